"""Coupling layers that keep their output: gradients from input and output, without a convolution computed again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edgetrain
from edgetrain.memory import measure_costs, measure_peak, simulate
from edgetrain.memory.rates import OperatorRates
from edgetrain.nn.coupling import CouplingLayer
from edgetrain.planner import Planner
from edgetrain.runtime import Backward, Forward, Free, Head, Program, Recompute

BATCH, SIZE = 6, 16
SHAPE: dict[str, Any] = {"input_shape": (3, SIZE, SIZE), "batch_size": BATCH}
BOUND = 1e-10
RATES = OperatorRates({1: 1e9}, 1e12, 1e12, 0.0, 0.0, "a device that multiplies slowly")


def network() -> nn.Module:
    torch.manual_seed(0)
    return edgetrain.create_model("layerwise18", num_classes=5)


def loss(y: Tensor) -> Tensor:
    return F.cross_entropy(y, torch.arange(len(y)) % 5)


def same_step(model: nn.Module, plan: Any) -> None:
    """A step of ``plan`` in float64 against plain autograd's: gradients, and what batch norm counts."""
    plain = copy.deepcopy(model).double()
    ours, x = copy.deepcopy(plain), torch.randn(BATCH, 3, SIZE, SIZE, dtype=torch.float64)
    loss(plain(x)).backward()
    loss(edgetrain.wrap(ours, plan)(x)).backward()
    for got, expected in zip(ours.parameters(), plain.parameters(), strict=True):
        assert (got.grad is None) == (expected.grad is None)
        if got.grad is not None and expected.grad is not None:
            assert float((got.grad - expected.grad).norm() / expected.grad.norm()) < BOUND
    for got, expected in zip(ours.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def peaks(model: nn.Module, plan: Any) -> tuple[int, int]:
    """Predicted and measured, weights and batch included."""
    costs = measure_costs(model, **SHAPE, optimizer=None)
    net, x = edgetrain.wrap(copy.deepcopy(model), plan), torch.randn(BATCH, 3, SIZE, SIZE)

    def step() -> None:
        loss(net(x)).backward()
        net.zero_grad(set_to_none=True)

    step()
    measured = costs.weight_bytes + x.nbytes + measure_peak(step).allocator_peak_bytes
    return simulate(plan.program, costs).peak_bytes, measured


class Planned:
    """A program as a plan."""

    def __init__(self, program: Program) -> None:
        self.program = program


def mixed(model: nn.Module, *, again: bool) -> Planned:
    """Two layers that keep their outputs, between one that is inverted and one that stores; ``again``: on the way back.

    Layers 1 to 4 are at full resolution: of z[2] and z[3] others need the memory as it was.
    """
    uniform = edgetrain.uniform_plan(model, "keep_all", **SHAPE).program
    count = len(uniform.names)
    forward = [Forward(i, "all") for i in range(count)]
    backward = [Backward(i, "saved") for i in reversed(range(count))]
    if again:
        forward[1:3] = [Forward(1, "input"), Forward(2, "nothing")]
        back = [Recompute(1, 2, "products"), Backward(2, "selective"), Backward(1, "selective")]
    else:
        forward[1:4] = [Forward(1, "products"), Forward(2, "products"), Forward(3, "nothing")]
        backward[count - 4] = Backward(3, "invert_layerwise")
        back = [Backward(2, "selective"), Backward(1, "selective")]
    at = backward.index(Backward(2, "saved"))
    backward[at : at + 2] = [*back, Free(1)]
    return Planned(Program(uniform.names, uniform.shapes, (*forward, Head(), *backward)))


def test_every_layer():
    model = network()
    plan = edgetrain.uniform_plan(model, "selective", **SHAPE)
    assert plan.modes.count("selective") == sum(isinstance(m, CouplingLayer) for m in model.modules())
    same_step(model, plan)
    predicted, measured = peaks(model, plan)
    assert predicted == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("again", [False, True], ids=["first pass", "on the way back"])
def test_among_other_modes(again: bool):
    model = network()
    plan = mixed(model, again=again)
    same_step(model, plan)
    predicted, measured = peaks(model, plan)
    assert predicted == pytest.approx(measured, rel=0.01)


def test_frozen_statistics_and_weights():
    model = network()
    for layer in model.modules():
        if isinstance(layer, CouplingLayer):
            layer.norm.eval()
            layer.norm.running_mean.uniform_(-1, 1)
            layer.norm.running_var.uniform_(0.5, 2)
            layer.norm.weight.requires_grad_(False)
            layer.conv.g.weight.requires_grad_(False)
    same_step(model, edgetrain.uniform_plan(model, "selective", **SHAPE))


def test_no_convolution_runs_again(monkeypatch: pytest.MonkeyPatch):
    layer, x = CouplingLayer(4), torch.randn(2, 4, 8, 8)
    y = layer.forward_(x.clone())
    monkeypatch.setattr(F, "conv2d", lambda *_: pytest.fail("a convolution was computed again"))
    layer.backward_between(x, y, torch.randn_like(y))


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_plans_use_it(share: float):
    model = network()
    planner = Planner(model, **SHAPE, times=RATES)
    least = planner.needed()[0]
    plan = planner.plan(int(least + share * (planner.plan().peak_bytes - least)))
    assert "selective" in plan.modes
    assert "keeps its output besides its input" in plan.explain()
    same_step(model, plan)


def test_not_where_every_bit_is_to_come_back():
    model = network()
    planner = Planner(model, **SHAPE, device="rpi5-4gb", snr_limit=float("inf"))
    plan = planner.plan(planner.needed()[0])
    assert set(plan.modes) <= {"store", "recompute"}
    assert "not selective      would leave a signal-to-noise ratio" in plan.explain()
