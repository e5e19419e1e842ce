"""``edgetrain train --live`` on terminals that are none: a target made here says what is held, and the chart must."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import edgetrain.cli.progress
from edgetrain.cli.live import COLUMNS, MARGIN, READINGS_PER_SECOND, ROWS, WIDTH, LiveView
from edgetrain.cli.main import run
from edgetrain.cli.progress import TrainingProgress, training_display
from edgetrain.train import StepRecord
from edgetrain.units import MIB

RECORD = StepRecord(epoch=2, epochs=3, step=10, steps=30, loss=1.2345, accuracy=0.5, images_per_second=113.4)
EIGHTHS = " ▁▂▃▄▅▆▇█"


class Memory:
    """A target that holds what it is told."""

    def __init__(self) -> None:
        self.held_bytes = 0
        self.most_bytes = 0

    def hold(self, size_bytes: int) -> None:
        self.held_bytes, self.most_bytes = size_bytes, max(self.most_bytes, size_bytes)

    def readings(self) -> dict[str, int]:
        return {"process": self.held_bytes, "allocator": self.held_bytes // 2}

    def peak_bytes(self) -> int:
        return self.most_bytes


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=WIDTH, height=25, color_system=None)


def drawn(view: LiveView) -> list[str]:
    """The lines of the next picture, as a terminal of 80 columns shows them."""
    console = terminal()
    console.print(view.draw())
    return console.file.getvalue().splitlines()


def height(lines: list[str], column: int) -> int:
    """Eighths of a row that the bar of a column is high; nothing may lie above a cell that is not full."""
    cells = [EIGHTHS.index(line.ljust(WIDTH)[MARGIN + column]) for line in reversed(lines[3 : 3 + ROWS])]
    full = sum(cell == 8 for cell in cells)
    assert cells[:full] == [8] * full
    assert not any(cells[full + 1 :])
    return sum(cells)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What rich makes of the variables of whoever runs the tests is not tested."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


@pytest.fixture
def memory() -> Memory:
    return Memory()


def test_bars_are_as_high_as_the_part_of_the_budget_that_is_held(memory: Memory) -> None:
    budget_mib, held_mib = 64, [0, 1, 17, 32, 63, 64]
    view = LiveView(budget_bytes=budget_mib * MIB, console=terminal())
    with view.watch(memory):
        for size in held_mib:
            memory.hold(size * MIB)
            lines = drawn(view)
    assert [height(lines, COLUMNS - len(held_mib) + k) for k in range(len(held_mib))] == held_mib  # 8 rows of 8 eighths
    assert height(lines, 0) == 0
    assert lines[2].startswith("     64 MiB")
    assert "budget 64.0 MiB" in lines[2]
    assert lines[3 + ROWS].startswith("allocator")
    assert lines[3 + ROWS].endswith(EIGHTHS[4])  # half of the budget
    assert lines[4 + ROWS].split() == ["32.0", "MiB"]


def test_the_peak_is_the_target_s_even_where_no_reading_saw_it(memory: Memory) -> None:
    view = LiveView(budget_bytes=100 * MIB, console=terminal())
    with view.watch(memory):
        memory.hold(75 * MIB)
        memory.hold(20 * MIB)
        assert drawn(view)[1] == "process 20.0 MiB, peak 75.0 MiB (75% of 100.0 MiB)"
        memory.hold(80 * MIB)
    memory.hold(500 * MIB)  # a trial after the run
    assert drawn(view)[1] == "process 80.0 MiB, peak 80.0 MiB (80% of 100.0 MiB)"


@pytest.mark.parametrize(
    ("budget_bytes", "label"),
    [(None, "peak 10.0 MiB"), (400 * MIB, "peak 10.0 MiB"), (40 * MIB, "budget 40.0 MiB")],
    ids=["no budget", "a budget far above", "a budget"],
)
def test_a_budget_is_the_top_unless_it_would_flatten_the_chart(
    memory: Memory, budget_bytes: int | None, label: str
) -> None:
    view = LiveView(budget_bytes=budget_bytes, console=terminal())
    with view.watch(memory):
        memory.hold(10 * MIB)
        lines = drawn(view)
    assert label in lines[2]
    assert height(lines, COLUMNS - 1) == (64 if label.startswith("peak") else 16)


def test_lines_fit_80_columns_and_bars_stay_in_the_chart(memory: Memory) -> None:
    view = LiveView(budget_bytes=8 * MIB, console=terminal(), clock=iter(range(0, 10**6, 360)).__next__)
    with view.watch(memory):
        for _ in range(2 * COLUMNS):
            memory.hold(10**5 * MIB)  # beyond the budget
            view.on_step(RECORD)
            lines = drawn(view)
    assert max(map(len, lines)) == WIDTH
    assert [height(lines, column) for column in range(COLUMNS)] == [8 * ROWS] * COLUMNS
    assert len(lines) == 3 + ROWS + 2


def test_time_left_is_that_of_the_steps_left_at_the_pace_so_far(memory: Memory) -> None:
    now = [100.0]
    view = LiveView(budget_bytes=None, console=terminal(), clock=lambda: now[0])
    assert drawn(view) == ["before the first step", "memory: not counted yet"]
    with view.watch(memory):
        view.on_step(replace(RECORD, epoch=1, step=1))
        now[0] += 4000
        view.on_step(RECORD)  # 40 of 90 steps: 5000 s are left
        line = drawn(view)[0]
    assert line == "epoch 2/3 step 10/30 loss 1.234 acc 50.0% 113 img/s left 1:23:20"


def test_time_left_of_a_resumed_run_goes_by_the_steps_that_it_has_done_itself(memory: Memory) -> None:
    now = [100.0]
    view = LiveView(budget_bytes=None, console=terminal(), clock=lambda: now[0])
    with view.watch(memory):
        now[0] += 100
        view.on_step(RECORD)  # its first, the 40th of 90
        view.on_wait("zone 0 is at 90 °C")
        assert drawn(view)[0] == "waiting: zone 0 is at 90 °C"
        view.on_wait(None)
        line = drawn(view)[0]
    assert line.endswith("left 1:23:20")


def test_a_terminal_without_unicode_gets_plain_letters(memory: Memory) -> None:
    text = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    view = LiveView(budget_bytes=64 * MIB, console=Console(file=text, force_terminal=True, width=WIDTH))
    with view.watch(memory):
        memory.hold(40 * MIB)
        lines = drawn(view)
    assert "\n".join(lines).isascii()
    assert lines[2 + ROWS].endswith("#")


def test_it_reads_four_times_a_second_and_not_at_each_step(memory: Memory) -> None:
    console, reads = terminal(), []
    read: Callable[[], dict[str, int]] = memory.readings
    memory.readings = lambda: reads.append(1) or read()  # type: ignore[method-assign]
    started = time.monotonic()
    with LiveView(budget_bytes=MIB, console=console) as view, view.watch(memory):
        for _ in range(10_000):
            view.on_step(RECORD)
    assert 1 <= len(reads) <= 2 + READINGS_PER_SECOND * (time.monotonic() - started)
    assert "epoch 2/3" in console.file.getvalue()


def test_quiet_and_live_contradict_each_other(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["train", "--data", "digits", "--live", "--quiet", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert all(part in " ".join(error.split()) for part in ("--live with --quiet", "one of them", "leave --quiet out"))


@pytest.mark.parametrize(("is_terminal", "term"), [(False, "xterm"), (True, "dumb"), (True, "xterm")])
def test_where_stderr_cannot_be_drawn_on_the_plain_progress_stays(
    is_terminal: bool, term: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", term)
    console = Console(file=io.StringIO(), force_terminal=is_terminal)
    monkeypatch.setattr(edgetrain.cli.progress, "Console", lambda stderr: console)
    expected = LiveView if (is_terminal, term) == (True, "xterm") else TrainingProgress
    assert isinstance(training_display(budget_bytes=None, quiet=False, live=True), expected)
    assert isinstance(training_display(budget_bytes=None, quiet=False, live=False), TrainingProgress)


def test_a_run_shows_the_peak_that_it_records(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = terminal()
    monkeypatch.setattr(edgetrain.cli.progress, "Console", lambda stderr: console)
    options = "train --data digits --limit-train 64 --limit-test 32 --batch-size 32 --epochs 1 --mode keep_all --json"
    assert run([*options.split(), "--model", "resnet20", "--live", "--out", str(tmp_path)]) == 0
    result = json.loads(capsys.readouterr().out)
    last = console.file.getvalue().rpartition("epoch 1/1 step 2/2")[2].splitlines()
    shown_mib = float(last[1].partition("peak ")[2].split()[0])
    assert shown_mib == pytest.approx(result["peak_bytes"] / MIB, abs=1)  # read a moment later than the record
