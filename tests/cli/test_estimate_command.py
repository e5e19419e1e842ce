"""``edgetrain estimate``, as a person and as a script read it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edgetrain.cli.main import run

MODELS = """
import torch
def net(num_classes=5):
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
                               torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, num_classes))
"""
OWN = ["estimate", "estimate_models:net", "--batch", "8"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "estimate_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "estimate_models", raising=False)


@pytest.mark.parametrize("arguments", [OWN, ["estimate", "resnet20", "--batch", "4"], [*OWN, "--mode", "recompute"]])
def test_table(arguments: list[str], capfd: pytest.CaptureFixture[str]):
    assert run([*arguments, "--device", "gtx750"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert re.search(r"^total +\d+\.\d MiB", out, re.MULTILINE)
    assert re.search(r"^available +400\.0 MiB", out, re.MULTILINE)
    assert out.endswith("It fits.\n")


@pytest.mark.parametrize("more", [[], ["--measure"], ["--device", "gtx750", "--max-batch"]])
def test_json_is_one_document(more: list[str], capfd: pytest.CaptureFixture[str]):
    assert run([*OWN, *more, "--json"]) == 0
    out, err = capfd.readouterr()
    document = json.loads(out)
    assert err == ""
    assert document["process_peak_bytes"] == sum(line["bytes"] for line in document["lines"])
    assert document["fits"] is True
    assert document["batch_size"] > 8 if "--max-batch" in more else document["batch_size"] == 8


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ("--input 3x", 2, "3x224x224"),
        ("--input 0x8x8", 2, "above zero"),
        ("--device gtx75", 2, "gtx750"),
        ("--precision fp8", 2, "fp32"),
        ("--optimizer sdg", 2, "sgd"),
        ("--mode invertt", 2, "invert_layerwise"),
        ("--batch 0", 2, "--batch"),
        ("--measure --mode invert", 2, "--mode"),
        ("--input 1x8x8", 3, "--input"),
        ("--device gtx750 --max-batch --input 3x9000x9000", 5, "one sample"),
    ],
)
def test_wrong_argument(arguments: str, code: int, said: str, capfd: pytest.CaptureFixture[str]):
    assert run([*OWN, *arguments.split()]) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert re.fullmatch(r"edgetrain: Found: .+ Expected: .+ To do: .+[.?]\n", err), err
    assert said in err


def test_fresh_process():
    done = subprocess.run(
        [sys.executable, "-m", "edgetrain.cli.main", *OWN, "--json"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == "estimate_models:net"


def test_a_device_without_pytorch_is_named(capfd: pytest.CaptureFixture[str]):
    assert run([*OWN, "--device", "nano-4gb"]) == 0
    assert "PyTorch does not train there (exported-step)" in capfd.readouterr().out
