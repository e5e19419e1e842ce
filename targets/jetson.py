"""GPUs that share their memory with the host: the Jetsons, and what is built like them.

What can be had is the kernel's ``MemAvailable``. The driver's ``cudaMemGetInfo`` takes page cache for used memory, and
NVML is missing on Jetsons up to JetPack 5 and says "not supported" later (pytorch pull request 112121, cosmos-reason1
issue 61, ollama issue 12283; "CUDA for Tegra", section "Estimating total allocatable device memory").
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgetrain.errors import BudgetError
from edgetrain.targets.memory import HostMemory, check_budget
from edgetrain.targets.proc import ROOT, host_memory, proc_bytes
from edgetrain.units import format_mib

if TYPE_CHECKING:
    from edgetrain.targets.cuda import CudaTarget

_log = logging.getLogger(__name__)

# "# R36 (release), REVISION: 4.3, GCID: ..., BOARD: generic, EABI: aarch64, DATE: ..."
_RELEASE = re.compile(r"#\s*R(\d+)\s*\(release\),\s*REVISION:\s*([\d.]+)")
_DEVICE_TREES = ("proc/device-tree", "sys/firmware/devicetree/base")


@dataclass(frozen=True)
class Tegra:
    """A Tegra system as its files describe it.

    Attributes:
        model: what the device tree calls the board; None: no device tree.
        compatible: names of board and chip, the most special first, such as ``"nvidia,tegra234"``.
        l4t: release of Jetson Linux, such as ``"36.4.3"``; None: the release file is missing or in another form.
    """

    model: str | None
    compatible: tuple[str, ...]
    l4t: str | None


def find_tegra(root: Path = ROOT) -> Tegra | None:
    """The Tegra that this system runs on, found without CUDA; None: it is none.

    It is one where ``/etc/nv_tegra_release`` exists or the device tree is compatible with an ``nvidia,tegra`` chip.
    """
    release = _read(root / "etc/nv_tegra_release")
    compatible = tuple(name for name in _device_tree(root, "compatible").split("\0") if name)
    if release is None and not any(name.startswith("nvidia,tegra") for name in compatible):
        return None
    match = _RELEASE.search(release or "")
    return Tegra(
        model=_device_tree(root, "model").rstrip("\0") or None,
        compatible=compatible,
        l4t=f"{match.group(1)}.{match.group(2)}" if match else None,
    )


def gpu_used_bytes(root: Path = ROOT) -> int | None:
    """What all GPU processes hold, ``NvMapMemUsed``; None: the kernel does not say (JetPack 7 on Thor, or no Tegra)."""
    try:
        return proc_bytes("meminfo", root).get("NvMapMemUsed")
    except OSError:
        return None


class JetsonTarget:
    """An integrated GPU as this process uses it: the host's figures, and PyTorch's allocator to limit it.

    Args:
        cuda: the same device, as PyTorch's allocator knows it.
        root: where ``/proc`` is found.
    """

    def __init__(self, cuda: CudaTarget, *, root: Path = ROOT, environment: Mapping[str, str] | None = None) -> None:
        self._cuda = cuda
        self._root = root
        if _has_expandable_segments(os.environ if environment is None else environment):
            _log.warning(
                "expandable_segments is on: on Tegra it ends in 'CUDA driver error: out of memory' with memory free "
                "(unsloth-zoo pull request 1235); take it out of PYTORCH_ALLOC_CONF"
            )

    @property
    def name(self) -> str:
        """Name that the driver gives, such as ``"Orin"``."""
        return self._cuda.name

    def probe(self) -> HostMemory:
        """MemTotal and MemAvailable: GPU and host draw on one pool, and the page cache can be reclaimed."""
        return host_memory(self._root)

    def gpu_used_bytes(self) -> int | None:
        """What all processes hold on the GPU; None where the kernel does not say."""
        return gpu_used_bytes(self._root)

    def start(self) -> None:
        """See :meth:`edgetrain.targets.cuda.CudaTarget.start`."""
        self._cuda.start()

    def current_bytes(self) -> int:
        """Bytes of all tensors on the device."""
        return self._cuda.current_bytes()

    def peak_bytes(self) -> int:
        """Peak of the bytes of all tensors on the device since :meth:`start`."""
        return self._cuda.peak_bytes()

    def file_bytes(self) -> int:
        """Pages of files among :meth:`current_bytes`: zero, tensors are none."""
        return 0

    def readings(self) -> dict[str, int]:
        """See :meth:`edgetrain.targets.cuda.CudaTarget.readings`."""
        return self._cuda.readings()

    def cap(self, budget_bytes: int) -> None:
        """Lets the allocator reserve ``budget_bytes`` in all, what it holds already included.

        Raises:
            BudgetError: so much is not available now. Beyond it no allocation fails: the kernel ends a process.
            UsageError: the budget is not above zero.
        """
        check_budget(budget_bytes)
        can_have = self.probe().available_bytes + self._cuda.reserved_bytes
        if budget_bytes > can_have:
            raise BudgetError(
                found=f"a budget of {format_mib(budget_bytes)}",
                expected=f"at most the {format_mib(can_have)} that CPU and GPU of {self.name} have left",
                action="lower --budget, or stop the desktop and other programs",
            )
        self._cuda.cap(budget_bytes)

    def uncap(self) -> None:
        """Gives the whole device back to the allocator; does nothing without a cap."""
        self._cuda.uncap()

    def release_cache(self) -> None:
        """See :meth:`edgetrain.targets.cuda.CudaTarget.release_cache`; the host takes from the same memory."""
        self._cuda.release_cache()

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether ``error`` is a failed allocation on the device or on its host."""
        return self._cuda.is_out_of_memory(error)


def _has_expandable_segments(environment: Mapping[str, str]) -> bool:
    settings = (environment.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    return any("expandable_segments:true" in text.lower().replace(" ", "") for text in settings)


def _device_tree(root: Path, name: str) -> str:
    for tree in _DEVICE_TREES:
        text = _read(root / tree / name)
        if text is not None:
            return text
    return ""


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
