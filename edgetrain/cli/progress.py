"""The progress line of a training run: loss, accuracy, images/s, memory now and at its peak against the budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from edgetrain.cli.live import LiveView, memory_news
from edgetrain.targets import Target
from edgetrain.train import Callback, MemoryEvent, StepRecord
from edgetrain.units import MIB


class TrainingProgress(Callback):
    """A bar on stderr, and a line where the run waits; silent where ``quiet``.

    Args:
        budget_bytes: shown beside the memory, None for no cap.
    """

    def __init__(self, *, budget_bytes: int | None, quiet: bool) -> None:
        self._budget = "" if budget_bytes is None else f" of {budget_bytes / MIB:.0f}"
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f} acc {task.fields[accuracy]:.1%}"),
            TextColumn("{task.fields[rate]:.0f} img/s"),
            TextColumn("mem {task.fields[now]:.0f} peak {task.fields[peak]:.0f}{task.fields[budget]} MiB"),
            TimeRemainingColumn(compact=True),
            console=Console(stderr=True),
            disable=quiet,
        )
        self._task: TaskID | None = None
        self._target: Target | None = None

    def __enter__(self) -> TrainingProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    @contextmanager
    def watch(self, target: Target) -> Iterator[Sequence[Callback]]:
        """As :meth:`edgetrain.cli.live.LiveView.watch`; here nothing is read but at the end of a step."""
        self._target = target
        try:
            yield (self,)
        finally:
            self._target = None

    def on_wait(self, reason: str | None) -> None:
        """Says that the run waits, and that it goes on."""
        if not self._progress.disable:
            self._progress.console.print("goes on" if reason is None else f"waiting: {reason}", highlight=False)

    def on_memory(self, event: MemoryEvent) -> None:
        """Says that the plan is another now."""
        self.on_warning(memory_news(event))

    def on_warning(self, text: str) -> None:
        """Prints a line above the bar."""
        if not self._progress.disable:
            self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def on_step(self, record: StepRecord) -> None:
        """Shows one step."""
        now, peak = (0, 0) if self._target is None else (self._target.current_bytes(), self._target.peak_bytes())
        fields: dict[str, Any] = {
            "epoch": f"{record.epoch}/{record.epochs}",
            "loss": record.loss,
            "accuracy": record.accuracy,
            "rate": record.images_per_second,
            "now": now / MIB,
            "peak": peak / MIB,
            "budget": self._budget,
        }
        total, done = record.epochs * record.steps, (record.epoch - 1) * record.steps + record.step
        if self._task is None:
            self._task = self._progress.add_task("train", total=total, **fields)
        self._progress.update(self._task, completed=done, **fields)


def training_display(*, budget_bytes: int | None, quiet: bool, live: bool) -> TrainingProgress | LiveView:
    """What ``edgetrain train`` shows on stderr: the live view where it is asked for and stderr is a terminal."""
    console = Console(stderr=True)
    if live and console.is_terminal and not console.is_dumb_terminal:
        return LiveView(budget_bytes=budget_bytes, console=console)
    return TrainingProgress(budget_bytes=budget_bytes, quiet=quiet)
