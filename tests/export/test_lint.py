"""Each rule of the lint on a hand-made graph that breaks it, and on one that does not."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgetrain.errors import ExportError
from edgetrain.export.lint import Finding, lint, refuse_errors
from edgetrain.export.tensorrt_operators import known_operators, parse_version
from edgetrain.profiles import load_profile

NANO = load_profile("nano-4gb")  # JetPack 4: TensorRT 8.2.1, opset 13
ORIN = load_profile("orin-nano-8gb")  # JetPack 7: TensorRT 10.16


def graph(*nodes: onnx.NodeProto, opset: int = 13, rank: int = 4, **constants: np.ndarray) -> onnx.ModelProto:
    """A graph from ``images`` (1, 2, 4, 4) to ``logits`` of ``rank`` unnamed dimensions."""
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 2, 4, 4])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [None] * rank)
    initialisers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    made = helper.make_graph(list(nodes), "made by hand", [images], [logits], initialisers)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def node(kind: str, inputs: str, output: str = "logits", **attributes: object) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), [output], name=f"{kind} here", **attributes)


def rules(findings: tuple[Finding, ...]) -> list[tuple[str, str, str]]:
    return [(finding.rule, finding.severity, finding.node) for finding in findings]


def test_a_convolution_passes_everywhere():
    plain = graph(node("Conv", "images w"), w=np.zeros((3, 2, 3, 3), np.float32))
    for profile in (None, NANO, ORIN, load_profile("rpi5-8gb")):
        assert lint(plain, profile) == ()


def test_a_shape_is_no_surprise():
    shapes = graph(
        node("Shape", "images", "size"),
        node("Gather", "size first", "n"),
        node("Concat", "n rest", "target", axis=0),
        node("Reshape", "images target"),
        rank=2,
        first=np.array([0]),
        rest=np.array([-1]),
    )
    assert lint(shapes, NANO) == ()


def test_numbers_in_64_bits_are_found():
    cast = graph(
        node("Cast", "images", "wide", to=TensorProto.INT64),
        node("Add", "wide one", "more"),
        node("Cast", "more", to=TensorProto.FLOAT),
        one=np.array([1]),
    )
    names = ["Add here", "one", "Cast here"]
    assert rules(lint(cast, NANO)) == [("int64", "error", name) for name in names]  # TensorRT 8.2 narrows it
    assert rules(lint(cast, ORIN)) == rules(lint(cast)) == [("int64", "note", name) for name in names]
    double = graph(
        node("Cast", "images", "wide", to=TensorProto.DOUBLE),
        node("Cast", "wide", to=TensorProto.FLOAT),
    )
    (found,) = lint(double)
    assert "float64" in found.reason


def test_an_operator_that_the_parser_lacks():
    swish = graph(node("HardSwish", "images"), opset=14)
    assert rules(lint(swish, NANO)) == [("opset", "error", ""), ("operator", "error", "HardSwish here")]
    assert lint(swish, load_profile("xavier-nx")) == ()  # TensorRT 8.5 has it
    with pytest.raises(ExportError, match=r"HardSwish here: TensorRT 8\.2\.1 does not parse HardSwish"):
        refuse_errors(lint(swish, NANO))


def test_sequences_are_refused_by_every_tensorrt():
    split = graph(
        node("SplitToSequence", "images", "parts", axis=1),
        node("SequenceAt", "parts zero"),
        zero=np.array(0),
    )
    for profile in (NANO, ORIN):
        kinds = [finding.node for finding in lint(split, profile) if finding.rule == "operator"]
        assert kinds == ["SplitToSequence here", "SequenceAt here"]


def test_an_operator_of_nobody_s_standard():
    own = graph(node("Relu", "images", "x"), helper.make_node("Gelu", ["x"], ["logits"], name="own", domain="mine"))
    own.opset_import.append(helper.make_opsetid("mine", 1))
    assert ("operator", "error", "own") in rules(lint(own, ORIN))


def test_batch_norm_in_training_mode():
    two = np.ones(2, np.float32)
    norm = graph(
        helper.make_node(
            "BatchNormalization",
            ["images", "a", "b", "c", "d"],
            ["logits", "mean", "var"],
            name="norm",
            training_mode=1,
        ),
        opset=15,
        a=two,
        b=two,
        c=two,
        d=two,
    )
    assert rules(lint(norm)) == [("batch norm", "error", "norm")]
    still = graph(node("BatchNormalization", "images a b c d"), opset=15, a=two, b=two, c=two, d=two)
    assert lint(still) == ()


def test_quantisation_that_the_builder_refuses():
    def quantised(zero: int) -> onnx.ModelProto:
        return graph(
            node("QuantizeLinear", "images s z", "q"),
            node("DequantizeLinear", "q s z"),
            s=np.array(0.1, np.float32),
            z=np.array(zero, np.int8),
        )

    assert rules(lint(quantised(3))) == [
        ("zero point", "error", "QuantizeLinear here"),
        ("zero point", "error", "DequantizeLinear here"),
    ]
    assert lint(quantised(0)) == ()
    bias = graph(
        node("DequantizeLinear", "b s z", "bias"),
        node("Conv", "images w bias"),
        b=np.ones(3, np.int32),
        s=np.array(0.1, np.float32),
        z=np.array(0, np.int32),
        w=np.zeros((3, 2, 3, 3), np.float32),
    )
    assert rules(lint(bias)) == [("bias", "error", "DequantizeLinear here")]


def test_notes_do_not_stop_an_export():
    padded = graph(node("Conv", "images w", auto_pad="SAME_UPPER"), w=np.zeros((3, 2, 3, 3), np.float32))
    findings = lint(padded)
    assert rules(findings) == [("auto_pad", "note", "Conv here")]
    refuse_errors(findings)


def test_a_float32_product_on_compute_capability_7_5():
    flat = graph(node("Flatten", "images", "flat"), node("Gemm", "flat w"), rank=2, w=np.zeros((32, 3), np.float32))
    capability = ORIN.compute_capability
    assert capability is not None
    turing = ORIN.model_copy(update={"compute_capability": capability.model_copy(update={"value": 7.5})})
    assert rules(lint(flat, turing)) == [("gemm", "note", "Gemm here")]
    assert lint(flat, ORIN) == ()


def test_a_graph_that_breaks_the_standard():
    sizes = graph(node("Add", "images w"), w=np.zeros(3, np.float32))  # 3 columns for 4
    loose = graph(node("Relu", "nothing"))
    for broken in (sizes, loose):
        assert rules(lint(broken)) == [("standard", "error", "")]


def test_versions():
    assert parse_version("8.2.1") == (8, 2)
    assert parse_version("10.16.2") == (10, 16)
    assert parse_version("unknown") == (0, 0)
    older, newer, newest = (known_operators(version) for version in ((8, 2), (8, 6), (10, 16)))
    assert older < newer < newest
    assert newer - older == {
        "GridSample", "HardSwish", "MeanVarianceNormalization", "Mod", "NonZero", "OneHot", "Reciprocal", "RoiAlign",
        "Shrink", "Trilu",
    }  # fmt: skip
    # operators.md of TensorRT 10.15 marks these as not supported
    assert not newest & {"SplitToSequence", "SequenceAt", "QLinearConv", "ConvInteger", "MaxUnpool", "Det", "Unique"}
