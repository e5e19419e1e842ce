"""An order for an engine, and the builder's configuration that follows from it.

A builder with precision flags may compute an fp32 graph in half precision; one without takes every type from the graph,
so that graph and order have to agree. INT8 always needs a graph that quantises.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetrain.errors import ExportError
from edgetrain.export.engines.batch import Batch, add_batch
from edgetrain.export.engines.builders import Builder
from edgetrain.export.engines.device import Target
from edgetrain.export.engines.graph import Graph
from edgetrain.export.engines.limits import Limits, set_limits
from edgetrain.export.engines.parsing import is_typed
from edgetrain.export.engines.timing import TimingCache
from edgetrain.export.precision import Precision


@dataclass(frozen=True)
class Order:
    """All that a build was asked for."""

    graph: Graph
    engine: Path
    target: Target
    precision: Precision
    batch: Batch | None
    limits: Limits
    refit: bool
    timing: TimingCache


def check_precision(builder: Builder, order: Order) -> None:
    """Whether the graph gives an engine of the precision that was asked for.

    Raises:
        ExportError: it does not.
    """
    has, wanted = order.graph.precision, order.precision
    if has == wanted or (not is_typed(builder) and (has, wanted) == ("fp32", "fp16")):
        return
    raise ExportError(
        found=f"{order.graph.path.name} is an {has} graph, and the engine is to be {wanted}",
        expected=f"an {wanted} graph: {builder.name} {builder.version} takes the precision from it",
        action=f"export it with --precision {wanted} first, or build with precision={has!r}",
    )


def configuration(builder: Builder, trt_builder: Any, order: Order) -> tuple[Any, tuple[str, ...]]:
    """The builder's configuration of the order, and what a person should know of it."""
    trt = builder.module
    config = trt_builder.create_builder_config()
    notes = set_limits(trt, config, order.limits)
    if builder.capabilities:
        config.num_compute_capabilities = 1
        name = "SM{}{}".format(*order.target.capability)
        config.set_compute_capability(getattr(trt.ComputeCapability, name), 0)
    if not is_typed(builder) and order.precision != "fp32":
        config.set_flag(getattr(trt.BuilderFlag, order.precision.upper()))
    if order.precision == "fp32" and hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)
    if order.refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    if order.batch is not None:
        add_batch(trt_builder, config, order.graph, order.batch)
    order.timing.load(config)
    return config, (*notes, *order.timing.notes)
