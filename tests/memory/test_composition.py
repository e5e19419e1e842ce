"""The kinds of memory add up to the simulation's peaks, and each is what a count by hand says."""

from __future__ import annotations

from dataclasses import astuple
from typing import get_args

import pytest
from programs import nested_program
from torch import nn

import edgetrain
from edgetrain.chain import chain_of
from edgetrain.memory import compose, measure_costs, simulate
from edgetrain.planner import UniformMode
from edgetrain.runtime import Backward, Fetch, Forward, Head, Offload, Program, Update

BATCH = 4
MODELS = {
    "resnet20": lambda: edgetrain.create_model("resnet20"),
    "hybrid18": lambda: edgetrain.create_model("hybrid18", width=8),
    "revnet18": lambda: edgetrain.create_model("revnet18", widths=(8, 16, 32, 64)),
}


@pytest.fixture(scope="module", params=MODELS)
def network(request: pytest.FixtureRequest) -> tuple:
    model = MODELS[request.param]()
    return model, measure_costs(model, input_shape=(3, 16, 16), batch_size=BATCH)


def assert_adds_up(program: Program, costs: edgetrain.memory.Costs) -> None:
    simulation, found = simulate(program, costs), compose(program, costs)
    assert [part.instruction for part in found] == [moment.instruction for moment in simulation.moments]
    assert [part.peak_bytes for part in found] == [moment.peak_bytes for moment in simulation.moments]
    assert all(nbytes >= 0 for part in found for nbytes in astuple(part)[1:])
    assert all(part.weights == costs.weight_bytes and part.optimizer == costs.optimizer_bytes for part in found)


@pytest.mark.parametrize(
    ("mode", "update"), [*((mode, False) for mode in get_args(UniformMode)), ("recompute", True), ("invert", True)]
)
def test_uniform_plans_add_up_to_the_byte(network: tuple, mode: UniformMode, update: bool) -> None:
    model, costs = network
    plan = edgetrain.uniform_plan(model, mode, input_shape=(3, 16, 16), batch_size=BATCH, update_in_backward=update)
    assert_adds_up(plan.program, costs)


@pytest.mark.parametrize("seed", range(1, 3))
def test_nested_programs_add_up_to_the_byte(network: tuple, seed: int) -> None:
    model, costs = network
    assert_adds_up(nested_program(chain_of(model), (BATCH, 3, 16, 16), seed), costs)


def test_every_kind_of_two_layers_by_hand() -> None:
    """Linear 6 -> 5, sigmoid, without bias: every byte counted from shapes."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 5, bias=False), nn.Sigmoid())
    costs = measure_costs(model, input_shape=(6, 1, 1), batch_size=BATCH, optimizer="sgd")
    steps = (
        *(Forward(i, "all") for i in range(3)),
        Head(),
        *(Backward(i, "saved") for i in (2, 1, 0)),
    )
    program = Program(costs.names, costs.shapes, steps)
    found = compose(program, costs)
    assert_adds_up(program, costs)
    weights, batch, output = 4 * 6 * 5, 4 * BATCH * 6, 4 * BATCH * 5
    assert {part.weights for part in found} == {weights}
    assert {part.optimizer for part in found} == {weights}  # one momentum per weight
    assert {part.batch for part in found} == {batch}
    linear, sigmoid = found[1], found[2]
    assert (linear.kept, linear.gradients, linear.hidden) == (output, 0, 0)  # the view of the batch takes nothing
    assert sigmoid.kept == 2 * output
    assert found[4].gradients == 2 * output  # those of the logits and of the sigmoid's input
    assert found[-1].gradients == weights
    assert found[-1].kept == 0


def test_what_waits_beside_the_device_s_memory_stays_kept() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten())
    costs = measure_costs(model, input_shape=(3, 8, 8), batch_size=BATCH)
    steps = (
        Forward(0, "all"),
        Forward(1, "all"),
        Forward(2, "input"),
        Offload(2, "bfloat16"),
        Forward(3, "all"),
        Head(),
        Backward(3, "saved"),
        Fetch(2),
        Backward(2, "recompute"),
        Backward(1, "saved"),
        Backward(0, "saved"),
        *(Update(i) for i in range(1, 3)),
    )
    assert_adds_up(Program(costs.names, costs.shapes, steps), costs)
