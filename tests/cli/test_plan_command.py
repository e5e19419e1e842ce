"""``edgetrain plan``, and ``edgetrain train`` with a plan of its own and with one from a file."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from edgetrain.cli.main import run
from edgetrain.planner import Plan

SMALL = ["--num-classes", "10", "--input", "1x16x16", "--batch", "16", "--device", "rpi5-4gb"]
TRAIN = [
    "train",
    "--data",
    "digits",
    "--model",
    "resnet20",
    "--limit-train",
    "64",
    "--limit-test",
    "32",
    "--epochs",
    "1",
]


def test_plans_for_a_device_and_explains(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    assert run(["plan", "resnet20", *SMALL, "--budget", "12MiB", "--explain", "--out", str(file)]) == 0
    out = capsys.readouterr().out
    plan = Plan.from_json(file.read_text())
    assert plan.peak_bytes <= 12 * 2**20
    assert all(name in out for name in plan.program.names)
    assert plan.program.table() in out
    assert "rates of profile rpi5-4gb" in out


def test_prints_the_plan_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "resnet20", *SMALL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["costed"]["device"] == "rpi5-4gb"
    assert set(found["modes"]) == {"store"}


def test_checkpoints_wait_in_bfloat16_on_request(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    options = ["plan", "resnet20", *SMALL, "--budget", "6MiB", "--explain", "--out", str(file)]
    assert run(options) == 0
    assert "bfloat16" not in capsys.readouterr().out
    seconds = Plan.from_json(file.read_text()).step_seconds
    assert run([*options, "--stored-precision", "bf16"]) == 0
    out = capsys.readouterr().out
    assert "waits in bfloat16" in out
    assert "to bfloat16" in out
    plan = Plan.from_json(file.read_text())
    assert plan.peak_bytes <= 6.5 * 2**20
    assert plan.step_seconds < seconds
    assert run([*options, "--stored-precision", "bf16", "--precision", "bf16"]) == 2
    assert "--stored-precision" in capsys.readouterr().err


def test_an_infeasible_budget_names_the_least(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "resnet20", *SMALL, "--budget", "4MiB"]) == 5
    err = capsys.readouterr().err
    named = re.search(r"raise --budget to (\d+)MiB", err)
    assert named is not None, err
    assert run(["plan", "resnet20", *SMALL, "--budget", f"{named.group(1)}MiB"]) == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the cap needs Linux")
def test_trains_by_a_plan_of_its_own_within_the_budget(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run([*TRAIN, "--batch-size", "16", "--budget", "48MiB", "--json", "--quiet", "--out", str(out)]) == 0
    result = json.loads(capsys.readouterr().out)
    plan = Plan.from_json((out / "plan.json").read_text())
    assert result["peak_bytes"] <= 48 * 2**20
    assert result["predicted_step_seconds"] == plan.step_seconds
    assert plan.peak_bytes < 48 * 2**20


def test_trains_by_a_plan_from_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file, out = tmp_path / "plan.json", tmp_path / "run"
    assert run(["plan", "resnet20", *SMALL, "--budget", "12MiB", "--out", str(file)]) == 0
    assert run([*TRAIN, "--plan", str(file), "--quiet", "--out", str(out)]) == 0
    assert (out / "plan.json").read_text() == file.read_text()
    colours = tmp_path / "colours.json"
    assert run(["plan", "resnet20", "--num-classes", "10", *SMALL[4:], "--out", str(colours)]) == 0
    capsys.readouterr()
    assert run([*TRAIN, "--plan", str(colours), "--quiet", "--out", str(out)]) == 3
    assert "1 channels" in capsys.readouterr().err


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the cap needs Linux")
def test_steps_block_by_block_give_the_same_training(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    records = []
    for name, options in (("after", ["--mode", "keep_all"]), ("within", ["--update-in-backward"])):
        out = tmp_path / name
        assert run([*TRAIN, "--batch-size", "16", *options, "--json", "--quiet", "--out", str(out)]) == 0
        records.append(json.loads(capsys.readouterr().out)["history"][-1])
    assert records[0]["loss"] == pytest.approx(records[1]["loss"], rel=1e-4)
    text = (tmp_path / "within" / "plan.json").read_text()
    assert '"update"' in text
