"""Measured memory of a call: exact bytes of the allocator, and growth of the process.

On the CPU the allocator's own events are replayed: the profiler reports each allocation and each free with its
address and the bytes that were asked for (``c10/core/CPUAllocator.cpp``, ProfiledCPUMemoryReporter), and the peak is
the largest running sum. The allocator rounds nothing, so the figure is exact to the byte. Two things it cannot see:

- memory that libraries take with malloc (oneDNN's scratch pads, BLAS buffers): that is in the process's growth only;
- the size of a block allocated before the profiler ran, so freeing one does not count. Where the call frees
  such blocks - gradients set to None, a state replaced - build them in ``setup``, which runs under the profiler.

On CUDA the peak is ``max_memory_allocated``, in which each block is rounded up to 512 bytes.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.autograd.profiler import profile, record_function

from edgetrain.targets import select_target

_RANGE = "edgetrain.memory.measure_peak"


@dataclass(frozen=True)
class Measurement:
    """What a call took.

    Attributes:
        allocator_peak_bytes: most bytes allocated by torch at once, above what was allocated when the call began.
        allocated_after_bytes: bytes still allocated when it ended, its result included; below zero where it freed
            more than it left.
        seconds: duration of the call, profiler included.
    """

    allocator_peak_bytes: int
    allocated_after_bytes: int
    seconds: float


def measure_peak(
    fn: Callable[[], object], *, device: torch.device | str = "cpu", setup: Callable[[], object] | None = None
) -> Measurement:
    """Calls ``setup``, then ``fn`` once, and measures ``fn``.

    Args:
        fn: what is measured; its result is held until the measurement ends.
        device: where its tensors live.
        setup: runs first and is not measured; what it allocates counts as freed when ``fn`` frees it.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        return _measure_cuda(fn, device, setup)
    profiler = _profiler()
    with muted():
        profiler.__enter__()
    try:
        if setup is not None:
            setup()
        began = time.perf_counter()
        with record_function(_RANGE):
            result = fn()
        seconds = time.perf_counter() - began
    finally:
        with muted():
            profiler.__exit__(None, None, None)
    del result
    recorded = profiler.kineto_results
    assert recorded is not None  # the profiler was stopped
    sizes = _sizes(recorded.experimental_event_tree())
    allocated = peak = 0
    for size in sizes:
        allocated += size
        peak = max(peak, allocated)
    return Measurement(peak, allocated, seconds)


def measure_process_growth(fn: Callable[[], object]) -> int:
    """Calls ``fn`` once, without a profiler: peak of the resident bytes of the process above those at its start.

    Memory that the C library held free at the start and hands out again does not show; call
    :func:`edgetrain.targets.release_free_memory` first where that matters. Linux only.

    Raises:
        BudgetError: not on Linux.
    """
    gc.collect()
    target = select_target("cpu")
    target.start()
    fn()
    return target.peak_bytes()


def record_allocations(
    function: Callable[..., object], arguments: Iterable[Sequence[object]]
) -> list[list[tuple[int, int]]]:
    """Calls ``function`` with each of ``arguments`` on the CPU: what torch's allocator did, as ``(address, bytes)``.

    Bytes are above zero for an allocation and below for the free of a block that the same call allocated; the result
    of a call outlives it. Arguments are asked for one by one and dropped after their call.
    """
    with muted(), _profiler() as profiler:  # it warns of blocks that were there before
        for these in arguments:
            with record_function(_RANGE):
                result = function(*these)
            del result, these
    recorded = profiler.kineto_results
    assert recorded is not None  # the profiler was stopped
    events, ranges = _memory_events(recorded.experimental_event_tree())
    histories = []
    position = 0
    for measured in ranges:
        live_bytes: dict[int, int] = {}
        history = []
        while position < len(events) and events[position].start_time_ns <= measured.end_time_ns:
            event, position = events[position], position + 1
            fields = event.extra_fields
            if event.start_time_ns < measured.start_time_ns:
                continue
            if fields.alloc_size > 0:
                live_bytes[fields.ptr] = fields.alloc_size
                history.append((fields.ptr, fields.alloc_size))
            elif fields.ptr in live_bytes:
                history.append((fields.ptr, -live_bytes.pop(fields.ptr)))
        histories.append(history)
    return histories


def _measure_cuda(
    fn: Callable[[], object], device: torch.device | str, setup: Callable[[], object] | None
) -> Measurement:
    if setup is not None:
        setup()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before_bytes = torch.cuda.memory_allocated(device)
    began = time.perf_counter()
    result = fn()
    torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    peak_bytes = torch.cuda.max_memory_allocated(device)
    after_bytes = torch.cuda.memory_allocated(device)
    del result
    return Measurement(peak_bytes - before_bytes, after_bytes - before_bytes, seconds)


def _profiler() -> profile:
    """That of torch.profiler without what is around it, which imports torch's compiler, a second, when it starts."""
    return profile(use_kineto=True, profile_memory=True)


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Keeps what the profiler's library writes to the process's stderr from the user, and all else that goes there."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _memory_events(roots: list[Any]) -> tuple[list[Any], list[Any]]:
    """Allocations and frees, and the measured ranges, each in order of time."""
    events: list[Any] = []
    ranges: list[Any] = []
    waiting = roots[::-1]
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children[::-1])
        if event.tag == _EventType.Allocation:
            events.append(event)
        elif event.name == _RANGE:
            ranges.append(event)
    # several threads; stable, so that equal times keep their order
    events.sort(key=lambda event: event.start_time_ns)
    ranges.sort(key=lambda event: event.start_time_ns)
    return events, ranges


def _sizes(roots: list[Any]) -> list[int]:
    """Bytes of every allocation (above zero) and free (below) inside the measured range, in order of time."""
    events, (measured,) = _memory_events(roots)
    sizes = []
    live_bytes: dict[int, int] = {}  # address -> size of what this profile saw being allocated
    for event in events:
        fields = event.extra_fields
        if fields.alloc_size > 0:
            size = live_bytes[fields.ptr] = fields.alloc_size
        else:
            # the reporter remembers sizes of earlier profiles, and the address may be another block's by now
            size = -live_bytes.pop(fields.ptr, 0)
        if measured.start_time_ns <= event.start_time_ns <= measured.end_time_ns:
            sizes.append(size)
    return sizes
