"""Targets: what runs on one kind of device - memory probe, memory cap, engine build.

Importing this package loads no driver and no torch; an implementation is loaded by :func:`select_target`.
"""

from edgetrain.targets.glibc import (
    keep_freed_blocks,
    keeps_freed_blocks,
    release_free_memory,
    return_large_blocks,
)
from edgetrain.targets.memory import HostMemory, Target, select_target

__all__ = [
    "HostMemory",
    "Target",
    "keep_freed_blocks",
    "keeps_freed_blocks",
    "release_free_memory",
    "return_large_blocks",
    "select_target",
]
