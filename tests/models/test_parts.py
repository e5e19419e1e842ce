"""The pooling between the stages of ResNet and RevNet against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from edgetrain.models.parts import MaxPoolPad


@pytest.mark.parametrize("slope", [None, 0.1])
def test_pooling_equals_torchs(slope: float | None):
    torch.manual_seed(0)
    values = torch.randint(-3, 3, (5, 4, 6, 8)).double()  # with ties: the first of a window gets the gradient
    dy = torch.randn(5, 8, 3, 4, dtype=torch.float64)
    results = []
    for ours in (True, False):
        x = values.clone().requires_grad_()
        if ours:
            y = MaxPoolPad(4, 8, slope=slope)(x)
        else:
            y = F.max_pool2d(x if slope is None else F.leaky_relu(x, slope), 2)  # the activation before the pooling
            y = F.pad(y.view(5, 2, 2, 3, 4), (0, 0, 0, 0, 0, 2)).view(5, 8, 3, 4)
        y.backward(dy)
        results.append((y.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_no_sample():
    assert MaxPoolPad(4, 8)(torch.randn(0, 4, 8, 8)).shape == (0, 8, 4, 4)


def test_pooling_keeps_a_byte_per_output():
    kept: list[torch.Tensor] = []
    x = torch.randn(2, 4, 8, 8, requires_grad=True) * 1.0
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        MaxPoolPad(4, 4)(x)
    assert sum(t.numel() * t.element_size() for t in kept) == x.numel() // 4
