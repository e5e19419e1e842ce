"""``edgetrain train --live``: memory against the budget over time, with loss, accuracy, images/s and time left.

The view reads the target four times a second from the thread that draws, so that a step costs one assignment and
what is shown is the inside of steps, not only their ends. A reading may miss a peak; the figure beside it does not, as
the kernel or the allocator keeps it.
"""

from __future__ import annotations

import textwrap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from edgetrain.targets import Target
from edgetrain.train import Callback, MemoryEvent, StepRecord
from edgetrain.units import MIB, format_mib

READINGS_PER_SECOND = 4
WIDTH, MARGIN, ROWS = 80, 11, 8
COLUMNS = WIDTH - MARGIN
"""Readings that the chart shows: the last 17 seconds."""
DRAWN_BUDGET = 4
"""A budget of more than so many peaks is written and not drawn, as in a report."""
_BLOCKS, _LINE = " ▁▂▃▄▅▆▇█", "╌"
_ASCII_BLOCKS, _ASCII_LINE = "  ..::||#", "-"


class LiveView(Callback):
    """Draws on ``console`` while it is entered.

    Args:
        budget_bytes: the line in the chart, None for no cap.
        clock: seconds, for the time left.
    """

    def __init__(
        self, *, budget_bytes: int | None, console: Console, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._budget_bytes = budget_bytes
        self._clock = clock
        self._ascii = console.options.ascii_only
        self._readings: dict[str, deque[int]] = {}
        self._peak_bytes = 0
        self._target: Target | None = None
        self._record: StepRecord | None = None
        self._done_before = 0
        self._waiting: str | None = None
        self._news: str | None = None
        self._lock = threading.Lock()  # the thread that draws reads, and so does the end of a run
        self._started = clock()
        self._live = Live(console=console, get_renderable=self.draw, refresh_per_second=READINGS_PER_SECOND)

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    @contextmanager
    def watch(self, target: Target) -> Iterator[Sequence[Callback]]:
        """Reads ``target`` while it is entered; what trials take before and after is not the run's. Gives itself."""
        self._started, self._target = self._clock(), target
        try:
            yield (self,)
        finally:
            with self._lock:
                self._target = None
                self._read(target)

    def on_step(self, record: StepRecord) -> None:
        """Keeps the record for the next drawing."""
        if self._record is None:  # a resumed run has done steps before
            self._done_before = _done(record) - 1
        self._record = record

    def on_wait(self, reason: str | None) -> None:
        """Says that the run waits."""
        self._waiting = reason

    def on_memory(self, event: MemoryEvent) -> None:
        """Says that the plan is another now."""
        self._news = memory_news(event)

    def on_warning(self, text: str) -> None:
        """Shows ``text`` until there is other news."""
        self._news = text

    def draw(self) -> Group:
        """Takes a reading where a target is watched, and gives the picture: lines of at most 80 characters."""
        with self._lock:
            if self._target is not None:
                self._read(self._target)
            return Group(*(Text(line, style=style, no_wrap=True) for line, style in self._lines()))

    def _read(self, target: Target) -> None:
        for name, size_bytes in target.readings().items():
            self._readings.setdefault(name, deque(maxlen=COLUMNS)).append(max(size_bytes, 0))
        self._peak_bytes = target.peak_bytes()

    def _lines(self) -> Iterator[tuple[str, str]]:
        yield self._progress(), "bold"
        if self._news is not None:
            for line in textwrap.wrap(self._news, WIDTH):
                yield line, "red"
        if not self._readings:
            yield "memory: not counted yet", ""
            return
        (counted, history), *others = self._readings.items()
        budget = self._budget_bytes
        share = "" if budget is None else f" ({self._peak_bytes / budget:.0%} of {format_mib(budget)})"
        yield f"{counted} {format_mib(history[-1])}, peak {format_mib(self._peak_bytes)}{share}", ""
        drawn = budget is not None and budget <= DRAWN_BUDGET * max(self._peak_bytes, 1)
        top_bytes = max(budget if budget is not None and drawn else self._peak_bytes, 1)
        line = _ASCII_LINE if self._ascii else _LINE
        label = f" {'budget' if drawn else 'peak'} {format_mib(top_bytes)} "
        yield f"{top_bytes / MIB:>7.0f} MiB" + label.center(COLUMNS, line), "yellow"
        for row in reversed(range(ROWS)):
            yield f"{'0' if row == 0 else '':>7}    " + self._bars(history, top_bytes, row), "cyan"
        for name, values in others:
            yield f"{name[: MARGIN - 1]:<{MARGIN}}" + self._bars(values, top_bytes, 0, rows=1), "blue"
            yield f"{'':{MARGIN}}{format_mib(values[-1])}", ""

    def _bars(self, values: deque[int], top_bytes: int, row: int, rows: int = ROWS) -> str:
        """The cells of one row; each is eight eighths high, and what passes ``top_bytes`` is cut."""
        blocks = _ASCII_BLOCKS if self._ascii else _BLOCKS
        eighths = (-(-8 * rows * value // top_bytes) - 8 * row for value in values)
        return "".join(blocks[min(max(height, 0), 8)] for height in eighths).rjust(COLUMNS)

    def _progress(self) -> str:
        record = self._record
        if self._waiting is not None:
            return f"waiting: {self._waiting}"
        if record is None:
            return "before the first step"
        done, total = _done(record), record.epochs * record.steps
        step_seconds = (self._clock() - self._started) / (done - self._done_before)
        minutes, seconds = divmod(round(step_seconds * (total - done)), 60)
        hours, minutes = divmod(minutes, 60)
        return (
            f"epoch {record.epoch}/{record.epochs} step {record.step}/{record.steps} loss {record.loss:.3f} "
            f"acc {record.accuracy:.1%} {record.images_per_second:.0f} img/s left {hours}:{minutes:02}:{seconds:02}"
        )


def memory_news(event: MemoryEvent) -> str:
    """What happened, for a person."""
    sizes = "a smaller plan"
    if event.after_bytes is not None:
        before = "" if event.before_bytes is None else f" in place of {format_mib(event.before_bytes)}"
        sizes = f"a plan of {format_mib(event.after_bytes)}{before}"
    return f"{event.kind} after step {event.step}: going on with {sizes} ({event.reason})"


def _done(record: StepRecord) -> int:
    """Steps of the run, this one included."""
    return (record.epoch - 1) * record.steps + record.step
