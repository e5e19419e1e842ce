"""Targets in this process: probing, measuring, telling errors apart. Nothing here sets a limit."""

from __future__ import annotations

import errno
import sys

import psutil
import pytest
import torch

from edgetrain.errors import BudgetError, UsageError
from edgetrain.targets import release_free_memory, return_large_blocks, select_target
from edgetrain.units import MIB

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def test_probe_agrees_with_psutil():
    probed, expected = select_target("cpu").probe(), psutil.virtual_memory()
    assert probed.total_bytes == expected.total
    assert probed.available_bytes == pytest.approx(expected.available, rel=0.2)


@linux_only
def test_growth_and_peak_follow_what_is_touched():
    target = select_target("cpu")
    release_free_memory()
    target.start()
    block = torch.ones(100 * MIB, dtype=torch.uint8)
    assert target.current_bytes() == pytest.approx(100 * MIB, abs=4 * MIB)
    del block
    release_free_memory()  # a heap that earlier tests have stretched keeps it otherwise
    assert target.current_bytes() < 4 * MIB
    assert target.peak_bytes() == pytest.approx(100 * MIB, abs=4 * MIB)
    target.start()
    assert target.peak_bytes() < 4 * MIB


@linux_only
def test_the_allocator_counts_what_nobody_has_touched_yet():
    target = select_target("cpu")
    target.start()
    if "allocator" not in target.readings():
        pytest.skip("a C library without mallinfo2")
    block = torch.empty(100 * MIB, dtype=torch.uint8)
    readings = target.readings()
    assert list(readings) == ["process", "allocator"]
    assert readings["allocator"] == pytest.approx(100 * MIB, abs=MIB)
    assert readings["process"] < 4 * MIB
    del block
    assert target.readings()["allocator"] == pytest.approx(0, abs=MIB)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("posix_memalign failed:Cannot allocate memory (12)"),
        RuntimeError("NVML_SUCCESS == r INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp:1016"),
    ],
    ids=lambda error: type(error).__name__ + ":" + str(error)[:20],
)
def test_failed_allocations_are_recognised(error: BaseException):
    assert select_target("cpu").is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("could not create a primitive"),  # means memory only below a cap
        OSError(errno.ENOENT, "No such file or directory"),
        ValueError("can't allocate memory"),
    ],
    ids=lambda error: type(error).__name__ + ":" + str(error)[:20],
)
def test_other_errors_are_not(error: BaseException):
    assert not select_target("cpu").is_out_of_memory(error)


@pytest.mark.parametrize("budget_bytes", [0, -1])
@linux_only
def test_budget_above_zero(budget_bytes: int):
    with pytest.raises(UsageError, match="more than zero bytes"):
        select_target("cpu").cap(budget_bytes)


def test_cap_needs_linux(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(BudgetError, match="expected Linux"):
        select_target("cpu").cap(MIB)


def test_unknown_devices():
    with pytest.raises(UsageError, match="cpu or cuda"):
        select_target("meta")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="sees 0 CUDA devices"):
            select_target("cuda")


@pytest.mark.parametrize("threshold_bytes", [0, 100, 33 * MIB])
def test_thresholds_that_glibc_would_refuse(threshold_bytes: int):
    with pytest.raises(UsageError, match="threshold"):
        return_large_blocks(threshold_bytes)


@pytest.mark.gpu
def test_cuda_cap_is_enforced_and_lifted():
    target = select_target("cuda")
    target.start()
    target.cap(64 * MIB)
    try:
        with pytest.raises(torch.OutOfMemoryError) as caught:
            torch.empty(128 * MIB, dtype=torch.uint8, device="cuda")
        assert target.is_out_of_memory(caught.value)
        block = torch.empty(32 * MIB, dtype=torch.uint8, device="cuda")
        assert target.current_bytes() >= block.nbytes
    finally:
        target.uncap()
    assert torch.empty(128 * MIB, dtype=torch.uint8, device="cuda").nbytes == 128 * MIB
    assert target.peak_bytes() >= 128 * MIB
