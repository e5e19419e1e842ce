"""Comparisons by hand, both evaluators against PyTorch, and the newest ONNX Runtime in an environment of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_network import small_network

import edgetrain
from edgetrain.errors import ExportError
from edgetrain.export.verify import check, compare, open_session, run_session

BEFORE = np.array([[4.0, -2.0], [1.0, 2.0]], np.float32)
NAMES = {"before": "a", "after": "b", "evaluator": "c"}


def test_differences_are_relative_to_the_largest_logit():
    after = BEFORE + np.array([[0.0, 0.4], [1.2, 0.0]], np.float32)  # the second image changes its class
    comparison = compare(BEFORE, after, **NAMES, bound=0.5, labels=np.array([0, 1]))
    assert comparison.max_difference == pytest.approx(1.2 / 4)
    assert comparison.mean_difference == pytest.approx((0.4 + 1.2) / 4 / 4)
    assert comparison.top1_agreement == 0.5
    assert (comparison.accuracy_before, comparison.accuracy_after) == (1.0, 0.5)
    assert check(comparison) is comparison


@pytest.mark.parametrize("wrong", [0.1, float("nan"), float("inf")])
def test_what_does_not_agree_is_refused(wrong: float):
    with pytest.raises(ExportError, match=r"differs from a by .* expected at most 1e-05 on 2 images"):
        check(compare(BEFORE, BEFORE + np.float32(wrong), **NAMES, bound=1e-5))


def test_an_export_that_fails_leaves_the_old_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "m.onnx"
    edgetrain.export_onnx(small_network(), path, input_shape=(3, 8, 8))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def wrong(model: torch.nn.Module) -> torch.nn.Module:
        plain = edgetrain.fold(model)
        plain.get_parameter("stem.weight").mul_(1 + 1e-3)
        return plain

    monkeypatch.setattr("edgetrain.export.onnx.fold", wrong)
    with pytest.raises(ExportError, match="folded module in PyTorch differs from training module"):
        edgetrain.export_onnx(small_network(), path, input_shape=(3, 8, 8))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_the_model_is_left_as_it_was(tmp_path: Path):
    model = small_network().train()
    model.norm.eval()  # a frozen part of a network that trains
    state = {name: value.clone() for name, value in model.state_dict().items()}
    edgetrain.export_onnx(model, tmp_path / "m.onnx", input_shape=(3, 8, 8))
    assert model.training
    assert not model.norm.training
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def cancelling(factor: float) -> torch.nn.Sequential:
    """A network that subtracts two nearly equal numbers, and so shows the rounding of float32 times ``factor``."""
    torch.manual_seed(4)
    wide = torch.nn.Conv2d(3, 8, 3, padding=1)
    with torch.no_grad():
        wide.bias.add_(factor)
    norm = torch.nn.BatchNorm2d(8)
    norm.running_mean.fill_(factor)
    return torch.nn.Sequential(wide, norm, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 4))


def test_a_network_that_rounds_more_is_held_to_its_own_rounding(tmp_path: Path):
    """PyTorch's float32 is itself further than 1e-5 from float64; the bound is four times that, and says so."""
    model, images = cancelling(1e4).eval(), torch.rand(16, 3, 8, 8)
    with torch.no_grad():
        single, exact = model(images), cancelling(1e4).double().eval()(images.double())
    rounding = float((single - exact).abs().max() / exact.abs().max())
    assert rounding > 1e-5
    export = edgetrain.export_onnx(model, tmp_path / "m.onnx", input_shape=(3, 8, 8), images=images)
    first = export.certificate.steps[0]
    assert 1e-5 < first.max_difference <= first.bound
    assert first.bound == pytest.approx(4 * rounding, rel=1e-3)


def test_a_damaged_graph(tmp_path: Path):
    (tmp_path / "m.onnx").write_bytes(b"no graph")
    with pytest.raises(ExportError, match=r"ONNX Runtime .* refuses"):
        open_session(tmp_path / "m.onnx")


ELSEWHERE = """
import json, sys
import numpy as np, onnxruntime
logits = {}
for path in sys.argv[2:]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (value,) = session.run(["logits"], {"images": np.load(sys.argv[1])})
    logits[path] = value.tolist()
print(json.dumps({"version": onnxruntime.__version__, "logits": logits}))
"""


@pytest.mark.slow
def test_the_newest_onnx_runtime_agrees(tmp_path: Path):
    """Plain onnxruntime shares a module with the training wheel of this environment, so it gets one of its own."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True, timeout=300)
    python = str(tmp_path / "venv" / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--upgrade", "onnxruntime", "numpy"]
    subprocess.run(install, check=True, timeout=900)
    images = torch.rand((8, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "images.npy", images.numpy())
    torch.manual_seed(0)
    models = {"hybrid18": {"width": 8}, "revnet18": {}, "resnet20": {}}
    expected = {}
    for name, options in models.items():
        model = edgetrain.create_model(name, **options)
        with torch.no_grad():
            for _ in range(3):
                model(torch.rand(16, 3, 16, 16))
        for device in ("nano-4gb", "orin-nano-8gb"):
            path = tmp_path / f"{name}-{device}.onnx"
            edgetrain.export_onnx(model, path, input_shape=(3, 16, 16), images=images, device=device)
            expected[str(path)] = run_session(open_session(path), images.numpy())
    ran = subprocess.run(
        [python, "-c", ELSEWHERE, str(tmp_path / "images.npy"), *expected], capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, ran.stderr
    answer = json.loads(ran.stdout)
    print("onnxruntime", answer["version"])
    for path, logits in expected.items():
        difference = np.abs(np.array(answer["logits"][path]) - logits).max() / np.abs(logits).max()
        assert difference <= 1e-5, path
