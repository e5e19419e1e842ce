"""``--snr-limit inf``: a run inside a cap that is, bit for bit, the one that keeps everything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgetrain.cli.main import run
from edgetrain.train.run_record import RunRecord

NETWORK = """
from edgetrain.models import hybrid

def exact(num_classes, in_channels):
    return hybrid(num_classes, in_channels=in_channels, width=8, exact=True)
"""
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


def test_an_exact_network_is_inverted_inside_a_cap_and_the_run_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "noiseless_network.py").write_text(NETWORK)
    whole = trained(tmp_path, "--mode", "keep_all", "--out", str(tmp_path / "whole"))
    options = ("--budget", "40MiB", "--snr-limit", "inf")
    capped = trained(tmp_path, *options, "--out", str(tmp_path / "capped"))
    plan = json.loads((tmp_path / "capped" / "plan.json").read_text())
    assert any(mode.startswith("invert") for mode in plan["modes"])
    assert set(plan["snrs"]) == {None}
    assert capped["peak_bytes"] < whole["peak_bytes"]
    told = [[(e["loss"], e["accuracy"], e["test_accuracy"]) for e in one["history"]] for one in (whole, capped)]
    assert told[0] == told[1]
    record = RunRecord.read(tmp_path / "capped")
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
