"""float16 and INT8 graphs: what TensorRT's builder needs of them, and what they cost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from small_network import small_network

import edgetrain
from edgetrain.errors import ExportError, UsageError
from edgetrain.export.verify import BOUNDS

IMAGES = torch.rand((40, 3, 8, 8), generator=torch.Generator().manual_seed(2))


def exported(path: Path, precision: str, **options: object) -> tuple[edgetrain.export.Export, onnx.GraphProto]:
    export = edgetrain.export_onnx(
        small_network(), path / "m.onnx", input_shape=(3, 8, 8), images=IMAGES, precision=precision, **options
    )
    return export, onnx.load(str(export.path)).graph


@pytest.mark.parametrize("device", ["nano-4gb", "orin-nano-8gb"])
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_each_form_is_compared_with_the_one_before(precision: str, device: str, tmp_path: Path):
    export, graph = exported(tmp_path, precision, device=device)
    steps = [(step.before, step.after, step.evaluator, step.bound) for step in export.certificate.steps]
    assert steps[2:] == [
        ("folded module", "fp32 ONNX", "ONNX reference evaluator", 1e-5),
        ("fp32 ONNX", f"{precision} ONNX", "ONNX Runtime", BOUNDS[precision]),
        ("fp32 ONNX", f"{precision} ONNX", "ONNX reference evaluator", BOUNDS[precision]),
        ("training module", "ONNX", "ONNX Runtime", BOUNDS[precision]),
    ]
    assert export.max_difference > 1e-5  # it is another precision
    types = [value.type.tensor_type.elem_type for value in [*graph.input, *graph.output]]
    assert types == [TensorProto.FLOAT, TensorProto.FLOAT]
    assert export.certificate.findings == ()


def test_float16_holds_every_weight_in_half_the_bytes(tmp_path: Path):
    _, graph = exported(tmp_path, "fp16")
    weights = {value.name: value for value in graph.initializer}
    state = edgetrain.fold(small_network()).state_dict()
    for name in ("stem.weight", "body.0.weight", "classifier.weight"):
        half = numpy_helper.to_array(weights[name])
        assert half.dtype == np.float16
        np.testing.assert_array_equal(half, state[name].numpy().astype(np.float16))


def test_int8_is_symmetric_per_channel_and_leaves_biases_alone(tmp_path: Path):
    export, graph = exported(tmp_path, "int8")
    held = {value.name: numpy_helper.to_array(value) for value in graph.initializer}
    nodes = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert nodes
    assert all(not held[node.input[2]].any() for node in nodes)
    state = edgetrain.fold(small_network()).state_dict()
    for name in ("stem.weight", "body.0.weight"):
        stored, scale = held[f"{name}_quantized"], held[f"{name}_scale"]
        weight = state[name].numpy()
        # symmetric: the largest weight of an output channel is 127 steps
        np.testing.assert_allclose(scale, np.abs(weight).max((1, 2, 3)) / 127, rtol=1e-5)
        assert (stored.dtype, scale.shape) == (np.int8, (8,))
        assert np.abs(stored * scale[:, None, None, None] - weight).max() <= scale.max() * 0.501
        assert held[name.replace("weight", "bias")].dtype == np.float32
    mapped = {entry.initialiser for entry in export.certificate.refit}
    assert {"stem.weight_quantized", "stem.bias"} <= mapped


def test_int8_is_calibrated_on_the_images_given(tmp_path: Path):
    """Symmetric scale of the input: its largest value over 127."""
    _, graph = exported(tmp_path, "int8", calibration=IMAGES * 3)
    held = {value.name: numpy_helper.to_array(value) for value in graph.initializer}
    assert held["images_scale"] == pytest.approx(3 * float(IMAGES.max()) / 127, rel=1e-5)


def test_int8_of_a_fixed_batch(tmp_path: Path):
    export, graph = exported(tmp_path, "int8", batch_size=7)
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_value == 7
    assert export.images == 40


def test_too_much_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(BOUNDS, "fp16", 1e-6)
    with pytest.raises(ExportError, match="fp16 ONNX in ONNX Runtime differs from fp32 ONNX"):
        exported(tmp_path, "fp16")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_precision(tmp_path: Path):
    with pytest.raises(UsageError, match="one of fp32, fp16, int8"):
        exported(tmp_path, "fp8")
