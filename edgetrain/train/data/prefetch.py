"""Builds one item ahead on a background thread, and never more than one.

A queue of depth 1 would allow two: one in it and one that waits to be put. So the thread takes a permit
before it starts an item, and the permit comes back when the consumer has taken the item and finished
it. While the consumer works there is one item ahead in its unfinished form (uint8, a quarter of float32).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
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

    thread = threading.Thread(target=work, name="edgetrain-prefetch", daemon=True)
    before = threading.stack_size(_STACK_BYTES)
    try:
        thread.start()
    finally:
        threading.stack_size(before)
    try:
        while True:
            item = results.get()
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
        thread.join()


def _put(results: SimpleQueue[_Item[Raw] | _Failure | _End], raw: Raw | None) -> bool:
    """Hands over an item, in a function of its own so that the thread keeps no reference to it."""
    if raw is not None:
        results.put(_Item(raw))
    return raw is not None
