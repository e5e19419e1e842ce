"""Every model in every mode, uniform and mixed, against plain autograd in float64."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edgetrain
from edgetrain.chain import MODES, Mode, chain_of
from edgetrain.errors import ModelError
from edgetrain.memory import measure_peak
from edgetrain.planner import Plan, schedule
from edgetrain.planner.uniform import UNIFORM_MODES
from edgetrain.runtime import Wrapped

BOUND = 1e-10
SHAPE = (3, 3, 16, 16)

SMALL: dict[str, dict[str, Any]] = {
    "resnet18": {"widths": (8, 16, 16, 32)},
    "revnet18": {"widths": (8, 16, 32, 32)},
    "irevnet18": {"width": 4},
    "hybrid18": {"width": 4},
    # float64 round-off grows about tenfold with each inverted layer at slope 0.1, so fourteen layers of pure
    # inversion cannot stay under 1e-10; at slope 0.5 they do (test_noise_of_pure_inversion has the default)
    "layerwise18": {"width": 4, "slope": 0.5},
    "resnet20": {"width": 4},
}


def small_model(name: str) -> nn.Sequential:
    torch.manual_seed(0)
    return edgetrain.create_model(name, **SMALL[name]).double()


def dropout_network() -> nn.Sequential:
    def module() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU())

    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        edgetrain.nn.ReversibleBlock(module(), module()),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Dropout(0.2),
        edgetrain.nn.HybridBlock(8),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)),
    ).double()


def plan_of(model: nn.Module, modes: list[Mode]) -> Plan:
    chain = chain_of(model)
    program = schedule([block.name for block in chain.blocks], chain.shapes(SHAPE), modes)
    return Plan(tuple(modes), ("",) * len(modes), program)


def step(net: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    torch.manual_seed(7)
    loss = F.cross_entropy(net(x), labels)
    loss.backward()
    return loss.detach()


def assert_same_step(model: nn.Module, plan: Plan, *, input_gradient: bool = False) -> None:
    plain = copy.deepcopy(model)
    torch.manual_seed(1)
    x, labels = torch.randn(SHAPE, dtype=torch.double), torch.randint(0, 10, SHAPE[:1])
    x_plain = x.clone().requires_grad_(input_gradient)
    x.requires_grad_(input_gradient)
    before = x.detach().clone()
    expected = step(plain, x_plain, labels)
    actual = step(edgetrain.wrap(model, plan), x, labels)
    assert torch.equal(x.detach(), before), "the batch is the caller's"
    assert abs(actual - expected) <= BOUND * abs(expected)
    if input_gradient:
        torch.testing.assert_close(x.grad, x_plain.grad, rtol=BOUND, atol=BOUND)
    assert_gradients(model, plain)
    for (name, b), c in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(b, c, rtol=1e-10, atol=1e-12, msg=name)
        if name.endswith("num_batches_tracked"):
            assert int(b) == 1, name


def assert_gradients(model: nn.Module, plain: nn.Module) -> None:
    # a gradient that is zero but for round-off (a bias in front of a batch norm) is measured against the largest
    largest = max(float(p.grad.norm()) for p in plain.parameters() if p.grad is not None)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert p.grad is not None, name
        assert q.grad is not None, name
        error = float((p.grad - q.grad).norm()) / max(float(q.grad.norm()), 1e-4 * largest)
        assert error < BOUND, f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    "mode", ["keep_all", "selective", "recompute", "invert", "invert_selective", "invert_layerwise"]
)
@pytest.mark.parametrize("name", SMALL)
def test_uniform(name: str, mode: Any) -> None:
    model = small_model(name)
    plan = edgetrain.uniform_plan(model, mode, input_shape=SHAPE[1:], batch_size=SHAPE[0])
    assert_same_step(model, plan)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", SMALL)
def test_mixed(name: str, seed: int) -> None:
    model = small_model(name)
    draw = random.Random(seed)
    modes = [draw.choice([m for m in MODES if block.allows(m)]) for block in chain_of(model).blocks]
    assert_same_step(model, plan_of(model, modes), input_gradient=seed == 0)


@pytest.mark.parametrize("seed", range(12))
def test_mixed_with_dropout_and_in_place_activations(seed: int) -> None:
    model = dropout_network()
    draw = random.Random(seed)
    modes = [draw.choice([m for m in MODES if block.allows(m)]) for block in chain_of(model).blocks]
    assert_same_step(model, plan_of(model, modes))


def test_frozen_batch_norm_in_every_mode() -> None:
    for mode in UNIFORM_MODES:
        model = small_model("hybrid18")
        x, labels = torch.randn(SHAPE, dtype=torch.double), torch.randint(0, 10, SHAPE[:1])
        with torch.no_grad():
            for _ in range(40):  # running statistics that fit the data, as those of a trained network do
                model(x)
        model.eval()
        counted = [int(b) for name, b in model.named_buffers() if name.endswith("num_batches_tracked")]
        plain = copy.deepcopy(model)
        plan = edgetrain.uniform_plan(model, mode, input_shape=SHAPE[1:], batch_size=SHAPE[0])
        assert abs(step(edgetrain.wrap(model, plan), x, labels) - step(plain, x, labels)) < BOUND
        assert_gradients(model, plain)
        assert counted == [int(b) for name, b in model.named_buffers() if name.endswith("num_batches_tracked")]


def test_noise_of_pure_inversion() -> None:
    """The default layer-wise network in float64: noise grows on the way down, and an exact anchor ends it."""
    torch.manual_seed(0)
    model = edgetrain.create_model("layerwise18", width=4).double()
    anchored: list[Mode] = [
        "recompute" if name in ("stage1.2", "stage2.0", "stage2.2", "stage3.0", "stage3.2") else mode
        for name, mode in zip(*_names_and_modes(model), strict=True)
    ]
    assert_same_step(copy.deepcopy(model), plan_of(model, anchored))
    plain, noisy = copy.deepcopy(model), copy.deepcopy(model)
    x, labels = torch.randn(SHAPE, dtype=torch.double), torch.randint(0, 10, SHAPE[:1])
    step(plain, x, labels)
    plan = edgetrain.uniform_plan(noisy, "invert_layerwise", input_shape=SHAPE[1:], batch_size=SHAPE[0])
    step(edgetrain.wrap(noisy, plan), x, labels)
    errors = {
        name: float((p.grad - q.grad).norm() / q.grad.norm())  # type: ignore[operator, union-attr]
        for (name, p), q in zip(noisy.named_parameters(), plain.parameters(), strict=True)
    }
    assert errors["stage4.1.conv.f.weight"] < 1e-13
    assert errors["stage1.0.conv.f.weight"] > 1e4 * errors["stage4.0.conv.f.weight"]


def _names_and_modes(model: nn.Module) -> tuple[tuple[str, ...], tuple[Mode, ...]]:
    plan = edgetrain.uniform_plan(model, "invert_layerwise", input_shape=SHAPE[1:], batch_size=SHAPE[0])
    return plan.program.names, plan.modes


def test_two_forward_passes_before_their_backward_passes() -> None:
    model = small_model("hybrid18")
    plain = copy.deepcopy(model)
    plan = edgetrain.uniform_plan(model, "invert_layerwise", input_shape=SHAPE[1:], batch_size=SHAPE[0])
    net = edgetrain.wrap(model, plan)
    a, b = torch.randn(2, *SHAPE, dtype=torch.double)
    (net(a) - net(b)).square().sum().backward()
    (plain(a) - plain(b)).square().sum().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-11)


def test_another_batch_size_than_planned_and_inference() -> None:
    model = small_model("hybrid18")
    net = edgetrain.wrap(
        model, edgetrain.uniform_plan(model, "invert_layerwise", input_shape=SHAPE[1:], batch_size=SHAPE[0])
    )
    x = torch.randn(5, *SHAPE[1:], dtype=torch.double)
    assert net(x).shape == (5, 10)
    net.eval()
    with torch.no_grad():
        assert torch.equal(net(x), model(x))
    assert isinstance(net, Wrapped)
    assert next(name for name, _ in net.named_parameters()) == "model.stem.weight"


def test_a_second_backward_is_refused() -> None:
    model = small_model("hybrid18")
    net = edgetrain.wrap(
        model, edgetrain.uniform_plan(model, "invert_layerwise", input_shape=SHAPE[1:], batch_size=SHAPE[0])
    )
    loss = net(torch.randn(SHAPE, dtype=torch.double)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        loss.backward()


def test_autocast_is_refused() -> None:
    model = small_model("hybrid18").float()
    plan = edgetrain.uniform_plan(model, "invert_layerwise", input_shape=SHAPE[1:], batch_size=SHAPE[0])
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ModelError, match="autocast"):
        edgetrain.wrap(model, plan)(torch.randn(SHAPE))


class _Halve(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5


def test_stored_blocks_hold_no_more_than_autograd():
    model = nn.Sequential(*[_Halve() for _ in range(4)])  # the gradient needs no activation
    x = torch.randn(8, 16, 32, 32, requires_grad=True)
    net = edgetrain.wrap(model, edgetrain.uniform_plan(model, "keep_all", input_shape=(16, 32, 32), batch_size=8))
    kept = [measure_peak(lambda f=f: f(x)).allocated_after_bytes for f in (net, model)]
    assert kept[0] <= kept[1] + 4096
