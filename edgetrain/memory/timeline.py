"""From the operators of a step to its allocation events, its peak, and what is alive there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from edgetrain.memory.cuda_allocator import Allocation, MemoryEvent, Release
from edgetrain.memory.inner import Inner
from edgetrain.memory.operators import DeviceKind, InnerAllocations
from edgetrain.memory.trace import Call, Kind, StepTrace

INNER = "inside the operator"
"""What a temporary of an operator serves as, where a block of the trace has its kind."""


@dataclass(frozen=True)
class Point:
    """A moment of a step: after one of its operators has done something with memory.

    Attributes:
        call: number of the operator; -1 before the first.
        bytes: allocated.
    """

    call: int
    bytes: int


@dataclass(frozen=True)
class Timeline:
    """The memory of one training step.

    Attributes:
        events: allocations and releases in order; those of what was there before the step come first.
        points: allocated bytes, one for each operator: the most while it ran.
        resident_bytes: what was there when the step began.
        peak_bytes: most bytes allocated at once, ``resident_bytes`` included.
        peak: when.
        kinds: bytes alive at the peak by what they serve as.
        modules: bytes alive at the peak by the path of the module that made them.
    """

    events: tuple[MemoryEvent, ...]
    points: tuple[Point, ...]
    resident_bytes: int
    peak_bytes: int
    peak: Point
    peak_call: Call | None
    kinds: dict[str, int]
    modules: dict[str, int]


def timeline(trace: StepTrace, device: DeviceKind = "cpu", *, measured: bool = True) -> Timeline:
    """What ``trace`` does to the allocator of ``device``.

    Args:
        measured: whether convolutions may be run here on small batches to see what they take inside (CPU).
    """
    events = list(numbered_events(trace, InnerAllocations(trace.calls, device, measured=measured)))
    live: dict[int, int] = {}
    allocated = peak_bytes = resident = 0
    peak_at, peak_event = -1, 0
    most: dict[int, int] = {}
    for position, (call, event) in enumerate(events):
        if isinstance(event, Release):
            allocated -= live.pop(event.block)
            continue
        live[event.block] = event.nbytes
        allocated += event.nbytes
        if call < 0:
            resident = allocated
        most[call] = max(most.get(call, 0), allocated)
        if allocated > peak_bytes:
            peak_bytes, peak_at, peak_event = allocated, call, position
    kinds, modules = _alive(trace, [event for _, event in events[: peak_event + 1]], peak_at)
    return Timeline(
        events=tuple(event for _, event in events),
        points=tuple(Point(call, most[call]) for call in sorted(most)),
        resident_bytes=resident,
        peak_bytes=peak_bytes,
        peak=Point(peak_at, peak_bytes),
        peak_call=trace.calls[peak_at] if peak_at >= 0 else None,
        kinds=kinds,
        modules=modules,
    )


def numbered_events(trace: StepTrace, inner: InnerAllocations) -> Iterator[tuple[int, MemoryEvent]]:
    """Allocations and releases, each with the number of the operator in which it happens, -1 before the first."""
    alive = set()
    for block in trace.resident:
        alive.add(block)
        yield -1, Allocation(block, trace.blocks[block].nbytes)
    temporaries = len(trace.blocks)
    for number, call in enumerate(trace.calls):
        for block in call.freed:
            if block in alive:
                alive.discard(block)
                yield number, Release(block)
        waiting = list(call.made)
        names: dict[int, int] = {}
        for step in inner.of(call):
            if step.name is None:
                for block in _results(step, waiting, trace):
                    alive.add(block)
                    yield number, Allocation(block, trace.blocks[block].nbytes)
            elif step.nbytes:
                names[step.name] = temporaries
                temporaries += 1
                yield number, Allocation(names[step.name], step.nbytes)
            else:
                yield number, Release(names.pop(step.name))


def _results(step: Inner, waiting: list[int], trace: StepTrace) -> list[int]:
    """The results that ``step`` allocates: the one of its size, or all that are left."""
    if step.nbytes:
        matching = [b for b in waiting if trace.blocks[b].nbytes == step.nbytes]
        chosen = matching[:1] or waiting[:1]
    else:
        chosen = list(waiting)
    for block in chosen:
        waiting.remove(block)
    return [b for b in chosen if trace.blocks[b].nbytes]


def _alive(trace: StepTrace, events: list[MemoryEvent], call: int) -> tuple[dict[str, int], dict[str, int]]:
    live: dict[int, int] = {}
    for event in events:
        if isinstance(event, Release):
            del live[event.block]
        else:
            live[event.block] = event.nbytes
    kinds: Counter[str] = Counter()
    modules: Counter[str] = Counter()
    for block, nbytes in live.items():
        if block < len(trace.blocks):
            made = trace.blocks[block]
            kind: Kind | str = made.kind
            module = made.module
        else:
            kind, module = INNER, trace.calls[call].module
        kinds[kind] += nbytes
        if kind not in ("weights", "gradients", "optimizer", "batch"):
            modules[module] += nbytes
    return dict(kinds), dict(modules)
