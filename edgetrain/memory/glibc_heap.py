"""What a process holds for its allocations: glibc's malloc with a fixed mmap threshold, simulated.

torch asks glibc for every tensor on the CPU (``malloc/malloc.c``; mallopt(3)):

- a block of at least the threshold that fits no free hole is a mapping of its own, rounded up to pages, and goes back
  to the kernel when it is freed;
- any other block comes from the heap: from the smallest free hole that holds it, else from the end, which is moved by
  brk. A hole keeps its pages; two that touch become one; the end goes back when more than the trim threshold is free
  there.

Every page of a block is taken for touched, and small objects of Python and of libraries are not in the events. glibc's
own threshold follows the program up to 32 MiB; a simulation of that came out up to a third below what processes took,
for a reason that was not established. :func:`edgetrain.targets.return_large_blocks` fixes the threshold.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

from edgetrain.memory.cuda_allocator import Allocation, MemoryEvent, Release
from edgetrain.units import KIB

PAGE_BYTES = 4096
TOP_PAD_BYTES = 128 * KIB
_ALIGNMENT, _HEADER = 64, 16


class GlibcHeap:
    """The memory of one arena and its mappings.

    Args:
        mmap_threshold_bytes: as :func:`edgetrain.targets.return_large_blocks` sets it.
        trim_threshold_bytes: likewise.

    Attributes:
        resident_bytes: held now.
        peak_bytes: most of it so far.
    """

    def __init__(self, mmap_threshold_bytes: int, trim_threshold_bytes: int) -> None:
        self._threshold, self._trim = mmap_threshold_bytes, trim_threshold_bytes
        self._mapped: dict[int, int] = {}
        self._used: dict[int, tuple[int, int]] = {}  # block -> (start, bytes)
        self._starts: dict[int, int] = {}  # hole: start -> bytes
        self._ends: dict[int, int] = {}  # hole: end -> start
        self._by_size: list[tuple[int, int]] = []  # holes as (bytes, start)
        self._top = self._break = 0  # where the free end begins, where the heap ends
        self._mapped_bytes = 0
        self.resident_bytes = self.peak_bytes = 0

    def allocate(self, block: int, nbytes: int) -> None:
        """Takes memory for ``block``."""
        size = -(-(nbytes + _HEADER) // _ALIGNMENT) * _ALIGNMENT + _ALIGNMENT
        position = bisect_left(self._by_size, (size, -1))
        if position < len(self._by_size):
            start = self._by_size[position][1]
            rest = self._take_hole(start) - size
            if rest:
                self._add_hole(start + size, rest)
            self._used[block] = start, size
        elif self._break - self._top >= size:
            self._used[block] = self._top, size
            self._top += size
        elif size >= self._threshold:
            self._mapped[block] = _pages(size)
            self._mapped_bytes += self._mapped[block]
        else:
            self._break = _pages(self._top + size + TOP_PAD_BYTES)
            self._used[block] = self._top, size
            self._top += size
        self._count()

    def free(self, block: int) -> None:
        """Gives the memory of ``block`` back, to the heap or to the kernel."""
        if block in self._mapped:
            self._mapped_bytes -= self._mapped.pop(block)
        else:
            start, size = self._used.pop(block)
            if start in self._ends:
                start, size = self._ends[start], size + self._take_hole(self._ends[start])
            if start + size in self._starts:
                size += self._take_hole(start + size)
            if start + size == self._top:
                self._top = start
                if self._break - self._top >= self._trim:
                    self._break = _pages(self._top + TOP_PAD_BYTES)
            else:
                self._add_hole(start, size)
        self._count()

    def _add_hole(self, start: int, size: int) -> None:
        self._starts[start] = size
        self._ends[start + size] = start
        insort(self._by_size, (size, start))

    def _take_hole(self, start: int) -> int:
        size = self._starts.pop(start)
        del self._ends[start + size]
        del self._by_size[bisect_left(self._by_size, (size, start))]
        return size

    def _count(self) -> None:
        # what was never reached of the free end is not touched, but the end is never far
        self.resident_bytes = self._mapped_bytes + self._break
        self.peak_bytes = max(self.peak_bytes, self.resident_bytes)


def process_peak_bytes(
    events: Iterable[MemoryEvent], *, mmap_threshold_bytes: int, trim_threshold_bytes: int, steps: int = 2
) -> int:
    """Most bytes that a process holds for ``events``, those of one step, run ``steps`` times.

    Args:
        events: what is released by none of them and allocated before the first release stays between the steps; what
            else is left is freed before the next one, as ``zero_grad`` does.
        mmap_threshold_bytes, trim_threshold_bytes: see :class:`GlibcHeap`.
        steps: the second finds the holes of the first.
    """
    heap = GlibcHeap(mmap_threshold_bytes, trim_threshold_bytes)
    recorded = list(events)
    released = {event.block for event in recorded if isinstance(event, Release)}
    first = next((k for k, event in enumerate(recorded) if event.block in released), len(recorded))
    for event in recorded[:first]:
        assert isinstance(event, Allocation)
        heap.allocate(event.block, event.nbytes)
    for _ in range(steps):
        left = []
        for event in recorded[first:]:
            if isinstance(event, Release):
                heap.free(event.block)
                continue
            heap.allocate(event.block, event.nbytes)
            if event.block not in released:
                left.append(event.block)
        for block in left:
            heap.free(block)
    return heap.peak_bytes


def _pages(nbytes: int) -> int:
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES
