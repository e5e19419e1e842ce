"""What would go wrong with a graph on the device, found before it is sent there.

Each rule is a function that yields findings with a reason; an ``error`` stops the export, a ``note`` stands in the
certificate. The rules: onnx's full checker and strict shape inference; the opset and operators of the target's
TensorRT; no int64 outside shapes (before version 10 the parser narrows it to 32 bits); no batch norm in training mode;
scales without a zero point and biases without a scale where the graph is quantised (the parser refuses both);
``auto_pad`` written out (ONNX Runtime's training gets its gradients wrong); no float32 Gemm on compute capability 7.5,
where TensorRT-RTX has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from edgetrain.errors import ExportError
from edgetrain.export.classifier import WITHOUT_PRODUCT
from edgetrain.export.graph import opset_of
from edgetrain.export.tensorrt_operators import known_operators, parse_version

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

    from edgetrain.profiles import Profile

# operator -> positions of its inputs that describe shapes or places, which ONNX fixes to int64 or an index type
_SHAPE_INPUTS = {
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "Pad": (1, 3),
    "Reshape": (1,),
    "Resize": (3,),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Unsqueeze": (1,),
    **{f"Reduce{kind}": (1,) for kind in ("L1", "L2", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare", "LogSumExp")},
    **{kind: (1,) for kind in ("Gather", "GatherElements", "GatherND", "ScatterElements", "ScatterND")},
}
_INT64_SINCE = (10, 0)  # operators.md of TensorRT 10: INT64 is a type of its own


@dataclass(frozen=True)
class Finding:
    """What a rule found.

    Attributes:
        rule: its short name.
        severity: ``error`` where the device cannot run the graph, else ``note``.
        node: the node or value; empty for the whole graph.
        reason: what is wrong with it.
    """

    rule: str
    severity: Literal["error", "note"]
    node: str
    reason: str


def lint(model: ModelProto, profile: Profile | None = None) -> tuple[Finding, ...]:
    """All findings about ``model``; those about TensorRT only where ``profile`` names its version."""
    broken = tuple(_standard(model))
    if broken:
        return broken  # the other rules read types that only a whole graph has
    rules: tuple[Callable[[ModelProto, Profile | None], Iterator[Finding]], ...] = (
        _parser,
        _int64,
        _batch_norm,
        _quantisation,
        _auto_pad,
        _gemm,
    )
    return tuple(finding for rule in rules for finding in rule(model, profile))


def refuse_errors(
    findings: Iterable[Finding],
    *,
    expected: str = "a graph that the device runs",
    action: str = "replace the layers named, or export for another --device",
) -> None:
    """Raises ExportError where one of ``findings`` is an error; names the first ones."""
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        shown = "; ".join(f"{finding.node or 'graph'}: {finding.reason}" for finding in errors[:4])
        raise ExportError(
            found=f"{len(errors)} finding(s) in the graph: {shown}",
            expected=expected,
            action=action,
        )


def _standard(model: ModelProto) -> Iterator[Finding]:
    import onnx

    try:
        onnx.checker.check_model(model, full_check=True)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        yield Finding("standard", "error", "", str(error).strip().splitlines()[0])


def _parser(model: ModelProto, profile: Profile | None) -> Iterator[Finding]:
    if profile is None or profile.software.tensorrt is None:
        return
    text = profile.software.tensorrt.value
    known, limit, opset = known_operators(parse_version(text)), profile.onnx_opset, opset_of(model)
    if limit is not None and opset > limit:
        yield Finding("opset", "error", "", f"opset {opset}, TensorRT {text} reads up to {limit}")
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx"):
            yield Finding("operator", "error", node.name, f"{node.domain}.{node.op_type} is none of ONNX's operators")
        elif node.op_type not in known:
            yield Finding("operator", "error", node.name, f"TensorRT {text} does not parse {node.op_type}")


def _int64(model: ModelProto, profile: Profile | None) -> Iterator[Finding]:
    """A value belongs to a shape or an index if every use of it does, directly or through other int64 values."""
    import onnx

    wide = {onnx.TensorProto.INT64: "int64", onnx.TensorProto.DOUBLE: "float64"}
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {value.name: value.type.tensor_type.elem_type for value in [*graph.value_info, *graph.output]}
    types |= {initialiser.name: initialiser.data_type for initialiser in graph.initializer}
    data: set[str] = {value.name for value in graph.output}  # values with a use that is no shape
    for node in reversed(graph.node):
        computes_shape = types.get(node.output[0]) in wide and not data.intersection(node.output)
        if not computes_shape:
            shapes = _SHAPE_INPUTS.get(node.op_type, ())
            data.update(name for k, name in enumerate(node.input) if name and k not in shapes)
    tensorrt = None if profile is None else profile.software.tensorrt
    narrow = tensorrt is not None and parse_version(tensorrt.value) < _INT64_SINCE
    made_by = {output: node.name for node in graph.node for output in node.output}
    for name in sorted(data):
        if types.get(name) in wide:
            reason = f"{wide[types[name]]} outside of a shape or an index"
            yield Finding("int64", "error" if narrow else "note", made_by.get(name, name), reason)


def _batch_norm(model: ModelProto, profile: Profile | None) -> Iterator[Finding]:
    for node in nodes_of(model, "BatchNormalization"):
        if attribute_of(node, "training_mode") or len([name for name in node.output if name]) > 1:
            yield Finding("batch norm", "error", node.name, "batch normalisation in training mode")


def _quantisation(model: ModelProto, profile: Profile | None) -> Iterator[Finding]:
    import onnx

    constants = {value.name: value for value in model.graph.initializer}
    for node in [*nodes_of(model, "QuantizeLinear"), *nodes_of(model, "DequantizeLinear")]:
        zero = constants.get(node.input[2]) if len(node.input) > 2 else None
        if zero is not None and np.any(onnx.numpy_helper.to_array(zero)):
            yield Finding("zero point", "error", node.name, "a zero point other than zero: scales must be symmetric")
        source = constants.get(node.input[0])
        if source is not None and source.data_type == onnx.TensorProto.INT32:
            yield Finding("bias", "error", node.name, "a quantised bias")


def _auto_pad(model: ModelProto, profile: Profile | None) -> Iterator[Finding]:
    for node in model.graph.node:
        if attribute_of(node, "auto_pad") not in (None, b"NOTSET"):
            reason = "padding left to the reader (auto_pad): ONNX Runtime's training gets its gradients wrong"
            yield Finding("auto_pad", "note", node.name, reason)


def _gemm(model: ModelProto, profile: Profile | None) -> Iterator[Finding]:
    import onnx

    if profile is None or profile.compute_capability_pair != WITHOUT_PRODUCT:
        return
    constants = {value.name: value.data_type for value in model.graph.initializer}
    for node in [*nodes_of(model, "Gemm"), *nodes_of(model, "MatMul")]:
        if constants.get(node.input[1]) == onnx.TensorProto.FLOAT:
            reason = "TensorRT-RTX has no float32 matrix product for compute capability 7.5; a 1x1 convolution has one"
            yield Finding("gemm", "note", node.name, reason)


def nodes_of(model: ModelProto, kind: str) -> list[NodeProto]:
    """The nodes of operator ``kind``."""
    return [node for node in model.graph.node if node.op_type == kind]


def attribute_of(node: NodeProto, name: str) -> object:
    """Value of an attribute; None where the node has none of that name."""
    from onnx import helper

    return next((helper.get_attribute_value(entry) for entry in node.attribute if entry.name == name), None)
