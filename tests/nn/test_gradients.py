"""Gradients, inverses and running statistics of every layer and block against plain autograd in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from edgetrain.nn import (
    BatchPool,
    ChannelPool,
    CouplingConv,
    CouplingLayer,
    CouplingStack,
    HybridBlock,
    Invertible,
    InvertibleBatchNorm,
    InvertibleLeakyReLU,
    InvertibleSequential,
    ReversibleBlock,
)

BOUND = 1e-10
"""Relative error that the float64 gradients of every mode must stay under."""


def stateful_module() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3, padding=1)),
    )


LAYERS: dict[str, Callable[[], Invertible]] = {
    "batch norm": lambda: InvertibleBatchNorm(8),
    "batch norm, frozen": lambda: InvertibleBatchNorm(8).eval(),
    "leaky ReLU": lambda: InvertibleLeakyReLU(0.2),
    "coupling conv": lambda: CouplingConv(8),
    "coupling conv 5x5": lambda: CouplingConv(8, kernel_size=5),
    "channel pool": ChannelPool,
    "batch pool": BatchPool,
    "coupling layer": lambda: CouplingLayer(8),
    "coupling stack": lambda: CouplingStack(8, depth=3),
    "sequence": lambda: InvertibleSequential(a=CouplingLayer(8), b=ChannelPool(), c=CouplingLayer(32)),
    "reversible block": lambda: ReversibleBlock(stateful_module(), stateful_module()),
    "reversible block, one module invertible": lambda: ReversibleBlock(stateful_module(), CouplingLayer(4)),
    "hybrid block, depth 1": lambda: HybridBlock(8, depth=1),
    "hybrid block, depth 2": lambda: HybridBlock(8),
    "hybrid block, depth 3": lambda: HybridBlock(8, depth=3),
    "hybrid block, depth 4": lambda: HybridBlock(8, depth=4),
    "hybrid block, frozen": lambda: HybridBlock(8).eval(),
    "hybrid block of other layers": lambda: ReversibleBlock(InvertibleBatchNorm(4), CouplingStack(4)),
}


def relative_error(actual: torch.Tensor, expected: torch.Tensor, scale: float) -> float:
    return float((actual - expected).norm()) / scale


@pytest.fixture(params=LAYERS, ids=str)
def layer(request: pytest.FixtureRequest) -> Invertible:
    torch.manual_seed(0)
    made = LAYERS[request.param]().double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("shape", [(3, 8, 6, 6), (70, 8, 32, 32)], ids=["one slice", "several slices"])
@pytest.mark.parametrize("method", ["backward_from_output", "backward_holding"])
def test_equals_autograd(layer: Invertible, method: str, shape: tuple[int, ...]) -> None:
    plain = copy.deepcopy(layer)
    x = torch.randn(shape, dtype=torch.double)
    leaf = x.clone().requires_grad_()
    state = torch.get_rng_state()
    expected = plain(leaf)
    state_after = torch.get_rng_state()
    dy = torch.randn_like(expected)
    expected.backward(dy)

    torch.set_rng_state(state)
    given, given_dy = x.clone(), dy.clone()
    y = layer.forward_(given)
    assert torch.equal(torch.get_rng_state(), state_after), "the same random numbers are drawn, once"
    assert relative_error(y, expected.detach(), float(expected.detach().norm())) < BOUND
    inverted, dx = getattr(layer, method)(y, given_dy)
    assert torch.equal(torch.get_rng_state(), state_after), "the backward pass draws none"
    assert relative_error(inverted, x, float(x.norm())) < BOUND
    assert leaf.grad is not None
    assert relative_error(dx, leaf.grad, float(leaf.grad.norm())) < BOUND

    gradients = [p.grad for p in plain.parameters() if p.grad is not None]
    # a bias in front of a batch norm has no gradient but round-off: measured against the layer's largest
    largest = max((float(g.norm()) for g in gradients), default=1.0)
    for (name, actual), wanted in zip(layer.named_parameters(), plain.parameters(), strict=True):
        assert actual.grad is not None, name
        assert wanted.grad is not None, name
        scale = max(float(wanted.grad.norm()), 1e-4 * largest)
        assert relative_error(actual.grad, wanted.grad, scale) < BOUND, name
    for (name, actual_buffer), wanted_buffer in zip(layer.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(actual_buffer, wanted_buffer[1], rtol=1e-12, atol=1e-14, msg=name)


def test_in_place_methods_stay_in_the_memory_they_are_given(layer: Invertible) -> None:
    x = torch.randn(3, 8, 6, 6, dtype=torch.double)
    memory = x.data_ptr()
    y = layer.forward_(x)
    assert y.data_ptr() == memory
    dy = torch.randn_like(y)
    gradient_memory = dy.data_ptr()
    inverted, dx = layer.backward_from_output(y, dy)
    assert (inverted.data_ptr(), dx.data_ptr()) == (memory, gradient_memory)


def test_inverse_leaves_its_argument_alone(layer: Invertible) -> None:
    x = torch.randn(3, 8, 6, 6, dtype=torch.double)
    y = layer.forward_(x.clone())
    before = y.clone()
    torch.testing.assert_close(layer.inverse(y), x, rtol=1e-10, atol=1e-10)
    assert torch.equal(y, before)


def test_gradients_are_added_to_what_is_there() -> None:
    torch.manual_seed(0)
    layer = HybridBlock(8).double()
    x, dy = torch.randn(2, 3, 8, 6, 6, dtype=torch.double)
    layer.backward_from_output(layer.forward_(x.clone()), dy.clone())
    once = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    layer.backward_from_output(layer.forward_(x.clone()), dy.clone())
    for parameter, gradient in zip(layer.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient, rtol=1e-10, atol=1e-12)


def test_frozen_parameters_get_no_gradient() -> None:
    layer = HybridBlock(8)
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    y = layer.forward_(torch.randn(2, 8, 4, 4))
    layer.backward_from_output(y, torch.randn_like(y))
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_an_inverse_before_any_forward_says_so() -> None:
    with pytest.raises(RuntimeError, match="before any forward"):
        InvertibleBatchNorm(4).inverse(torch.randn(2, 4, 2, 2))
    with pytest.raises(RuntimeError, match="before any forward"):
        ReversibleBlock(nn.Identity(), nn.Identity()).inverse(torch.randn(2, 4, 2, 2))
