"""The background thread: how much it holds, how it ends, how it fails."""

import gc
import threading
import time
import weakref

import pytest

from edgetrain.train.data import prefetch
from edgetrain.train.data.prefetch import prefetched, ready_thread


def running() -> bool:
    threads = [thread for thread in threading.enumerate() if thread.name == "edgetrain-prefetch"]
    return len(threads) > len(prefetch._idle)


def wait_until(condition) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.002)


class _Batch:
    """Something that counts how many of its kind are alive."""

    def __init__(self, alive: weakref.WeakSet) -> None:
        alive.add(self)


def test_order_and_skipped_jobs():
    items = prefetched(range(10), build=lambda k, _: None if k % 3 == 0 else k, finish=lambda k: k * 10)
    assert list(items) == [10, 20, 40, 50, 70, 80]
    assert not running()
    assert list(prefetched([], build=lambda k, _: k, finish=str)) == []


def test_one_ahead_and_no_more():
    raw, ready, built = weakref.WeakSet(), weakref.WeakSet(), []

    def build(job, stop):
        built.append(job)
        return _Batch(raw)

    gc.disable()  # references alone must do
    try:
        items = prefetched(range(6), build=build, finish=lambda _: _Batch(ready))
        for k in range(6):
            item = next(items)
            wait_until(lambda k=k: len(built) == min(k + 2, 6))
            time.sleep(0.02)  # time in which a second one ahead would be begun
            assert len(built) == min(k + 2, 6)
            assert len(raw) <= 1
            assert len(ready) == 1
            del item
            assert len(ready) == 0
        assert next(items, None) is None
    finally:
        gc.enable()


def test_error_surfaces_after_the_items_before_it():
    def build(job, stop):
        if job == 2:
            raise MemoryError("no more")
        return job

    items = prefetched(range(5), build=build, finish=lambda k: k)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(MemoryError, match="no more"):
        next(items)
    assert not running()


def test_error_in_the_jobs():
    def jobs():
        yield 1
        raise OSError("gone")

    items = prefetched(jobs(), build=lambda k, _: k, finish=lambda k: k)
    assert next(items) == 1
    with pytest.raises(OSError, match="gone"):
        next(items)


@pytest.mark.parametrize("failing", [False, True])
def test_early_stop_ends_the_thread(failing):
    def build(job, stop):
        while job == 1 and not stop.wait(0.001):
            pass
        if failing and job == 1:
            raise RuntimeError("nobody listens any more")
        return job

    items = prefetched(range(100), build=build, finish=lambda k: k)
    assert next(items) == 0
    assert running()
    items.close()
    assert not running()


def test_a_thread_that_was_made_ready_is_used_and_kept():
    ready_thread()
    before = threading.active_count()
    for _ in range(3):
        items = prefetched(range(3), build=lambda k, _: k, finish=str)
        assert next(items) == "0"
        assert threading.active_count() == before
        items.close()
    assert threading.active_count() == before
    assert not running()
