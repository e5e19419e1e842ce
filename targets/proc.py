"""Files that the kernel writes as lines ``Name: N kB``, and the memory of the host in them.

Everything that reads the system takes a root folder, so that a test can give a tree of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

from edgetrain.targets.memory import HostMemory
from edgetrain.units import KIB

ROOT = Path("/")


def proc_bytes(file: str, root: Path = ROOT) -> dict[str, int]:
    """The lines with kB of ``/proc/FILE``, in bytes.

    Raises:
        OSError: the file cannot be read.
    """
    fields = {}
    for line in (root / "proc" / file).read_text().splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            fields[name] = int(value[:-3]) * KIB
    return fields


def host_memory(root: Path = ROOT) -> HostMemory:
    """MemTotal and MemAvailable of ``/proc/meminfo``; what psutil says on systems other than Linux."""
    if not sys.platform.startswith("linux"):
        import psutil

        memory = psutil.virtual_memory()
        return HostMemory(int(memory.total), int(memory.available))
    fields = proc_bytes("meminfo", root)
    return HostMemory(fields["MemTotal"], fields["MemAvailable"])
