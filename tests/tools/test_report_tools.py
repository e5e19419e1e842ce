"""The pictures in docs/results hold the data of the report beside them, and the matrix of models and devices runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import report_pictures

from edgetrain.report import Report

TOOLS = Path(__file__).resolve().parents[2] / "tools"
RESULTS = report_pictures.RESULTS


def stored() -> Report:
    return Report.model_validate_json((RESULTS / "report.json").read_text())


def data_of(text: str) -> list[tuple[dict[str, str], str]]:
    """Facts of every part of a picture that has some, and its words: no coordinates, no colours."""
    parts = []
    for part in ElementTree.fromstring(text).iter():
        facts = {name: value for name, value in part.attrib.items() if name.startswith("data-")}
        if facts:
            parts.append((facts, " ".join("".join(part.itertext()).split())))
    return parts


@pytest.mark.parametrize("name", ["report_memory.svg", "report_front.svg"])
def test_pictures_hold_the_report_s_data(name: str) -> None:
    drawn = report_pictures.pictures_of(stored())[name]
    found = data_of((RESULTS / name).read_text(encoding="utf-8"))
    assert found == data_of(drawn)
    assert len(found) > 10


def test_the_stored_report_adds_up() -> None:
    report = stored()
    assert max(instant.total_bytes for instant in report.memory) == report.context_bytes + (report.reserved_bytes or 0)
    by_name = {point.name: point for point in report.marked}
    assert by_name["chosen"].peak_bytes == report.peak_bytes


@pytest.mark.slow
def test_the_stored_report_is_what_the_planner_says() -> None:
    fresh, kept = report_pictures.fresh_report(), stored()
    assert fresh.memory == kept.memory
    assert [(row.name, row.mode) for row in fresh.blocks] == [(row.name, row.mode) for row in kept.blocks]
    assert fresh.step_seconds == pytest.approx(kept.step_seconds, rel=1e-9)


@pytest.mark.slow
def test_models_on_devices() -> None:
    options = ["--models", "resnet20", "resnet32", "--devices", "gtx750", "tx2", "--workers", "1", "--json"]
    done = subprocess.run(
        [sys.executable, str(TOOLS / "memory_report.py"), *options], capture_output=True, text=True, check=True
    )
    rows = json.loads(done.stdout)["rows"]
    assert {(row["model"], row["device"]) for row in rows} == {
        (model, device) for model in ("resnet20", "resnet32") for device in ("gtx750", "tx2")
    }
    needed = {(row["model"], row["device"], row["mode"]): row["needed_bytes"] for row in rows}
    assert needed["resnet32", "gtx750", "keep_all"] > needed["resnet20", "gtx750", "keep_all"]
