"""``edgetrain report`` on a model, a plan, a run, and two of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgetrain.cli.main import run
from edgetrain.planner import Plan
from edgetrain.report import Report

SMALL = ["--num-classes", "10", "--input", "1x16x16", "--batch", "16", "--device", "rpi5-4gb"]


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("plans")
    files = folder / "tight.json", folder / "wide.json"
    for file, budget in zip(files, ("7MiB", "40MiB"), strict=True):
        assert run(["plan", "resnet20", *SMALL, "--budget", budget, "--out", str(file)]) == 0
    return files


def test_a_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert run(["report", "resnet20", *SMALL, "--budget", "8MiB", "--json", "--html", str(page)]) == 0
    found = Report.model_validate_json(capsys.readouterr().out)
    assert found.peak_bytes is not None
    assert found.peak_bytes <= found.budget_bytes == 8 * 2**20
    assert max(instant.total_bytes for instant in found.memory) == found.peak_bytes
    assert {row.device for row in found.devices} >= {"gtx750", "orin-nano-8gb", "rpi5-4gb"}
    assert {missing.section for missing in found.missing} == {"run"}
    text = page.read_text()
    assert found.model_dump_json().replace("<", "\\u003c") in text


def test_a_plan_with_and_without_its_model(capsys: pytest.CaptureFixture[str], plans: tuple[Path, Path]) -> None:
    capsys.readouterr()
    assert run(["report", str(plans[0])]) == 0
    alone = capsys.readouterr().out
    assert "--model" in alone
    options = ["--model", "resnet20", "--num-classes", "10", "--no-devices", "--explain"]
    assert run(["report", str(plans[0]), *options]) == 0
    out = capsys.readouterr().out
    plan = Plan.from_json(plans[0].read_text())
    assert "kept activations" in out
    assert f"peak {plan.peak_bytes / 2**20:.1f} MiB" in out
    assert max(map(len, out.splitlines()[1:])) <= 80
    assert run(["report", str(plans[0]), "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("# ")


def test_two_plans(capsys: pytest.CaptureFixture[str], plans: tuple[Path, Path]) -> None:
    capsys.readouterr()
    assert run(["report", "--compare", *map(str, plans), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    peaks = [Plan.from_json(file.read_text()).peak_bytes for file in plans]
    assert [found["figures"][0][key] for key in ("name", "first", "second")] == ["peak", *peaks]
    assert found["blocks"]
    assert run(["report", "--compare", *map(str, plans)]) == 0
    assert "What it costs" in capsys.readouterr().out


def test_a_run_knows_its_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = ["--data", "digits", "--limit-train", "64", "--limit-test", "32", "--batch-size", "32", "--epochs", "1"]
    options = ["--model", "resnet20", "--mode", "keep_all", "--quiet", "--json", "--out", str(tmp_path)]
    assert run(["train", *data, *options]) == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert run(["report", str(tmp_path), "--no-devices", "--json"]) == 0
    found = Report.model_validate_json(capsys.readouterr().out)
    assert found.epochs[0].loss == result["history"][0]["loss"]
    assert found.memory
    process = next(level for level in found.levels if level.name == "simulated process")
    assert process.found == result["peak_bytes"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["a.json", "--compare", "a.json", "b.json"],
        ["a.json"],
        ["resnet20", "--json", "--markdown"],
        ["no-such-model"],
    ],
)
def test_what_cannot_be_reported_on_is_said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", *arguments]) == 2
    assert "Expected:" in capsys.readouterr().err
