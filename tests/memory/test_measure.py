"""Measured peaks against hand-counted bytes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from edgetrain.memory.measure import measure_peak
from edgetrain.units import MIB


def byte_block(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8)


def test_every_byte_counts_and_nothing_is_rounded():
    def call() -> torch.Tensor:
        a = byte_block(1_001)
        b = byte_block(7)  # 1008
        del a  # 7
        c = byte_block(999)  # 1006
        del b  # 999
        return c

    measured = measure_peak(call)
    assert measured.allocator_peak_bytes == 1_008
    assert measured.allocated_after_bytes == 999
    assert measured.seconds > 0


@pytest.mark.parametrize("size", [1, 63, 64, 65, 4_095, 4_097, 3 * MIB + 1])
def test_single_blocks(size: int):
    assert measure_peak(lambda: byte_block(size)).allocator_peak_bytes == size


def test_nothing_allocated():
    assert measure_peak(lambda: None).allocator_peak_bytes == 0


def test_setup_is_not_measured_but_freeing_it_is():
    state: dict[str, torch.Tensor] = {}

    def call() -> torch.Tensor:
        kept = byte_block(100)  # 100
        del state["old"]  # -900
        return torch.cat([kept, byte_block(50)])  # -850, then -700 at the end of cat

    measured = measure_peak(call, setup=lambda: state.update(old=byte_block(1_000)))
    assert measured.allocator_peak_bytes == 100
    assert measured.allocated_after_bytes == -1_000 + 150


def test_block_of_an_earlier_profile_is_not_taken_for_another():
    """The reporter keeps the sizes of earlier profiles; an address used again since must not count as that."""
    kept = []
    measure_peak(lambda: kept.append(byte_block(5_000)))
    for _ in range(20):
        kept.clear()
        kept.append(byte_block(4_999))
    measured = measure_peak(kept.clear)
    assert (measured.allocator_peak_bytes, measured.allocated_after_bytes) == (0, 0)


def test_backward_of_a_linear_chain():
    """Weight gradients stay; the activation y (n x d) lives until its backward pass, dx is not wanted.

    Forward: y and the loss. Backward from a given dy: dW and db of the layer, and nothing else.
    """
    n, d_in, d_out = 64, 128, 256
    layer, x = nn.Linear(d_in, d_out), torch.randn(n, d_in)
    dy = torch.randn(n, d_out)
    measured = measure_peak(lambda: layer(x).backward(dy))
    gradients = 4 * (d_in * d_out + d_out)
    assert measured.allocated_after_bytes == gradients
    assert gradients <= measured.allocator_peak_bytes <= gradients + 4 * n * d_out + 4 * (d_in * d_out)


def test_same_call_same_bytes():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    x = torch.randn(4, 3, 16, 16)

    def step() -> None:
        net(x).sum().backward()
        net.zero_grad()

    step()
    first, second = (measure_peak(step) for _ in range(2))
    assert first.allocator_peak_bytes == second.allocator_peak_bytes >= 4 * 4 * 8 * 16 * 16 * 4
    assert first.allocated_after_bytes == second.allocated_after_bytes == 0


TOUCH = """
import torch
from edgetrain.memory.measure import measure_process_growth
print(measure_process_growth(lambda: torch.ones(64 * 2**20, dtype=torch.uint8)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_process_growth_sees_what_is_touched():
    """In a process of its own: one that ran other tests may have memory free that serves without growth."""
    done = subprocess.run([sys.executable, "-c", TOUCH], stdout=subprocess.PIPE, text=True, check=True)
    assert int(done.stdout) == pytest.approx(64 * MIB, abs=4 * MIB)


@pytest.mark.gpu
def test_cuda_rounds_to_512_bytes():
    measured = measure_peak(lambda: torch.empty(1_001, dtype=torch.uint8, device="cuda"), device="cuda")
    assert measured.allocator_peak_bytes == measured.allocated_after_bytes == 1_024
