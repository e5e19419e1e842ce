"""The batch sizes an engine takes: smallest, usual and largest, and the shapes that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgetrain.errors import ExportError, UsageError
from edgetrain.export.engines.graph import Graph, TensorInfo

DEFAULT = 1
"""Where nobody says otherwise: what a device classifies is one image."""


@dataclass(frozen=True)
class Batch:
    """Samples at once: TensorRT tunes for ``usual`` and takes any number from ``smallest`` to ``largest``."""

    smallest: int
    usual: int
    largest: int


def batch_for(graph: Graph, wanted: int | tuple[int, int, int] | None) -> Batch | None:
    """The batch sizes of an engine of ``graph``; None: the graph's own shapes are fixed.

    Args:
        wanted: n: from 1 to n samples, tuned for n; three numbers: smallest, usual, largest; None: one sample, or
            what the graph is fixed to.

    Raises:
        UsageError: they are not in order, or not above zero.
        ExportError: the graph is fixed to another batch, or leaves more open than the batch.
    """
    for tensor in graph.inputs:
        if not tensor.shape or any(isinstance(size, str) for size in tensor.shape[1:]):
            raise ExportError(
                found=f"input {tensor.name} of {graph.path.name} has shape {tensor.shape}",
                expected="sizes that are fixed but for the batch, which comes first",
                action="export it again with one input shape",
            )
    sizes = wanted if isinstance(wanted, tuple) else (1, wanted or DEFAULT, wanted or DEFAULT)
    if not (len(sizes) == 3 and 0 < sizes[0] <= sizes[1] <= sizes[2]) or (isinstance(wanted, int) and wanted <= 0):
        raise UsageError(
            found=f"batch {wanted}",
            expected="a number above zero, or smallest <= usual <= largest",
            action="pass for instance batch=8 or batch=(1, 8, 32)",
        )
    batch = Batch(*sizes)
    fixed = [tensor for tensor in graph.inputs if isinstance(tensor.shape[0], int)]
    if len(fixed) < len(graph.inputs):
        return batch
    if wanted is not None and any(tensor.shape[0] != size for tensor in fixed for size in (batch.usual, batch.largest)):
        raise ExportError(
            found=f"batch {wanted}, but {graph.path.name} is fixed to a batch of {fixed[0].shape[0]}",
            expected="the same, or a graph that leaves the batch open",
            action="export it again without a batch size, or leave out the batch here",
        )
    return None


def shape_at(tensor: TensorInfo, samples: int) -> tuple[int, ...]:
    """Shape of ``tensor`` with ``samples`` where the batch is open."""
    return tuple(samples if isinstance(size, str) else size for size in tensor.shape)


def add_batch(builder: Any, config: Any, graph: Graph, batch: Batch) -> None:
    """Gives the builder's configuration an optimisation profile with these batch sizes."""
    profile = builder.create_optimization_profile()
    for tensor in graph.inputs:
        if any(isinstance(size, str) for size in tensor.shape):
            shapes = [shape_at(tensor, samples) for samples in (batch.smallest, batch.usual, batch.largest)]
            profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)
