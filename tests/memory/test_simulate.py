"""The simulator against the trace of the same step, instruction by instruction to the byte, and against measurement."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edgetrain
from edgetrain.chain import MODES, Mode, chain_of
from edgetrain.errors import ModelError
from edgetrain.memory import Costs, Simulation, measure_costs, measure_peak, simulate, trace_step
from edgetrain.memory import step as step_module
from edgetrain.memory.cuda_allocator import Release
from edgetrain.memory.operators import InnerAllocations
from edgetrain.memory.timeline import numbered_events
from edgetrain.memory.trace import Recorder
from edgetrain.planner import Plan, UniformMode, schedule
from edgetrain.runtime import (
    Backward,
    Execution,
    Fetch,
    Forward,
    Free,
    Head,
    Instruction,
    Offload,
    Program,
    Recompute,
    Update,
)
from edgetrain.runtime.program import Place

BATCH, INPUT = 4, (3, 8, 8)
RANDOM_STATE_BYTES = torch.get_rng_state().numel()
OPTIMIZER = "sgd-plain"  # a wrapped model makes the state of its optimisers in its first step


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Residual(nn.Module):
    """Saves its output as well as its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = conv(channels, channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.norm(self.conv(x)).add_(x))


class Closed(nn.Module):
    """One block, whatever is inside."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Tokens(nn.Module):
    """(n, c, h, w) -> (n, h*w, c), a view that is not contiguous; so is the gradient that it gives."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


def mixture() -> nn.Sequential:
    """Blocks that save input, output or neither, blocks in the memory of their input, views, dropout."""

    def half() -> nn.Module:
        return nn.Sequential(conv(4, 4), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU())

    return nn.Sequential(
        Closed(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        edgetrain.nn.ReversibleBlock(half(), half()),
        Residual(8),
        Residual(8),
        edgetrain.nn.HybridBlock(8),
        edgetrain.nn.CouplingLayer(8),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def transposed() -> nn.Sequential:
    return nn.Sequential(
        conv(3, 8), Tokens(), nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), Closed(nn.Flatten(), nn.Linear(1024, 10))
    )


class Shared(nn.Module):
    """One convolution called in two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.fc = conv(3, 8), conv(8, 8), nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.twice(x))
        x = torch.relu(self.twice(x))
        return self.fc(x.flatten(1))


MODELS: dict[str, Callable[[], nn.Module]] = {"mixture": mixture, "transposed": transposed, "shared": Shared}


def mixed_plan(model: nn.Module, seed: int, *, batch: int = BATCH, shape: tuple[int, ...] = INPUT) -> Plan:
    draw, chain = random.Random(seed), chain_of(model)
    modes: list[Mode] = [draw.choice([m for m in MODES if block.allows(m)]) for block in chain.blocks]
    program = schedule([b.name for b in chain.blocks], chain.shapes((batch, *shape)), modes)
    return Plan(tuple(modes), ("",) * len(modes), program)


def plan_of(model: nn.Module, *instructions: Instruction) -> Plan:
    chain = chain_of(model)
    count = len(chain.blocks)
    program = Program(tuple(b.name for b in chain.blocks), chain.shapes((BATCH, *INPUT)), instructions)
    return Plan(("store",) * count, ("",) * count, program)


def traced(
    model: nn.Module, plan: Plan, patch: pytest.MonkeyPatch, *, batch: int = BATCH, shape: tuple[int, ...] = INPUT
) -> tuple[list[tuple[int, int, int]], int]:
    """Bytes before, during and after each instruction of a traced step, and the peak of all of it.

    No instruction of a plain step, which the model runs itself.
    """
    recorders: list[Recorder] = []
    spans: list[tuple[int, int]] = []
    run = Execution._run

    class Watched(Recorder):
        def __init__(self) -> None:
            super().__init__()
            recorders.append(self)

    def marked(self: Execution, step: Instruction) -> None:
        start = recorders[0].mark()
        run(self, step)
        spans.append((start, recorders[0].mark()))

    def wrap(fake: nn.Module) -> nn.Module:
        updating = any(isinstance(step, Update) for step in plan.program.instructions)
        return edgetrain.wrap(fake, plan, optimizer=(lambda ps: torch.optim.SGD(ps, lr=0.1)) if updating else None)

    with patch.context() as local:
        local.setattr(step_module, "Recorder", Watched)
        local.setattr(Execution, "_run", marked)
        trace = trace_step(model, input_shape=shape, batch_size=batch, wrap=wrap, optimizer=None)
    sizes: dict[int, int] = {}
    level = peak = 0
    levels = [0] * (len(trace.calls) + 1)
    peaks = [0] * (len(trace.calls) + 1)
    for call, event in numbered_events(trace, InnerAllocations(trace.calls)):
        if isinstance(event, Release):
            level -= sizes[event.block]
        else:
            sizes[event.block] = event.nbytes
            level += event.nbytes
        peak = max(peak, level)
        levels[call], peaks[call] = level, max(peaks[call], level)
    for call in range(len(trace.calls)):
        levels[call] = levels[call] or levels[call - 1]  # nothing happened in it; -1 is the state before the first
    instructions = [
        (levels[start], max(levels[start], *peaks[start + 1 : end + 1]), levels[end]) for start, end in spans
    ]
    return instructions, peak


def simulated(simulation: Simulation) -> list[tuple[int, int, int]]:
    """The same of a simulation, without the head: that is nobody's instruction in the executor."""
    inside = [m for m in simulation.moments if m.instruction is not None and not isinstance(m.instruction, Head)]
    return [(m.before_bytes, m.peak_bytes, m.after_bytes) for m in inside]


def merged(program: Program, moments: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """``moments``, one for all blocks that go back in one graph: there the first one's instruction does all."""
    found: list[tuple[int, int, int]] = []
    joined = False
    steps = [step for step in program.instructions if not isinstance(step, Head)]
    for step, moment in zip(steps, moments, strict=True):
        if joined:
            moment = found[-1][0], max(found.pop()[1], moment[1]), moment[2]
        found.append(moment)
        if isinstance(step, Backward):
            joined = step.block in program.joins
    return found


def assert_exact(model: nn.Module, plan: Plan, costs: Costs, patch: pytest.MonkeyPatch, **size: Any) -> None:
    simulation = simulate(plan.program, costs, optimizer_bytes=0)
    instructions, peak = traced(model, plan, patch, **size)
    if not plan.program.is_plain:
        assert merged(plan.program, simulated(simulation)) == merged(plan.program, instructions)
    assert simulation.peak_bytes == peak


@pytest.fixture(scope="module", params=MODELS)
def measured(request: pytest.FixtureRequest) -> tuple[nn.Module, Costs]:
    model = MODELS[request.param]()
    return model, measure_costs(model, input_shape=INPUT, batch_size=BATCH, optimizer=OPTIMIZER)


@pytest.mark.parametrize("mode", get_args(UniformMode))
def test_uniform_plans_to_the_byte(measured: tuple[nn.Module, Costs], mode: Any, monkeypatch: Any) -> None:
    model, costs = measured
    plan = edgetrain.uniform_plan(model, mode, input_shape=INPUT, batch_size=BATCH)
    assert_exact(model, plan, costs, monkeypatch)


@pytest.mark.parametrize("seed", range(3))
def test_mixed_plans_to_the_byte(measured: tuple[nn.Module, Costs], seed: int, monkeypatch: Any) -> None:
    model, costs = measured
    assert_exact(model, mixed_plan(model, seed), costs, monkeypatch)


@pytest.mark.parametrize("mode", ["keep_all", "selective", "invert_layerwise"])
def test_updates_in_the_backward_pass_to_the_byte(
    measured: tuple[nn.Module, Costs], mode: Any, monkeypatch: Any
) -> None:
    model, costs = measured
    plan = edgetrain.uniform_plan(model, mode, input_shape=INPUT, batch_size=BATCH, update_in_backward=True)
    assert_exact(model, plan, costs, monkeypatch)
    kept = edgetrain.uniform_plan(model, mode, input_shape=INPUT, batch_size=BATCH)
    ends = [simulate(p.program, costs).moments for p in (kept, plan)]
    # the function around a chain holds the gradient of the logits to the end; a plain step has none
    held = math.prod(costs.shapes[-1]) * 4 if kept.program.is_plain else 0
    assert ends[0][-2].after_bytes + held - ends[1][-1].after_bytes == costs.gradient_bytes


class Turned(nn.Module):
    """A view of its input that is not contiguous."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(2, 3)


@pytest.mark.parametrize("viewing", ["store", "recompute"])
def test_what_others_see_is_copied_before_it_is_overwritten_to_the_byte(viewing: Mode, monkeypatch: Any) -> None:
    """The batch, a view beside its original, a tensor that is not contiguous, the logits and their gradient."""
    first, second, last = (edgetrain.nn.CouplingLayer(4) for _ in range(3))
    small = edgetrain.nn.InvertibleLeakyReLU(0.1)  # takes so little that the copy before it shows
    model = nn.Sequential(first, nn.Identity(), second, conv(4, 4), Turned(), small, last)
    shape = (4, 8, 8)
    costs = measure_costs(model, input_shape=shape, batch_size=BATCH, optimizer=None)
    modes: list[Mode] = ["invert", viewing, "invert_layerwise", "store", "store", "invert", "invert_layerwise"]
    chain = chain_of(model)
    program = schedule([b.name for b in chain.blocks], chain.shapes((BATCH, *shape)), modes)
    assert_exact(model, Plan(tuple(modes), ("",) * 7, program), costs, monkeypatch, shape=shape)


def five_blocks() -> nn.Sequential:
    return nn.Sequential(
        conv(3, 8),
        Closed(nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        conv(8, 8),
        edgetrain.nn.CouplingLayer(8),
        Closed(nn.Flatten(), nn.Linear(512, 10)),
    )


def offloading(place: Place) -> list[Instruction]:
    return [
        Forward(0, "all"),
        Forward(1, "input"),
        Offload(1, place),
        Forward(2, "input"),
        Offload(2, place),
        Forward(3, "nothing"),
        Forward(4, "all"),
        Head(),
        Backward(4, "saved"),
        Backward(3, "invert"),
        Fetch(2),
        Backward(2, "recompute"),
        Free(2),
        Fetch(1),
        Backward(1, "recompute"),
        Backward(0, "saved"),
    ]


NESTED: list[Instruction] = [
    Forward(0, "input"),
    Forward(1, "nothing"),
    Forward(2, "nothing"),
    Forward(3, "nothing"),
    Forward(4, "all"),
    Head(),
    Backward(4, "saved"),
    Recompute(0, 0, "input"),
    Recompute(1, 2, "nothing"),
    Recompute(3, 3, "all"),
    Backward(3, "saved"),
    Recompute(0, 1, "input"),
    Backward(2, "recompute"),
    Backward(1, "recompute"),
    Backward(0, "recompute"),
]


@pytest.fixture(scope="module")
def five() -> tuple[nn.Module, Costs]:
    model = five_blocks()
    return model, measure_costs(model, input_shape=INPUT, batch_size=BATCH, optimizer=OPTIMIZER)


def test_nested_checkpoints_to_the_byte(five: tuple[nn.Module, Costs], monkeypatch: Any) -> None:
    model, costs = five
    assert_exact(model, plan_of(model, *NESTED), costs, monkeypatch)


def test_offloading_to_a_host_that_shares_the_memory_to_the_byte(
    five: tuple[nn.Module, Costs], monkeypatch: Any
) -> None:
    model, costs = five
    plan = plan_of(model, *offloading("host"))
    assert_exact(model, plan, costs, monkeypatch)
    assert simulate(plan.program, costs).host_peak_bytes == 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_waits_in_bfloat16_takes_half_to_the_byte(
    five: tuple[nn.Module, Costs], device: Any, monkeypatch: Any
) -> None:
    model, costs = five
    plan = plan_of(model, *offloading("bfloat16"))
    if device == "cpu":
        assert_exact(model, plan, costs, monkeypatch)
    else:
        costs = measure_costs(model, input_shape=INPUT, batch_size=BATCH, device=device)
    simulation = simulate(plan.program, costs)
    z_bytes = 4 * BATCH * 8 * 8 * 8  # z[1] and z[2]: 8 channels of 8 x 8 in fp32
    moved = [m for m in simulation.moments if isinstance(m.instruction, Offload | Fetch)]
    half = z_bytes // 2
    assert [m.after_bytes - m.before_bytes for m in moved] == [-half, -half, half, half]
    assert [m.peak_bytes - m.before_bytes for m in moved] == [half, half, z_bytes, z_bytes]
    assert simulation.host_peak_bytes == 0


def test_a_view_that_waits_in_bfloat16_to_the_byte(monkeypatch: Any) -> None:
    model = transposed()
    costs = measure_costs(model, input_shape=INPUT, batch_size=BATCH, optimizer=OPTIMIZER)
    steps = [
        Forward(0, "all"),
        Forward(1, "all"),
        Forward(2, "input"),
        Offload(2, "bfloat16"),
        *(Forward(i, "all") for i in range(3, 6)),
        Head(),
        *(Backward(i, "saved") for i in (5, 4, 3)),
        Fetch(2),
        Backward(2, "recompute"),
        Backward(1, "saved"),
        Backward(0, "saved"),
    ]
    assert_exact(model, plan_of(model, *steps), costs, monkeypatch)


def test_what_is_offloaded_elsewhere_is_not_on_the_device(five: tuple[nn.Module, Costs]) -> None:
    model, _ = five
    costs = measure_costs(model, input_shape=INPUT, batch_size=BATCH, device="cuda")
    z_bytes = 4 * BATCH * 8 * 8 * 8  # z[1] and z[2]: 8 channels of 8 x 8 in fp32
    for place, host_bytes in (("host", 2 * z_bytes), ("disk", 0)):
        simulation = simulate(plan_of(model, *offloading(place)).program, costs)  # type: ignore[arg-type]
        moved = [m for m in simulation.moments if isinstance(m.instruction, Offload | Fetch)]
        assert simulation.host_peak_bytes == host_bytes
        assert [m.after_bytes - m.before_bytes for m in moved] == [-z_bytes, -z_bytes, z_bytes, z_bytes]


def test_what_is_alive(five: tuple[nn.Module, Costs]) -> None:
    model, costs = five
    simulation = simulate(plan_of(model, *offloading("disk")).program, costs)
    alive = {i: (set(m.z), set(m.g), set(m.graphs)) for i, m in enumerate(simulation.moments)}
    assert alive[6] == ({0, 4, 5}, set(), {0, 4})  # z[4] stays beside the graph of block 4
    assert alive[9] == ({0, 3, 5}, {3}, {0})  # inverted: z[3] in the place of z[4]
    assert alive[15] == ({0, 1, 3, 5}, set(), set())


@pytest.mark.parametrize("place", get_args(Place))
def test_offloading_against_measurement(place: Place) -> None:
    torch.manual_seed(0)
    model, shape, batch = five_blocks_of(64), (3, 16, 16), 32
    plan = Plan(("store",) * 5, ("",) * 5, program_of(model, offloading(place), batch, shape))
    check_measured(model, plan, batch, shape)


@pytest.mark.parametrize("mode", ["keep_all", "selective", "recompute", "invert_layerwise"])
def test_uniform_plans_against_measurement(mode: Any) -> None:
    torch.manual_seed(0)
    model, shape, batch = five_blocks_of(64), (3, 16, 16), 32
    check_measured(model, edgetrain.uniform_plan(model, mode, input_shape=shape, batch_size=batch), batch, shape)


def five_blocks_of(channels: int) -> nn.Sequential:
    return nn.Sequential(
        conv(3, channels),
        Closed(nn.BatchNorm2d(channels), nn.ReLU(inplace=True)),
        conv(channels, channels),
        edgetrain.nn.CouplingLayer(channels),
        Closed(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)),
    )


def program_of(model: nn.Module, steps: list[Instruction], batch: int, shape: tuple[int, ...]) -> Program:
    chain = chain_of(model)
    return Program(tuple(b.name for b in chain.blocks), chain.shapes((batch, *shape)), tuple(steps))


def check_measured(model: nn.Module, plan: Plan, batch: int, shape: tuple[int, ...]) -> None:
    """Never more than 1 % high, never more than 0.5 % low."""
    costs = measure_costs(model, input_shape=shape, batch_size=batch, optimizer=None)
    simulation = simulate(plan.program, costs)
    net, x, labels = edgetrain.wrap(model, plan), torch.randn(batch, *shape), torch.zeros(batch, dtype=torch.long)

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        F.cross_entropy(net(x), labels).backward()

    step()  # what layers keep from one step to the next is there in the steady one
    measured = measure_peak(step, setup=step).allocator_peak_bytes
    gone = costs.gradient_bytes  # freed at the start of the measured step, allocated in its setup
    predicted = simulation.peak_bytes - simulation.resident_bytes
    print(f"predicted {predicted}, measured {measured + gone}, ratio {predicted / (measured + gone):.4f}")
    assert 0.995 <= predicted / (measured + gone) <= 1.01


ZOO: dict[str, dict[str, Any]] = {
    "resnet18": {"widths": (8, 16, 16, 32)},
    "revnet18": {"widths": (8, 16, 32, 32)},
    "irevnet18": {"width": 4},
    "hybrid18": {"width": 4},
    "layerwise18": {"width": 4},
    "resnet20": {"width": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_every_model_of_the_zoo_to_the_byte(name: str, monkeypatch: Any) -> None:
    model, size = edgetrain.create_model(name, **ZOO[name]), {"batch": 8, "shape": (3, 16, 16)}
    costs = measure_costs(model, input_shape=(3, 16, 16), batch_size=8, optimizer=None)
    modes = get_args(UniformMode)
    plans = [edgetrain.uniform_plan(model, mode, input_shape=(3, 16, 16), batch_size=8) for mode in modes]
    plans += [mixed_plan(model, seed, **size) for seed in range(6)]  # type: ignore[arg-type]
    for plan in plans:
        assert_exact(model, plan, costs, monkeypatch, **size)


def test_costs_of_a_linear_layer() -> None:
    """x (n, a), weight (b, a), bias (b): the gradient needs x alone, gradients have the size of the parameters."""
    n, a, b = 32, 64, 128
    model = nn.Sequential(nn.Linear(16, a), nn.Linear(a, b), nn.Linear(b, 10))
    costs = measure_costs(model, input_shape=(16,), batch_size=n, optimizer="adam")
    block = costs.blocks[1]
    assert block.gradient_bytes == 4 * (a * b + b)
    assert block.saved_bytes <= 64
    forward = block.effect(("forward nothing", None, None))
    assert 4 * n * b <= forward.peak_bytes <= 4 * n * b + 2 * RANDOM_STATE_BYTES
    backward = block.effect(("backward saved after forward all", None, None))
    assert backward.net_bytes == 4 * (n * a + a * b + b) - block.saved_bytes
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert costs.gradient_bytes == costs.weight_bytes == weights
    assert 2 * weights <= costs.optimizer_bytes <= 2 * weights + 64


def test_the_state_of_the_optimizer_is_resident_and_can_be_elsewhere(five: tuple[nn.Module, Costs]) -> None:
    model, _ = five
    costs = measure_costs(model, input_shape=INPUT, batch_size=BATCH, optimizer="sgd")
    plan = edgetrain.uniform_plan(model, "keep_all", input_shape=INPUT, batch_size=BATCH)
    assert costs.optimizer_bytes == sum(4 * p.numel() for p in model.parameters())
    with_state, without = simulate(plan.program, costs), simulate(plan.program, costs, optimizer_bytes=0)
    assert with_state.peak_bytes - without.peak_bytes == costs.optimizer_bytes


def test_an_optimizer_with_temporaries_can_be_the_peak() -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 2))
    plan = edgetrain.uniform_plan(model, "keep_all", input_shape=(512,), batch_size=2)  # type: ignore[arg-type]
    costs = measure_costs(model, input_shape=(512,), batch_size=2, optimizer="rmsprop")
    simulation = simulate(plan.program, costs)
    assert costs.update_bytes >= 4 * 512 * 512
    assert simulation.peak_instruction is None


def test_equal_blocks_are_measured_once() -> None:
    model = nn.Sequential(conv(3, 8), *[Residual(8) for _ in range(4)], Residual(8), nn.Flatten(), nn.Linear(512, 10))
    model[5].conv.stride = (1, 1)
    model[5].slope = 0.2  # another attribute: it may behave in another way
    costs = measure_costs(model, input_shape=INPUT, batch_size=BATCH, optimizer=None)
    groups = [id(block.effects) for block in costs.blocks]
    assert len(set(groups[1:5])) == 1
    assert groups[5] != groups[4]


def test_a_program_for_another_batch_is_refused(five: tuple[nn.Module, Costs]) -> None:
    model, costs = five
    plan = edgetrain.uniform_plan(model, "keep_all", input_shape=INPUT, batch_size=BATCH + 1)
    with pytest.raises(ModelError, match="measure the costs"):
        simulate(plan.program, costs)


@pytest.mark.parametrize(
    ("replaced", "by", "message"),
    [
        (11, Backward(2, "invert"), "backward invert"),
        (10, Free(2), "Backward.*without"),
        (2, Free(1), "Fetch.*without"),
    ],
)
def test_a_program_that_cannot_run_is_refused(
    five: tuple[nn.Module, Costs], replaced: int, by: Instruction, message: str
) -> None:
    model, costs = five
    steps = offloading("disk")
    steps[replaced] = by
    with pytest.raises(ModelError, match=message):
        simulate(plan_of(model, *steps).program, costs)


def test_sixty_blocks_in_five_milliseconds() -> None:
    model = nn.Sequential(conv(3, 8), *[Residual(8) for _ in range(58)], Closed(nn.Flatten(), nn.Linear(512, 10)))
    costs = measure_costs(model, input_shape=INPUT, batch_size=BATCH, optimizer=None)
    plan = mixed_plan(model, 0)
    seconds = []
    for _ in range(20):
        began = time.perf_counter()
        simulate(plan.program, costs)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 5e-3
