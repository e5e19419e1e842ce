"""A limit on the memory of the whole process: interpreter, libraries, graph, state and batch.

The limit is RLIMIT_DATA, which counts every private writable mapping whether it was touched or not (getrlimit(2)):
heap, arenas, stacks of threads. Set before NumPy and ONNX Runtime are imported, it counts what they take as well. Pages
of files - the libraries' code - are not counted; how much was resident with them is what :func:`peak_bytes` says.

OpenBLAS, which NumPy loads, reserves 32 MiB for each of its threads at once. Nothing here multiplies matrices in NumPy,
so it gets one thread.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from edgetrain.errors import BudgetError
from edgetrain.units import format_mib

_TEXTS = ("Failed to allocate memory", "bad_alloc", "Cannot allocate memory", "cannot allocate memory", "map segment")


def one_thread_for_blas() -> None:
    """Of OpenBLAS, unless the environment says otherwise; to be called before NumPy is imported."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def limit_process(budget_bytes: int) -> None:
    """From now on the process has no more than ``budget_bytes``, what it has now included.

    Raises:
        BudgetError: the system has no such limit, or the process holds as much already.
    """
    held = _status("VmData")
    if held is None or not sys.platform.startswith("linux"):
        raise BudgetError(
            found=f"the operating system {sys.platform}",
            expected="Linux: a memory budget is enforced through RLIMIT_DATA",
            action="leave the budget out",
        )
    import resource

    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    highest = budget_bytes if hard == resource.RLIM_INFINITY else min(hard, budget_bytes)
    if held > highest:
        raise BudgetError(
            found=f"a process that holds {format_mib(held)}",
            expected=f"less than the budget of {format_mib(highest)} for all of it",
            action="raise --budget",
        )
    resource.setrlimit(resource.RLIMIT_DATA, (highest, hard))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error``, or what it came from, is a failed allocation of Python, NumPy or ONNX Runtime."""
    if isinstance(error, MemoryError) or any(text in str(error) for text in _TEXTS):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


def over_budget(budget_bytes: int | None, error: BaseException) -> BudgetError:
    """What a failed allocation is called."""
    limit = "the memory of this device" if budget_bytes is None else format_mib(budget_bytes)
    reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return BudgetError(
        found=f"a process that needs more than {limit} ({reason[-200:]})",
        expected="a step that fits, with the interpreter and the libraries",
        action="raise --budget, pass --threads 1, or export the step of a plan with a smaller batch or micro-batches",
    )


def peak_bytes() -> int | None:
    """The most memory that this process has had resident, files' pages among it; None where Linux does not tell."""
    return _status("VmHWM")


def _status(field: str) -> int | None:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:")), None)
