"""Whether the system as a whole is short of memory: stalls, swapping, and what is left.

The kernel says in ``/proc/pressure/memory`` which share of the time tasks waited for memory (pressure stall
information, since Linux 4.20): ``full`` is the share in which all of them did. Pages that come back from swap and go
out again are counted in ``/proc/vmstat``, zram's too. Pages that only go out are no harm: what is idle makes room.

| reading | limit | why |
|---|---|---|
| ``full avg10`` of the last 10 s | 10 % | the work of a second takes 1.1 |
| pages swapped in and out, each | 8 MiB/s over at least 2 s | thrashing: what is swapped out is wanted again |
| MemAvailable | 2 % of MemTotal | what the kernel's out-of-memory killer acts on is near |

Limits are this module's choice. A reading that the system does not give counts as none.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgetrain.targets.proc import ROOT, host_memory
from edgetrain.units import MIB, format_mib

STALL_LIMIT = 0.10
SWAP_LIMIT_BYTES_PER_SECOND = 8 * MIB
AVAILABLE_LIMIT = 0.02
_WINDOW_SECONDS = 2.0
_SETTLE_SECONDS = 15.0  # longer than the average of 10 s remembers


@dataclass(frozen=True)
class Pressure:
    """One look at the system.

    Attributes:
        stalled: share of the last 10 s in which every task waited for memory, 0..1; None: the kernel does not say.
        swapped_in_bytes: since the system started; ``swapped_out_bytes`` likewise; None: it does not say.
        available_bytes: MemAvailable.
        total_bytes: MemTotal.
    """

    stalled: float | None
    swapped_in_bytes: int | None
    swapped_out_bytes: int | None
    available_bytes: int
    total_bytes: int


def read_pressure(root: Path = ROOT) -> Pressure:
    """The readings now."""
    memory = host_memory(root)
    counts = _swap_counts(root)
    return Pressure(
        _stalled(root),
        counts.get("pswpin"),
        counts.get("pswpout"),
        memory.available_bytes,
        memory.total_bytes,
    )


class PressureGauge:
    """Readings over time; looks at the system at most once in ``every`` seconds.

    Args:
        read: gives the readings.
        clock: seconds.
    """

    def __init__(
        self,
        read: Callable[[], Pressure] = read_pressure,
        *,
        clock: Callable[[], float] = time.monotonic,
        every: float = 1.0,
    ) -> None:
        self._read, self._clock, self._every = read, clock, every
        self._began: tuple[float, Pressure] | None = None
        self._looked_at = self._reported_at = float("-inf")
        self._thrashes: str | None = None
        self._warned: str | None = None
        self._said = False

    def reason(self) -> str | None:
        """Which reading passes its limit, with both; None: none does.

        After a reason none is given for 15 s: what was done about it takes as long to show in the averages.
        """
        now = self._clock()
        if now - self._looked_at < self._every:
            return None
        self._looked_at = now
        found = self._read()
        self._thrashes = self._swapping(now, found) or self._stalling(found)
        if self._thrashes is None:
            self._said = False
        elif not self._said:
            self._warned, self._said = self._thrashes, True
        reason = self._thrashes or _scarce(found)
        if reason is None or now - self._reported_at < _SETTLE_SECONDS:
            return None
        self._reported_at = now
        return reason

    def warning(self) -> str | None:
        """That the last :meth:`reason` looked at a system that had begun to thrash, once; else None."""
        text, self._warned = self._warned, None
        return text

    def _swapping(self, now: float, found: Pressure) -> str | None:
        if found.swapped_in_bytes is None or found.swapped_out_bytes is None:
            return None
        if self._began is None:
            self._began = now, found
            return None
        seconds, before = now - self._began[0], self._began[1]
        if seconds < _WINDOW_SECONDS:
            return self._thrashes if self._thrashes and "swap" in self._thrashes else None
        self._began = now, found
        assert before.swapped_in_bytes is not None
        assert before.swapped_out_bytes is not None
        came = (found.swapped_in_bytes - before.swapped_in_bytes) / seconds
        went = (found.swapped_out_bytes - before.swapped_out_bytes) / seconds
        if min(came, went) <= SWAP_LIMIT_BYTES_PER_SECOND:
            return None
        return (
            f"swap thrashes: {format_mib(round(came))}/s in, {format_mib(round(went))}/s out, each above "
            f"{format_mib(SWAP_LIMIT_BYTES_PER_SECOND)}/s"
        )

    @staticmethod
    def _stalling(found: Pressure) -> str | None:
        if found.stalled is None or found.stalled <= STALL_LIMIT:
            return None
        return f"every task waited for memory {found.stalled:.0%} of the last 10 s, above {STALL_LIMIT:.0%}"


def _scarce(found: Pressure) -> str | None:
    limit = int(AVAILABLE_LIMIT * found.total_bytes)
    if found.available_bytes >= limit:
        return None
    return (
        f"{format_mib(found.available_bytes)} of {format_mib(found.total_bytes)} are available, less than "
        f"{format_mib(limit)}"
    )


def _stalled(root: Path) -> float | None:
    """The share in ``full avg10=P avg60=... total=...``."""
    try:
        lines = (root / "proc/pressure/memory").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("full ") and " avg10=" in line:
            return float(line.partition(" avg10=")[2].split()[0]) / 100
    return None


def _swap_counts(root: Path) -> dict[str, int]:
    """pswpin and pswpout in bytes."""
    try:
        lines = (root / "proc/vmstat").read_text().splitlines()
    except OSError:
        return {}
    page = os.sysconf("SC_PAGE_SIZE")
    pairs = (line.split() for line in lines if line.startswith(("pswpin ", "pswpout ")))
    return {name: int(count) * page for name, count in pairs}
