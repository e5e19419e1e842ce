"""Steps whose batch has its channels last: plain autograd's results, the peak that was predicted, and the choice."""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edgetrain
from edgetrain.errors import ModelError, UsageError
from edgetrain.memory import measure_costs, measure_peak, measured_times, simulate
from edgetrain.memory.times import Times
from edgetrain.nn.layouts import memory_format, with_channels_last
from edgetrain.nn.pooling import ChannelPool
from edgetrain.nn.reversible import ReversibleBlock
from edgetrain.planner import Plan, Planner, measures
from edgetrain.planner.planning import Found
from edgetrain.planner.search import Candidate
from edgetrain.planner.smaller import planner_like
from edgetrain.runtime import Backward, Fetch, Head, Offload, Program

BATCH, SIZE = 8, 16
SHAPE: dict[str, Any] = {"input_shape": (3, SIZE, SIZE), "batch_size": BATCH}


class Residual(nn.Module):
    """Depthwise and pointwise convolutions beside a pooled shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU6(inplace=True),
            nn.Conv2d(channels, channels, 1),
        )
        self.shortcut = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.relu(self.main(x) + self.shortcut(x)), x], 1)


def ordinary() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        *(nn.BatchNorm2d(8), nn.ReLU(inplace=True), Residual(8), nn.MaxPool2d(2), Residual(16), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.2), nn.Linear(512, 5)),
    )


class Viewed(nn.Module):
    """Takes its images for planes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1)


class Planes(ReversibleBlock):
    """A reversible block that is inverted with channels first alone."""

    keeps_layout = False


def part() -> nn.Module:
    return nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())


def planes() -> nn.Module:
    blocks = [nn.Conv2d(3, 12, 3, padding=1), *(Planes(part(), part()) for _ in range(3))]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))


def pooled_first() -> nn.Module:
    blocks = [ReversibleBlock(part(), part(), exact=True), ReversibleBlock(part(), part()), Planes(part(), part())]
    return nn.Sequential(ChannelPool(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))


NETWORKS = {
    "ordinary": ordinary,
    "resnet20": lambda: edgetrain.create_model("resnet20", num_classes=5),
    "revnet18": lambda: edgetrain.create_model("revnet18", num_classes=5),
    "revnet18-exact": lambda: edgetrain.create_model("revnet18-exact", num_classes=5),
    "hybrid18": lambda: edgetrain.create_model("hybrid18", num_classes=5),
    "layerwise18": lambda: edgetrain.create_model("layerwise18", num_classes=5),
    "planes": planes,
    "pooled first": pooled_first,
}
MODES = ("keep_all", "selective", "recompute", "invert", "invert_selective", "invert_layerwise")


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]()


def step_of(net: nn.Module, x: Tensor) -> None:
    torch.manual_seed(1)
    F.cross_entropy(net(x), torch.arange(len(x)) % 5).backward()


# round-off of layerwise18's inversions, one after the other, grows beyond the bound in any layout
@pytest.mark.parametrize(
    ("name", "mode"),
    [(n, m) for n in NETWORKS for m in MODES if n != "layerwise18" or not m.startswith("invert")],
)
def test_a_step_is_that_of_plain_autograd(name: str, mode: str):
    plain = build(name).double()
    model, x = copy.deepcopy(plain), torch.randn(BATCH, 3, SIZE, SIZE, dtype=torch.float64)
    plan = edgetrain.uniform_plan(model, mode, **SHAPE, channels_last=True)
    before = x.clone()
    step_of(plain, x)
    step_of(edgetrain.wrap(model, plan), x)
    assert torch.equal(x, before)
    for ours, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert float((ours.grad - expected.grad).norm() / expected.grad.norm().clamp_min(1e-30)) < 1e-10
        assert ours.grad.stride() == ours.stride()  # fused optimisers take that for granted
    for ours, expected in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "mode"), [("hybrid18", "invert_layerwise"), ("layerwise18", "selective"), ("revnet18", "invert")]
)
def test_steps_of_a_fused_optimizer(name: str, mode: str):
    """It goes through memory; one that is not fused goes by strides. Both get the same gradients, twice."""
    networks = [build(name).double() for _ in range(2)]
    x = torch.randn(BATCH, 3, SIZE, SIZE, dtype=torch.float64)
    for model, fused in zip(networks, (True, False), strict=True):
        net = edgetrain.wrap(model, edgetrain.uniform_plan(model, mode, **SHAPE, channels_last=True))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, fused=fused)
        step_of(net, x)
        for _ in range(2):
            optimizer.step()
    for ours, expected in zip(*(model.parameters() for model in networks), strict=True):
        assert float((ours - expected).detach().norm() / expected.detach().norm().clamp_min(1e-30)) < 1e-10


def measured_peak(model: nn.Module, plan: Plan) -> int:
    """Of a step without an optimiser, weights and batch included."""
    net, x = edgetrain.wrap(copy.deepcopy(model), plan), torch.randn(BATCH, 3, SIZE, SIZE)

    def step() -> None:
        step_of(net, x)
        net.zero_grad(set_to_none=True)

    step()
    weights = sum(t.nbytes for t in (*net.parameters(), *net.buffers()))
    return weights + x.nbytes + measure_peak(step).allocator_peak_bytes


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_peak_is_the_one_predicted(name: str, mode: str):
    model = build(name)
    plan = edgetrain.uniform_plan(model, mode, **SHAPE, channels_last=True)
    costs = measure_costs(model, **SHAPE, optimizer=None, channels_last=True)
    assert simulate(plan.program, costs).peak_bytes == pytest.approx(measured_peak(model, plan), rel=0.01)


@pytest.mark.parametrize("mode", ["keep_all", "selective", "recompute"])
def test_blocks_see_channels_last(mode: str):
    model = build("ordinary")
    seen = []
    model[3].main[0].register_forward_pre_hook(lambda _, inputs: seen.append(memory_format(inputs[0])))
    net = edgetrain.wrap(model, edgetrain.uniform_plan(model, mode, **SHAPE, channels_last=True))
    seen.clear()
    step_of(net, torch.randn(BATCH, 3, SIZE, SIZE))
    assert set(seen) == {torch.channels_last}


@pytest.mark.parametrize("mode", ["invert", "invert_selective", "recompute"])
def test_what_is_inverted_keeps_channels_last(mode: str):
    model = build("revnet18")
    seen = []
    for _, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_pre_hook(lambda _, inputs: seen.append(memory_format(inputs[0])))
    net = edgetrain.wrap(model, edgetrain.uniform_plan(model, mode, **SHAPE, channels_last=True))
    seen.clear()
    step_of(net, torch.randn(BATCH, 3, SIZE, SIZE))
    assert set(seen) == {torch.channels_last}


def test_a_plan_inverts_with_channels_last(pace: dict[bool, float]):
    pace[True] = 0.5
    model = build("revnet18")
    planner = Planner(model, **SHAPE)
    plan = planner.plan(Planner(model, **SHAPE, channels_last=True).needed()[0])
    assert plan.program.channels_last
    assert {"invert", "invert_selective"} & set(plan.modes)
    plan = Planner(build("planes"), **SHAPE, channels_last=True).plan()
    assert "works on channels first" in plan.explain()
    exact = Planner(build("revnet18-exact"), **SHAPE, channels_last=True)
    assert "invert" in exact.plan(exact.needed()[0]).modes


NARROW = nn.Sequential(nn.Conv2d(3, 8, 1, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(288, 5))
"""Its first layer is one whose gradient oneDNN writes beyond its memory."""


def test_what_corrupts_memory_does_not_run():
    for make in (edgetrain.uniform_plan, lambda model, _, **others: Planner(model, **others)):
        with pytest.raises(ModelError, match="1x1 convolution of few channels with a stride"):
            make(NARROW, "keep_all", **SHAPE, channels_last=True)


@pytest.mark.parametrize("place", ["host", "disk", "bfloat16"])
def test_an_activation_that_waits_elsewhere(place: str):
    plain = build("ordinary").double()
    model, x = copy.deepcopy(plain), torch.randn(BATCH, 3, SIZE, SIZE, dtype=torch.float64)
    program = edgetrain.uniform_plan(model, "recompute", **SHAPE, channels_last=True).program
    index = next(step.block for step in program.instructions if isinstance(step, Backward) and step.how == "recompute")
    head = program.instructions.index(Head())
    back = program.instructions.index(Backward(index, "recompute"))
    steps = [*program.instructions[:head], Offload(index, place), *program.instructions[head:back], Fetch(index)]
    program = replace(program, instructions=(*steps, *program.instructions[back:]))
    step_of(plain, x)
    step_of(edgetrain.wrap(model, Plan((), (), program)), x)
    bound = 0.1 if place == "bfloat16" else 1e-10
    for ours, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert float((ours.grad - expected.grad).norm() / expected.grad.norm().clamp_min(1e-30)) < bound
    costs = measure_costs(model, **SHAPE, dtype=torch.float64, channels_last=True)
    assert simulate(program, costs).peak_bytes > 0


def test_a_report_of_such_a_plan():
    model = build("ordinary")
    plan = edgetrain.uniform_plan(model, "recompute", **SHAPE, channels_last=True)
    facts = edgetrain.report.report_of(plan, title="last", model=model)
    costs = measure_costs(model, **SHAPE, channels_last=True)
    assert facts.peak_bytes == simulate(plan.program, costs).peak_bytes


def test_times_of_another_layout_than_is_asked_for():
    model = build("ordinary")
    with pytest.raises(UsageError, match="channels_last=True"):
        Planner(model, **SHAPE, times=measured_times(model, **SHAPE, budget_s=0.1), channels_last=True)


def test_a_batch_that_is_so_already_is_not_copied():
    x = torch.randn(BATCH, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    assert with_channels_last(x).data_ptr() == x.data_ptr()


def test_a_program_remembers_it():
    model = build("ordinary")
    program = edgetrain.uniform_plan(model, "recompute", **SHAPE, channels_last=True).program
    assert Program.from_json(program.to_json()) == program
    data = json.loads(program.to_json())
    older = {name: value for name, value in data.items() if name != "channels_last"}
    assert Program.from_json(json.dumps(older)) == replace(program, channels_last=False)
    with pytest.raises(ModelError, match="'yes'"):
        Program.from_json(json.dumps({**data, "channels_last": "yes"}))


def test_costs_and_times_of_the_other_layout_are_refused():
    model = build("ordinary")
    program = edgetrain.uniform_plan(model, "keep_all", **SHAPE, channels_last=True).program
    with pytest.raises(ModelError, match="with channels last"):
        simulate(program, measure_costs(model, **SHAPE))
    with pytest.raises(ModelError):
        edgetrain.memory.program_seconds(program, measured_times(model, **SHAPE, budget_s=0.1))


@pytest.fixture
def pace(monkeypatch: pytest.MonkeyPatch) -> dict[bool, float]:
    """How long a step takes, channels first and last, against what is measured channels first."""
    factors = {False: 1.0, True: 1.0}
    known: dict[tuple[int, int], tuple[nn.Module, Times]] = {}  # the model, so that its number is no other's

    def timed(model: nn.Module, *, batch_size: int, channels_last: bool, **others: Any) -> Times:
        key = id(model), batch_size
        if key not in known:
            known[key] = model, measured_times(model, batch_size=batch_size, budget_s=0.2, **others)
        found = known[key][1]
        scaled = [
            replace(b, **{k: v * factors[channels_last] for k, v in vars_of(b).items() if v is not None})
            for b in found.blocks
        ]
        return replace(found, blocks=tuple(scaled), channels_last=channels_last)

    monkeypatch.setattr(measures, "measured_times", timed)
    return factors


def vars_of(block: Any) -> dict[str, float | None]:
    return {name: getattr(block, name) for name in block.__dataclass_fields__}


def planned(model: nn.Module, budget: int | None = None, **others: Any) -> Plan:
    found = Planner(model, **{**SHAPE, **others}).fitting(budget)
    assert found is not None
    return found


def test_the_faster_layout_is_taken_and_the_other_one_named(pace: dict[bool, float]):
    model = build("resnet20")
    pace[True] = 0.8
    plan = planned(model)
    assert plan.program.channels_last
    assert "channels last" in plan.summary()
    assert "not channels first" in plan.explain()
    pace[True] = 1.2
    plan = planned(build("resnet20"))
    assert not plan.program.channels_last
    assert "not channels last" in plan.explain()
    assert Plan.from_json(plan.to_json()) == plan


def test_channels_stay_first_where_the_clock_cannot_tell():
    program = edgetrain.uniform_plan(build("ordinary"), "keep_all", **SHAPE).program

    def found(channels_last: bool, seconds: float) -> Found:
        candidate = Candidate(replace(program, channels_last=channels_last), 0, seconds)
        return Found(candidate, candidate, 1, BATCH, 0, None)

    assert not found(True, 0.98).is_faster_than(found(False, 1.0))
    assert found(False, 1.0).is_faster_than(found(True, 0.98))
    assert found(True, 0.96).is_faster_than(found(False, 1.0))
    assert not found(False, 1.0).is_faster_than(found(True, 0.96))
    assert found(True, 0.99).is_faster_than(found(True, 1.0))


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("resnet20", {"snr_limit": float("inf")}),
        ("resnet20", {"channels_last": False}),
        ("resnet20", {"device": "rpi5-4gb"}),
        ("dropout", {}),
        ("viewed", {}),
        ("narrow", {}),
        ("no images", {}),
    ],
    ids=[
        "every bit",
        "not wanted",
        "a profile",
        "dropout",
        "a view",
        "corrupts",
        "no images",
    ],
)
def test_where_there_is_no_choice(name: str, others: dict[str, Any], pace: dict[bool, float]):
    pace[True] = 0.5
    without = {
        "dropout": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(784, 5)),
        "viewed": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Viewed(), nn.Linear(784, 5)),
        "narrow": lambda: NARROW,
        "no images": lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 5)),
    }
    make = without.get(name, lambda: build(name))
    assert not planned(make(), **others).program.channels_last


def test_where_only_one_layout_fits_it_is_taken(pace: dict[bool, float]):
    pace[True] = 0.8
    model = build("planes")
    inverting = Planner(model, **SHAPE, channels_last=False).needed()[0]
    assert inverting < Planner(model, **SHAPE, channels_last=True).needed()[0]
    planner = Planner(model, **SHAPE)
    assert planner.needed()[0] == inverting
    plan = planner.fitting(inverting)
    assert plan is not None
    assert not plan.program.channels_last
    assert planner.fitting(inverting - 1) is None


def test_a_model_that_does_not_run_with_channels_last(caplog: pytest.LogCaptureFixture):
    def planes(x: Tensor) -> None:
        if not x.is_contiguous():
            raise ValueError("planes are expected")

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(784, 5))
    model[0].register_forward_pre_hook(lambda _, inputs: planes(inputs[0]))
    with caplog.at_level(logging.INFO):
        plan = planned(model)
    assert "planes are expected" in caplog.text
    assert not plan.program.channels_last
    assert "channels" not in plan.explain()


def test_plans_to_fall_back_on_are_of_both_layouts(pace: dict[bool, float]):
    pace[True] = 0.8
    model = build("planes")
    plan = planned(model)
    assert plan.program.channels_last
    smaller = planner_like(model, plan, optimizer="sgd")
    assert smaller.needed()[0] < Planner(model, **SHAPE, channels_last=True).needed()[0]
    assert not smaller.plan(smaller.needed()[0]).program.channels_last


def test_a_plan_within_a_budget_runs_within_it(pace: dict[bool, float]):
    pace[True] = 0.8
    model = build("ordinary")
    planner = Planner(model, **SHAPE)
    least, most = planner.needed()[0], planner.plan().peak_bytes
    for share in (0.0, 0.3, 0.6, 1.0):
        budget = int(least + share * (most - least))
        plan = planner.plan(budget)
        assert measured_peak(model, plan) <= budget
        plain, ours = copy.deepcopy(model).double(), copy.deepcopy(model).double()
        x = torch.randn(BATCH, 3, SIZE, SIZE, dtype=torch.float64)
        step_of(plain, x)
        step_of(edgetrain.wrap(ours, plan), x)
        for got, expected in zip(ours.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(got.grad, expected.grad, rtol=1e-10, atol=1e-12)
        assert plan.program.channels_last or share < 1
