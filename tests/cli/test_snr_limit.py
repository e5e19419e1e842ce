"""``--snr-limit inf``: a run inside a cap that is, bit for bit, the one that keeps everything."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from edgetrain.chain import measure_noise
from edgetrain.cli.main import run
from edgetrain.memory.rates import INSTRUCTION_SECONDS, START_SECONDS, OperatorRates
from edgetrain.models import hybrid
from edgetrain.planner import Plan, Planner
from edgetrain.train.run_record import RunRecord

NETWORK = """
from edgetrain.models import hybrid

def exact(num_classes, in_channels):
    return hybrid(num_classes, in_channels=in_channels, width=8, exact=True)
"""
RATES = OperatorRates({1: 1e10}, 1e10, 5e9, START_SECONDS["cpu"], INSTRUCTION_SECONDS, "made up")
OPTIONS = [
    *("--model", "noiseless_network:exact", "--data", "digits", "--image-size", "16", "--batch-size", "64"),
    *("--limit-train", "192", "--limit-test", "64", "--epochs", "2", "--seed", "3", "--json", "--quiet"),
]


def trained(folder: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "edgetrain.cli.main", "train", *OPTIONS, *options]
    places = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, env=places, text=True, timeout=300, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("noiseless")
    (folder / "noiseless_network.py").write_text(NETWORK)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, Any]:
    return trained(folder, "--mode", "keep_all", "--out", str(folder / "whole"))


@pytest.fixture(scope="module")
def inverting(folder: Path) -> Plan:
    """The leanest plan without noise by made-up rates: measured ones differ between machines, and so do plans."""
    torch.manual_seed(0)
    model = hybrid(10, in_channels=1, width=8, exact=True)
    shape, batch = (1, 16, 16), 64
    noise = measure_noise(model, torch.randn(batch, *shape))
    planner = Planner(model, input_shape=shape, batch_size=batch, snr_limit=math.inf, times=RATES, noise=noise)
    plan = planner.plan(planner.least().peak_bytes)
    (folder / "inverting.json").write_text(plan.to_json())
    return plan


@pytest.mark.parametrize("choice", ["planned", "inverting"])
def test_an_exact_network_inside_a_cap_runs_as_without_one(
    folder: Path, whole: dict[str, Any], inverting: Plan, choice: str
) -> None:
    out = folder / choice
    options = ["--plan", str(folder / "inverting.json")] if choice == "inverting" else []
    capped = trained(folder, "--budget", "40MiB", "--snr-limit", "inf", *options, "--out", str(out))
    plan = json.loads((out / "plan.json").read_text())
    if choice == "inverting":
        assert plan["modes"] == list(inverting.modes)
        assert sum(mode.startswith("invert") for mode in inverting.modes) >= 3
    assert set(plan["snrs"]) == {None}
    assert capped["peak_bytes"] < whole["peak_bytes"]
    told = [[(e["loss"], e["accuracy"], e["test_accuracy"]) for e in one["history"]] for one in (whole, capped)]
    assert told[0] == told[1]
    record = RunRecord.read(out)
    assert record.training is not None
    assert record.training.snr_limit_or_infinity == float("inf")


@pytest.mark.parametrize("command", [["train"], ["finetune", "--from", "nowhere"]])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--snr-limit", "-1"], "Found: --snr-limit -1.0. Expected: a number above zero, or inf."),
        (["--snr-limit", "nan"], "--snr-limit nan"),
    ],
)
def test_what_is_no_limit(
    command: list[str], options: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run([*command, "--data", "digits", "--out", str(tmp_path), *options]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
