"""From an ONNX graph to TensorRT's network, with errors that name the node, and the names that its weights get.

The parser gives a weight the name of its ONNX initialiser (``INetworkDefinition::setWeightsName``). Which initialisers
became weights of the network is asked, not assumed: ``mark_weights_refittable(NAME)`` says no to a name that the
network does not have (TensorRT 10 and later). Shapes and other constants are no weights.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from edgetrain.errors import ExportError, MissingExtraError
from edgetrain.export.engines.builders import Builder, cuda_capability, installed_builders
from edgetrain.export.engines.graph import Graph, read_graph
from edgetrain.export.engines.log import BuildLog, build_log, last_errors


def network_of(builder: Builder, trt_builder: Any, graph: Graph, log: BuildLog, *, typed: bool) -> tuple[Any, Any]:
    """The network and the parser that made it; the parser owns what the network refers to and must outlive it.

    Args:
        typed: every tensor keeps the type that the graph gives it.

    Raises:
        ExportError: the parser refuses the graph; the message names node and operator.
    """
    trt = builder.module
    flags = getattr(trt, "NetworkDefinitionCreationFlag", None)
    # releases before 10 know networks without a batch dimension, too, and take them where nobody objects
    names = ["EXPLICIT_BATCH"] if _has_implicit_batch(trt) else []
    names += ["STRONGLY_TYPED"] if typed else []
    network = trt_builder.create_network(sum(1 << int(getattr(flags, name)) for name in names if hasattr(flags, name)))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph.path)):
        raise ExportError(
            found=f"{builder.name} {builder.version} does not read {graph.path.name}: "
            + _parser_errors(parser, graph, log),
            expected="a graph of operators that it parses",
            action="export with the opset of the device's profile (edgetrain export --device), or change that layer",
        )
    return network, parser


def engine_weight_names(onnx_path: str | Path, *, builder: str | None = None) -> dict[str, str]:
    """By ONNX initialiser, the name of the engine's weight that holds it; other initialisers are left out.

    Args:
        builder: ``tensorrt`` or ``tensorrt_rtx``; None: one that reads graphs here.

    Raises:
        UsageError: ``builder`` is none.
        ExportError: the graph is not read.
        MissingExtraError: no builder that reads graphs here is installed.
    """
    for chosen in installed_builders(builder):
        if chosen.capabilities or cuda_capability() is not None:
            return weight_names(chosen, read_graph(onnx_path))
    raise MissingExtraError(
        found="no TensorRT that reads a graph here is installed",
        expected="tensorrt_rtx, or tensorrt beside a CUDA device",
        action="run pip install 'edgetrain[tensorrt]'",
    )


def weight_names(builder: Builder, graph: Graph) -> dict[str, str]:
    """The initialisers of ``graph`` that become weights, each by the name it has in TensorRT's network.

    A network of its own is parsed for it: marking weights, which is how they are asked for, would change a build.

    Raises:
        ExportError: the parser refuses the graph.
    """
    log = build_log(builder.module)
    network, _parser = network_of(builder, builder.module.Builder(log), graph, log, typed=is_typed(builder))
    if not hasattr(network, "mark_weights_refittable"):
        return {}
    return {name: name for name in graph.weight_names if network.mark_weights_refittable(name)}


def is_typed(builder: Builder) -> bool:
    """Whether it has no precision flags and takes every type from the graph."""
    return not hasattr(builder.module.BuilderFlag, "FP16")


def _has_implicit_batch(trt: ModuleType) -> bool:
    return hasattr(trt.Builder, "max_batch_size")


def _parser_errors(parser: Any, graph: Graph, log: BuildLog) -> str:
    texts = []
    for position in range(parser.num_errors):
        error = parser.get_error(position)
        index = error.node()
        text = error.desc()
        if 0 <= index < len(graph.nodes):
            node = graph.nodes[index]
            text = f"node {node.name} ({node.operator}): {text}"
        texts.append(text)
    return "; ".join(dict.fromkeys(texts)) or last_errors(log)
