"""The simulated CUDA caching allocator against cases worked out by hand, invariants, and the real one.

Sizes of segments and the rests of splits are those of the rules in the module's docstring; each test says its sum.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import pairwise
from multiprocessing import get_context

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetrain.errors import DataError, UsageError
from edgetrain.memory.cuda_allocator import (
    DEFAULT_SETTINGS,
    Allocation,
    AllocatorSettings,
    CachingAllocator,
    MemoryEvent,
    Release,
    SegmentSnapshot,
    SimulatedOutOfMemoryError,
    replay,
    replay_snapshot,
)
from edgetrain.units import GIB, KIB, MIB

CUBLAS_WORKSPACE_BYTES = 8_519_680  # 2 x 4096 KiB + 8 x 16 KiB


def sizes(segment: SegmentSnapshot) -> list[tuple[int, str]]:
    return [(block.size_bytes, block.state) for block in segment.blocks]


@pytest.mark.parametrize(
    ("requested_bytes", "rounded_bytes"),
    [(1, 512), (511, 512), (512, 512), (513, 1024), (1_000_000, 1_000_448), (MIB, MIB), (MIB + 1, MIB + 512)],
)
def test_requests_round_up_to_512_bytes(requested_bytes: int, rounded_bytes: int):
    assert DEFAULT_SETTINGS.rounded_bytes(requested_bytes) == rounded_bytes


@pytest.mark.parametrize(
    ("requested_bytes", "rounded_bytes"),
    [
        (1200, 1536),  # not above 4 x 512: to the next multiple of 512
        (2049, 2560),  # above 2048, steps of 2048 / 4
        (4096, 4096),  # powers of two stay
        (9 * MIB, 10 * MIB),  # steps of 8 MiB / 4
        (10 * MIB + 1, 12 * MIB),
        (15 * MIB, 16 * MIB),
    ],
)
def test_four_divisions_between_powers_of_two(requested_bytes: int, rounded_bytes: int):
    assert AllocatorSettings(roundup_power2_divisions=4).rounded_bytes(requested_bytes) == rounded_bytes


def test_divisions_by_interval_first_from_1_mib_down_last_from_32_gib_up():
    by_interval = AllocatorSettings(roundup_power2_divisions=(2, 4) + (0,) * 13 + (8,))
    assert by_interval.rounded_bytes(5000) == 6144  # 4096 + 4096 / 2
    assert by_interval.rounded_bytes(MIB + 1) == 3 * MIB // 2
    assert by_interval.rounded_bytes(2 * MIB + 1) == 5 * MIB // 2
    assert by_interval.rounded_bytes(4 * MIB + 1) == 4 * MIB + 512
    assert by_interval.rounded_bytes(64 * GIB + 1) == 72 * GIB


@pytest.mark.parametrize(
    ("requested_bytes", "segment_bytes"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (CUBLAS_WORKSPACE_BYTES, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB - 511, 10 * MIB),  # rounds to 10 MiB, which has a segment of its own
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
        (21 * MIB, 22 * MIB),
    ],
)
def test_first_request_reserves_one_segment(requested_bytes: int, segment_bytes: int):
    allocator = CachingAllocator()
    allocator.allocate(requested_bytes)
    assert allocator.reserved_bytes == segment_bytes


def test_small_pool_2048_kib_hold_two_of_1_mib_and_4096_of_512_bytes():
    for size_bytes, count in ((MIB, 2), (512, 4096)):
        allocator = CachingAllocator()
        for _ in range(count):
            allocator.allocate(size_bytes)
        assert (allocator.allocated_bytes, allocator.reserved_bytes) == (2 * MIB, 2 * MIB)
        allocator.allocate(size_bytes)
        assert allocator.reserved_bytes == 4 * MIB


def test_small_pool_splits_off_a_rest_of_512_bytes():
    allocator = CachingAllocator()
    allocator.allocate(MIB)
    allocator.allocate(MIB - 512)
    (segment,) = allocator.segments()
    assert sizes(segment) == [(MIB, "allocated"), (MIB - 512, "allocated"), (512, "free")]


def test_cublas_workspace_of_8_519_680_bytes_leaves_12_451_840_of_a_20_mib_segment():
    allocator = CachingAllocator()
    allocator.allocate(CUBLAS_WORKSPACE_BYTES)
    (segment,) = allocator.segments()
    assert sizes(segment) == [(CUBLAS_WORKSPACE_BYTES, "allocated"), (12_451_840, "free")]
    allocator.allocate(5 * MIB)  # 12 451 840 - 5 242 880 = 7 208 960
    allocator.allocate(7 * MIB)  # 7 208 960 < 7 340 032: a segment of its own
    assert allocator.reserved_bytes == 40 * MIB


def test_large_pool_keeps_a_rest_of_1_mib_and_counts_it_as_allocated():
    """12 - 11 = 1 MiB is not split off, 12 - 11 MiB + 512 bytes are."""
    allocator = CachingAllocator()
    allocator.allocate(11 * MIB)
    assert (allocator.allocated_bytes, allocator.requested_bytes) == (12 * MIB, 11 * MIB)
    allocator.allocate(11 * MIB - 512)
    assert allocator.allocated_bytes == 12 * MIB + 11 * MIB - 512
    assert sizes(allocator.segments()[1]) == [(11 * MIB - 512, "allocated"), (MIB + 512, "free")]


def test_best_fit_takes_the_smallest_block_that_holds_the_request():
    allocator = CachingAllocator()
    first, second, third = (allocator.allocate(size * MIB) for size in (30, 14, 22))
    for block in (first, second, third):
        allocator.free(block)
    allocator.allocate(15 * MIB)  # 22 MiB serves, 7 MiB stay free
    assert [sizes(segment) for segment in allocator.segments()] == [
        [(30 * MIB, "free")],
        [(14 * MIB, "free")],
        [(15 * MIB, "allocated"), (7 * MIB, "free")],
    ]
    allocator.allocate(7 * MIB)
    assert allocator.reserved_bytes == 66 * MIB


def test_equal_sizes_are_served_by_the_lowest_address():
    allocator = CachingAllocator()
    blocks = [allocator.allocate(12 * MIB) for _ in range(3)]
    addresses = [allocator.address(block) for block in blocks]
    for block in reversed(blocks):
        allocator.free(block)
    assert [allocator.address(allocator.allocate(12 * MIB)) for _ in range(3)] == sorted(addresses)


def test_pools_do_not_serve_each_other():
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(12 * MIB))
    allocator.allocate(512)
    assert allocator.reserved_bytes == 14 * MIB


def test_streams_do_not_serve_each_other():
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(12 * MIB, stream=0))
    allocator.allocate(12 * MIB, stream=7)
    assert allocator.reserved_bytes == 24 * MIB
    allocator.allocate(12 * MIB, stream=0)
    assert allocator.reserved_bytes == 24 * MIB


def test_free_merges_with_both_neighbours():
    allocator = CachingAllocator()
    a, b, c, d = (allocator.allocate(5 * MIB) for _ in range(4))
    allocator.free(a)
    allocator.free(c)
    assert [size for size, _ in sizes(allocator.segments()[0])] == [5 * MIB] * 4
    allocator.free(b)
    assert sizes(allocator.segments()[0]) == [(15 * MIB, "free"), (5 * MIB, "allocated")]
    allocator.free(d)
    assert sizes(allocator.segments()[0]) == [(20 * MIB, "free")]


def test_a_block_in_use_by_another_stream_does_not_serve_or_merge():
    allocator = CachingAllocator()
    a, b = allocator.allocate(10 * MIB - 512), allocator.allocate(10 * MIB - 512)
    allocator.request_free(a)
    allocator.free(b)
    # 20 MiB: 10 MiB - 512 twice leave 1024 bytes, which the second block keeps
    assert sizes(allocator.segments()[0]) == [(10 * MIB - 512, "awaiting_free"), (10 * MIB + 512, "free")]
    assert (allocator.allocated_bytes, allocator.active_bytes) == (0, 10 * MIB - 512)
    allocator.complete_free(a)
    assert sizes(allocator.segments()[0]) == [(20 * MIB, "free")]


def test_empty_cache_keeps_segments_that_are_partly_used():
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(12 * MIB))
    allocator.free(allocator.allocate(3 * MIB))  # of the 12 MiB: no new segment
    held = allocator.allocate(14 * MIB)
    small, other = allocator.allocate(512), allocator.allocate(512)
    allocator.free(small)
    assert allocator.reserved_bytes == (12 + 14 + 2) * MIB
    allocator.empty_cache()
    assert allocator.reserved_bytes == (14 + 2) * MIB
    allocator.free(held)
    allocator.free(other)
    allocator.empty_cache()
    assert (allocator.reserved_bytes, allocator.peak_reserved_bytes) == (0, 28 * MIB)


def test_limit_of_40_mib_allows_reserved_bytes_up_to_40_mib():
    allocator = CachingAllocator(limit_bytes=40 * MIB)
    allocator.allocate(20 * MIB)
    allocator.allocate(20 * MIB)
    with pytest.raises(SimulatedOutOfMemoryError) as caught:
        allocator.allocate(1)
    error = caught.value
    assert (error.requested_bytes, error.segment_bytes) == (1, 2 * MIB)
    assert (error.allocated_bytes, error.reserved_bytes, error.limit_bytes) == (40 * MIB, 40 * MIB, 40 * MIB)
    assert "needs a segment of 2.0 MiB beside 40.0 MiB reserved" in str(error)


def test_free_segments_are_released_before_a_request_fails():
    """16 + 14 + 2 = 32 MiB of 40; a request for 20 MiB needs 52, so 16 + 2 MiB go and 34 stay."""
    allocator = CachingAllocator(limit_bytes=40 * MIB)
    first, _held, small = (allocator.allocate(size) for size in (16 * MIB, 14 * MIB, 512))
    allocator.free(first)
    allocator.free(small)
    allocator.allocate(20 * MIB)
    assert (allocator.reserved_bytes, allocator.retries) == (34 * MIB, 1)


def test_a_failing_request_releases_free_segments_all_the_same():
    """4 MiB live keep a 20 MiB segment; the 12 MiB segment goes, and 20 + 22 > 40 still."""
    allocator = CachingAllocator(limit_bytes=40 * MIB)
    kept = allocator.allocate(4 * MIB)
    allocator.allocate(13 * MIB)  # of the rest of 16 MiB
    allocator.free(allocator.allocate(12 * MIB))
    with pytest.raises(SimulatedOutOfMemoryError, match=r"at most 40\.0 MiB"):
        allocator.allocate(22 * MIB)
    assert (allocator.reserved_bytes, allocator.allocated_bytes) == (20 * MIB, 17 * MIB)
    allocator.free(kept)
    assert allocator.allocated_bytes == 13 * MIB


def test_max_split_size_keeps_oversize_blocks_for_oversize_requests():
    allocator = CachingAllocator(AllocatorSettings(max_split_bytes=40 * MIB))
    allocator.free(allocator.allocate(60 * MIB))
    allocator.allocate(30 * MIB)  # below 40 MiB: the free 60 MiB do not serve it
    assert allocator.reserved_bytes == 90 * MIB
    block = allocator.allocate(50 * MIB)  # 10 MiB left over, below 20: served whole
    assert (allocator.reserved_bytes, allocator.allocated_bytes) == (90 * MIB, 90 * MIB)
    allocator.free(block)
    allocator.allocate(40 * MIB)  # 20 MiB left over: not served
    assert allocator.reserved_bytes == 130 * MIB


def test_max_non_split_rounding_widens_what_an_oversize_block_serves():
    wide = AllocatorSettings(max_split_bytes=40 * MIB, max_non_split_rounding_bytes=21 * MIB)
    allocator = CachingAllocator(wide)
    allocator.free(allocator.allocate(60 * MIB))
    allocator.allocate(40 * MIB)
    assert (allocator.reserved_bytes, allocator.allocated_bytes) == (60 * MIB, 60 * MIB)


def test_max_split_size_releases_one_fitting_block_before_all():
    """60 + 80 + 12 = 152 MiB free of 160; 30 MiB need one release: the smallest of 40 MiB and more, 60."""
    allocator = CachingAllocator(AllocatorSettings(max_split_bytes=40 * MIB), limit_bytes=160 * MIB)
    for block in [allocator.allocate(size * MIB) for size in (60, 80, 12)]:
        allocator.free(block)
    allocator.allocate(30 * MIB)
    assert (allocator.reserved_bytes, allocator.retries) == ((80 + 12 + 30) * MIB, 0)


def test_max_split_size_releases_the_largest_blocks_until_they_would_hold_the_request():
    """44 + 50 + 60 MiB free of 160; 100 MiB want 60 + 50 released, 44 + 100 stay."""
    allocator = CachingAllocator(AllocatorSettings(max_split_bytes=40 * MIB), limit_bytes=160 * MIB)
    for block in [allocator.allocate(size * MIB) for size in (44, 50, 60)]:
        allocator.free(block)
    allocator.allocate(100 * MIB)
    assert (allocator.reserved_bytes, allocator.retries) == (144 * MIB, 0)


def test_large_segment_size_of_12_mib_serves_requests_below_10_mib():
    allocator = CachingAllocator(AllocatorSettings(large_segment_bytes=12 * MIB))
    allocator.allocate(CUBLAS_WORKSPACE_BYTES)
    assert allocator.reserved_bytes == 12 * MIB


@pytest.mark.parametrize(
    "wrong",
    [
        {"large_segment_bytes": 9 * MIB},
        {"max_split_bytes": 19 * MIB},
        {"roundup_power2_divisions": 3},
        {"roundup_power2_divisions": (4, 4)},
    ],
)
def test_settings_that_pytorch_or_the_rules_refuse(wrong: dict[str, int]):
    with pytest.raises(UsageError):
        replace(DEFAULT_SETTINGS, **wrong)


def test_zero_bytes_take_nothing_and_wrong_frees_are_refused():
    allocator = CachingAllocator()
    empty = allocator.allocate(0)
    assert (allocator.reserved_bytes, allocator.address(empty)) == (0, None)
    allocator.free(empty)
    with pytest.raises(UsageError):
        allocator.free(empty)
    with pytest.raises(UsageError):
        allocator.allocate(-1)
    with pytest.raises(UsageError):
        replay([Allocation(3, 1), Allocation(3, 1)])
    with pytest.raises(UsageError):
        replay([Release(3)])


def test_fragmentation_is_the_share_of_free_bytes_outside_the_largest_block():
    """Free: 12 MiB beside 4 MiB of 20; 1 - 12 / 16."""
    allocator = CachingAllocator()
    assert allocator.fragmentation == 0
    block = allocator.allocate(12 * MIB)
    allocator.allocate(8 * MIB)
    allocator.allocate(8 * MIB)
    allocator.free(block)
    assert (allocator.free_bytes, allocator.fragmentation) == (16 * MIB, 0.25)


def test_report_of_a_replay():
    """3 MiB and 8 MiB share 20 MiB, 12 MiB have their own; after the releases 8 MiB live in 32 reserved."""
    events = [Allocation(1, 3 * MIB), Allocation(2, 8 * MIB), Release(1), Allocation(1, 12 * MIB), Release(1)]
    report = replay(events)
    assert (report.events, report.segments, report.retries) == (5, 2, 0)
    assert (report.peak_allocated_bytes, report.allocated_bytes) == (20 * MIB, 8 * MIB)
    assert (report.peak_reserved_bytes, report.reserved_bytes) == (32 * MIB, 32 * MIB)
    # free: 3, 9 and 12 MiB
    assert report.fragmentation == 0.5


# ------------------------------------------------------------------------------------------------ invariants

REQUESTS = st.one_of(
    st.integers(0, 4 * KIB), st.integers(1, 2 * MIB), st.integers(MIB, 12 * MIB), st.integers(10 * MIB, 90 * MIB)
)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("allocate"), REQUESTS, st.integers(0, 1)),
        st.tuples(st.sampled_from(["free", "request", "complete"]), st.integers(0, 10**6), st.just(0)),
        st.tuples(st.just("empty"), st.just(0), st.just(0)),
    ),
    max_size=60,
)
SETTINGS = st.builds(
    AllocatorSettings,
    max_split_bytes=st.sampled_from([None, 20 * MIB, 48 * MIB]),
    roundup_power2_divisions=st.sampled_from([0, 4]),
    large_segment_bytes=st.sampled_from([12 * MIB, 20 * MIB]),
)


def check(allocator: CachingAllocator) -> None:
    """Segments apart, blocks without gaps, no two free neighbours, and every sum as counted."""
    segments = allocator.segments()
    for before, after in pairwise(segments):
        assert before.address + before.size_bytes <= after.address
    by_state: Counter[str] = Counter()
    for segment in segments:
        end = segment.address
        previous = ""
        for block in segment.blocks:
            assert block.address == end
            assert block.size_bytes >= 512
            assert block.size_bytes % 512 == 0
            assert block.requested_bytes <= block.size_bytes
            assert not previous == block.state == "free"
            end, previous = end + block.size_bytes, block.state
            by_state[block.state] += block.size_bytes
        assert end == segment.address + segment.size_bytes
    assert by_state["allocated"] == allocator.allocated_bytes
    assert by_state["allocated"] + by_state["awaiting_free"] == allocator.active_bytes
    assert by_state["free"] == allocator.free_bytes
    assert sum(segment.size_bytes for segment in segments) == allocator.reserved_bytes
    assert allocator.requested_bytes <= allocator.allocated_bytes <= allocator.active_bytes
    assert allocator.active_bytes <= allocator.reserved_bytes <= allocator.peak_reserved_bytes
    assert allocator.allocated_bytes <= allocator.peak_allocated_bytes
    assert 0 <= allocator.fragmentation < 1
    if allocator.limit_bytes is not None:
        assert allocator.peak_reserved_bytes <= allocator.limit_bytes


@settings(max_examples=150, deadline=None)
@given(OPERATIONS, SETTINGS, st.sampled_from([None, 64 * MIB, 200 * MIB]))
def test_invariants_hold_after_every_operation(
    operations: list[tuple[str, int, int]], rules: AllocatorSettings, limit_bytes: int | None
):
    allocator = CachingAllocator(rules, limit_bytes=limit_bytes)
    live: list[int] = []
    awaiting: list[int] = []
    for kind, number, stream in operations:
        if kind == "allocate":
            try:
                live.append(allocator.allocate(number, stream))
            except SimulatedOutOfMemoryError as error:
                failure = error
            else:
                failure = None
            if failure is not None:
                assert failure.reserved_bytes + failure.segment_bytes > failure.limit_bytes
                assert allocator.releasable_bytes == 0
        elif kind == "empty":
            allocator.empty_cache()
        elif kind == "complete" and awaiting:
            waited = awaiting.pop(number % len(awaiting))
            if waited in allocator._awaiting:  # a full cache may have completed it
                allocator.complete_free(waited)
        elif live and kind != "complete":
            block = live.pop(number % len(live))
            if kind == "free":
                allocator.free(block)
            else:
                allocator.request_free(block)
                awaiting.append(block)
        check(allocator)
    for block in live:
        allocator.free(block)
    allocator.empty_cache()
    check(allocator)
    assert (allocator.reserved_bytes, allocator.active_bytes, allocator.segments()) == (0, 0, ())


def random_events(count: int, seed: int) -> list[MemoryEvent]:
    """Requests of every class, about 400 alive at a time."""
    numbers = random.Random(seed)
    events: list[MemoryEvent] = []
    live: list[int] = []
    for block in range(count):
        if live and (len(live) > 400 or numbers.random() < 0.45):
            events.append(Release(live.pop(numbers.randrange(len(live)))))
        else:
            size_bytes = int(2 ** numbers.uniform(0, 26))
            events.append(Allocation(block, size_bytes, numbers.randrange(2)))
            live.append(block)
    return events


def test_replay_is_deterministic():
    events = random_events(3_000, seed=1)
    assert replay(events) == replay(list(events))


def test_100_000_events_take_less_than_two_seconds():
    events = random_events(100_000, seed=2)
    began = time.process_time()
    report = replay(events)
    assert time.process_time() - began < 2
    assert report.events == 100_000


# ------------------------------------------------------------------------------------------------ recorded traces


def entry(action: str, addr: int, size: int, stream: int = 0) -> dict[str, object]:
    return {"action": action, "addr": addr, "size": size, "stream": stream, "pool_id": (0, 0)}


def test_recorded_trace_with_emptied_cache():
    """12 MiB reserved and freed; 5 MiB are split from them; 14 MiB are served after the small segment was released."""
    base, other, small = 0x7F0000000000, 0x7E0000000000, 0x7D0000000000
    trace = [
        entry("segment_alloc", base, 12 * MIB),
        entry("alloc", base, 11 * MIB),
        entry("segment_alloc", small, 2 * MIB),
        entry("alloc", small, 100),
        entry("free_requested", base, 11 * MIB),
        entry("free_completed", base, 11 * MIB),
        entry("alloc", base, 5 * MIB),
        entry("free_requested", small, 100),
        entry("free_completed", small, 100),
        entry("segment_free", small, 2 * MIB),
        entry("snapshot", 0, 0),
        entry("segment_alloc", other, 14 * MIB),
        entry("alloc", other, 13 * MIB + 1),
    ]
    report = replay_snapshot(trace)
    assert report.first_difference is None
    reserved_mib = [step.recorded_reserved_bytes // MIB for step in report.steps]
    assert reserved_mib == [12, 14, 14, 14, 14, 14, 14, 12, 26]
    assert report.recorded_peak_reserved_bytes == report.simulated.peak_reserved_bytes == 26 * MIB
    last = report.steps[-1]
    assert last.simulated_allocated_bytes == (5 + 14) * MIB  # 14 MiB - 13 MiB - 512: no split
    assert last.recorded_requested_bytes == (5 + 13) * MIB + 1


def test_recorded_addresses_decide_between_equal_blocks():
    """The second segment lies below the first: the real allocator takes it first."""
    high, low = 0x7F0000000000, 0x7E0000000000
    trace = [entry("segment_alloc", high, 12 * MIB), entry("alloc", high, 12 * MIB)]
    trace += [entry("segment_alloc", low, 12 * MIB), entry("alloc", low, 12 * MIB)]
    trace += [
        entry(action, block, 12 * MIB) for block in (high, low) for action in ("free_requested", "free_completed")
    ]
    trace += [entry("alloc", low, 12 * MIB)]
    report = replay_snapshot(trace)
    assert report.first_difference is None


def test_recorded_difference_is_found():
    """A device that reserved 22 MiB where the rule says 20."""
    trace = [entry("segment_alloc", 1 << 40, 22 * MIB), entry("alloc", 1 << 40, 5 * MIB)]
    difference = replay_snapshot(trace).first_difference
    assert difference is not None
    assert (difference.index, difference.simulated_reserved_bytes) == (1, 20 * MIB)


def test_recorded_retry_and_out_of_memory():
    """12 MiB cached are released for 20 MiB under a limit of 24; then 30 MiB fail."""
    a, b = 1 << 40, 1 << 41
    trace = [
        entry("segment_alloc", a, 12 * MIB),
        entry("alloc", a, 12 * MIB),
        entry("free_requested", a, 12 * MIB),
        entry("free_completed", a, 12 * MIB),
        entry("segment_free", a, 12 * MIB),
        entry("segment_alloc", b, 20 * MIB),
        entry("alloc", b, 20 * MIB),
        entry("oom", 4 * MIB, 30 * MIB),
    ]
    for limit_bytes in (None, 24 * MIB):
        report = replay_snapshot(trace, limit_bytes=limit_bytes)
        assert report.first_difference is None
        assert [step.action for step in report.steps][-2:] == ["alloc", "oom"]


@pytest.mark.parametrize(
    "trace",
    [
        [entry("free_requested", 512, 512)],
        [entry("free_completed", 512, 512)],
        [entry("alloc", 1 << 40, 512)],
        [entry("segment_free", 1 << 40, 2 * MIB)],
        [entry("segment_map", 1 << 40, 2 * MIB)],
        [entry("segment_alloc", 1 << 40, 2 * MIB) | {"pool_id": (0, 1)}],
    ],
)
def test_traces_that_cannot_be_replayed(trace: list[dict[str, object]]):
    with pytest.raises(DataError):
        replay_snapshot(trace)


class PlainAllocator:
    """The default rules once more, by search through plain lists; segments lie at random addresses.

    Writes the trace that PyTorch would record.
    """

    def __init__(self, seed: int, limit_bytes: int) -> None:
        self.numbers = random.Random(seed)
        self.limit_bytes = limit_bytes
        self.trace: list[dict[str, object]] = []
        self.segments: dict[int, tuple[bool, int, list[list[int]]]] = {}  # small, stream, [address, size, requested]

    def reserved(self) -> int:
        return sum(block[1] for _, _, blocks in self.segments.values() for block in blocks)

    def empty(self) -> None:
        for start, (_, stream, blocks) in list(self.segments.items()):
            if len(blocks) == 1 and not blocks[0][2]:
                self.trace.append(entry("segment_free", start, blocks[0][1], stream))
                del self.segments[start]

    def allocate(self, nbytes: int, stream: int) -> int | None:
        size = (nbytes + 511) // 512 * 512
        small = size <= 1_048_576
        fitting = [
            (block[1], block[0], block, blocks)
            for its_small, its_stream, blocks in self.segments.values()
            if (its_small, its_stream) == (small, stream)
            for block in blocks
            if not block[2] and block[1] >= size
        ]
        if fitting:
            _, _, block, blocks = min(fitting)
        else:
            own_segment = (size + 2_097_151) // 2_097_152 * 2_097_152
            segment = 2_097_152 if small else 20_971_520 if size < 10_485_760 else own_segment
            if self.reserved() + segment > self.limit_bytes:
                self.empty()
            if self.reserved() + segment > self.limit_bytes:
                self.trace.append(entry("oom", 0, size, stream))
                return None
            block = [self.numbers.randrange(1, 10**6) << 30, segment, 0]
            blocks = [block]
            assert block[0] not in self.segments
            self.segments[block[0]] = small, stream, blocks
            self.trace.append(entry("segment_alloc", block[0], segment, stream))
        rest = block[1] - size
        if rest >= 512 if small else rest > 1_048_576:
            blocks.insert(blocks.index(block) + 1, [block[0] + size, rest, 0])
            block[1] = size
        block[2] = nbytes
        self.trace.append(entry("alloc", block[0], nbytes, stream))
        return block[0]

    def free(self, address: int) -> None:
        for _, stream, blocks in self.segments.values():
            for block in blocks:
                if block[0] == address:
                    self.trace.append(entry("free_requested", address, block[2], stream))
                    self.trace.append(entry("free_completed", address, block[2], stream))
                    block[2] = 0
            merged: list[list[int]] = []
            for block in blocks:
                if merged and not merged[-1][2] and not block[2]:
                    merged[-1][1] += block[1]
                else:
                    merged.append(block)
            blocks[:] = merged


@pytest.mark.parametrize("limit_bytes", [100 * MIB, 10**12])
@pytest.mark.parametrize("seed", range(5))
def test_equal_to_a_search_through_plain_lists(seed: int, limit_bytes: int):
    """Every address and every failure agree with the plain search, with and without a limit that is met."""
    plain = PlainAllocator(seed, limit_bytes)
    numbers = random.Random(seed)
    live: list[int] = []
    choices = [int(2 ** numbers.uniform(8, 25)) for _ in range(40)]  # few sizes, so that equal blocks are common
    for _ in range(1_500):
        if live and (len(live) > 40 or numbers.random() < 0.45):
            plain.free(live.pop(numbers.randrange(len(live))))
        elif (address := plain.allocate(numbers.choice(choices), numbers.randrange(2))) is not None:
            live.append(address)
        if numbers.random() < 0.01:
            plain.empty()
    report = replay_snapshot(plain.trace, limit_bytes=limit_bytes)
    assert report.first_difference is None
    assert report.simulated.reserved_bytes == plain.reserved()
    assert any(step.action == "oom" for step in report.steps) == (limit_bytes == 100 * MIB)


# ------------------------------------------------------------------------------------------------ the real allocator


def record_random_requests(
    seed: int, limit_bytes: int | None
) -> tuple[list[dict[str, object]], list[tuple[int, int]], int | None]:
    """Random tensors of every class on two streams, the cache emptied now and then.

    Returns the trace, (allocated, reserved) bytes after each operation, and the limit to the byte. Runs in a process
    of its own, in which nothing was allocated before.
    """
    import torch

    torch.cuda.init()
    exact_limit_bytes = None
    if limit_bytes is not None:
        total_bytes = torch.cuda.mem_get_info()[1]
        fraction = limit_bytes / total_bytes
        exact_limit_bytes = int(fraction * total_bytes)
        torch.cuda.set_per_process_memory_fraction(fraction)
    numbers = random.Random(seed)
    streams = [torch.cuda.default_stream(), torch.cuda.Stream()]
    live: list[torch.Tensor] = []
    counted: list[tuple[int, int]] = []
    torch.cuda.memory._record_memory_history(max_entries=1_000_000, stacks="python", context=None)
    for _ in range(3_000):
        if live and (len(live) > 150 or numbers.random() < 0.45):
            live.pop(numbers.randrange(len(live)))
        else:
            size_bytes = int(2 ** numbers.uniform(0, 26))
            with torch.cuda.stream(numbers.choice(streams)), contextlib.suppress(torch.OutOfMemoryError):
                live.append(torch.empty(size_bytes, dtype=torch.uint8, device="cuda"))
        counted.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
        if numbers.random() < 0.003:
            torch.cuda.empty_cache()
    trace = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    wanted = ("action", "addr", "size", "stream", "pool_id")
    return [{key: e[key] for key in wanted if key in e} for e in trace], counted, exact_limit_bytes


@pytest.mark.gpu
@pytest.mark.parametrize("limit_bytes", [None, 401 * MIB])
@pytest.mark.parametrize("seed", range(3))
def test_equal_to_the_real_allocator_to_the_byte_at_every_event(seed: int, limit_bytes: int | None):
    """Reserved bytes and addresses by the recorded trace; allocated bytes by the counters read after each operation.

    The limit is odd where reserved bytes are even MiB, so that the driver's total may differ by a little.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        trace, counted, exact_limit_bytes = pool.submit(record_random_requests, seed, limit_bytes).result(timeout=300)
    report = replay_snapshot(trace, limit_bytes=exact_limit_bytes)
    assert report.first_difference is None
    assert report.simulated.peak_reserved_bytes == report.recorded_peak_reserved_bytes
    simulated = [
        (step.simulated_allocated_bytes, step.simulated_reserved_bytes)
        for step in report.steps
        if step.action in ("alloc", "free_completed", "oom")
    ]
    assert simulated == counted
    assert any(step.action == "oom" for step in report.steps) == (limit_bytes is not None)
