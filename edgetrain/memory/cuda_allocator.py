"""The CUDA caching allocator of PyTorch as a simulator: which bytes are reserved for a given list of requests.

Native backend, one device, any number of streams. Rules and their place in PyTorch, ``c10/cuda/
CUDACachingAllocator.cpp`` (newer versions, 2.13 among them, keep the constants in ``c10/core/AllocatorConfig.h``):

1. ``round_size``: a request is rounded up to a multiple of 512 bytes (kMinBlockSize), or, with
   ``roundup_power2_divisions`` = d, above 512 d bytes to the next of d equal steps between two powers of two.
2. ``get_pool``: up to 1 MiB (kSmallSize) after rounding the small pool serves it, else the large pool.
3. ``get_free_block``: of the cached blocks of that pool and stream, the smallest that holds the request, at equal
   sizes the one of the lowest address (BlockComparatorSize). A block of ``max_split_size`` or more never serves a
   request below ``max_split_size``, and one above it only with less than ``max_non_split_rounding`` left over.
   Only the first candidate is looked at: where it is refused, a new segment follows.
4. ``get_allocation_size``: a new segment has 2 MiB (kSmallBuffer) in the small pool; 20 MiB (kLargeBuffer, in newer
   versions the option ``large_segment_size``) below 10 MiB (kMinLargeAlloc); else the request rounded up to 2 MiB
   (kRoundLarge).
5. ``should_split``: the rest of a block is split off where it has at least 512 bytes (small pool) or more than 1 MiB
   (large pool, and the request is below ``max_split_size``). A rest that stays belongs to the block, and
   ``memory_allocated`` counts the whole block: more than the rounded request.
6. ``free_block``: a block merges with its free neighbours of the same segment. Segments stay reserved.
7. ``alloc_block``: where reserved bytes and the new segment together exceed the limit, first enough oversize blocks
   of the stream are released (``release_available_cached_blocks``, only with ``max_split_size``), then every
   segment that is wholly free (``release_cached_blocks``, the same as ``empty_cache``); else out of memory.

Not modelled: expandable segments, private pools (CUDA graphs), ``garbage_collection_threshold``, callbacks that free
memory. **Not knowable: the order of the addresses that cudaMalloc returns.** It decides only between free blocks of
equal size in different segments. Here each new segment lies above all earlier ones; :func:`replay_snapshot` takes
the recorded addresses instead. ``limit_bytes`` bounds the reserved bytes, as ``set_per_process_memory_fraction``
does; a full device fails the same way, at a number of bytes that the driver alone knows.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from edgetrain.errors import BudgetError, DataError, UsageError
from edgetrain.units import MIB, format_mib

_FIRST_ADDRESS = 1 << 60  # above every address of a device, so that recorded segments and ours never meet
_DIVISION_INTERVALS = 16  # kRoundUpPowerOfTwoIntervals: powers of two from 1 MiB


@dataclass(frozen=True)
class AllocatorSettings:
    """Constants and options of the allocator; the defaults are PyTorch's.

    Attributes:
        min_block_bytes: kMinBlockSize.
        small_limit_bytes: kSmallSize, the largest request of the small pool, and the largest rest not split off.
        small_segment_bytes: kSmallBuffer.
        large_segment_bytes: kLargeBuffer, or ``large_segment_size_mb``.
        large_limit_bytes: kMinLargeAlloc, from which a request has a segment of its own.
        round_large_bytes: kRoundLarge.
        max_split_bytes: ``max_split_size_mb`` in bytes; None: every block may be split.
        max_non_split_rounding_bytes: ``max_non_split_rounding_mb`` in bytes; versions without that option
            behave as with 20 MiB.
        roundup_power2_divisions: 0 or 1 for off, a power of two for all sizes, or 16 of these: one for each power of
            two from 1 MiB, the first also for what is below and the last also for what is above.
    """

    min_block_bytes: int = 512
    small_limit_bytes: int = MIB
    small_segment_bytes: int = 2 * MIB
    large_segment_bytes: int = 20 * MIB
    large_limit_bytes: int = 10 * MIB
    round_large_bytes: int = 2 * MIB
    max_split_bytes: int | None = None
    max_non_split_rounding_bytes: int = 20 * MIB
    roundup_power2_divisions: int | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        if self.large_segment_bytes < self.large_limit_bytes:
            raise UsageError(
                found=f"large segments of {self.large_segment_bytes} bytes",
                expected=f"at least {self.large_limit_bytes} bytes, so that a segment holds every request it serves",
                action="raise large_segment_bytes",
            )
        if self.max_split_bytes is not None and self.max_split_bytes < self.large_segment_bytes:
            raise UsageError(
                found=f"max_split_bytes {self.max_split_bytes}",
                expected=f"at least large_segment_bytes ({self.large_segment_bytes}), as PyTorch does",
                action="raise max_split_bytes or leave it out",
            )
        divisions = self.roundup_power2_divisions
        listed = (divisions,) if isinstance(divisions, int) else divisions
        if len(listed) not in (1, _DIVISION_INTERVALS) or any(d < 0 or d & (d - 1) for d in listed):
            raise UsageError(
                found=f"roundup_power2_divisions {divisions}",
                expected=f"0 or a power of two, or {_DIVISION_INTERVALS} of these",
                action="pass 4, for example",
            )

    def rounded_bytes(self, nbytes: int) -> int:
        """Bytes that a request takes (``round_size``)."""
        divisions = self.roundup_power2_divisions
        if isinstance(divisions, tuple):
            interval = nbytes.bit_length() - MIB.bit_length()
            divisions = divisions[min(max(interval, 0), len(divisions) - 1)]
        if divisions > 1 and nbytes > self.min_block_bytes * divisions:
            return _round_up(nbytes, (1 << (nbytes.bit_length() - 1)) // divisions)
        return max(self.min_block_bytes, _round_up(nbytes, self.min_block_bytes))

    def is_small(self, rounded_bytes: int) -> bool:
        """Whether the small pool serves a rounded request (``get_pool``)."""
        return rounded_bytes <= self.small_limit_bytes

    def segment_bytes(self, rounded_bytes: int) -> int:
        """Bytes of the segment that a rounded request takes where no cached block serves it."""
        if self.is_small(rounded_bytes):
            return self.small_segment_bytes
        if rounded_bytes < self.large_limit_bytes:
            return self.large_segment_bytes
        return _round_up(rounded_bytes, self.round_large_bytes)

    def splits(self, block_bytes: int, rounded_bytes: int) -> bool:
        """Whether the rest of a block that serves a rounded request becomes a block of its own (``should_split``)."""
        rest_bytes = block_bytes - rounded_bytes
        if self.is_small(rounded_bytes):
            return rest_bytes >= self.min_block_bytes
        below = self.max_split_bytes is None or rounded_bytes < self.max_split_bytes
        return below and rest_bytes > self.small_limit_bytes


DEFAULT_SETTINGS = AllocatorSettings()


class SimulatedOutOfMemoryError(BudgetError):
    """The simulated allocator cannot serve a request, even with every free segment released.

    Attributes:
        requested_bytes: what was asked for.
        segment_bytes: the segment that it needed.
        allocated_bytes: in use when it failed.
        reserved_bytes: reserved when it failed, free segments already released.
        limit_bytes: most bytes that may be reserved.
    """

    def __init__(
        self, *, requested_bytes: int, segment_bytes: int, allocated_bytes: int, reserved_bytes: int, limit_bytes: int
    ) -> None:
        self.requested_bytes = requested_bytes
        self.segment_bytes = segment_bytes
        self.allocated_bytes = allocated_bytes
        self.reserved_bytes = reserved_bytes
        self.limit_bytes = limit_bytes
        super().__init__(
            found=f"a request of {requested_bytes} bytes needs a segment of {format_mib(segment_bytes)} beside "
            f"{format_mib(reserved_bytes)} reserved ({format_mib(allocated_bytes)} allocated)",
            expected=f"at most {format_mib(limit_bytes)} reserved",
            action="raise the limit, or plan for a smaller peak",
        )


BlockState: TypeAlias = Literal["allocated", "awaiting_free", "free"]


@dataclass(frozen=True)
class BlockSnapshot:
    """A piece of a segment; ``requested_bytes`` is 0 where it is free."""

    address: int
    size_bytes: int
    requested_bytes: int
    state: BlockState


@dataclass(frozen=True)
class SegmentSnapshot:
    """What one cudaMalloc returned, and its blocks by address."""

    address: int
    size_bytes: int
    stream: int
    small: bool
    blocks: tuple[BlockSnapshot, ...]


class _Block:
    """A block and its neighbours in the segment."""

    __slots__ = ("address", "following", "previous", "requested_bytes", "segment", "size_bytes", "state")

    def __init__(self, segment: _Segment, address: int, size_bytes: int) -> None:
        self.segment = segment
        self.address = address
        self.size_bytes = size_bytes
        self.requested_bytes = 0
        self.state: BlockState = "free"
        self.previous: _Block | None = None
        self.following: _Block | None = None

    def split(self, size_bytes: int) -> _Block:
        """Keeps the first ``size_bytes`` and returns the rest."""
        rest = _Block(self.segment, self.address + size_bytes, self.size_bytes - size_bytes)
        rest.previous, rest.following = self, self.following
        if rest.following is not None:
            rest.following.previous = rest
        self.following, self.size_bytes = rest, size_bytes
        return rest

    def absorb_following(self) -> None:
        absorbed = self.following
        assert absorbed is not None
        self.size_bytes += absorbed.size_bytes
        self.following = absorbed.following
        if self.following is not None:
            self.following.previous = self


class _Segment:
    """A segment; its first block stays the same object through all splits and merges."""

    __slots__ = ("cache", "first", "size_bytes", "small", "stream")

    def __init__(self, address: int, size_bytes: int, stream: int, small: bool, cache: list[tuple[int, int]]) -> None:
        self.size_bytes = size_bytes
        self.stream = stream
        self.small = small
        self.cache = cache  # the free blocks of this pool and stream: (size, address), sorted
        self.first = _Block(self, address, size_bytes)


class CachingAllocator:
    """State of the simulated allocator; the names of its figures are those of ``torch.cuda.memory_stats``.

    Arguments:
        settings: constants of the rules.
        limit_bytes: most bytes that may be reserved; None: no limit.

    Attributes:
        requested_bytes: sum of what was asked for and is in use.
        allocated_bytes: sum of the blocks in use (``torch.cuda.memory_allocated``).
        active_bytes: the same, with the blocks whose free awaits another stream.
        reserved_bytes: sum of the segments (``torch.cuda.memory_reserved``).
        peak_allocated_bytes: largest ``allocated_bytes`` so far.
        peak_reserved_bytes: largest ``reserved_bytes`` so far.
        retries: how often every free segment was released to serve a request (``num_alloc_retries``).
    """

    def __init__(self, settings: AllocatorSettings = DEFAULT_SETTINGS, *, limit_bytes: int | None = None) -> None:
        self.settings = settings
        self.limit_bytes = limit_bytes
        self.requested_bytes = 0
        self.allocated_bytes = 0
        self.active_bytes = 0
        self.reserved_bytes = 0
        self.peak_allocated_bytes = 0
        self.peak_reserved_bytes = 0
        self.retries = 0
        self._caches: dict[tuple[bool, int], list[tuple[int, int]]] = {}
        self._free: dict[int, _Block] = {}  # free blocks by address
        self._segments: dict[int, _Segment] = {}  # by address
        self._live: dict[int, _Block | None] = {}  # by block id; None for a request of zero bytes
        self._awaiting: dict[int, _Block | None] = {}
        self._next_id = 0
        self._next_address = _FIRST_ADDRESS
        self._address_hint: int | None = None

    def allocate(self, nbytes: int, stream: int = 0) -> int:
        """Takes a block for ``nbytes`` and returns its id; zero bytes take none.

        Raises:
            SimulatedOutOfMemoryError: the limit does not allow it; the free segments are released all the same.
        """
        if nbytes < 0:
            raise UsageError(found=f"a request of {nbytes} bytes", expected="zero or more", action="check the events")
        block = self._take(nbytes, stream) if nbytes else None
        block_id = self._next_id
        self._next_id += 1
        self._live[block_id] = block
        return block_id

    def free(self, block_id: int) -> None:
        """Gives a block back to the cache."""
        self.request_free(block_id)
        self.complete_free(block_id)

    def request_free(self, block_id: int) -> None:
        """First half of a free: the block is no longer allocated, but another stream still uses it."""
        if block_id not in self._live:
            raise _unknown_block(block_id)
        block = self._awaiting[block_id] = self._live.pop(block_id)
        if block is not None:
            block.state = "awaiting_free"
            self.allocated_bytes -= block.size_bytes
            self.requested_bytes -= block.requested_bytes

    def complete_free(self, block_id: int) -> None:
        """Second half of a free: the block may serve again."""
        if block_id not in self._awaiting:
            raise _unknown_block(block_id)
        block = self._awaiting.pop(block_id)
        if block is None:
            return
        self.active_bytes -= block.size_bytes
        block.state, block.requested_bytes = "free", 0
        previous, following = block.previous, block.following
        if following is not None and following.state == "free":
            self._uncache(following)
            block.absorb_following()
        if previous is not None and previous.state == "free":
            self._uncache(previous)
            previous.absorb_following()
            block = previous
        self._cache(block)

    def empty_cache(self) -> None:
        """Completes every free that waits, and releases the segments that are wholly free."""
        for block_id in list(self._awaiting):
            self.complete_free(block_id)
        for segment in [s for s in self._segments.values() if _is_free(s)]:
            self._release(segment)

    @property
    def free_bytes(self) -> int:
        """Reserved bytes that no block in use holds."""
        return self.reserved_bytes - self.active_bytes

    @property
    def releasable_bytes(self) -> int:
        """Bytes of the segments that are wholly free, which :meth:`empty_cache` would release."""
        return sum(segment.size_bytes for segment in self._segments.values() if _is_free(segment))

    @property
    def fragmentation(self) -> float:
        """Share of the free bytes that lies outside the largest free block: 1 - largest / free, 0 where none is."""
        largest_bytes = max((cache[-1][0] for cache in self._caches.values() if cache), default=0)
        return 1 - largest_bytes / self.free_bytes if self.free_bytes else 0.0

    def address(self, block_id: int) -> int | None:
        """Simulated address of an allocated block; None for a request of zero bytes."""
        if block_id not in self._live:
            raise _unknown_block(block_id)
        block = self._live[block_id]
        return None if block is None else block.address

    def segments(self) -> tuple[SegmentSnapshot, ...]:
        """All segments by address, with their blocks."""
        return tuple(_snapshot(self._segments[address]) for address in sorted(self._segments))

    def _take(self, nbytes: int, stream: int) -> _Block:
        size_bytes = self.settings.rounded_bytes(nbytes)
        small = self.settings.is_small(size_bytes)
        cache = self._caches.setdefault((small, stream), [])
        block = self._best_fit(cache, size_bytes)
        if block is None:
            segment_bytes = self.settings.segment_bytes(size_bytes)
            self._make_room(cache, nbytes, size_bytes, segment_bytes)
            block = self._add_segment(segment_bytes, stream, small, cache).first
        if self.settings.splits(block.size_bytes, size_bytes):
            self._cache(block.split(size_bytes))
        block.state, block.requested_bytes = "allocated", nbytes
        self.requested_bytes += nbytes
        self.active_bytes += block.size_bytes
        self.allocated_bytes += block.size_bytes
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return block

    def _best_fit(self, cache: list[tuple[int, int]], size_bytes: int) -> _Block | None:
        position = bisect_left(cache, (size_bytes, -1))
        if position == len(cache):
            return None
        found_bytes, address = cache[position]
        limit_bytes = self.settings.max_split_bytes
        if limit_bytes is not None:
            if size_bytes < limit_bytes <= found_bytes:
                return None
            if limit_bytes <= size_bytes <= found_bytes - self.settings.max_non_split_rounding_bytes:
                return None
        del cache[position]
        return self._free.pop(address)

    def _fits(self, segment_bytes: int) -> bool:
        return self.limit_bytes is None or self.reserved_bytes + segment_bytes <= self.limit_bytes

    def _make_room(self, cache: list[tuple[int, int]], nbytes: int, size_bytes: int, segment_bytes: int) -> None:
        """Releases what is needed for a new segment."""
        if self._fits(segment_bytes) or (self._release_oversize(cache, size_bytes) and self._fits(segment_bytes)):
            return
        self.empty_cache()
        self.retries += 1
        if not self._fits(segment_bytes):
            assert self.limit_bytes is not None
            raise SimulatedOutOfMemoryError(
                requested_bytes=nbytes,
                segment_bytes=segment_bytes,
                allocated_bytes=self.allocated_bytes,
                reserved_bytes=self.reserved_bytes,
                limit_bytes=self.limit_bytes,
            )

    def _release_oversize(self, cache: list[tuple[int, int]], size_bytes: int) -> bool:
        """Releases the smallest oversize block that holds the request, else the largest ones until they would."""
        if self.settings.max_split_bytes is None:
            return False
        wanted_bytes = max(size_bytes, self.settings.max_split_bytes)
        position = bisect_left(cache, (wanted_bytes, -1))
        if position < len(cache):
            self._release(self._free[cache[position][1]].segment)
            return True
        released_bytes = 0
        while released_bytes < wanted_bytes and cache and cache[-1][0] >= self.settings.max_split_bytes:
            released_bytes += cache[-1][0]
            self._release(self._free[cache[-1][1]].segment)
        return released_bytes >= wanted_bytes

    def _add_segment(self, size_bytes: int, stream: int, small: bool, cache: list[tuple[int, int]]) -> _Segment:
        address, self._address_hint = self._address_hint, None
        if address is None or any(
            s.first.address < address + size_bytes and address < s.first.address + s.size_bytes
            for s in self._segments.values()
        ):
            address = self._next_address
            self._next_address += _round_up(size_bytes, self.settings.round_large_bytes)
        segment = self._segments[address] = _Segment(address, size_bytes, stream, small, cache)
        self.reserved_bytes += size_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        return segment

    def _release(self, segment: _Segment) -> None:
        self._uncache(segment.first)
        del self._segments[segment.first.address]
        self.reserved_bytes -= segment.size_bytes

    def _cache(self, block: _Block) -> None:
        insort(block.segment.cache, (block.size_bytes, block.address))
        self._free[block.address] = block

    def _uncache(self, block: _Block) -> None:
        cache = block.segment.cache
        del cache[bisect_left(cache, (block.size_bytes, block.address))]
        del self._free[block.address]


@dataclass(frozen=True)
class Allocation:
    """A request for ``nbytes``, named ``block`` until its release."""

    block: int
    nbytes: int
    stream: int = 0


@dataclass(frozen=True)
class Release:
    """The free of a block."""

    block: int


MemoryEvent: TypeAlias = Allocation | Release


@dataclass(frozen=True)
class AllocatorReport:
    """What a list of events came to: peaks, and the state after the last one."""

    events: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    segments: int
    retries: int
    fragmentation: float


def replay(
    events: Iterable[MemoryEvent], *, settings: AllocatorSettings = DEFAULT_SETTINGS, limit_bytes: int | None = None
) -> AllocatorReport:
    """Feeds ``events`` to a fresh allocator.

    Raises:
        SimulatedOutOfMemoryError: a request does not fit the limit.
        UsageError: a block is allocated twice or released without being allocated.
    """
    allocator = CachingAllocator(settings, limit_bytes=limit_bytes)
    ids: dict[int, int] = {}
    count = 0
    for event in events:
        count += 1
        if isinstance(event, Release):
            if event.block not in ids:
                raise _unknown_block(event.block)
            allocator.free(ids.pop(event.block))
        elif event.block in ids:
            raise UsageError(
                found=f"block {event.block} is allocated twice",
                expected="a release in between",
                action="give each block that lives a number of its own",
            )
        else:
            ids[event.block] = allocator.allocate(event.nbytes, event.stream)
    return _report(allocator, count)


@dataclass(frozen=True)
class TraceStep:
    """State after one entry of a recorded trace.

    Attributes:
        index: position in the trace.
        action: ``alloc``, ``free_requested``, ``free_completed``, ``oom`` or ``segment_free``.
        simulated_reserved_bytes: by the simulator.
        recorded_reserved_bytes: by the recorded segments.
        simulated_allocated_bytes: sum of the simulator's blocks in use.
        recorded_requested_bytes: sum of the recorded requests in use; the trace holds no sizes of blocks.
        same_outcome: whether an ``alloc`` got the recorded address, and whether the request of an ``oom`` fails here
            too (taken for granted without a limit); true for other actions.
    """

    index: int
    action: str
    simulated_reserved_bytes: int
    recorded_reserved_bytes: int
    simulated_allocated_bytes: int
    recorded_requested_bytes: int
    same_outcome: bool


@dataclass(frozen=True)
class TraceReport:
    """A recorded trace beside its simulation."""

    steps: tuple[TraceStep, ...]
    simulated: AllocatorReport
    recorded_peak_reserved_bytes: int

    @property
    def first_difference(self) -> TraceStep | None:
        """The first step at which reserved bytes or the outcome differ; None where all are equal to the byte."""
        return next(
            (s for s in self.steps if s.simulated_reserved_bytes != s.recorded_reserved_bytes or not s.same_outcome),
            None,
        )


def replay_snapshot(
    trace: Sequence[Mapping[str, Any]],
    *,
    settings: AllocatorSettings = DEFAULT_SETTINGS,
    limit_bytes: int | None = None,
) -> TraceReport:
    """Feeds the requests of a recorded trace to a fresh allocator, and compares reserved bytes after each.

    ``trace`` is ``torch.cuda.memory._snapshot()["device_traces"][0]`` of a history that began while nothing was
    reserved and lost no entry. Its ``size`` (``record_trace``) is what was *asked for* in ``alloc``,
    ``free_requested`` and ``free_completed``, the rounded request in ``oom`` and the bytes of the segment in
    ``segment_alloc`` and ``segment_free``; rounding a rounded size changes nothing.

    Of the segments only two facts are used: their addresses, for ties, and that a run of ``segment_free`` means a
    cache emptied, by ``empty_cache`` or by a request that found the device full. Both leave the same state, except
    that with ``max_split_size`` a request may release a part, which is then left to the simulated limit. A free that
    waited for another stream until a request found the device full counts as completed before that request.

    Raises:
        DataError: the trace begins too late, lost entries, or holds what is not modelled.
        SimulatedOutOfMemoryError: a request that was served does not fit ``limit_bytes``.
    """
    allocator = CachingAllocator(settings, limit_bytes=limit_bytes)
    recorded = _RecordedSegments()
    live: dict[int, tuple[int, int]] = {}  # recorded address -> block id, requested bytes
    awaiting: dict[int, int] = {}
    requested_bytes = 0
    steps: list[TraceStep] = []
    releasing = False  # inside a run of segment_free
    for index, entry in enumerate(trace):
        action, address, size_bytes = entry["action"], entry["addr"], entry["size"]
        if action in ("segment_map", "segment_unmap") or tuple(entry.get("pool_id", (0, 0))) != (0, 0):
            raise DataError(
                found=f"entry {index} of the trace is {action} of pool {entry.get('pool_id', (0, 0))}",
                expected="the default pool without expandable segments",
                action="record without CUDA graphs and with expandable_segments:False",
            )
        same_outcome = True
        match action:
            case "segment_alloc":
                recorded.add(address, size_bytes)
                allocator._address_hint = address
                continue
            case "segment_free":
                if not releasing and _empties(allocator, trace, index):
                    allocator.empty_cache()
                recorded.remove(address, size_bytes, index)
                releasing = _action(trace, index + 1) in ("segment_free", "free_completed", "segment_alloc", "oom")
                if releasing:
                    continue
            case "alloc":
                recorded.check(address, index)
                block_id = allocator.allocate(size_bytes, entry["stream"])
                same_outcome = allocator.address(block_id) == address
                live[address] = block_id, size_bytes
                requested_bytes += size_bytes
            case "free_requested":
                if address not in live:
                    raise _truncated(index, f"free of the unknown address {address:#x}")
                block_id, block_bytes = live.pop(address)
                awaiting[address] = block_id
                allocator.request_free(block_id)
                requested_bytes -= block_bytes
            case "free_completed":
                if address not in awaiting:
                    raise _truncated(index, f"free of the unknown address {address:#x}")
                block_id = awaiting.pop(address)
                if block_id in allocator._awaiting:  # emptying the cache may have completed it
                    allocator.complete_free(block_id)
                if releasing:
                    continue
            case "oom":
                same_outcome = limit_bytes is None or _fails(allocator, size_bytes, entry["stream"])
                allocator.empty_cache()
            case _:
                continue
        releasing = False
        allocator._address_hint = None
        steps.append(
            TraceStep(
                index,
                action,
                allocator.reserved_bytes,
                recorded.reserved_bytes,
                allocator.allocated_bytes,
                requested_bytes,
                same_outcome,
            )
        )
    return TraceReport(tuple(steps), _report(allocator, len(steps)), recorded.peak_bytes)


class _RecordedSegments:
    """The segments that a trace says were reserved."""

    def __init__(self) -> None:
        self.reserved_bytes = 0
        self.peak_bytes = 0
        self._spans: list[tuple[int, int]] = []  # (address, size), sorted

    def add(self, address: int, size_bytes: int) -> None:
        insort(self._spans, (address, size_bytes))
        self.reserved_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.reserved_bytes)

    def remove(self, address: int, size_bytes: int, index: int) -> None:
        position = bisect_left(self._spans, (address, size_bytes))
        if position == len(self._spans) or self._spans[position] != (address, size_bytes):
            raise _truncated(index, f"release of the unknown segment {address:#x}")
        del self._spans[position]
        self.reserved_bytes -= size_bytes

    def check(self, address: int, index: int) -> None:
        """Refuses an address outside every segment."""
        position = bisect_right(self._spans, (address, _FIRST_ADDRESS)) - 1
        start, size_bytes = self._spans[position] if position >= 0 else (0, 0)
        if address >= start + size_bytes:
            raise _truncated(index, f"block at {address:#x} in an unknown segment")


def _empties(allocator: CachingAllocator, trace: Sequence[Mapping[str, Any]], index: int) -> bool:
    """Whether the run of segment_free that begins at ``index`` releases all that is free, not a part."""
    if allocator.settings.max_split_bytes is None:
        return True
    released_bytes = 0
    while (action := _action(trace, index)) in ("segment_free", "free_completed"):
        released_bytes += trace[index]["size"] if action == "segment_free" else 0
        index += 1
    return released_bytes == allocator.releasable_bytes


def _fails(allocator: CachingAllocator, nbytes: int, stream: int) -> bool:
    """Whether a request finds no room; nothing is held afterwards."""
    try:
        allocator.free(allocator.allocate(nbytes, stream))
    except SimulatedOutOfMemoryError:
        return True
    return False


def _action(trace: Sequence[Mapping[str, Any]], index: int) -> str:
    return trace[index]["action"] if index < len(trace) else ""


def _report(allocator: CachingAllocator, events: int) -> AllocatorReport:
    return AllocatorReport(
        events=events,
        peak_allocated_bytes=allocator.peak_allocated_bytes,
        peak_reserved_bytes=allocator.peak_reserved_bytes,
        allocated_bytes=allocator.allocated_bytes,
        reserved_bytes=allocator.reserved_bytes,
        segments=len(allocator._segments),
        retries=allocator.retries,
        fragmentation=allocator.fragmentation,
    )


def _is_free(segment: _Segment) -> bool:
    return segment.first.state == "free" and segment.first.following is None


def _snapshot(segment: _Segment) -> SegmentSnapshot:
    blocks = []
    block: _Block | None = segment.first
    while block is not None:
        blocks.append(BlockSnapshot(block.address, block.size_bytes, block.requested_bytes, block.state))
        block = block.following
    return SegmentSnapshot(segment.first.address, segment.size_bytes, segment.stream, segment.small, tuple(blocks))


def _round_up(nbytes: int, step_bytes: int) -> int:
    return -(-nbytes // step_bytes) * step_bytes


def _unknown_block(block: int) -> UsageError:
    return UsageError(
        found=f"free of block {block}",
        expected="a block that is allocated and not yet freed",
        action="check the order of the events",
    )


def _truncated(index: int, what: str) -> DataError:
    return DataError(
        found=f"entry {index} of the trace: {what}",
        expected="a history from the first allocation on, without lost entries",
        action="call _record_memory_history before the first CUDA allocation, with max_entries above their number",
    )
