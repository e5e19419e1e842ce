"""Seconds of Programs, from times that were made up, predicted and measured."""

from __future__ import annotations

import copy
import math
import sys
import time
from typing import Any

import pytest
import torch
from torch import nn

import edgetrain
from edgetrain.errors import ModelError, UsageError
from edgetrain.memory import (
    BlockTimes,
    OperatorRates,
    Times,
    classification_loss,
    measure_costs,
    measured_times,
    predicted_times,
    program_seconds,
    rates_of,
)
from edgetrain.memory import rates as assumed
from edgetrain.memory.work import Work
from edgetrain.profiles import Profile, load_profile
from edgetrain.runtime import Backward, Fetch, Forward, Free, Head, Instruction, Offload, Program, Recompute, Update
from edgetrain.targets.other_work import ProcessorTicks

SHAPES = ((2, 3), (2, 5), (2, 7))
FIRST = BlockTimes(1, 2, 4, 8, None, None, 16)
SECOND = BlockTimes(
    100, 200, 400, 800, 1600, 3200, 6400, forward_in_place=50, forward_products=110, backward_selective=500
)
TIMES = Times((FIRST, SECOND), 0.5, 10.0, 40.0, "made up", SHAPES, (4, 4, 4))


def program(*steps: Instruction) -> Program:
    return Program(("a", "b"), SHAPES, (*steps, Head()))


@pytest.mark.parametrize(
    ("step", "seconds"),
    [
        (Forward(0, "all"), 2),
        (Forward(0, "input"), 1),
        (Forward(0, "nothing"), 1),
        (Forward(1, "input"), 100),
        (Forward(1, "nothing"), 50),
        (Recompute(0, 1, "all"), 202),
        (Recompute(0, 1, "input"), 101),
        (Forward(1, "products"), 110),
        (Recompute(1, 1, "products"), 110),
        (Backward(1, "selective"), 500),
        (Backward(1, "saved"), 400),
        (Backward(1, "recompute"), 800),
        (Backward(1, "invert"), 1600),
        (Backward(1, "invert_layerwise"), 3200),
        (Offload(1, "host"), 2 * 5 * 4 / 10),
        (Fetch(1), 2 * 5 * 4 / 10),
        (Free(1), 0),
    ],
    ids=str,
)
def test_an_instruction_takes_its_time(step: Instruction, seconds: float):
    # without an update in it, a program is followed by one of all parameters
    assert program_seconds(program(step), TIMES) == pytest.approx(seconds + 0.5 + 16 + 6400)


def test_a_fetch_takes_as_long_as_what_it_undoes():
    steps = Offload(1, "bfloat16"), Offload(0, "host"), Fetch(1), Fetch(0), Offload(1, "host"), Fetch(1)
    rounding, copying = 2 * 5 * 4 / 40, (2 * 3 * 4 + 2 * 5 * 4) / 10
    assert program_seconds(program(*steps), TIMES) == pytest.approx(2 * rounding + 2 * copying + 0.5 + 16 + 6400)


def test_updates_inside_replace_the_one_after():
    assert program_seconds(program(Update(0)), TIMES) == 16.5


def test_times_of_another_batch_are_refused():
    other = Program(("a", "b"), ((4, 3), (4, 5), (4, 7)), (Head(),))
    with pytest.raises(ModelError, match=r"times of 2 blocks for \(2, 3\)"):
        program_seconds(other, TIMES)


@pytest.mark.parametrize(
    ("step", "named"),
    [
        (Backward(0, "invert"), "'backward invert' for block 0"),
        (Backward(0, "selective"), "'backward selective' for block 0"),
        (Forward(0, "products"), "'forward products' for block 0"),
        (Recompute(0, 1, "products"), "'recompute products' for block 0"),
    ],
)
def test_an_instruction_that_the_block_refuses_is_named(step: Instruction, named: str):
    with pytest.raises(ModelError, match=named):
        program_seconds(program(step), TIMES)


RATES = OperatorRates({16: 1e9, 64: 4e9}, 1e9, 5e8, 1e-6, 0.0, "toy")


def test_the_longer_of_arithmetic_and_traffic_counts():
    waiting = Work(flops=2000, moved_bytes=4000, channels=16, calls=3)
    computing = Work(flops=8000, moved_bytes=4000, channels=64, calls=1)
    assert RATES.seconds([waiting]) == pytest.approx(3 * (4e-6 + 1e-6))
    assert RATES.seconds([waiting, computing]) == pytest.approx(3 * 5e-6 + 5e-6)
    assert RATES.seconds([]) == 0.0


def test_rates_between_measured_channels():
    found = [RATES.rate_at(channels) for channels in (1, 16, 32, 64, 512)]
    assert found == pytest.approx([1e9, 1e9, 2e9, 4e9, 4e9])


def test_measured_rates_win_over_shares_of_the_peaks():
    origin = {"source": "test", "date": "2026-11"}
    peaks = {
        "name": "toy",
        "description": "toy",
        "kind": "cuda",
        "unified": False,
        "rates": {"fp32": {"value": 1, "unit": "TFLOP/s", **origin}},
        "bandwidth": {"value": 100, "unit": "GB/s", **origin},
    }
    found = rates_of(Profile.model_validate(peaks))
    assert found.rate_at(64) == 1e12 * assumed.PEAK_RATE_SHARE
    assert found.bytes_per_s == 1e11 * assumed.PEAK_BANDWIDTH_SHARE
    assert found.copy_bytes_per_s == assumed.BUS_BYTES_PER_SECOND
    calibrated = peaks | {
        "unified": True,
        "convolution": {"fp32": {"32": {"value": 300, "unit": "GFLOP/s", **origin}}},
        "elementwise": {"fp32": {"value": 60, "unit": "GB/s", **origin}},
    }
    found = rates_of(Profile.model_validate(calibrated))
    assert (found.rate_at(64), found.bytes_per_s, found.copy_bytes_per_s) == (3e11, 6e10, 3e10)
    assert found.rounding_bytes_per_s == pytest.approx(4e10)  # of 4 bytes, 4 are read and 2 written


def test_a_profile_without_rates_says_what_to_do():
    with pytest.raises(UsageError, match="edgetrain calibrate"):
        rates_of(load_profile("cpu"))


def test_predictions_of_a_network_by_hand():
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.Conv2d(16, 16, 3, padding=1, bias=False))
    costs = measure_costs(model, input_shape=(16, 8, 8), batch_size=4, optimizer="sgd-plain", measured=False)
    times = predicted_times(costs, OperatorRates({1: 1e6}, 1e12, 1e9, 0.0, 0.0, "slow arithmetic"))
    once = 2 * 4 * 64 * 16 * 16 * 9 / 1e6
    first, second = times.blocks
    assert first.forward == first.forward_all == pytest.approx(once)
    assert first.backward_saved == pytest.approx(once)  # nobody asks for the gradient of the batch
    assert second.backward_saved == pytest.approx(2 * once)
    assert second.backward_recompute == pytest.approx(2 * once)  # no gradient depends on its result
    assert second.backward_invert is None
    assert times.source == "rates of profile slow arithmetic"
    plan = edgetrain.uniform_plan(model, "keep_all", input_shape=(16, 8, 8), batch_size=4)
    assert program_seconds(plan.program, times) == pytest.approx(5 * once, rel=1e-3)


def test_every_shipped_profile_with_rates_predicts_that_inversion_computes_more():
    model = edgetrain.create_model("hybrid18", num_classes=10)
    costs = measure_costs(model, input_shape=(3, 32, 32), batch_size=8, measured=False)
    plans = {
        mode: edgetrain.uniform_plan(model, mode, input_shape=(3, 32, 32), batch_size=8).program
        for mode in ("keep_all", "invert", "invert_layerwise")
    }
    for name in ("gtx750", "nano-4gb", "orin-nano-8gb", "rpi5-4gb"):
        times = predicted_times(costs, load_profile(name))
        kept, inverted, layerwise = (program_seconds(plan, times) for plan in plans.values())
        assert kept < inverted < layerwise < 3 * kept, name


def test_measuring_leaves_the_model_and_the_random_numbers_alone():
    model = edgetrain.create_model("hybrid18", num_classes=10)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    state = copy.deepcopy({**model.state_dict(), **{f"{n}.grad": p.grad for n, p in model.named_parameters()}})
    random = torch.get_rng_state()
    measured_times(model, input_shape=(3, 32, 32), batch_size=2, budget_s=0.1)
    after = {**model.state_dict(), **{f"{n}.grad": p.grad for n, p in model.named_parameters()}}
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], state[name]) for name in state)
    assert torch.equal(random, torch.get_rng_state())
    assert all(module.saved is None for module in model.modules() if isinstance(module, edgetrain.nn.Invertible))


def test_measured_times_have_what_the_blocks_allow():
    model = edgetrain.create_model("revnet18", num_classes=10)
    times = measured_times(model, input_shape=(3, 32, 32), batch_size=2, budget_s=0.1)
    plan = edgetrain.uniform_plan(model, "invert", input_shape=(3, 32, 32), batch_size=2)
    assert times.shapes == plan.program.shapes
    assert times.source.startswith("measured on this machine")  # other tests run beside this one
    by_name = dict(zip(plan.program.names, times.blocks, strict=True))
    assert by_name["stage1.1"].backward_invert is not None
    assert by_name["stage1.1"].forward_in_place is not None
    assert by_name["stage1.1"].backward_invert_layerwise is None
    assert by_name["stem"].backward_invert is None
    assert all(block.update > 0 for name, block in by_name.items() if not name.startswith("pool"))
    assert times.head > 0
    assert times.copy_bytes_per_s > 0
    assert 0 < times.rounding_bytes_per_s < math.inf


@pytest.mark.parametrize(
    ("own", "source"),
    [
        (195, "measured on this machine"),
        (
            120,
            "measured on this machine while other work took 40% of its processors: too long, measure again when it is "
            "idle",
        ),
    ],
)
def test_times_measured_beside_other_work_say_so(own: int, source: str, monkeypatch: pytest.MonkeyPatch):
    counts = iter([ProcessorTicks(1000, 500, 100), ProcessorTicks(1200, 700, 100 + own)])
    module = sys.modules["edgetrain.memory.measured_times"]  # the package has the function by this name
    monkeypatch.setattr(module, "processor_ticks", lambda: next(counts))
    assert measured_times(nn.Linear(3, 2), input_shape=(3,), batch_size=2, budget_s=0.0).source == source


def small_network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))


@pytest.fixture
def whole_steps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Steps that were timed; each takes 7 s, the second 5."""
    seconds: list[float] = []

    def timed(*_: Any) -> float:
        seconds.append(5.0 if len(seconds) == 1 else 7.0)
        return seconds[-1]

    monkeypatch.setattr(sys.modules["edgetrain.memory.measured_times"], "keep_all_seconds", timed)
    return seconds


def test_the_sum_of_the_instructions_is_a_whole_step(whole_steps: list[float]):
    times = measured_times(small_network(), input_shape=(3, 8, 8), batch_size=32, budget_s=1.0, memory_bytes=10**9)
    assert 3 <= len(whole_steps) <= 8
    assert times.keep_all_seconds + times.head == pytest.approx(5.0)
    assert times.step_ratio is not None
    assert times.alone().keep_all_seconds + times.alone().head == pytest.approx(5.0 / times.step_ratio)
    assert times.alone().blocks[0].update == times.blocks[0].update < 1


def test_no_whole_step_is_timed_where_it_might_not_fit(whole_steps: list[float]):
    shape = {"input_shape": (3, 8, 8), "batch_size": 32}
    assert measured_times(small_network(), **shape, budget_s=1.0, memory_bytes=200_000).step_ratio is None
    assert measured_times(small_network(), **shape, budget_s=0.0, memory_bytes=10**9).step_ratio is None
    assert measured_times(small_network(), **shape, budget_s=1.0, step_ratio=2.0).step_ratio == 2.0
    assert not whole_steps


def test_equal_blocks_share_their_times():
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(6)))
    blocks = measured_times(model, input_shape=(8, 8, 8), batch_size=2, budget_s=0.1).blocks
    assert blocks[1] == blocks[2] == blocks[5]
    assert blocks[0] != blocks[1]


@pytest.mark.parametrize("limit", [{"budget_s": 0.0}, {"memory_bytes": 1}], ids=str)
def test_a_batch_that_is_too_large_is_measured_small_and_continued(limit):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    began = time.perf_counter()
    large = measured_times(model, input_shape=(3, 8, 8), batch_size=100_000, **limit)
    assert time.perf_counter() - began < 20
    small = measured_times(model, input_shape=(3, 8, 8), batch_size=4, budget_s=0.1)
    assert large.shapes[0] == (100_000, 3, 8, 8)
    # a busy machine makes either slower, hardly by a factor of a hundred
    assert 0.01 < large.blocks[0].forward_all / small.blocks[0].forward_all / 25_000 < 100
    assert 0.01 < large.blocks[0].update / small.blocks[0].update < 100


def test_a_batch_of_nobody_is_refused():
    with pytest.raises(UsageError, match="a batch of 0"):
        measured_times(nn.Linear(3, 2), input_shape=(3,), batch_size=0)


@pytest.mark.parametrize("mode", ["keep_all", "invert_layerwise"])
def test_block_times_add_up_to_the_step(mode, capsys):
    """In processor seconds, to which other work adds little; ``tools/step_prediction.py`` prints closer ratios."""
    torch.manual_seed(0)
    model, shape, batch_size = edgetrain.create_model("hybrid18", num_classes=10), (3, 32, 32), 8
    plan = edgetrain.uniform_plan(model, mode, input_shape=shape, batch_size=batch_size)
    net, optimizer = edgetrain.wrap(model, plan), torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, fused=True)
    x, taken = torch.randn(batch_size, *shape), []
    for _ in range(3):
        began = time.process_time()
        classification_loss(net(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
        taken.append(time.process_time() - began)
    times = measured_times(model, input_shape=shape, batch_size=batch_size, budget_s=1, clock=time.process_time)
    seconds = program_seconds(plan.program, times)
    with capsys.disabled():
        print(f"\n{mode}: sum {seconds:.3f} s, step {min(taken):.3f} s, ratio {seconds / min(taken):.2f}")
    assert 0.5 < seconds / min(taken) < 2
