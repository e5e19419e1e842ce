"""What ONNX Runtime's training cannot derive a gradient for, or derives a wrong one, found before anything is written.

On the way from a trained parameter to the output:

- every operator has a gradient and a CPU kernel for it (:data:`GRADIENTS`, asked of onnxruntime-training 1.19.2; a test
  asks again);
- Split with an output that nobody reads: the gradients of the others come out wrong, without a word;
- convolutions with ``auto_pad``: with SAME_UPPER their gradients come out wrong, without a word.

And in the whole graph: opset 21 and IR version 10 at most, and no batch norm by running statistics, which would become
one by those of the batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from edgetrain.export.graph import opset_of
from edgetrain.export.lint import Finding, attribute_of, nodes_of

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

NEWEST_OPSET, NEWEST_IR = 21, 10

# fmt: off
GRADIENTS = frozenset([
    "Abs", "Add", "AveragePool", "BatchNormalization", "Cast", "Clip", "Concat", "Conv", "Cos", "Div", "Erf", "Exp",
    "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Gelu", "Gemm", "GlobalAveragePool", "Identity",
    "LeakyRelu", "Log", "LogSoftmax", "MatMul", "Max", "MaxPool", "Min", "Mul", "Neg", "Pad", "Pow", "Reciprocal",
    "ReduceL2", "ReduceLogSumExp", "ReduceMean", "ReduceSum", "Relu", "Reshape", "ScatterElements", "ScatterND",
    "Sigmoid", "Sin", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "Tile", "TopK", "Transpose",
    "Trilu", "Unsqueeze", "Where",
])
# fmt: on
"""Operators with a gradient on the CPU in onnxruntime-training 1.19.2. Dropout has one, but a graph with random numbers
cannot be compared with PyTorch."""

_ENDS = frozenset(["Shape", "Size", "ArgMax", "ArgMin", "Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual"])
"""What they give is no function with a slope: no gradient is asked of them."""


def lint_training(model: ModelProto, trained: Collection[str]) -> tuple[Finding, ...]:
    """All findings about a forward graph whose initialisers ``trained`` are to be trained."""
    return (*_graph(model), *(f for node in trained_path(model, trained) for f in _node(node, model)))


def trained_path(model: ModelProto, trained: Collection[str]) -> list[NodeProto]:
    """The nodes between a parameter of ``trained`` and an output of the graph, in the graph's order."""
    depends, below = set(trained), []
    for node in model.graph.node:
        if node.op_type not in _ENDS and depends.intersection(node.input):
            depends.update(filter(None, node.output))
            below.append(node)
    needed, path = {value.name for value in model.graph.output}, []
    for node in reversed(below):
        if needed.intersection(node.output):
            needed.update(node.input)
            path.append(node)
    return path[::-1]


def _graph(model: ModelProto) -> Iterator[Finding]:
    if opset_of(model) > NEWEST_OPSET:
        reason = f"opset {opset_of(model)}, onnxruntime-training reads up to {NEWEST_OPSET}"
        yield Finding("opset", "error", "", reason)
    if model.ir_version > NEWEST_IR:
        reason = f"IR version {model.ir_version}, onnxruntime-training reads up to {NEWEST_IR}"
        yield Finding("ir", "error", "", reason)
    for node in nodes_of(model, "BatchNormalization"):
        if not attribute_of(node, "training_mode"):
            reason = "batch normalisation by running statistics: training would take those of the batch"
            yield Finding("batch norm", "error", node.name, reason)


def _node(node: NodeProto, model: ModelProto) -> Iterator[Finding]:
    kind = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
    if kind not in GRADIENTS:
        reason = f"onnxruntime-training has no gradient for {kind} on the CPU"
        yield Finding("gradient", "error", node.name, reason)
    elif kind == "Split" and (unread := _unread(node, model)):
        reason = f"Split with {unread} output(s) that nobody reads: the gradients of the others come out wrong"
        yield Finding("split", "error", node.name, reason)
    elif attribute_of(node, "auto_pad") not in (None, b"NOTSET", b"VALID"):
        reason = "padding left to the reader (auto_pad): its gradients come out wrong"
        yield Finding("auto_pad", "error", node.name, reason)


def _unread(split: NodeProto, model: ModelProto) -> int:
    """How many outputs of ``split`` nobody reads."""
    read = Counter(name for node in model.graph.node for name in node.input)
    read.update(value.name for value in model.graph.output)
    return sum(not read[name] for name in split.output)
