"""Memory of a process on the CPU: probe, growth, and a hard cap without privileges.

Growth is resident memory above a baseline: ``VmRSS - baseline`` now, ``VmHWM - baseline`` at its peak, after the
high-water mark was reset by writing 5 to ``/proc/self/clear_refs`` (proc(5)).

The cap is ``RLIMIT_DATA = VmData + budget``: since Linux 4.7 it counts every private writable mapping (getrlimit(2)),
so that malloc fails and torch, NumPy and Python raise. It limits addresses, not pages: memory that is reserved and
never touched counts, and the resident peak stays below it by that much. Memory which the allocator held free when the
cap was set can be used again on top: call :func:`edgetrain.targets.return_large_blocks` at the start of the program, so
that such rests stay small.

What an error cannot tell, or not for long:

- libgomp ends the process when it cannot create a thread. ``cap`` starts the OpenMP threads of the thread that calls
  it; raise the number of threads, or enter torch from further Python threads, only before the cap.
- oneDNN's code generator keeps an error for the rest of the thread's life: after "could not create a primitive", every
  convolution of a new shape fails in that thread, with or without a cap. A new thread is free of it (call ``cap``
  there, for the reason above); so is ``torch.backends.mkldnn.flags(enabled=False)``, which is slow.
- A failed malloc of less than about 32 KiB inside oneDNN may crash the process. The heap serves such requests from free
  rests long after large ones fail, so it takes a process that fills its memory with small objects.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from edgetrain.errors import BudgetError
from edgetrain.targets.glibc import allocated_bytes, release_free_memory
from edgetrain.targets.memory import HostMemory, check_budget, says_out_of_memory
from edgetrain.targets.proc import host_memory, proc_bytes
from edgetrain.units import format_mib

_log = logging.getLogger(__name__)

CAPPED_TEXTS = (
    # oneDNN reports a failed allocation as a failed call; without a cap the same words mean an unsupported one
    "could not create a primitive",
    "could not execute a primitive",
    "could not create an engine",
    "could not create a memory",
    "can't start new thread",
)
"""What a failed allocation inside oneDNN is called. It stays with the thread."""
_ELEMENTS_PER_THREAD = 2**16  # above the grain of 2**15 elements under which ATen stays on one thread


class CpuTarget:
    """The process that asks, on its host.

    Before :meth:`start` the baseline is zero: the whole process counts.
    """

    def __init__(self) -> None:
        self._baseline_bytes = 0
        self._allocated_baseline_bytes = 0
        self._file_baseline_bytes = 0
        self._lifted_limit: int | None = None

    @property
    def name(self) -> str:
        """``"cpu"``."""
        return "cpu"

    def probe(self) -> HostMemory:
        """MemTotal and MemAvailable of ``/proc/meminfo``; what psutil says on other systems."""
        return host_memory()

    def start(self) -> None:
        """Resets the high-water mark and takes the memory of now, resident and allocated, as the baseline."""
        self._allocated_baseline_bytes = allocated_bytes() or 0
        if not _on_linux():
            self._baseline_bytes = 0
            self._baseline_bytes = self.current_bytes()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError as error:
            _log.warning("the high-water mark cannot be reset (%s): peaks are those of the whole process", error)
        status = proc_bytes("self/status")
        self._baseline_bytes, self._file_baseline_bytes = status["VmRSS"], status["RssFile"]

    def current_bytes(self) -> int:
        """Resident bytes above the baseline; below zero where memory was given back since."""
        if not _on_linux():
            import psutil

            return int(psutil.Process().memory_info().rss) - self._baseline_bytes
        return proc_bytes("self/status")["VmRSS"] - self._baseline_bytes

    def peak_bytes(self) -> int:
        """Peak of the resident bytes above the baseline.

        Raises:
            BudgetError: not on Linux, where alone the mark can be reset.
        """
        _require_linux("the peak memory of a process is read from /proc")
        return proc_bytes("self/status")["VmHWM"] - self._baseline_bytes

    def file_bytes(self) -> int:
        """How much of :meth:`current_bytes` are pages of files, such as library code that ran for the first time.

        The cap does not count them, and the kernel can drop them; zero where it does not tell them apart.
        """
        if not _on_linux():
            return 0
        return max(0, proc_bytes("self/status")["RssFile"] - self._file_baseline_bytes)

    def readings(self) -> dict[str, int]:
        """Resident bytes above the baseline, and what malloc has handed out since where glibc says so."""
        allocated = allocated_bytes()
        readings = {"process": self.current_bytes()}
        if allocated is not None:
            readings["allocator"] = allocated - self._allocated_baseline_bytes
        return readings

    def cap(self, budget_bytes: int) -> None:
        """Lets the process grow by ``budget_bytes`` and no more.

        Call it after a warm-up step on a small batch, so that libraries have loaded what they load once. Child
        processes inherit the limit as it stands, not the growth that is left.

        Raises:
            BudgetError: not on Linux, or a hard limit of the host is lower.
            UsageError: the budget is not above zero.
        """
        _require_linux("a memory budget is enforced through RLIMIT_DATA")
        import resource

        check_budget(budget_bytes)
        self.uncap()
        _start_threads()
        release_free_memory()
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        held_bytes = proc_bytes("self/status")["VmData"]
        wanted = held_bytes + budget_bytes
        if hard != resource.RLIM_INFINITY and wanted > hard:
            raise BudgetError(
                found=f"a hard limit of {format_mib(hard)} on the data of this process, which holds "
                f"{format_mib(held_bytes)}",
                expected=f"room for {format_mib(budget_bytes)} more",
                action="lower --budget, or raise the limit with ulimit -H -d before the start",
            )
        resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))
        self._lifted_limit = soft

    def uncap(self) -> None:
        """Puts back the soft limit that stood before :meth:`cap`."""
        if self._lifted_limit is None:
            return
        import resource

        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (self._lifted_limit, hard))
        self._lifted_limit = None

    def release_cache(self) -> None:
        """Gives free heap pages back to the kernel."""
        release_free_memory()

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether ``error`` is a failed allocation; under a cap, oneDNN's failed calls count as one."""
        if says_out_of_memory(error):
            return True
        capped = self._lifted_limit is not None
        return capped and isinstance(error, RuntimeError) and any(text in str(error) for text in CAPPED_TEXTS)


def _on_linux() -> bool:
    return sys.platform.startswith("linux")


def _require_linux(reason: str) -> None:
    if not _on_linux():
        raise BudgetError(
            found=f"the operating system {sys.platform}",
            expected=f"Linux: {reason}",
            action="run on Linux, or leave the budget unenforced",
        )


def _start_threads() -> None:
    # the stack of an OpenMP thread that is created under the cap may not fit, and libgomp then ends the process
    if "torch" in sys.modules:
        import torch

        torch.zeros(torch.get_num_threads() * _ELEMENTS_PER_THREAD).add_(1)
