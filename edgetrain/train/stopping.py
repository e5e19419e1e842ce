"""Ctrl-C and SIGTERM as wishes that the training loop honours after the step.

The loop finishes the step it is in, saves, and raises :class:`InterruptedRunError`, with which the command line exits
as a shell would report the signal: 130 after Ctrl-C, 143 after SIGTERM. A second Ctrl-C is immediate.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from edgetrain.errors import EdgetrainError

T = TypeVar("T")

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class InterruptedRunError(EdgetrainError):
    """Ctrl-C or SIGTERM: the step was finished and the state saved.

    Attributes:
        checkpoint: where the state is.
    """

    def __init__(self, checkpoint: Path, asked: signal.Signals = signal.SIGINT) -> None:
        super().__init__(
            found=_NAMES[asked],
            expected="the run to end by itself",
            action=f"nothing is lost: the step was finished and the state saved in {checkpoint}; edgetrain resume "
            f"{checkpoint.parent.parent} goes on, and Trainer.resume for a run started from Python",
        )
        self.checkpoint = checkpoint
        self.exit_code = 128 + asked


class StopAskedError(Exception):
    """Raised inside :meth:`Stop.watched`; the loop turns it into :class:`InterruptedRunError`."""


class Stop(contextlib.AbstractContextManager["Stop"]):
    """Inside, the signals only set :attr:`asked`. In another thread than the main one it does nothing.

    Attributes:
        asked: the first signal that came, None so far.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in _NAMES:
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def watched(self, items: Iterable[T]) -> Iterator[T]:
        """``items``; raises StopAskedError in place of the next one when a signal has come."""
        for item in items:
            if self.asked is not None:
                raise StopAskedError
            yield item

    def _ask(self, number: int, *_: object) -> None:
        if self.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = self.asked or signal.Signals(number)
