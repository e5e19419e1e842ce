"""Memory of a CUDA device, through PyTorch's caching allocator.

The cap is ``torch.cuda.set_per_process_memory_fraction(budget / total)``: it limits what the allocator reserves, and
an allocation beyond it raises ``torch.OutOfMemoryError``. The CUDA context (300 to 400 MB on desktop cards, PyTorch
issues 107667 and 109888) is not part of it: a budget for the whole process has to leave room for it.
"""

from __future__ import annotations

import torch

from edgetrain.errors import BudgetError, UsageError
from edgetrain.targets.memory import HostMemory, check_budget, says_out_of_memory
from edgetrain.units import format_mib


class CudaTarget:
    """One CUDA device as this process uses it.

    Args:
        device: ``"cuda"`` (the current device) or ``"cuda:N"``.

    Raises:
        UsageError: there is no such device.
    """

    def __init__(self, device: torch.device | str = "cuda") -> None:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        wanted = torch.device(device)
        if (wanted.index or 0) >= count:
            raise UsageError(
                found=f"device {device} where torch sees {count} CUDA devices",
                expected="a device that is present",
                action="pass --device cpu, or install a torch build that fits the driver",
            )
        self._device = torch.device("cuda", torch.cuda.current_device() if wanted.index is None else wanted.index)
        self._capped = False

    @property
    def name(self) -> str:
        """Name that the driver gives, such as ``"NVIDIA GeForce GTX 750"``."""
        return torch.cuda.get_device_name(self._device)

    @property
    def is_integrated(self) -> bool:
        """Whether GPU and host share one memory: then :class:`edgetrain.targets.jetson.JetsonTarget` reads it."""
        return bool(torch.cuda.get_device_properties(self._device).is_integrated)

    @property
    def reserved_bytes(self) -> int:
        """Bytes that the caching allocator holds, used or not; what a cap limits."""
        return torch.cuda.memory_reserved(self._device)

    def probe(self) -> HostMemory:
        """Total and free memory, as the driver says."""
        free_bytes, total_bytes = torch.cuda.mem_get_info(self._device)
        return HostMemory(total_bytes, free_bytes)

    def start(self) -> None:
        """Empties the cache and resets the peak; what is allocated goes on counting."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)

    def current_bytes(self) -> int:
        """Bytes of all tensors on the device."""
        return torch.cuda.memory_allocated(self._device)

    def peak_bytes(self) -> int:
        """Peak of the bytes of all tensors on the device since :meth:`start`."""
        return torch.cuda.max_memory_allocated(self._device)

    def file_bytes(self) -> int:
        """Pages of files among :meth:`current_bytes`: zero, tensors are none."""
        return 0

    def readings(self) -> dict[str, int]:
        """Bytes of all tensors, and what the caching allocator has reserved for them."""
        return {"allocator": self.current_bytes(), "reserved": self.reserved_bytes}

    def cap(self, budget_bytes: int) -> None:
        """Lets the allocator reserve ``budget_bytes`` in all, what it holds already included.

        Raises:
            BudgetError: the device has less.
            UsageError: the budget is not above zero.
        """
        check_budget(budget_bytes)
        total_bytes = torch.cuda.mem_get_info(self._device)[1]
        if budget_bytes > total_bytes:
            raise BudgetError(
                found=f"a budget of {format_mib(budget_bytes)}",
                expected=f"at most the {format_mib(total_bytes)} of {self.name}",
                action="lower --budget",
            )
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(budget_bytes / total_bytes, self._device)
        self._capped = True

    def uncap(self) -> None:
        """Gives the whole device back to the allocator; does nothing without a cap."""
        if self._capped:
            torch.cuda.set_per_process_memory_fraction(1.0, self._device)
            self._capped = False

    def release_cache(self) -> None:
        """Gives the blocks that the caching allocator holds free back to the driver."""
        torch.cuda.empty_cache()

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether ``error`` is a failed allocation on the device or on its host."""
        return isinstance(error, torch.OutOfMemoryError) or says_out_of_memory(error)
