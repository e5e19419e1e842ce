"""Networks with Dirac weights, plain chains and wide residual networks in every mode, against autograd in float64."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edgetrain
from edgetrain.chain import chain_of
from edgetrain.memory import measure_costs, measure_peak, predicted_times
from edgetrain.memory.rates import OperatorRates
from edgetrain.planner import Planner
from edgetrain.planner.uniform import UNIFORM_MODES

BOUND = 1e-10
RATES = OperatorRates({64: 5e10}, 1e10, 6e9, 5e-6, 0.0, "round numbers")

SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "diracnet": ("diracnet-10-2", {"width": 4}),
    "diracnet-18": ("diracnet-18", {"width": 4}),
    "plain": ("plain-10", {"width": 4}),
    "wrn": ("wrn-10-2", {"width": 4, "dropout": 0.3}),
    "hybrid": ("hybrid18", {"width": 4, "blocks": (1, 1), "pooling": ("channel",), "dirac": True}),
    "hybrid, exact": ("hybrid18", {"width": 4, "blocks": (1, 1), "pooling": ("batch",), "dirac": True, "exact": True}),
    "irevnet": ("irevnet18", {"width": 4, "blocks": (1, 1), "pooling": ("channel",), "dirac": True}),
    "revnet": ("revnet18", {"widths": (8, 16), "blocks": (1, 1), "dirac": True}),
    # with a near 1, a coupling adds channel to channel, and inverting it multiplies noise: few layers in a row
    "layerwise": ("layerwise18", {"width": 4, "blocks": (1, 1), "pooling": ("channel",), "slope": 0.5, "dirac": True}),
}


def small(name: str) -> nn.Sequential:
    torch.manual_seed(0)
    family, options = SMALL[name]
    return edgetrain.create_model(family, **options).double()


def size(name: str) -> int:
    return 32 if name == "diracnet-18" else 16


def step(net: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    torch.manual_seed(7)
    loss = F.cross_entropy(net(x), labels)
    loss.backward()
    return loss.detach()


def assert_same_step(model: nn.Module, plan: Any) -> None:
    plain = copy.deepcopy(model)
    n, c, h, w = plan.input_shape
    x, labels = torch.randn(n, c, h, w, dtype=torch.double), torch.randint(0, 10, (n,))
    expected = step(plain, x, labels)
    assert abs(step(edgetrain.wrap(model, plan), x, labels) - expected) <= BOUND * abs(expected)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert p.grad is not None, name
        assert q.grad is not None
        assert float((p.grad - q.grad).norm()) <= BOUND * max(float(q.grad.norm()), 1e-3), name
    for (name, a), b in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize(("name", "mode"), list(itertools.product(SMALL, UNIFORM_MODES)))
def test_gradients_in_every_mode(name: str, mode: Any) -> None:
    model = small(name)
    pixels = size(name)
    assert_same_step(model, edgetrain.uniform_plan(model, mode, input_shape=(3, pixels, pixels), batch_size=3))


@pytest.mark.parametrize("name", ["diracnet", "wrn"])
def test_planned_for_a_budget(name: str) -> None:
    model = small(name).float()
    shape: dict[str, Any] = {"input_shape": (3, 16, 16), "batch_size": 16}
    times = predicted_times(measure_costs(model, **shape), RATES)
    least = Planner(model, times=times, **shape).least()
    plan = edgetrain.plan(model, budget=least.peak_bytes, times=times, **shape)
    assert plan.peak_bytes <= least.peak_bytes
    assert set(plan.modes) != {"store"}
    assert_same_step(model.double(), plan)


def test_the_peak_is_predicted() -> None:
    """What autograd keeps of W_hat counts: the predicted peak is not below that of the allocator."""
    model = edgetrain.create_model("diracnet-10-2", width=32)
    x, labels = torch.randn(2, 3, 16, 16), torch.zeros(2, dtype=torch.long)  # little data, much weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)

    def whole() -> None:
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    whole()
    resident = sum(p.numel() * 4 * 2 for p in model.parameters())  # with momentum
    resident += sum(b.numel() * b.element_size() for b in model.buffers()) + x.numel() * 4
    measured = measure_peak(whole).allocator_peak_bytes + resident
    predicted = edgetrain.estimate(model, input_shape=(3, 16, 16), batch_size=2).peak_bytes
    assert 0 <= predicted / measured - 1 < 0.05


def test_blocks_with_alike_weights_are_known_to_be_alike() -> None:
    from edgetrain.chain.knowledge import signature
    from edgetrain.memory.fingerprint import fingerprint

    chain = edgetrain.create_model("diracnet-16-1", width=4).group1
    one, other, wider = chain[1][0], chain[2][0], edgetrain.create_model("diracnet-16-1", width=8).group1[1][0]
    assert signature(one) == signature(other)
    assert fingerprint(one, 1) == fingerprint(other, 2) != fingerprint(wider, 3)
    projected = edgetrain.create_model("diracnet-16-2", width=4).group1[0][0]
    plain = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    assert len({signature(module) for module in (one, projected, plain)}) == 3


def test_wide_resnets_are_cut_at_their_blocks() -> None:
    names = [block.name for block in chain_of(edgetrain.create_model("wrn-16-1", width=4)).blocks]
    for group, i in itertools.product((1, 2, 3), (0, 1)):
        assert any(name.startswith(f"group{group}.{i}") for name in names)
