"""Making glibc's malloc give memory back, or keep it.

Freed blocks below the mmap threshold stay in the heap of the process. The threshold starts at 128 KiB, but each freed
mmapped block raises it to the size of that block, up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD): after a few tensors
were freed, activations of 1 to 32 MiB come from the heap, where they leave holes that fit nothing else, and the process
grows far beyond what torch has allocated. With a fixed threshold every larger block is a mapping of its own that
is gone when it is freed. The price is page faults: the kernel clears every block again, which makes a training step
take up to 2.4 times as long (``tools/heap_time.py``, docs/results/heap_time_cpu.json).

A program that repeats its step may keep what it has: with no mapping and no trimming a step after the first few has no
page faults, at the price of the holes. Without either setting glibc trims the end of its heap again and again.
That is so in the main thread; the heaps of other threads are of 64 MiB each, and an empty one goes back in any case.
"""

from __future__ import annotations

import ctypes
from functools import cache

from edgetrain.errors import UsageError
from edgetrain.units import KIB, MIB

DEFAULT_THRESHOLD_BYTES = MIB
MAX_THRESHOLD_BYTES = 32 * MIB  # HEAP_MAX_SIZE / 2 on 64-bit systems
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h
_MAPPINGS = 65536  # DEFAULT_MMAP_MAX
_NEVER = -1  # to trim, mallopt(3)
KEPT_BLOCKS = 4  # free blocks below the threshold that may stay at the top of the heap


def release_free_memory() -> bool:
    """Gives free heap pages back to the kernel, ``malloc_trim(0)``; False where the C library is not glibc."""
    libc = _glibc()
    if libc is None:
        return False
    libc.malloc_trim(0)
    return True


def return_large_blocks(threshold_bytes: int = DEFAULT_THRESHOLD_BYTES) -> bool:
    """From now on, a block of ``threshold_bytes`` or more goes back to the kernel when it is freed.

    Unless it fits a hole that the heap has already: call it before anything large is freed. Holds for the whole
    process, until :func:`keep_freed_blocks`. False where the C library is not glibc.

    Raises:
        UsageError: the threshold is below 4 KiB or above 32 MiB, which glibc refuses.
    """
    if not 4 * KIB <= threshold_bytes <= MAX_THRESHOLD_BYTES:
        raise UsageError(
            found=f"a threshold of {threshold_bytes} bytes",
            expected=f"{4 * KIB} to {MAX_THRESHOLD_BYTES} bytes",
            action=f"pass {DEFAULT_THRESHOLD_BYTES}",
        )
    libc = _glibc()
    if libc is None:
        return False
    _Setting.keeps = False
    libc.mallopt(_M_MMAP_MAX, _MAPPINGS)
    libc.mallopt(_M_TRIM_THRESHOLD, KEPT_BLOCKS * threshold_bytes)
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, threshold_bytes))


def keep_freed_blocks() -> bool:
    """From now on, a block that is freed stays with the process, for the next one that fits.

    Holds for the whole process, until :func:`return_large_blocks`. False where the C library is not glibc.
    """
    libc = _glibc()
    if libc is None:
        return False
    _Setting.keeps = True
    libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
    return bool(libc.mallopt(_M_MMAP_MAX, 0))


def keeps_freed_blocks() -> bool:
    """Whether :func:`keep_freed_blocks` holds."""
    return _Setting.keeps


def allocated_bytes() -> int | None:
    """Bytes that malloc has handed out and not got back, heaps and mappings; None where there is no mallinfo2(3)."""
    function = getattr(_glibc(), "mallinfo2", None)
    if function is None:
        return None
    function.restype = _Mallinfo2
    found = function()
    return int(found.uordblks + found.hblkhd)


class _Setting:
    """What this process was set to last: glibc does not tell."""

    keeps = False


class _Mallinfo2(ctypes.Structure):
    # malloc.h
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


@cache
def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version, libc.malloc_trim, libc.mallopt  # noqa: B018 - looks the symbols up
    except (OSError, AttributeError, TypeError):
        return None
    return libc
