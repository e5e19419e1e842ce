"""The folded inference model of a step's state, which a device without PyTorch can bring up to date.

The folds (:mod:`edgetrain.export.fold`) run once on tensors without data, and what they compute is written down like
the step itself: a graph ``fold.onnx`` from the state to the folded weights, in float64 as the folds have it. No second
description of them exists that could differ from the first. ``inference.onnx`` is the folded network, its weights raw
bytes in the file at known places: new weights are put there, and nothing else of the file changes.

What is folded must not depend on values: a batch norm whose shift happens to be zero would leave a convolution without
its bias. So the network is written with random numbers in the place of its weights, and then given those of the
state. That also proves the graph of the folds: a weight that it forgets stays random.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from edgetrain.chain.fakes import fake_mode
from edgetrain.errors import ExportError
from edgetrain.export.evaluation import logits_of, rounding_of
from edgetrain.export.fold import Plain, copied, fold
from edgetrain.export.graph import plain_name, write_graph
from edgetrain.export.images import NORMALISE, ImageSet, Normalisation, as_image_set, with_normalisation
from edgetrain.export.proof import GRAPH, TRAINED, Proof
from edgetrain.export.train_step.graph import Graph
from edgetrain.export.train_step.record import StepGraph, fake_network, saying_where
from edgetrain.export.train_step.recorder import Recorder, dtype_of
from edgetrain.export.verify import RUNTIME, open_session, run_session
from edgetrain.nn.slices import whole_batch

FOLDED = "folded."
"""What the names of folded weights begin with."""
_GRAPH, _INITIALISER, _NAME, _RAW = 7, 5, 8, 9  # of ModelProto, GraphProto and TensorProto in onnx.proto


@dataclass(frozen=True)
class Inference:
    """A folded network and how its weights follow from the state.

    Attributes:
        model: the file, with the weights of the state that it was made from.
        folding: the graph from the state to the folded weights; its outputs are ``folded.`` and their names.
        offsets: where the bytes of each begin in the file.
        bound: how far the logits may be from those of the network that is not folded, relative to the largest.
    """

    model: bytes
    folding: StepGraph
    offsets: dict[str, int]
    bound: float


def make_inference(
    model: nn.Module, shape: tuple[int, int, int], normalisation: Normalisation, *, opset: int, folder: Path
) -> Inference:
    """The folded form of ``model`` for pixels (n, c, h, w) on the scale 0..1; ``model`` is left as it is.

    Args:
        shape: (c, h, w).
        folder: for files on the way.

    Raises:
        ExportError: what the folds do depends on the values of weights, or has no counterpart in ONNX.
    """
    model = copied(model).cpu().eval()
    whole, images = with_normalisation(model, normalisation), as_image_set(None, shape)
    path = folder / "inference.onnx"
    graph = write_graph(fold(_randomised(whole)), images.pixels[:2], path, opset=opset, batch_size=None)
    folding = record_folding(whole, {initialiser.name for initialiser in graph.graph.initializer}, opset=opset)
    every = raw_offsets(path.read_bytes())
    inference = Inference(b"", folding, {name: every[name] for name in _names(folding)}, 0.0)
    weights = _folded(folding, whole, folder)
    path.write_bytes(updated(path.read_bytes(), weights, inference.offsets))
    bound = _proved(path, whole, images)
    return Inference(path.read_bytes(), folding, inference.offsets, bound)


def record_folding(whole: nn.Module, held: set[str], *, opset: int) -> StepGraph:
    """The graph of what the folds compute for the initialisers ``held``.

    Args:
        whole: the network behind its normalisation, whose numbers are constants.
    """
    graph, fake = Graph(opset), fake_network(whole, torch.float32)
    recorder, reads = Recorder(graph), []
    known = {f"model.{name}": value.numpy() for name, value in whole.state_dict().items() if name.startswith(NORMALISE)}
    fake.model.eval()
    with torch.random.fork_rng(devices=[]), fake_mode(), whole_batch(), torch.no_grad():
        for name, tensor in fake.names.items():
            kind, _, path = name.partition(".")
            if path.startswith(NORMALISE):
                recorder.bind(tensor.detach(), graph.constant(known[name]))
                continue
            own = f"{kind}.{plain_name(path)}"
            reads.append(own)
            recorder.bind(tensor.detach(), graph.input(own, tensor.shape, dtype_of(tensor)))
        with recorder, saying_where(recorder), recorder.doing("the folds"):
            plain = fold(fake.model)
        for name, tensor in _trained(plain):
            value = recorder.known(tensor.detach())
            if name in held and value is not None:
                graph.output(FOLDED + name, value)
    return StepGraph(graph, tuple(reads), ())


def raw_offsets(file: bytes) -> dict[str, int]:
    """Where the raw bytes of each initialiser begin in an ONNX file; those with typed numbers are left out.

    Protocol buffers' wire format: a field is a varint ``number << 3 | type``; type 2 is a length and as many bytes.
    """
    found = {}
    for start, stop in _fields(file, 0, len(file), _GRAPH):
        for first, last in _fields(file, start, stop, _INITIALISER):
            names = [file[a:b].decode() for a, b in _fields(file, first, last, _NAME)]
            raw = [a for a, _ in _fields(file, first, last, _RAW)]
            if names and raw:
                found[names[0]] = raw[0]
    return found


def updated(file: bytes, weights: Mapping[str, npt.NDArray[Any]], offsets: Mapping[str, int]) -> bytes:
    """``file`` with ``weights`` at their places."""
    new = bytearray(file)
    for name, offset in offsets.items():
        data = weights[name].tobytes()
        new[offset : offset + len(data)] = data
    return bytes(new)


def _trained(plain: Plain) -> Iterator[tuple[str, Tensor]]:
    """What of ``plain`` follows from the state, under the names that the graph has."""
    held = dict(plain.named_parameters()) | dict(plain.named_buffers())
    for name, tensor in held.items():
        if any(not origin.startswith(NORMALISE) for origin in plain.origins[name]):
            yield plain_name(name), tensor


def _names(folding: StepGraph) -> list[str]:
    return [name.removeprefix(FOLDED) for name in folding.graph.output_names]


@torch.no_grad()
def _randomised(whole: nn.Module) -> nn.Module:
    """A copy with positive random numbers in the place of weights and statistics, those of the normalisation apart."""
    other, random = copied(whole), torch.Generator().manual_seed(0)
    for name, tensor in (*other.named_parameters(), *other.named_buffers()):
        if tensor.is_floating_point() and not name.startswith(NORMALISE):
            spread = math.sqrt(tensor[0].numel()) if tensor.dim() > 1 else 1.0
            tensor.copy_((torch.rand(tensor.shape, generator=random) + 0.5) / spread)
    return other


def _folded(folding: StepGraph, whole: nn.Module, folder: Path) -> dict[str, npt.NDArray[Any]]:
    """The folded weights of ``whole``, by the graph."""
    path = folder / "fold.onnx"
    path.write_bytes(folding.graph.model("fold").SerializeToString())
    session = open_session(path)
    held = whole.state_dict() | dict(whole.named_buffers())
    state = {plain_name(name): value.detach().numpy() for name, value in held.items()}
    given = {i.name: state[i.name.partition(".")[2]] for i in session.get_inputs()}
    found = session.run(None, given)
    return dict(zip(_names(folding), found, strict=True))


def _proved(path: Path, whole: nn.Module, images: ImageSet) -> float:
    """Checks the updated file against the network that it is of; gives the bound that held."""
    trained = logits_of(whole, images.pixels)
    proof = Proof(images, partial(rounding_of, whole, images.pixels, trained))
    logits = run_session(open_session(path), images.pixels.numpy())
    if not np.isfinite(logits).all():
        raise ExportError(
            found="a network whose logits are no numbers", expected="a trained network", action="train it again"
        )
    proof.step(trained, logits, before=TRAINED, after=GRAPH, evaluator=RUNTIME, precision="fp32")
    return proof.comparisons[-1].bound


def _fields(file: bytes, start: int, stop: int, wanted: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each field ``wanted`` of the message in ``start`` to ``stop`` that is a row of bytes."""
    while start < stop:
        key, start = _varint(file, start)
        number, kind = key >> 3, key & 7
        if kind == 2:
            length, start = _varint(file, start)
            if number == wanted:
                yield start, start + length
            start += length
        elif kind == 0:
            _, start = _varint(file, start)
        else:
            start += {1: 8, 5: 4}[kind]


def _varint(file: bytes, start: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = file[start]
        value, shift, start = value | (byte & 127) << shift, shift + 7, start + 1
        if byte < 128:
            return value, start
