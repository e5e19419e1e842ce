"""What a convolution takes inside, continued from small batches, against the allocations of the whole one."""

from __future__ import annotations

import itertools

import pytest
import torch

from edgetrain.memory.measure import record_allocations
from edgetrain.memory.operators import InnerAllocations
from edgetrain.memory.timeline import timeline
from edgetrain.memory.trace import Block, Call, StepTrace, TensorMeta

# channels in and out, side, window, stride, padding, dilation, groups
SHAPES = {
    "first": (3, 12, 32, 3, 1, 1, 1, 1),
    "first, 20 channels": (3, 20, 32, 3, 1, 1, 1, 1),
    "first, 7x7": (3, 64, 64, 7, 2, 3, 1, 1),
    "16 channels": (16, 16, 32, 3, 1, 1, 1, 1),
    "12 to 24": (12, 24, 32, 3, 1, 1, 1, 1),
    "large weights": (256, 256, 4, 3, 1, 1, 1, 1),
    "strided": (48, 48, 33, 3, 2, 1, 1, 1),
    "dilated": (16, 16, 32, 3, 1, 2, 2, 1),
    "1x1": (24, 40, 32, 1, 1, 0, 1, 1),
    "1x1, padded": (24, 40, 14, 1, 1, 1, 1, 1),
    "1x1, strided": (64, 128, 16, 1, 2, 0, 1, 1),
    "patches": (3, 32, 64, 4, 4, 0, 1, 1),
    "grouped": (32, 64, 32, 3, 1, 1, 1, 4),
    "grouped, narrow": (64, 24, 32, 3, 1, 1, 1, 2),
    "depthwise": (24, 24, 32, 3, 1, 1, 1, 24),
    "depthwise, 7x7": (20, 20, 32, 7, 1, 3, 1, 20),
    "depthwise, strided": (40, 40, 32, 5, 2, 2, 1, 40),
}
TYPES = [torch.float32, torch.bfloat16, torch.float64]


def tensors(name: str, n: int, dtype: torch.dtype, *, transposed: bool) -> list[object]:
    c, k, side, window, stride, padding, dilation, groups = SHAPES[name]
    x = torch.zeros(n, c, side, side, dtype=dtype)
    shape = (c, k // groups) if transposed else (k, c // groups)
    weight = torch.zeros(*shape, window, window, dtype=dtype)
    pairs = [[stride] * 2, [padding] * 2, [dilation] * 2]
    return [x, weight, torch.zeros(k, dtype=dtype), *pairs, transposed, [0, 0], groups]


def backward_of(arguments: list[object]) -> list[object]:
    x, weight, bias, *rest = arguments
    with torch.no_grad():
        dy = torch.zeros_like(torch.ops.aten.convolution.default(*arguments))
    return [dy, x, weight, [bias.numel()], *rest, [True, True, True]]


def call_of(operator: str, arguments: list[object], results: list[int]) -> StepTrace:
    metas = tuple(
        TensorMeta(tuple(a.shape), a.stride(), a.dtype)
        if isinstance(a, torch.Tensor)
        else tuple(a)
        if isinstance(a, list)
        else a
        for a in arguments
    )
    made = tuple(range(len(results)))
    return StepTrace([Call(operator, metas, (), made, "", "forward")], [Block(b, "", "forward") for b in results])


def peak_of(history: list[tuple[int, int]]) -> int:
    return max(itertools.accumulate(nbytes for _, nbytes in history))


def ratios(name: str, n: int, dtype: torch.dtype, *, measured: bool, transposed: bool = False) -> list[float]:
    forward = tensors(name, n, dtype, transposed=transposed)
    found = []
    for operator, arguments in (("convolution", forward), ("convolution_backward", backward_of(forward))):
        function = getattr(torch.ops.aten, operator).default
        with torch.no_grad():
            (history,) = record_allocations(function, [arguments])
            made = function(*arguments)
        results = [t.untyped_storage().nbytes() for t in (made if isinstance(made, tuple) else (made,))]
        trace = call_of(f"aten.{operator}.default", arguments, results)
        found.append(timeline(trace, measured=measured).peak_bytes / peak_of(history))
    return found


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_continued_from_small_batches(name: str, dtype: torch.dtype):
    for n in (1, 16):
        assert all(0.995 <= ratio <= 1.03 for ratio in ratios(name, n, dtype, measured=True)), n


@pytest.mark.parametrize("name", ["12 to 24", "1x1", "strided", "grouped"])
def test_transposed(name: str):
    for n in (1, 5, 16):
        found = ratios(name, n, torch.float32, measured=True, transposed=True)
        assert all(0.995 <= ratio <= 1.03 for ratio in found), n


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_without_running_it_is_never_low(name: str, dtype: torch.dtype):
    for n in (1, 16):
        assert min(ratios(name, n, dtype, measured=False)) >= 0.99, n


@pytest.mark.parametrize("name", ["12 to 24", "1x1", "strided", "grouped"])
def test_transposed_without_running_it_is_never_low(name: str):
    for n, dtype in itertools.product((1, 16), TYPES):
        assert min(ratios(name, n, dtype, measured=False, transposed=True)) >= 0.99, (n, dtype)


def test_cuda_runs_nothing(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise AssertionError("a convolution was run")

    monkeypatch.setattr("edgetrain.memory.small_runs.record_allocations", fail)
    arguments = tensors("16 channels", 4, torch.float32, transposed=False)
    call = call_of("aten.convolution.default", arguments, [8]).calls[0]
    assert [step.nbytes for step in InnerAllocations([call], "cuda").of(call)] == [0]
