"""The role of a target: read, measure and limit the memory of one kind of device.

An implementation knows its driver and nothing of models or plans: :mod:`edgetrain.targets.cpu` limits the process
through the kernel, :mod:`edgetrain.targets.cuda` through PyTorch's caching allocator, and so does
:mod:`edgetrain.targets.jetson` where GPU and host share one memory. Bytes are ints throughout.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from edgetrain.errors import UsageError

if TYPE_CHECKING:
    import torch

OUT_OF_MEMORY_TEXTS = (
    "can't allocate memory",  # torch's CPU allocator, POSIX
    "not enough memory: you tried to allocate",  # the same, Windows
    "posix_memalign failed",  # libraries under torch
    "std::bad_alloc",  # C++ under torch or ONNX Runtime
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    # Tegra without NVML: the error path of the caching allocator fails before it can say what happened
    "NVML_SUCCESS == r INTERNAL ASSERT FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""Parts of the messages of a RuntimeError that mean "no memory", whatever the state of the process."""


@dataclass(frozen=True)
class HostMemory:
    """What a device has.

    Attributes:
        total_bytes: memory that programs can address, after what firmware and kernel keep.
        available_bytes: how much of it can be had now without swapping.
    """

    total_bytes: int
    available_bytes: int


class Target(Protocol):
    """Reads, measures and limits the memory of one device."""

    @property
    def name(self) -> str:
        """What a person calls the device."""
        ...

    def probe(self) -> HostMemory:
        """Memory of the device, read now."""
        ...

    def start(self) -> None:
        """Begins a measurement: sets the baseline and resets the peak."""
        ...

    def current_bytes(self) -> int:
        """Bytes that count against a budget now."""
        ...

    def peak_bytes(self) -> int:
        """The largest :meth:`current_bytes` since :meth:`start`."""
        ...

    def file_bytes(self) -> int:
        """How much of :meth:`current_bytes` no budget has to hold: pages of files that the kernel can drop."""
        ...

    def readings(self) -> dict[str, int]:
        """Bytes held now, by the name of who counts them; the first is :meth:`current_bytes`."""
        ...

    def cap(self, budget_bytes: int) -> None:
        """Enforces ``budget_bytes``: an allocation that passes it fails with an error one can catch.

        Raises:
            BudgetError: this host cannot enforce it.
            UsageError: the budget is not above zero.
        """
        ...

    def uncap(self) -> None:
        """Lifts the limit that :meth:`cap` set; does nothing without one."""
        ...

    def release_cache(self) -> None:
        """Gives memory that nothing uses back to the device."""
        ...

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether ``error`` says that an allocation failed."""
        ...


def select_target(device: torch.device | str) -> Target:
    """The target for ``device``: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.

    Raises:
        UsageError: there is no target for such a device, or it is absent.
    """
    kind = str(device).partition(":")[0]
    if kind == "cpu":
        from edgetrain.targets.cpu import CpuTarget

        return CpuTarget()
    if kind == "cuda":
        from edgetrain.targets.cuda import CudaTarget
        from edgetrain.targets.jetson import JetsonTarget

        target = CudaTarget(device)
        return JetsonTarget(target) if target.is_integrated else target
    raise UsageError(found=f"device {str(device)!r}", expected="cpu or cuda", action="pass cpu, cuda or cuda:N")


def check_budget(budget_bytes: int) -> None:
    """Refuses a budget that is not above zero.

    Raises:
        UsageError: it is not.
    """
    if budget_bytes <= 0:
        raise UsageError(
            found=f"a memory budget of {budget_bytes} bytes",
            expected="more than zero bytes",
            action="write it like 400MiB or 1.5GB",
        )


def says_out_of_memory(error: BaseException) -> bool:
    """Whether type or text of ``error`` alone tell that an allocation failed, on any target."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # torch.OutOfMemoryError is a RuntimeError; compared by name so that a process without torch can ask, too
    if type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY_TEXTS)
