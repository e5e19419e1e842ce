"""A module as an ONNX graph whose names a person recognises, with what to know about it in its metadata.

The graph writer is torch's older one: it is the one that reaches opset 13. It runs with ``TrainingMode.PRESERVE`` on a
module in evaluation mode, because in its own evaluation mode it fuses batch norms without saying so; what is folded is
what the fold's report says.

Names: a node is called after its module (``stage1/0/f/Conv``), a weight after its parameter (``stage1.0.f.weight``),
any other constant after the node and the input that take it (``head/Reshape.shape``), input and output ``images`` and
``logits``.
"""

from __future__ import annotations

import contextlib
import copy
import operator
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
from torch import Tensor, nn

from edgetrain.errors import ExportError, MissingExtraError
from edgetrain.export.classifier import PixelLinear, with_bias
from edgetrain.export.images import NETWORK

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto

    from edgetrain.export.fold import Plain

INPUT, OUTPUT = "images", "logits"


def write_graph(
    plain: Plain, sample: Tensor, path: Path, *, opset: int, batch_size: int | None, without_product: bool = False
) -> ModelProto:
    """A folded module on the CPU as a graph in ``path``.

    Args:
        sample: (n, c, h, w), to trace with.
        batch_size: fixed first dimension of input and output; None leaves it open.
        without_product: linear layers as convolutions.

    Raises:
        ExportError: the graph writer cannot express the module.
        MissingExtraError: onnx is not installed.
    """
    require_onnx()
    flat = flattened(plain, without_product=without_product)
    return write_module(flat, sample, path, opset=opset, batch_size=batch_size)


def write_module(
    module: nn.Module, sample: Tensor, path: Path, *, opset: int, batch_size: int | None, fold_constants: bool = True
) -> ModelProto:
    """A module on the CPU, in the mode it is in, as a graph in ``path``; arguments and errors as :func:`write_graph`.

    Args:
        fold_constants: compute once what depends on constants alone, weights among them.
    """
    import onnx

    dynamic = {INPUT: {0: "batch"}, OUTPUT: {0: "batch"}} if batch_size is None else None
    if batch_size is not None:
        sample = sample[:1].expand(batch_size, *sample.shape[1:]).contiguous()  # (batch_size, c, h, w)
    with warnings.catch_warnings(), torch.no_grad(), _quiet():
        # this graph writer is marked as deprecated, and it warns of every shape that the trace fixes
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                module,
                (sample,),
                str(path),
                dynamo=False,
                training=torch.onnx.TrainingMode.PRESERVE,
                opset_version=opset,
                do_constant_folding=fold_constants,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_axes=dynamic,
            )
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            raise ExportError(
                found=f"the network cannot be written as ONNX: {str(error).strip().splitlines()[0]}",
                expected=f"operators of opset {opset}",
                action="replace the layer, or name a device whose TensorRT reads a newer opset",
            ) from error
    graph = onnx.load(str(path))
    unshare(graph)
    rename(graph, kept={plain_name(name) for name in module.state_dict()})
    onnx.save(graph, str(path))
    return graph


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's print of the whole graph to stdout on an error, which its own switch does not turn off (2.13)."""
    log = torch._C._jit_onnx_log
    torch._C._jit_onnx_log = lambda *parts: None
    try:
        yield
    finally:
        torch._C._jit_onnx_log = log


def flattened(plain: Plain, *, without_product: bool = False) -> torch.fx.GraphModule:
    """``plain`` with every layer directly in the root, called after its whole path (``stage1/0/f``).

    The graph writer names a node after the last part of its module's path alone. Linear layers are written as
    :mod:`edgetrain.export.classifier` says.

    Args:
        without_product: write them as convolutions.
    """
    graph = copy.deepcopy(plain.graph)
    parts: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            layer = plain.get_submodule(node.target)
            if isinstance(layer, nn.Linear):
                layer = PixelLinear(layer) if without_product else with_bias(layer)
            node.target = node.target.replace(".", "/")
            parts[node.target] = layer
        elif node.op == "get_attr":
            parts[node.target] = operator.attrgetter(node.target)(plain)
    return torch.fx.GraphModule(parts, graph, class_name="Plain").eval()


def unshare(model: ModelProto) -> None:
    """Gives every parameter numbers of its own, in place.

    The writer keeps equal parameters once and copies them with Identity nodes; after a refit they may differ.
    """
    graph = model.graph
    constants = {initialiser.name: initialiser for initialiser in graph.initializer}
    outputs = {value.name for value in graph.output}
    for node in [node for node in graph.node if node.op_type == "Identity"]:
        if node.input[0] in constants and node.output[0] not in outputs:
            copied = graph.initializer.add()
            copied.CopyFrom(constants[node.input[0]])
            copied.name = node.output[0]
            constants[copied.name] = copied
            graph.node.remove(node)


def rename(model: ModelProto, kept: set[str]) -> None:
    """Gives nodes, values and constants of ``model`` their names, in place; ``kept`` are the names of parameters."""
    graph = model.graph
    names: dict[str, str] = {}
    taken = {value.name for value in [*graph.input, *graph.output]} | kept
    for node in graph.node:
        node.name = _place(node.name) or f"{node.op_type}_{len(names)}"
    roles = _roles(model)
    for initialiser in graph.initializer:
        plain = plain_name(initialiser.name)
        names[initialiser.name] = plain if plain in kept else _free(roles.get(initialiser.name, plain), taken)
    for node in graph.node:
        for k, output in enumerate(node.output):
            if output and output not in taken:
                names[output] = _free(node.name if k == 0 else f"{node.name}.{k}", taken)
    _apply(graph, names)


def plain_name(name: str) -> str:
    """A parameter's name in the training module: ``network/stem.weight`` -> ``stem.weight``."""
    return name.replace("/", ".").removeprefix(NETWORK)


def _place(name: str) -> str:
    """A node's name without the part around the network: ``/network/stem/Conv`` -> ``stem/Conv``."""
    return name.removeprefix("/").removeprefix(NETWORK.replace(".", "/"))


def _free(name: str, taken: set[str]) -> str:
    """``name``, or with a number behind it where another value has it."""
    free, k = name, 1
    while free in taken:
        free, k = f"{name}_{k}", k + 1
    taken.add(free)
    return free


def _roles(model: ModelProto) -> dict[str, str]:
    """Name of a constant by its first use: ``head/Reshape.shape``; operators' input names are those of the standard."""
    from onnx import defs

    opset = opset_of(model)
    roles: dict[str, str] = {}
    for node in model.graph.node:
        formal = [parameter.name for parameter in defs.get_schema(node.op_type, opset, node.domain).inputs]
        for k, name in enumerate(node.input):
            role = formal[k] if k < len(formal) else str(k)
            roles.setdefault(name, f"{node.name}.{role}")
    return roles


def _apply(graph: GraphProto, names: Mapping[str, str]) -> None:
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in [*graph.initializer, *graph.value_info]:
        value.name = names.get(value.name, value.name)


def opset_of(model: ModelProto) -> int:
    """Version of the standard operators in ``model``."""
    return next(int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def set_metadata(model: ModelProto, entries: Mapping[str, str]) -> None:
    """Writes ``entries`` into ``model``, in place of the ones it has."""
    from onnx import helper

    from edgetrain import __version__

    model.producer_name, model.producer_version = "edgetrain", __version__
    helper.set_model_props(model, dict(entries))


def require_onnx() -> None:
    """Raises MissingExtraError where onnx is not installed."""
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise missing("onnx") from error


def missing(package: str) -> MissingExtraError:
    """The error for a package that an export needs."""
    return MissingExtraError(
        found=f"the package {package} is not installed",
        expected="it for an export to ONNX",
        action=f"run pip install {package}",
    )
