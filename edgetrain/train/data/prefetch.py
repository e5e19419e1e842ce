"""Builds one item ahead on a background thread, and never more than one.

A queue of depth 1 would allow two: one in it and one that waits to be put. So the thread takes a permit
before it starts an item, and the permit comes back when the consumer has taken the item and finished
it. While the consumer works there is one item ahead in its unfinished form (uint8, a quarter of float32).

Threads are kept and used again. One that starts when memory has run out can end before its first instruction, and
CPython then waits for it for ever; so a run inside a cap calls :func:`ready_thread` before the cap is set.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from edgetrain.units import MIB

# the default of 8 MiB is address space that nobody touches, but that a cap on the process's data counts
_STACK_BYTES = MIB

Job = TypeVar("Job")
Raw = TypeVar("Raw")
Ready = TypeVar("Ready")


@dataclass(frozen=True)
class _Item(Generic[Raw]):
    raw: Raw


@dataclass(frozen=True)
class _Failure:
    error: BaseException


@dataclass(frozen=True)
class _End:
    pass


def prefetched(
    jobs: Iterable[Job],
    *,
    build: Callable[[Job, threading.Event], Raw | None],
    finish: Callable[[Raw], Ready],
) -> Iterator[Ready]:
    """Yields ``finish(build(job))`` for each job, where it is not None; an error in ``build`` is raised here.

    Args:
        build: runs on the background thread; may give None early once the event is set.
        finish: runs where the items are consumed.
    """
    results: SimpleQueue[_Item[Raw] | _Failure | _End] = SimpleQueue()  # the permit bounds it; a put never blocks
    permit, stop = threading.Semaphore(1), threading.Event()

    def work() -> None:
        try:
            for job in jobs:
                permit.acquire()
                if stop.is_set():
                    return
                if not _put(results, build(job, stop)):
                    permit.release()
            results.put(_End())
        except BaseException as error:  # whatever it is, it belongs to the consumer
            results.put(_Failure(error))

    worker = _idle_worker()
    ended = worker.run(work)
    try:
        while True:
            item = _next(results, ended)
            if isinstance(item, _End):
                return
            if isinstance(item, _Failure):
                raise item.error
            ready = [finish(item.raw)]
            del item
            permit.release()
            yield ready.pop()  # popped: this frame must not keep what the consumer drops
    finally:
        stop.set()
        permit.release()
        if not sys.is_finalizing():  # at the end of the process, where the thread never runs again
            ended.wait()
            _idle.append(worker)


def ready_thread() -> None:
    """Starts the background thread of the next :func:`prefetched`, where none is idle."""
    _idle.append(_idle_worker())


class _Worker:
    """A thread that does one piece of work after another."""

    def __init__(self) -> None:
        self._work: SimpleQueue[tuple[Callable[[], None], threading.Event]] = SimpleQueue()
        thread = threading.Thread(target=self._loop, name="edgetrain-prefetch", daemon=True)
        before = threading.stack_size(_STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(before)

    def run(self, work: Callable[[], None]) -> threading.Event:
        """Begins ``work``, which must not raise, and gives the event that is set when it has ended."""
        ended = threading.Event()
        self._work.put((work, ended))
        return ended

    def _loop(self) -> None:
        while True:
            work, ended = self._work.get()
            try:
                work()
            finally:
                del work  # and with it what it refers to, before anybody is told
                ended.set()


_idle: deque[_Worker] = deque()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)  # a child process has none of the threads


def _idle_worker() -> _Worker:
    try:
        return _idle.pop()
    except IndexError:
        return _Worker()


def _next(results: SimpleQueue[_Item[Raw] | _Failure | _End], ended: threading.Event) -> _Item[Raw] | _Failure | _End:
    while True:
        try:
            return results.get(timeout=1.0)
        except Empty:
            if ended.is_set() and results.empty():
                # not even the news of it could be handed over
                raise MemoryError("the thread that prepares the batches ran out of memory") from None


def _put(results: SimpleQueue[_Item[Raw] | _Failure | _End], raw: Raw | None) -> bool:
    """Hands over an item, in a function of its own so that the thread keeps no reference to it."""
    if raw is not None:
        results.put(_Item(raw))
    return raw is not None
