"""Clamping in place without a tensor of the results: values, gradients and memory against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgetrain.memory import measure_peak
from edgetrain.nn import lean
from edgetrain.nn.lean import lean_operators_in
from edgetrain.nn.slices import whole_batch


def values(dtype: torch.dtype = torch.float32) -> Tensor:
    """With both limits, what lies at and beyond them, and no number among them."""
    torch.manual_seed(0)
    x = torch.randn(4, 32, 40, 40, dtype=dtype).mul_(4)
    x.view(-1)[:7] = torch.tensor([0.0, 6.0, -0.0, torch.inf, -torch.inf, torch.nan, 7.0])
    return x


def stepped(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x * 1)
    (dx,) = torch.autograd.grad(y, x, torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    return y, dx


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layer", [nn.ReLU6(inplace=True), nn.Hardtanh(-0.5, 0.25, inplace=True)])
@pytest.mark.parametrize("last", [False, True])
def test_values_and_gradients_are_torchs(layer: nn.Module, dtype: torch.dtype, last: bool) -> None:
    x = values(dtype)
    if last:
        x = x.to(memory_format=torch.channels_last)
    expected, expected_dx = stepped(layer, x)
    with lean_operators_in(layer):
        y, dx = stepped(layer, x)
        without = layer(x.clone())
    assert type(y.grad_fn).__name__ == "_ClampBackward"
    assert y.stride() == expected.stride()
    for found, wanted in ((y, expected), (dx, expected_dx), (without, expected)):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_second_gradients() -> None:
    x = torch.randn(64, 1024, dtype=torch.double, requires_grad=True)
    layer = nn.ReLU6(inplace=True)
    found = []
    for within in (lean_operators_in(layer), torch.enable_grad()):
        with within:
            y = layer(x * x)
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), x)[0])
    assert torch.equal(*found)


def test_torchs_operator_where_ours_has_no_use() -> None:
    layer = nn.ReLU6(inplace=True)
    small, large = torch.randn(8, 8, requires_grad=True), torch.randn(512, 512, requires_grad=True)
    with lean_operators_in(layer):
        assert "Clamp" not in type(layer(small * 1).grad_fn).__name__
        assert "Clamp" not in type(F.hardtanh(large * 1).grad_fn).__name__, "not in place"
        assert "Clamp" not in type(layer((large * 1)[:, 1:]).grad_fn).__name__, "a view"
        with whole_batch():
            assert "Clamp" not in type(layer(large * 1).grad_fn).__name__
    with lean_operators_in(nn.ReLU6()):
        assert "Clamp" not in type(layer(large * 1).grad_fn).__name__, "nothing in it is in place"


def test_no_tensor_of_the_results() -> None:
    layer, x = nn.ReLU6(inplace=True), torch.randn(2**20)
    assert x.nbytes > lean._LEAST_BYTES

    def run() -> None:
        with torch.no_grad(), lean_operators_in(layer):
            layer(x)

    assert measure_peak(run, setup=run).allocator_peak_bytes < x.nbytes // 8
