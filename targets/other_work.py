"""How much of the processors other work took meanwhile: a time that was measured beside it is too long.

``/proc/stat`` counts what all processors did, the time that a hypervisor took away (``steal``) included;
``/proc/self/stat`` counts what this process did (``man 5 proc``). What is left of the busy time is others'. Where
threads wait for each other by spinning, as OpenMP's do, a little of it makes a parallel loop several times as long.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from edgetrain.targets.proc import ROOT

_FEWEST_TICKS = 50
"""Ticks of all processors below which a share means nothing: a quarter of a second on two."""


@dataclass(frozen=True)
class ProcessorTicks:
    """Ticks of the kernel's clock since the system started, over all processors.

    Attributes:
        total: idle ones included.
        busy: of whatever work.
        own: of this process, all its threads.
    """

    total: int
    busy: int
    own: int


def processor_ticks(root: Path = ROOT) -> ProcessorTicks | None:
    """The counts now; None where the system does not give them, as elsewhere than on Linux."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        first = (root / "proc/stat").read_text().splitlines()[0].split()
        own = (root / "proc/self/stat").read_text().rpartition(")")[2].split()
    except (OSError, IndexError):
        return None
    user, nice, system, idle, iowait, irq, softirq, steal = (int(ticks) for ticks in (*first[1:], *"0" * 8)[:8])
    busy = user + nice + system + irq + softirq + steal
    return ProcessorTicks(busy + idle + iowait, busy, int(own[11]) + int(own[12]))


def others_share(before: ProcessorTicks | None, after: ProcessorTicks | None) -> float | None:
    """Part of all processors' time that other work took between two counts, 0..1; None: not known, or too short."""
    if before is None or after is None or after.total - before.total < _FEWEST_TICKS:
        return None
    others = (after.busy - before.busy) - (after.own - before.own)
    return min(1.0, max(0.0, others / (after.total - before.total)))
