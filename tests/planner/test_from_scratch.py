"""The pooling sequence as a choice: the best of all sequences planned one by one, on devices given by their rates."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import edgetrain
from edgetrain.errors import BudgetError, ModelError, UsageError
from edgetrain.planner import Plan, PlanFromScratch, Planner, plan_from_scratch
from edgetrain.profiles import load_profile
from edgetrain.profiles.profile import Profile
from edgetrain.profiles.quantity import Quantity
from edgetrain.units import format_mib

SIZE: dict[str, Any] = {"input_shape": (3, 16, 16), "batch_size": 4}
NETWORKS: dict[str, dict[str, Any]] = {
    "hybrid18": {"width": 8, "blocks": (1, 1, 1), "slope": 0.2},
    "layerwise18": {"width": 8, "blocks": (2, 2, 1), "slope": 0.2},
    "irevnet18": {"width": 8, "blocks": (1, 1, 1)},
}
SEQUENCES = tuple(itertools.product(("channel", "batch"), repeat=2))


def device(name: str) -> Profile:
    """A board by its data sheet, or one whose arithmetic is the faster the more channels there are.

    Calibrated profiles are like the latter. It counts arithmetic alone: sixteen times the channels, a thousand times
    the rate.
    """
    board = load_profile("rpi5-4gb")
    if name == "data sheet":
        return board

    def rate(value: float) -> Quantity:
        return Quantity(value=value, unit="GFLOP/s", source="round numbers", date="2026-01", assumption=False)

    return board.model_copy(update={"convolution": {"fp32": {4: rate(0.1), 64: rate(100)}}})


@functools.cache
def found_of(name: str, board: str = "data sheet", budget: int | None = None) -> PlanFromScratch:
    return plan_from_scratch(name, **SIZE, budget=budget, device=device(board), options=NETWORKS[name])


def network(name: str, pooling: tuple[str, ...]) -> nn.Sequential:
    torch.manual_seed(0)
    return edgetrain.create_model(name, pooling=pooling, **NETWORKS[name])


def middle_budget(name: str) -> int:
    """What half of the sequences fit in."""
    return sorted(row.least_bytes for row in found_of(name).sequences)[1] + 1000


@pytest.mark.parametrize("name", ["layerwise18", pytest.param("irevnet18", marks=pytest.mark.slow)])
def test_is_the_best_of_the_sequences_planned_one_by_one(name: str) -> None:
    budget = middle_budget(name)
    found = found_of(name, budget=budget)
    assert tuple(row.pooling for row in found.sequences) == SEQUENCES
    alone: dict[tuple[str, ...], Plan] = {}
    for row in found.sequences:
        model = network(name, row.pooling)
        planner = Planner(model, **SIZE, device=device("data sheet"))
        assert row.parameters == sum(p.numel() for p in model.parameters())
        assert row.least_bytes == planner.least().peak_bytes
        if row.plan is None:
            with pytest.raises(BudgetError) as refused:
                planner.plan(budget)
            assert row.needed_bytes is not None
            assert row.needed_bytes > budget
            assert format_mib(row.needed_bytes) in refused.value.expected
            assert found.reason(row) == f"does not fit: needs {format_mib(row.needed_bytes)} at least"
        else:
            alone[row.pooling] = planner.plan(budget)
            assert row.plan == alone[row.pooling]
    assert 0 < len(alone) < len(SEQUENCES)
    best = min(alone, key=lambda pooling: alone[pooling].step_seconds)
    assert found.pooling == best
    assert found.plan == alone[best]
    assert found.plan.peak_bytes <= budget


def test_the_seed_decides_not_what_was_planned_before() -> None:
    state = torch.random.get_rng_state()
    again = plan_from_scratch("layerwise18", **SIZE, device=device("data sheet"), options=NETWORKS["layerwise18"])
    assert again == found_of("layerwise18")
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", ["hybrid18", "layerwise18"])
def test_a_tighter_budget_changes_the_sequence(name: str) -> None:
    """Wide layers are fast on such a device, and their weights take memory."""
    free = found_of(name, "faster when wide")
    other = next(point for point in reversed(free.front) if point.pooling != free.pooling)
    tight = found_of(name, "faster when wide", other.peak_bytes)
    assert tight.pooling != free.pooling
    assert tight.plan.peak_bytes <= other.peak_bytes < free.plan.peak_bytes
    parameters = {row.pooling: row.parameters for row in free.sequences}
    assert parameters[tight.pooling] < parameters[free.pooling]


def test_the_front_is_that_of_all_sequences_together() -> None:
    found = found_of("hybrid18", "faster when wide")
    assert len({point.pooling for point in found.front}) > 1
    own = {row.pooling: row.front for row in found.sequences}
    for point in found.front:
        assert (point.peak_bytes, point.seconds) in own[point.pooling]
    for front in own.values():
        for peak, seconds in front:
            assert any(point.peak_bytes <= peak and point.seconds <= seconds for point in found.front)
    for a, b in itertools.pairwise(found.front):
        assert a.peak_bytes < b.peak_bytes
        assert a.seconds > b.seconds
    assert found.front[0].peak_bytes == min(front[0][0] for front in own.values())


@pytest.mark.parametrize("name", ["layerwise18", "irevnet18"])
def test_the_chosen_network_trains_as_autograd_does(name: str) -> None:
    found = found_of(name, budget=middle_budget(name))
    assert set(found.plan.modes) != {"store"}
    plain = network(name, found.pooling).double()
    planned = copy.deepcopy(plain)
    x, labels = torch.randn(4, 3, 16, 16, dtype=torch.double), torch.randint(0, 10, (4,))
    F.cross_entropy(plain(x), labels).backward()
    F.cross_entropy(edgetrain.wrap(planned, found.plan)(x), labels).backward()
    for (parameter, own), other in zip(planned.named_parameters(), plain.parameters(), strict=True):
        assert own.grad is not None
        assert other.grad is not None
        assert ((own.grad - other.grad).abs().max() / other.grad.abs().max()) < 1e-10, parameter
    for own_buffer, other_buffer in zip(planned.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(own_buffer, other_buffer, rtol=1e-10, atol=1e-13)


def test_where_nothing_fits_the_leanest_sequence_is_named() -> None:
    least = min(row.least_bytes for row in found_of("layerwise18").sequences)
    with pytest.raises(BudgetError) as refused:
        found_of("layerwise18", budget=least - 1)
    assert format_mib(least) in refused.value.expected
    assert "with pooling bb, the leanest of 4 sequences" in refused.value.expected
    named = re.search(r"raise --budget to (\d+MiB)", refused.value.action)
    assert named is not None
    enough = plan_from_scratch(
        "layerwise18", **SIZE, budget=named.group(1), device=device("data sheet"), options=NETWORKS["layerwise18"]
    )
    assert enough.plan.peak_bytes >= least


def test_says_what_it_compares_and_what_not() -> None:
    found = found_of("layerwise18", budget=middle_budget("layerwise18"))
    table = found.summary()
    assert "Each pooling sequence is another network" in table
    for row, letters in zip(found.sequences, ("cc", "cb", "bc", "bb"), strict=True):
        line = next(line for line in table.splitlines() if line.startswith(f"{letters} "))
        assert f"{row.parameters:,}" in line
        assert line.endswith(found.reason(row))
    assert found.plan.explain() in found.explain()
    written = json.loads(found.to_json())
    assert "another network" in written["note"]
    assert tuple(written["pooling"]) == found.pooling
    assert Plan.from_json(json.dumps(written["plan"])) == found.plan
    assert [row["needed_bytes"] for row in written["sequences"]] == [row.needed_bytes for row in found.sequences]


def test_micro_batches_are_planned_as_the_planner_does() -> None:
    small: dict[str, Any] = {"width": 8, "blocks": (1, 1)}
    arguments: dict[str, Any] = {**SIZE, "device": device("data sheet"), "allow_ghost_batchnorm": True}
    torch.manual_seed(0)
    alone = Planner(edgetrain.create_model("irevnet18", pooling=("batch",), **small), **arguments)
    one = alone.costs(SIZE["batch_size"])
    budget = alone.least().peak_bytes + one.gradient_bytes
    found = plan_from_scratch("irevnet18", **arguments, budget=budget, options=small)
    assert found.pooling == ("batch",)
    assert found.plan.micro_batches > 1
    assert found.plan == alone.plan(budget)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet18", {}, "downsamples in one way alone; expected .*irevnet18, layerwise18, hybrid18"),
        ("resnet20", {}, "downsamples in one way alone"),
        ("my_models:make_net", {}, "no network of the zoo"),
        (nn.Sequential(nn.Conv2d(3, 8, 3)), {}, "Sequential, which is no network of the zoo"),
        ("hybrid18", {"pooling": ("channel",)}, "leave it out"),
        ("hybrid18", {"blocks": ()}, "give 1 block counts above zero"),
    ],
)
def test_refusals(name: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_from_scratch(name, **SIZE, options=options)


def test_an_image_that_poolings_do_not_divide_is_refused() -> None:
    with pytest.raises(ModelError, match="choose an image size divisible by 2"):
        plan_from_scratch("hybrid18", input_shape=(3, 18, 18), batch_size=4, options=NETWORKS["hybrid18"])
