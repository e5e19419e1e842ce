"""Random programs with nested checkpoints against plain autograd in float64: gradients, statistics, random numbers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from programs import NESTED_SHAPE, NETWORKS, nested_plan
from torch import Tensor, nn

import edgetrain

BOUND = 1e-10


def step(net: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(7)
    y: Tensor = net(x)
    F.cross_entropy(y, torch.arange(NESTED_SHAPE[0])).backward()
    return y.detach()


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_statistics_and_random_numbers(name: str, seed: int) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name]().double()
    reference = copy.deepcopy(model)
    net = edgetrain.wrap(model, nested_plan(model, seed))
    x = torch.randn(NESTED_SHAPE, dtype=torch.double)
    x_reference = x.clone().requires_grad_(seed % 2 == 0)
    x.requires_grad_(seed % 2 == 0)
    for _ in range(2):  # nothing is left of one step in the next
        expected = step(reference, x_reference)
        state = torch.get_rng_state()
        torch.testing.assert_close(step(net, x), expected, rtol=BOUND, atol=BOUND)
        assert torch.equal(torch.get_rng_state(), state), "the same random numbers are drawn, once"
    if x.grad is not None:
        torch.testing.assert_close(x.grad, x_reference.grad, rtol=BOUND, atol=BOUND)
    largest = max(float(q.grad.norm()) for q in reference.parameters() if q.grad is not None)
    for (parameter, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert p.grad is not None, parameter
        assert q.grad is not None, parameter
        # a gradient that is zero but for round-off (a bias in front of a batch norm) is measured against the largest
        error = float((p.grad - q.grad).norm()) / max(float(q.grad.norm()), 1e-4 * largest)
        assert error < BOUND, f"{parameter}: {error:.1e}"
    for (buffer, b), c in zip(model.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(b, c, rtol=BOUND, atol=1e-12, msg=buffer)
