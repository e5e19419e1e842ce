"""The simulated heap on cases that can be counted by hand, and what holds of any sequence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetrain.memory.cuda_allocator import Allocation, Release
from edgetrain.memory.glibc_heap import PAGE_BYTES, TOP_PAD_BYTES, GlibcHeap, process_peak_bytes
from edgetrain.units import KIB, MIB

THRESHOLD, TRIM = MIB, 4 * MIB
SLACK = 2 * PAGE_BYTES  # header, alignment and the rest of a page


def heap() -> GlibcHeap:
    return GlibcHeap(THRESHOLD, TRIM)


def test_a_large_block_is_a_mapping_and_goes_back():
    h = heap()
    h.allocate(0, 8 * MIB)
    assert 8 * MIB < h.resident_bytes <= 8 * MIB + SLACK
    assert h.resident_bytes % PAGE_BYTES == 0
    h.free(0)
    assert h.resident_bytes == 0
    assert h.peak_bytes <= 8 * MIB + SLACK


def test_a_small_block_extends_the_heap_by_the_pad():
    h = heap()
    h.allocate(0, 100 * KIB)
    assert 100 * KIB + TOP_PAD_BYTES < h.resident_bytes <= 100 * KIB + TOP_PAD_BYTES + SLACK


def test_a_freed_small_block_stays_and_is_used_again():
    h = heap()
    h.allocate(0, 512 * KIB)
    h.allocate(1, 512 * KIB)
    held = h.resident_bytes
    h.free(0)
    assert h.resident_bytes == held
    h.allocate(2, 500 * KIB)
    assert h.resident_bytes == held


def test_neighbouring_holes_become_one():
    h = heap()
    for block in range(4):
        h.allocate(block, 512 * KIB)
    held = h.resident_bytes
    h.free(0)
    h.free(1)
    h.allocate(4, MIB)  # at the threshold, but there is a hole for it
    assert h.resident_bytes == held


def test_two_holes_apart_do_not_hold_it():
    h = heap()
    for block in range(4):
        h.allocate(block, 512 * KIB)
    held = h.resident_bytes
    h.free(0)
    h.free(2)
    h.allocate(4, MIB)
    assert h.resident_bytes >= held + MIB


def test_the_smallest_hole_that_holds_it_is_taken():
    h = heap()
    for block, size in enumerate((800, 8, 400, 8)):
        h.allocate(block, size * KIB)
    held = h.resident_bytes
    h.free(0)
    h.free(2)
    h.allocate(4, 390 * KIB)
    h.allocate(5, 790 * KIB)
    assert h.resident_bytes == held


def test_the_end_goes_back_beyond_the_trim_threshold():
    h = heap()
    for block in range(9):
        h.allocate(block, 512 * KIB)
    for block in reversed(range(9)):
        h.free(block)
    assert h.resident_bytes < TRIM
    assert h.peak_bytes >= 9 * 512 * KIB


def test_a_step_runs_twice_and_weights_stay():
    events = [
        Allocation(0, 3 * MIB),  # weights
        Allocation(1, 2 * MIB),
        Allocation(2, 5 * MIB),  # a gradient, which the next step frees
        Release(1),
    ]
    peak = process_peak_bytes(events, mmap_threshold_bytes=THRESHOLD, trim_threshold_bytes=TRIM)
    assert 10 * MIB < peak <= 10 * MIB + 3 * SLACK


def test_a_step_that_releases_nothing():
    """Nothing says what is left of it: all of it stays."""
    events = [Allocation(0, 3 * MIB), Allocation(1, 2 * MIB)]
    peak = process_peak_bytes(events, mmap_threshold_bytes=THRESHOLD, trim_threshold_bytes=TRIM)
    assert 5 * MIB < peak <= 5 * MIB + 2 * SLACK


@pytest.mark.parametrize("release", [True, False])
def test_nothing_at_all(release: bool):
    events = [Allocation(0, 0), *([Release(0)] if release else [])]
    assert process_peak_bytes(events, mmap_threshold_bytes=THRESHOLD, trim_threshold_bytes=TRIM) <= 136 * KIB


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3 * MIB)), max_size=60))
def test_held_is_never_less_than_what_lives(actions: list[tuple[bool, int]]):
    h = heap()
    live: dict[int, int] = {}
    most = 0
    for number, (free, size) in enumerate(actions):
        if free and live:
            chosen = sorted(live)[size % len(live)]
            del live[chosen]
            h.free(chosen)
        else:
            live[number] = size
            h.allocate(number, size)
        most = max(most, sum(live.values()))
        assert h.resident_bytes >= sum(live.values())
        assert h.peak_bytes >= max(most, h.resident_bytes)
    for block in list(live):
        h.free(block)
    assert 0 <= h.resident_bytes < TRIM + TOP_PAD_BYTES + PAGE_BYTES
