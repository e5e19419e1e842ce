"""Measuring what a device does: rates of the operations that training consists of.

- Convolution: 3x3, stride 1, padding 1, as many channels out as in; 2 x 9 x n x h x w x c x c operations.
- Elementwise: ``torch.add(x, y, out=z)``; three tensors are moved.
- Copy: ``z.copy_(x)``; two tensors are moved.

Each is repeated for a fixed time after a warm-up; the median counts, and the quartiles say how much it varies. Batches
grow until one call takes 10 ms, so that a slow board and a large GPU are both measured well above the
resolution of the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from edgetrain.targets.measured import Measured, summarise
from edgetrain.targets.memory import select_target
from edgetrain.targets.overheads import Overheads, measure_overheads, own_bytes
from edgetrain.units import MIB

if TYPE_CHECKING:
    import torch

MeasuredPrecision = Literal["fp32", "fp16", "bf16"]

CHANNELS = (16, 32, 64, 128)
_SIDE = 32  # pixels
_KERNEL = 3
_CALL_SECONDS = 0.01
_TRIES = 4
_CASE_SECONDS = 0.5
_RUNS = 7  # at least
_LARGEST_BYTES = 64 * MIB  # of one tensor; beyond the last cache of most hosts, and three of them fit on 1 GB


@dataclass(frozen=True)
class Calibration:
    """What was measured on a device; rates of operations and bytes are per second.

    Attributes:
        convolution: by precision and channel count.
        elementwise: bytes by precision.
        copy: bytes.
        overheads: what the libraries take.
        total_bytes: memory of the device that programs can address.
        system_bytes: what other programs and the system held; None: nothing can tell it from the context.
        threads: that torch used on the CPU.
    """

    convolution: dict[MeasuredPrecision, dict[int, Measured]]
    elementwise: dict[MeasuredPrecision, Measured]
    copy: Measured
    overheads: Overheads
    total_bytes: int
    system_bytes: int | None
    threads: int


def calibrate(device: Literal["cpu", "cuda"] = "cpu", *, case_seconds: float = _CASE_SECONDS) -> Calibration:
    """Measures ``device`` of this host, for about 20 s on two CPU cores.

    Args:
        case_seconds: how long each operation is repeated.

    Raises:
        UsageError: the device is absent.
        EdgetrainError: a process that measures overheads failed.
    """
    import torch

    target = select_target(device)  # refuses a device that is absent
    overheads = measure_overheads(device)
    precisions: tuple[MeasuredPrecision, ...] = ("fp32",)
    if device == "cuda":
        # bf16 is emulated before Ampere
        ampere = torch.cuda.get_device_capability()[0] >= 8
        precisions = ("fp32", "fp16", "bf16") if ampere else ("fp32", "fp16")
    with torch.no_grad():
        convolution = {
            precision: {channels: _convolution(device, precision, channels, case_seconds) for channels in CHANNELS}
            for precision in precisions
        }
        elementwise = {precision: _elementwise(device, precision, case_seconds) for precision in precisions}
        copy = _copy(device, case_seconds)
    used_bytes = own_bytes(device, overheads)  # empties the cache, so before the probe
    memory = target.probe()
    taken_bytes = memory.total_bytes - memory.available_bytes
    return Calibration(
        convolution=convolution,
        elementwise=elementwise,
        copy=copy,
        overheads=overheads,
        total_bytes=memory.total_bytes,
        system_bytes=None if used_bytes is None else max(0, taken_bytes - used_bytes),
        threads=torch.get_num_threads(),
    )


def _convolution(device: str, precision: MeasuredPrecision, channels: int, seconds: float) -> Measured:
    import torch
    import torch.nn.functional as F

    dtype = _dtype(precision)
    weight = torch.randn(channels, channels, _KERNEL, _KERNEL, device=device).to(dtype)
    sample_bytes = channels * _SIDE * _SIDE * dtype.itemsize

    def call_with(n: int) -> Callable[[], object]:
        x = torch.randn(n, channels, _SIDE, _SIDE, device=device).to(dtype)  # (n, c, h, w)
        return lambda: F.conv2d(x, weight, padding=_KERNEL // 2)

    n, times = _repeat(call_with, device, largest=_LARGEST_BYTES // sample_bytes, seconds=seconds)
    operations = 2 * _KERNEL**2 * n * _SIDE**2 * channels**2
    return summarise([operations / taken for taken in times])


def _elementwise(device: str, precision: MeasuredPrecision, seconds: float) -> Measured:
    import torch

    dtype = _dtype(precision)
    x, y, z = (torch.ones(_LARGEST_BYTES // dtype.itemsize, dtype=dtype, device=device) for _ in range(3))
    _, times = _repeat(lambda n: lambda: torch.add(x, y, out=z), device, largest=1, seconds=seconds)
    return summarise([3 * _LARGEST_BYTES / taken for taken in times])


def _copy(device: str, seconds: float) -> Measured:
    import torch

    x, z = (torch.ones(_LARGEST_BYTES // 4, device=device) for _ in range(2))
    _, times = _repeat(lambda n: lambda: z.copy_(x), device, largest=1, seconds=seconds)
    return summarise([2 * _LARGEST_BYTES / taken for taken in times])


def _repeat(
    call_with: Callable[[int], Callable[[], object]], device: str, *, largest: int, seconds: float
) -> tuple[int, list[float]]:
    """The batch, doubled until a call takes long enough, and the seconds of each call with it."""
    n = 1
    while True:
        call = call_with(n)
        # the first call loads code, and any may have waited for another process
        taken = min(_time(call, device) for _ in range(_TRIES))
        if taken >= _CALL_SECONDS or 2 * n > largest:
            break
        n *= 2
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < _RUNS or time.perf_counter() < end:
        times.append(_time(call, device))
    return n, times


def _time(call: Callable[[], object], device: str) -> float:
    _wait_for(device)
    began = time.perf_counter()
    call()
    _wait_for(device)
    return time.perf_counter() - began


def _wait_for(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def _dtype(precision: MeasuredPrecision) -> torch.dtype:
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
