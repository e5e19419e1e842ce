"""Linear layers as the graph holds them, and the one chip that takes no matrix product."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from small_network import small_network

import edgetrain
from edgetrain.export.classifier import PixelLinear, with_bias

TURING = """
name = "turing"
description = "a card of compute capability 7.5"
kind = "cuda"
unified = false
extends = "cuda"
[compute_capability]
value = 7.5
unit = "major.minor"
assumption = true
note = "of this test"
[memory]
value = 8
unit = "GiB"
assumption = true
note = "of this test"
"""


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 6), (5, 4, 6)])
def test_the_same_numbers(bias: bool, shape: tuple[int, ...]):
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(6, 3, bias=bias).double(), torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        for form in (with_bias(linear), PixelLinear(linear)):
            torch.testing.assert_close(form(x), linear(x), rtol=1e-12, atol=1e-12)


def test_a_classifier_without_a_bias_keeps_its_weight(tmp_path: Path):
    model = small_network()
    model.classifier = torch.nn.Linear(8, 4, bias=False)
    edgetrain.export_onnx(model, tmp_path / "m.onnx", input_shape=(3, 8, 8))
    graph = onnx.load(str(tmp_path / "m.onnx")).graph
    held = {value.name: numpy_helper.to_array(value) for value in graph.initializer}
    torch.testing.assert_close(torch.from_numpy(held["classifier.weight"].copy()), model.classifier.weight.detach())
    assert not held["classifier.bias"].any()
    assert "MatMul" not in {node.op_type for node in graph.node}


def test_compute_capability_7_5_gets_a_convolution(tmp_path: Path):
    (tmp_path / "turing.toml").write_text(TURING)
    device = str(tmp_path / "turing.toml")
    export = edgetrain.export_onnx(small_network(), tmp_path / "m.onnx", input_shape=(3, 8, 8), device=device)
    graph = onnx.load(str(export.path)).graph
    assert "classifier/Conv" in [node.name for node in graph.node]
    assert not {"Gemm", "MatMul"} & {node.op_type for node in graph.node}
    assert export.certificate.findings == ()
    assert "classifier.weight" in {entry.initialiser for entry in export.certificate.refit}
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'edgetrain[tensorrt]'")
    report = edgetrain.build_engine(export.path, tmp_path / "m.engine", device=device)
    assert report.compute_capability == (7, 5)
    assert report.engine_bytes > 0
