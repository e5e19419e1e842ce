"""The price of a choice against the simulated peak of its plan, and what is offered beside it."""

from __future__ import annotations

import functools

import pytest
from torch import nn

from edgetrain.chain import parts_of
from edgetrain.chain.trained import fix_batch_norm, train_only
from edgetrain.memory import measure_costs, simulate
from edgetrain.models import create_model
from edgetrain.planner import uniform_plan
from edgetrain.train import Recipe
from edgetrain.train.prices import offered_choices, prices

SHAPE, RECIPE = (3, 16, 16), Recipe(batch_size=8)
STEM_BYTES = 4 * 8 * 8 * 16 * 16
"""Eight channels at the full resolution."""


@functools.cache
def made(name: str, choice: str, *, fixed: bool) -> nn.Module:
    model = train_only(create_model(name, width=8), choice, head="head.linear")
    return fix_batch_norm(model) if fixed else model


@pytest.mark.parametrize("fixed", [False, True])
def test_keeping_everything_is_that_plan(fixed: bool) -> None:
    choices = ["all", "last:3", "head"]
    found = prices(lambda choice: made("resnet20", choice, fixed=fixed), choices, input_shape=SHAPE, recipe=RECIPE)
    for price in found:
        model = made("resnet20", price.trained, fixed=fixed)
        assert price.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
        costs = measure_costs(model, input_shape=SHAPE, batch_size=8, optimizer=RECIPE.optimizer_for(model))
        plan = uniform_plan(model, "keep_all", input_shape=SHAPE, batch_size=8)
        planned = simulate(plan.program, costs).peak_bytes
        # plain autograd holds the output of one frozen layer longer than a plan does
        assert 0 <= price.keep_all_bytes - planned <= (0 if price.trained == "all" else STEM_BYTES)
        assert price.least_bytes <= price.keep_all_bytes
    memory = [price.keep_all_bytes for price in found]
    assert memory == sorted(memory, reverse=True)
    assert found[1].keep_all_bytes < 0.7 * found[0].keep_all_bytes


def test_what_is_offered() -> None:
    model = create_model("resnet20", width=8)
    blocks = len(parts_of(model))
    offered = offered_choices(model, "all")
    assert offered == ["all", f"last:{blocks // 2}", f"last:{blocks // 4}", "bias-norm", "head"]
    assert offered_choices(model, "last:4") == [*offered[:2], "last:4", *offered[2:]]
