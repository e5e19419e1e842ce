"""Plans of real networks: they fit by measurement, train as plain autograd does, and say why."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rounding import by_hand
from torch import Tensor, nn

import edgetrain
from edgetrain.chain import BFLOAT16_NSR
from edgetrain.errors import BudgetError, ModelError, UsageError
from edgetrain.memory import OPTIMIZERS, Times, measure_costs, measure_peak, predicted_times, trace_step
from edgetrain.memory.rates import OperatorRates
from edgetrain.planner import Plan
from edgetrain.planner.reasons import rounded_in
from edgetrain.runtime import Offload
from edgetrain.units import format_mib

RATES = OperatorRates({64: 5e10}, 1e10, 6e9, 5e-6, 0.0, "round numbers")
SHAPE = (3, 16, 16)


def convolutions(count: int = 12) -> nn.Sequential:
    """A plain chain without batch norm."""
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1)]
    for _ in range(count):
        layers += [nn.Conv2d(8, 8, 3, padding=1), nn.GELU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def inverted_residuals(count: int = 5) -> nn.Sequential:
    """As in a MobileNet: much to keep and little to compute between convolutions."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            parts: list[nn.Module] = []
            for inputs, outputs, size, groups in ((32, 128, 1, 1), (128, 128, 3, 128), (128, 32, 1, 1)):
                convolution = nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups, bias=False)
                parts += [convolution, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True)]
            self.inner = nn.Sequential(*parts[:-1])

        def forward(self, x: Tensor) -> Tensor:
            return x + self.inner(x)

    blocks = [Block() for _ in range(count)]
    return nn.Sequential(nn.Conv2d(3, 32, 3, stride=2, padding=1), *blocks, nn.Flatten(), nn.Linear(2048, 10))


def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "hybrid": edgetrain.create_model("hybrid18", width=8, blocks=(1, 1, 1, 1), slope=0.2),
        "layerwise": edgetrain.create_model("layerwise18", width=8, blocks=(2, 2, 2, 1), slope=0.2),
        "revnet": edgetrain.create_model("revnet18", widths=(8, 16, 24, 32)),
        "resnet": edgetrain.create_model("resnet20"),
        "convolutions": convolutions(),
        "inverted residuals": inverted_residuals(),
    }


@functools.cache
def times_of(name: str, batch_size: int) -> Times:
    return predicted_times(measure_costs(networks()[name], input_shape=SHAPE, batch_size=batch_size), RATES)


@functools.cache
def plan_of(name: str, budget: int | None = None, **options: Any) -> Plan:
    times = times_of(name, 8)
    return edgetrain.plan(networks()[name], input_shape=SHAPE, batch_size=8, budget=budget, times=times, **options)


@pytest.mark.parametrize("name", networks())
@pytest.mark.parametrize("place", [0.0, 0.3, 0.7])
def test_fits_by_trace_and_trains_as_autograd_does(name: str, place: float) -> None:
    """``place``: where the budget is between the leanest plan and keeping everything."""
    model = networks()[name]
    keep_all = plan_of(name, micro_batches=1)  # a part of the batch would be timed here
    assert set(keep_all.modes) == {"store"}
    assert keep_all.costed is not None
    least = keep_all.costed.front[0][0]
    budget = round(least + place * (keep_all.peak_bytes - least))
    plan = plan_of(name, budget, micro_batches=1)
    assert plan.costed is not None
    assert plan.peak_bytes <= budget
    assert keep_all.step_seconds <= plan.step_seconds * (1 + 1e-6)
    assert plan.costed.bound_seconds <= plan.step_seconds * (1 + 1e-6)

    trace = trace_step(model, input_shape=SHAPE, batch_size=8, wrap=lambda module: edgetrain.wrap(module, plan))
    traced = edgetrain.memory.timeline(trace, "cpu").peak_bytes
    assert traced == plan.peak_bytes, plan.program.table()

    plain, planned = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    x, labels = torch.randn(8, *SHAPE, dtype=torch.double), torch.randint(0, 10, (8,))
    F.cross_entropy(plain(x), labels).backward()
    F.cross_entropy(edgetrain.wrap(planned, plan)(x), labels).backward()
    for (parameter, own), other in zip(planned.named_parameters(), plain.parameters(), strict=True):
        assert own.grad is not None
        assert other.grad is not None
        scale = other.grad.abs().max().clamp_min(1e-12)
        assert ((own.grad - other.grad).abs().max() / scale) < 1e-10, parameter
    for own, other in zip(planned.buffers(), plain.buffers(), strict=True):
        assert torch.allclose(own, other, rtol=1e-10, atol=1e-13)


def test_blocks_that_keep_the_results_of_their_products_say_so() -> None:
    """On a device whose arithmetic is slow for its memory; a wider one would run these blocks again."""
    model, budget = inverted_residuals(), int(0.6 * plan_of("inverted residuals").peak_bytes)
    costs = measure_costs(model, input_shape=SHAPE, batch_size=8)
    times = predicted_times(costs, replace(RATES, flops_per_s={64: 5e9}))
    plan = edgetrain.plan(model, input_shape=SHAPE, batch_size=8, budget=budget, times=times)
    assert plan.peak_bytes <= budget
    assert "selective" in plan.modes
    reason = plan.reasons[plan.modes.index("selective")]
    assert "keeps the results of its expensive convolutions and matrix products, " in reason
    assert "spares" in reason
    assert any(other.name == "selective" for other in plan.rejected[plan.modes.index("store")])


def test_less_memory_never_costs_less_time() -> None:
    front = plan_of("convolutions").costed.front  # type: ignore[union-attr]
    assert len(front) > 3
    assert all(a < b for a, b in zip([p for p, _ in front], [p for p, _ in front[1:]], strict=False))
    assert all(a > b for a, b in zip([s for _, s in front], [s for _, s in front[1:]], strict=False))


def test_a_budget_that_nothing_fits_names_the_least_and_changes_that_do() -> None:
    costed = plan_of("resnet").costed
    assert costed is not None
    least = costed.front[0][0]
    with pytest.raises(BudgetError) as raised:
        plan_of("resnet", int(0.9 * least))
    assert format_mib(least) in raised.value.expected
    assert "--budget" in raised.value.action


def test_goes_through_json_without_loss_and_explains_every_block() -> None:
    plan = plan_of("hybrid", int(0.8 * plan_of("hybrid").peak_bytes))
    assert Plan.from_json(plan.to_json()) == plan
    text = plan.explain()
    assert all(name in text for name in plan.program.names)
    assert "not uniform keep_all" in text


def below_the_whole_batch() -> int:
    """A budget in which no plan of the whole batch fits; what convolutions take inside depends on the processor."""
    costed = plan_of("convolutions", micro_batches=1).costed
    assert costed is not None
    return costed.front[0][0] - 1


def test_micro_batches_only_where_they_are_exact_or_asked_for() -> None:
    with pytest.raises(UsageError, match="batch norm"):
        plan_of("resnet", micro_batches=2)
    assert plan_of("resnet", micro_batches=2, allow_ghost_batchnorm=True).micro_batches == 2
    parts = plan_of("convolutions", below_the_whole_batch())
    assert parts.micro_batches == 2
    assert parts.input_shape == (8, *SHAPE)


def test_micro_batches_take_what_was_predicted() -> None:
    plan = plan_of("convolutions", below_the_whole_batch())
    assert plan.micro_batches > 1
    model = networks()["convolutions"]
    net = edgetrain.wrap(model, plan)
    x, labels = torch.randn(plan.input_shape), torch.zeros(plan.input_shape[0], dtype=torch.long)
    optimizer = OPTIMIZERS["sgd"](model.parameters())

    def step() -> None:
        for images, classes in zip(x.chunk(plan.micro_batches), labels.chunk(plan.micro_batches), strict=True):
            (F.cross_entropy(net(images), classes) / plan.micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # momentum
    resident = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.parameters(), x))
    measured = resident + measure_peak(step).allocator_peak_bytes
    assert measured <= plan.peak_bytes <= 1.1 * measured


def test_a_plan_for_another_model_is_refused_with_the_difference() -> None:
    plan = plan_of("hybrid")
    with pytest.raises(ModelError, match="plan"):
        edgetrain.wrap(networks()["resnet"], plan)


def test_same_input_same_plan() -> None:
    budget = int(0.9 * plan_of("layerwise").peak_bytes)
    assert plan_of("layerwise", budget) == plan_of.__wrapped__("layerwise", budget)


def waiting_in_bfloat16(plan: Plan) -> list[int]:
    return [s.index for s in plan.program.instructions if isinstance(s, Offload) and s.to == "bfloat16"]


@pytest.mark.parametrize("name", ["hybrid", "resnet", "convolutions"])
def test_checkpoints_in_bfloat16_fit_by_trace_and_give_the_gradients_of_rounding_by_hand(name: str) -> None:
    """A little above the leanest peak, where exactly depends on what convolutions take inside on this processor."""
    model, keep_all = networks()[name], plan_of(name, micro_batches=1)
    assert keep_all.costed is not None
    budgets = [round(share * keep_all.costed.front[0][0]) for share in (1.02, 1.1, 1.01, 1.0)]
    plans = [(b, plan_of(name, b, micro_batches=1, stored_precision="bf16")) for b in budgets]
    budget, plan = next((found for found in plans if waiting_in_bfloat16(found[1])), plans[0])
    exact = plan_of(name, budget, micro_batches=1)
    waiting = waiting_in_bfloat16(plan)
    assert waiting, plan.program.table()
    assert plan.peak_bytes <= budget
    assert plan.step_seconds < exact.step_seconds
    assert not any(isinstance(step, Offload) for step in exact.program.instructions)
    trace = trace_step(model, input_shape=SHAPE, batch_size=8, wrap=lambda module: edgetrain.wrap(module, plan))
    assert edgetrain.memory.timeline(trace, "cpu").peak_bytes == plan.peak_bytes

    assert Plan.from_json(plan.to_json()) == plan
    assert 1e4 <= min(plan.snrs) <= 1 / BFLOAT16_NSR * (1 + 1e-9)
    assert all(f"z[{i}] waits in bfloat16" in plan.reasons[i] for i in waiting)
    starts = [plan.modes[i] for i in rounded_in(plan.program)]
    assert any(mode.startswith("invert") for mode in starts) == (name == "hybrid")  # a run from a rounded anchor
    assert "waits in bfloat16" in plan.explain()

    def step() -> dict[str, Tensor]:
        torch.manual_seed(0)
        net = copy.deepcopy(model).double()
        x, labels = torch.randn(8, *SHAPE, dtype=torch.double), torch.randint(0, 10, (8,))
        F.cross_entropy(edgetrain.wrap(net, plan)(x), labels).backward()
        return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}

    found = step()
    with by_hand() as indices:
        expected = step()
    assert sorted(indices) == sorted(waiting)
    for parameter, gradient in expected.items():
        scale = gradient.abs().max().clamp_min(1e-12)
        assert float((found[parameter] - gradient).abs().max() / scale) < 1e-10, parameter


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stored_precision": "int8"}, "pass bf16"),
        ({"stored_precision": "bf16", "precision": "bf16"}, "leave --stored-precision out"),
        ({"stored_precision": "bf16", "snr_limit": 2e5}, "at most 196608"),
    ],
)
def test_a_stored_precision_that_gains_nothing_or_is_too_noisy_is_refused(options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        edgetrain.plan(networks()["resnet"], input_shape=SHAPE, batch_size=8, device="rpi5-4gb", **options)
