"""Threads in which steps go on after a failed allocation.

oneDNN's code generator keeps an error for the rest of its thread's life, and every convolution of a new shape then
fails there (see :mod:`edgetrain.targets.cpu`). A thread that starts under a cap may fail to, together with the threads
that OpenMP starts for it; so they are made, and OpenMP's with them, before. None is used without need: each has a heap
of its own, in which it does not find what others have freed.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_ELEMENTS_PER_THREAD = 2**16  # above the grain of 2**15 elements under which ATen stays on one thread


class SpareThreads:
    """Calls functions in the thread of the caller; after :meth:`change` in a spare one, after the last without oneDNN.

    ATen's own convolutions are slow, but need no code to be generated.

    Args:
        count: of spare threads that are made ready now.
    """

    def __init__(self, count: int = 0) -> None:
        self._spare = deque(_Thread() for _ in range(count))
        self._current: _Thread | None = None
        self._onednn = True

    def change(self) -> None:
        """Goes on where nothing has failed yet."""
        if self._spare:
            self._current = self._spare.popleft()
        else:
            self._onednn = False

    def call(self, work: Callable[[], T]) -> T:
        """What ``work`` gives, or raises."""
        with contextlib.nullcontext() if self._onednn else torch.backends.mkldnn.flags(enabled=False):
            return work() if self._current is None else self._current.call(work)


class _Thread:
    def __init__(self) -> None:
        self._work: SimpleQueue[tuple[Callable[[], Any], SimpleQueue[tuple[bool, Any]]]] = SimpleQueue()
        threading.Thread(target=self._loop, name="edgetrain-step", daemon=True).start()
        self.call(lambda: torch.zeros(torch.get_num_threads() * _ELEMENTS_PER_THREAD).add_(1).sum())

    def call(self, work: Callable[[], T]) -> T:
        answers: SimpleQueue[tuple[bool, Any]] = SimpleQueue()
        self._work.put((work, answers))
        del work
        done, value = answers.get()  # a signal's handler may raise here
        if done:
            return value
        try:
            raise value
        finally:
            del value  # the error's frames, this one included, would hold each other

    def _loop(self) -> None:
        while True:
            work, answers = self._work.get()
            answers.put(_attempt(work))
            del work, answers


def _attempt(work: Callable[[], Any]) -> tuple[bool, Any]:
    try:
        return True, work()
    except BaseException as error:  # whatever it is, it belongs to the caller
        return False, error
