"""Exports agree with PyTorch in a real session, or leave no file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from fold_networks import DataDependent
from onnx import numpy_helper
from torch import Tensor, nn

import edgetrain
from edgetrain.errors import ExportError, ModelError
from edgetrain.export.graph import write_graph


@pytest.mark.parametrize("name", ["hybrid18", "layerwise18", "revnet18", "resnet18", "resnet20"])
def test_trained_statistics_are_exported(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {"width": 8} if name in ("hybrid18", "layerwise18") else {}
    model = edgetrain.create_model(name, **options)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, 16, 16))
    images = torch.randn(5, 3, 16, 16)
    exported = edgetrain.export_onnx(model, tmp_path / "m.onnx", input_shape=(3, 16, 16), images=images)
    assert exported.images == 5
    assert exported.max_difference < 1e-5
    assert exported.top1_agreement == 1.0
    assert model.training
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.certificate.json", "m.onnx"]


def test_the_graph_takes_any_batch_size(tmp_path: Path) -> None:
    import onnxruntime

    model = edgetrain.create_model("hybrid18", width=8).eval()
    edgetrain.export_onnx(model, tmp_path / "m.onnx", input_shape=(3, 16, 16))
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    for n in (1, 3, 17):
        x = torch.randn(n, 3, 16, 16)
        (logits,) = session.run(None, {"images": x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(x), rtol=1e-3, atol=1e-4)


def test_a_graph_that_disagrees_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight of the graph is changed by a thousandth after it was written."""

    def wrong(*arguments: object, **options: object) -> onnx.ModelProto:
        graph = write_graph(*arguments, **options)
        weight = next(value for value in graph.graph.initializer if value.name == "stem.weight")
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.001), weight.name))
        onnx.save(graph, str(arguments[2]))
        return graph

    monkeypatch.setattr("edgetrain.export.onnx.write_graph", wrong)
    with pytest.raises(ExportError, match=r"fp32 ONNX in ONNX Runtime .* no file was written"):
        edgetrain.export_onnx(edgetrain.create_model("hybrid18", width=8), tmp_path / "m.onnx", input_shape=(3, 16, 16))
    assert list(tmp_path.iterdir()) == []


class Both(nn.Module):
    """Logits and features."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean((2, 3)), x


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (Both(), (3, 8, 8), "a network that gives tuple for 4 images"),
        (nn.Conv2d(3, 4, 3), (3, 8, 8), r"gives \(4, 4, 6, 6\) for 4 images.*logits"),
        (nn.Conv2d(1, 4, 3), (3, 8, 8), "fails on images of 3x8x8.*channels"),
        (edgetrain.create_model("revnet18"), (3, 12, 12), "even height and width"),
    ],
)
def test_a_network_that_classifies_no_images(
    model: nn.Module, shape: tuple[int, int, int], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        edgetrain.export_onnx(model, tmp_path / "m.onnx", input_shape=shape)
    assert list(tmp_path.iterdir()) == []


def test_a_decision_by_values_is_noted(tmp_path: Path) -> None:
    """The graph has one branch; that it is the right one for other images, nothing here can know."""
    torch.manual_seed(0)
    model = nn.Sequential(DataDependent(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    exported = edgetrain.export_onnx(model, tmp_path / "m.onnx", input_shape=(4, 8, 8))
    ((rule, node, reason),) = [(f.rule, f.node, f.reason) for f in exported.certificate.findings]
    assert (rule, node) == ("structure", "0")
    assert "is written as it ran once" in reason
    images = torch.cat([torch.rand(64, 4, 8, 8), torch.rand(64, 4, 8, 8) - 1])  # both branches, by batches of 64
    with pytest.raises(ExportError, match="differs from folded module"):
        edgetrain.export_onnx(model, tmp_path / "m.onnx", input_shape=(4, 8, 8), images=images)
