"""What the memory of this system is divided into, as the kernel's files say it.

| row | from |
|---|---|
| total, available | ``MemTotal`` and ``MemAvailable`` of ``/proc/meminfo`` |
| swap on disks | ``/proc/swaps``, those that are no zram |
| zram | ``/proc/swaps`` for what was swapped there; ``mm_stat`` of ``/sys/block/zram*`` for the memory it holds |
| this process | ``RssAnon`` of ``/proc/self/status``: pages of files can be dropped and are called available |

Available memory and swap are not added up: what is swapped out of a training step comes back in the next
(:mod:`edgetrain.targets.pressure`). zram is memory too: pages that go there give back as much as they shrink. A
figure that the system does not give is None.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from edgetrain.targets.proc import ROOT, host_memory, proc_bytes
from edgetrain.units import KIB

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Swap:
    """Where pages go that find no room.

    Attributes:
        total_bytes: what there is room for.
        used_bytes: what is there.
    """

    total_bytes: int
    used_bytes: int


@dataclass(frozen=True)
class Ledger:
    """The memory of a system, and what a run that is about to begin takes of it; None: unknown, or there is none.

    Attributes:
        total_bytes, available_bytes: what programs can address, and what can be had now without swapping.
        swap: on disks.
        zram: what pages are compressed into, by their size before; ``zram_held_bytes``: the memory they take there.
        process_bytes: what this process holds, libraries and data included; not in ``available_bytes``.
        device_bytes: free memory of a GPU that has its own.
        context_bytes, framework_bytes: what a context and the libraries take, as the profile says. On this machine the
            libraries are loaded: they are in ``process_bytes``.
        loader_bytes: the batch of a step and the next one, which a thread prepares.
        decoding_bytes: what decoding one image takes besides.
        teacher_bytes: what a teacher holds beside a step.
        reserve_bytes: what ``--budget auto`` leaves to everything else.
        budget_bytes: the cap of the run; loader, decoding and teacher are inside.
    """

    total_bytes: int
    available_bytes: int
    swap: Swap | None
    zram: Swap | None
    zram_held_bytes: int | None
    process_bytes: int | None
    device_bytes: int | None = None
    context_bytes: int | None = None
    framework_bytes: int | None = None
    loader_bytes: int | None = None
    decoding_bytes: int | None = None
    teacher_bytes: int | None = None
    reserve_bytes: int | None = None
    budget_bytes: int | None = None


def read_ledger(root: Path = ROOT) -> Ledger:
    """The system now; ``root`` is where ``/proc`` and ``/sys`` are found."""
    memory = host_memory(root)
    disks, zram = _swaps(root)
    return Ledger(memory.total_bytes, memory.available_bytes, disks, zram, _zram_held_bytes(root), _own_bytes(root))


def _own_bytes(root: Path) -> int | None:
    try:
        return proc_bytes("self/status", root).get("RssAnon")
    except OSError:
        return None


def _swaps(root: Path) -> tuple[Swap | None, Swap | None]:
    """Swap on disks, and zram. A line is ``name type size used priority``, sizes in KiB."""
    try:
        lines = (root / "proc/swaps").read_text().splitlines()[1:]
    except OSError:
        return None, None
    found: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
    for line in lines:
        name, *fields = line.split()
        numbers = [int(field) for field in fields if field.isdigit()]
        if len(numbers) < 2:
            _log.warning("a line of /proc/swaps is not understood: %s", line)
            continue
        found[Path(name).name.startswith("zram")].append((numbers[0] * KIB, numbers[1] * KIB))
    disks, zram = (Swap(sum(t for t, _ in some), sum(u for _, u in some)) if some else None for some in found.values())
    return disks, zram


def _zram_held_bytes(root: Path) -> int | None:
    """The sum of ``mem_used_total``, the third number of ``mm_stat`` (Documentation/admin-guide/blockdev/zram.rst)."""
    held = []
    for device in sorted((root / "sys/block").glob("zram*")):
        try:
            numbers = (device / "mm_stat").read_text().split()
        except OSError:
            continue
        if len(numbers) > 2:
            held.append(int(numbers[2]))
    return sum(held) if held else None
