"""Waiting: on a file, on a temperature with hysteresis, and not longer than anybody wants."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from edgetrain.errors import UsageError
from edgetrain.train import Throttle, throttle


def test_hysteresis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throttle, "_READ_SECONDS", 0.0)
    readings: list[float | None] = [60.0, 80.0, 80.1, 78.0, 75.1, 75.0, 79.0, 81.0, None, 79.0]
    now: list[float | None] = [20.0]
    limited = Throttle(max_celsius=80.0, read_celsius=lambda: now[0])
    waits = []
    for reading in readings:
        now[0] = reading
        waits.append(limited.reason() is not None)
    # above 80 it waits, down to 75; what cannot be read does not make it wait
    assert waits == [False, False, True, True, True, False, False, True, False, False]


def test_says_why_and_until_when() -> None:
    reason = Throttle(max_celsius=80.0, read_celsius=lambda: 85.25).reason()
    assert reason == "85.2 °C is above 80 °C, goes on at 75 °C"


def test_a_limit_without_a_sensor() -> None:
    with pytest.raises(UsageError, match="no thermal zone"):
        Throttle(max_celsius=80.0, read_celsius=lambda: None)


def test_waits_while_the_file_exists_and_tells(tmp_path: Path) -> None:
    file = tmp_path / "pause"
    file.touch()
    told: list[str | None] = []
    polls = [0]

    def stopped() -> bool:
        polls[0] += 1
        if polls[0] == 2:
            file.unlink()
        return False

    waiting = Throttle(pause_file=file)
    assert waiting.wait(stopped=stopped, tell=told.append) > 0.2
    assert told == [f"{file} exists", None]
    assert waiting.wait(stopped=stopped, tell=told.append) == 0.0
    assert len(told) == 2


def test_a_signal_ends_the_wait(tmp_path: Path) -> None:
    began = time.monotonic()
    Throttle(pause_file=tmp_path).wait(stopped=lambda: True, tell=lambda reason: None)
    assert time.monotonic() - began < 1.0


def test_zones_of_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for k, text in enumerate(["45000\n", "61500\n", "-256000\n", "off\n"]):
        (tmp_path / f"thermal_zone{k}").mkdir()
        (tmp_path / f"thermal_zone{k}" / "temp").write_text(text)
    monkeypatch.setattr(throttle, "_ZONES", str(tmp_path))
    monkeypatch.setattr("psutil.sensors_temperatures", dict, raising=False)
    assert throttle.hottest_celsius() == 61.5
