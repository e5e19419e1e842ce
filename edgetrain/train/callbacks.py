"""What a run tells those who watch it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from edgetrain.train.records import EpochRecord, MemoryEvent, StepRecord


class Callback(Protocol):
    """Gets the news of a run; derive from it and override what is of interest.

    All methods are called in the training thread, between steps. What they raise ends the run.
    """

    def on_start(self, step: int) -> None:
        """A run starts, or goes on after batch ``step`` of all its epochs; nothing else is told before but a save."""
        return None

    def on_step(self, record: StepRecord) -> None:
        """A step is done."""
        return None

    def on_epoch(self, record: EpochRecord) -> None:
        """An epoch is done and evaluated, its checkpoint not written yet."""
        return None

    def on_checkpoint(self, path: Path) -> None:
        """The state is in ``path``."""
        return None

    def on_memory(self, event: MemoryEvent) -> None:
        """Memory was short: the run goes on with a smaller plan."""
        return None

    def on_warning(self, text: str) -> None:
        """The run goes on, but a person should know."""
        return None

    def on_wait(self, reason: str | None) -> None:
        """The run waits between two steps because of ``reason``; None: it goes on."""
        return None
