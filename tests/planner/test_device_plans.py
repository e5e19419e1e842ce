"""Plans for devices are what they were: a change shows here, and ``tools/device_plans.py --write`` accepts it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

from device_plans import CASES, FOLDER, Case, text_of  # noqa: E402


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_same_plan_as_before(case: Case) -> None:
    assert text_of(case) == (FOLDER / f"{case.name}.txt").read_text()
