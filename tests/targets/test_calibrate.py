"""Measuring this host: the arithmetic exactly, the measurements in their order of magnitude."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest
import torch

from edgetrain.errors import EdgetrainError
from edgetrain.targets import calibrate as measuring
from edgetrain.targets.measured import Measured, summarise
from edgetrain.targets.overheads import Overheads, measure_overheads
from edgetrain.units import MIB


def test_median_and_quartiles():
    """Of 1..5, by hand: median 3, quartiles 2 and 4."""
    measured = summarise([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (measured.lower, measured.median, measured.upper, measured.runs) == (2, 3, 4, 5)
    assert summarise([7.0]) == Measured(7.0, 7.0, 7.0, 1)


def test_rates_are_operations_and_bytes_over_time(monkeypatch: pytest.MonkeyPatch):
    """Where every call takes 10 ms, rates follow from shapes alone: 2 x 9 x 32 x 32 x c x c for one image."""

    def ten_milliseconds(call: Any, device: str) -> float:
        call()
        return 0.01

    monkeypatch.setattr(measuring, "_time", ten_milliseconds)
    monkeypatch.setattr(measuring, "_LARGEST_BYTES", MIB)
    overheads = Overheads(summarise([200.0 * MIB]), None)
    monkeypatch.setattr(measuring, "measure_overheads", lambda device: overheads)
    found = measuring.calibrate("cpu", case_seconds=0)
    for channels, rate in found.convolution["fp32"].items():
        assert rate.median == pytest.approx(2 * 9 * 32 * 32 * channels**2 / 0.01)
        assert rate.runs == 7
    assert tuple(found.convolution["fp32"]) == measuring.CHANNELS
    assert found.elementwise["fp32"].median == pytest.approx(3 * MIB / 0.01)
    assert found.copy.median == pytest.approx(2 * MIB / 0.01)
    assert found.overheads is overheads
    assert found.threads == torch.get_num_threads()
    assert found.system_bytes is not None
    assert 0 <= found.system_bytes < found.total_bytes


def test_batches_grow_until_a_call_can_be_timed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measuring, "_time", lambda call, device: 0.001 * call())
    n, times = measuring._repeat(lambda n: lambda: n, "cpu", largest=1000, seconds=0)
    assert n == 16  # the first power of two whose call takes 10 ms
    assert times == [0.016] * 7
    assert measuring._repeat(lambda n: lambda: n, "cpu", largest=5, seconds=0)[0] == 4


def test_memory_of_the_libraries_in_a_fresh_process():
    overheads = measure_overheads("cpu", runs=1)
    assert 50 * MIB < overheads.framework_bytes.median < 2000 * MIB
    assert overheads.context_bytes is None


def test_process_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch):
    failed = subprocess.CompletedProcess([], 1, "", "ImportError: libtorch.so")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **keys: failed)
    with pytest.raises(EdgetrainError, match=r"ended with 1: ImportError: libtorch\.so"):
        measure_overheads("cpu", runs=1)

    def late(*arguments: Any, **keys: Any) -> None:
        raise subprocess.TimeoutExpired("python", 120)

    monkeypatch.setattr(subprocess, "run", late)
    with pytest.raises(EdgetrainError, match="did not end within 120 s"):
        measure_overheads("cpu", runs=1)


@pytest.mark.gpu
def test_calibration_of_a_gpu():
    found = measuring.calibrate("cuda", case_seconds=0.05)
    assert {"fp32", "fp16"} <= set(found.convolution)
    assert found.overheads.context_bytes is not None
    assert 50 * MIB < found.overheads.context_bytes.median < 3000 * MIB
