"""A run that runs out of memory goes on, from the start of its step, as one that changed its plan there by itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import shortage_runs as runs
import torch

from edgetrain.errors import BudgetError
from edgetrain.planner import Plan
from edgetrain.runtime.program import Head, describe
from edgetrain.train import Callback
from edgetrain.train.records import MemoryEvent

DONE = runs.FAILED_STEP - 1

PLANS = {placement: runs.plans(update_in_backward=placement == "in backward") for placement in ("after", "in backward")}
INSTRUCTIONS = [
    pytest.param(
        placement,
        place,
        when,
        id=f"update {placement}: {when} {describe(step)}",
        # what an instruction has changed when it has done its work is what the next one finds
        marks=[pytest.mark.slow] if when == "after" else [],
    )
    for placement, (plan, _) in PLANS.items()
    for place, step in enumerate(plan.program.instructions)
    if step != Head()  # the caller's; see the objective below
    for when in ("before", "after")
]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, bytes], dict]]:
    """By placement: the end and the losses of a run that goes over to the smaller plan before the failing step."""
    found = {}
    for placement, (plan, smaller) in PLANS.items():
        switching = runs.Switching(smaller, DONE)
        trainer, losses = runs.train(tmp_path_factory.mktemp("reference"), plan, switching, smaller=[])
        found[placement] = runs.end(trainer), losses.found
    return found


class Told(Callback):
    def __init__(self) -> None:
        self.events: list[MemoryEvent] = []

    def on_memory(self, event: MemoryEvent) -> None:
        self.events.append(event)


def check(placement: str, references: dict, folder: Path, failed: list[int]) -> None:
    """Runs with the failure in place; the end is bit for bit that of the reference."""
    plan, smaller = PLANS[placement]
    told = Told()
    trainer, losses = runs.train(folder, plan, told, smaller=[smaller])
    assert failed
    end, curve = references[placement]
    assert losses.found == curve
    assert runs.end(trainer) == end
    (event,) = told.events
    assert (event.kind, event.epoch, event.step) == ("out of memory", 1, DONE)
    assert "can't allocate memory" in event.reason
    assert [json.loads(line)["step"] for line in (folder / "events.jsonl").read_text().splitlines()] == [DONE]
    assert Plan.from_json((folder / "plan.json").read_text()) == smaller == trainer.plan


@pytest.mark.parametrize(("placement", "place", "when"), INSTRUCTIONS)
def test_out_of_memory_at_every_instruction(
    placement: str, place: int, when: str, references: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(placement, references, tmp_path, runs.fail_at(monkeypatch, place, when, step=runs.FAILED_STEP))


@pytest.mark.parametrize("placement", PLANS)
def test_out_of_memory_in_the_head(
    placement: str, references: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgetrain.train.objectives import CrossEntropy

    loss, calls, failed = CrossEntropy.__call__, [0], []

    def failing(self: CrossEntropy, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == runs.FAILED_STEP:
            failed.append(1)
            runs.out_of_memory()
        return loss(self, outputs, labels)

    monkeypatch.setattr(CrossEntropy, "__call__", failing)
    check(placement, references, tmp_path, failed)


@pytest.mark.parametrize(("placement", "nth"), [("after", 0), *(("in backward", nth) for nth in range(5))])
def test_out_of_memory_half_way_through_an_update(
    placement: str, nth: int, references: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``nth`` of the step's updates, of which some parameters are changed already."""
    updates = 1 if placement == "after" else 5  # blocks with parameters
    failed = runs.fail_in_update(monkeypatch, call=DONE * updates + nth + 1)
    check(placement, references, tmp_path, failed)


def test_the_comparison_can_fail(references: dict, tmp_path: Path) -> None:
    plan, smaller = PLANS["after"]
    trainer, losses = runs.train(tmp_path, plan, runs.Switching(smaller, DONE - 1), smaller=[])
    assert losses.found != references["after"][1]
    assert runs.end(trainer) != references["after"][0]
    assert losses.found == pytest.approx(references["after"][1], rel=1e-12)


def test_the_same_plan_again_gives_the_run_that_did_not_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails once may succeed the next time: then nothing at all is different."""
    plan, _ = PLANS["in backward"]
    whole, curve = runs.train(tmp_path / "whole", plan, smaller=[])
    last_update = len(plan.program.instructions) - 2
    failed = runs.fail_at(monkeypatch, last_update, "after", step=runs.FAILED_STEP)
    trainer, losses = runs.train(tmp_path / "failed", plan, smaller=[plan])
    assert failed
    assert losses.found == curve.found
    assert runs.end(trainer) == runs.end(whole)


def test_a_repetition_that_fails_too(references: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an update had begun in step 6, step 4 is repeated from the checkpoint of the epoch, and fails."""
    plan, smaller = PLANS["in backward"]
    place = len(plan.program.instructions) - 2
    runs.fail_at(monkeypatch, place, "after", step=6)
    failed = runs.fail_at(monkeypatch, 0, "before", step=7)  # counted as they run: the first that is repeated
    told = Told()
    trainer, _ = runs.train(tmp_path, plan, told, smaller=[smaller], tolerance=1e-12)
    assert failed
    assert [(event.epoch, event.step) for event in told.events] == [(1, DONE)]
    assert runs.end(trainer) == references["in backward"][0]


def test_gives_up_with_the_numbers_where_the_smallest_plan_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, smaller = PLANS["after"]
    for step in (4, 5):
        runs.fail_at(monkeypatch, 0, "before", step=step)
    with pytest.raises(BudgetError) as raised:
        runs.train(tmp_path, plan, smaller=[smaller])
    assert "memory ran out in step 4 with the smallest plan, after 1 larger one" in raised.value.found
    assert raised.value.expected == "a step of 6 samples of 3x8x8 to fit"


def test_out_of_memory_in_an_evaluation(references: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is done again in smaller parts, which changes nothing: samples do not meet there."""
    model, sizes = runs.network(), []
    forward = type(model).forward

    def failing(self: torch.nn.Sequential, x: torch.Tensor) -> torch.Tensor:
        if not self.training and len(self) == len(model):
            sizes.append(len(x))
            if len(x) > 2:
                runs.out_of_memory()
        return forward(self, x)

    plan, smaller = PLANS["after"]
    whole, _ = runs.train(tmp_path / "whole", plan, runs.Switching(smaller, DONE), smaller=[])
    monkeypatch.setattr(torch.nn.Sequential, "forward", failing)
    trainer, _ = runs.train(tmp_path / "failing", plan, runs.Switching(smaller, DONE), smaller=[])
    assert {6, 3, 1} <= set(sizes)
    assert runs.end(trainer) == runs.end(whole) == references["after"][0]
    assert [r.test_accuracy for r in trainer.history] == [r.test_accuracy for r in whole.history]


def test_memory_pressure_changes_the_plan_between_two_steps(references: dict, tmp_path: Path) -> None:
    """As the reference does by itself; the warning is passed on once."""

    class Gauge:
        asked = 0

        def reason(self) -> str | None:
            self.asked += 1
            return "little is left" if self.asked == DONE + 1 else None  # asked before the first step, too

        def warning(self) -> str | None:
            return "swap thrashes" if self.asked == DONE + 1 else None

    class Warned(Told):
        def __init__(self) -> None:
            super().__init__()
            self.texts: list[str] = []

        def on_warning(self, text: str) -> None:
            self.texts.append(text)

    plan, smaller = PLANS["after"]
    told = Warned()
    trainer, losses = runs.train(tmp_path, plan, told, smaller=[smaller], gauge=Gauge())
    assert [(event.kind, event.step, event.reason) for event in told.events] == [
        ("memory pressure", DONE, "little is left")
    ]
    assert told.texts == ["swap thrashes"]
    assert losses.found == references["after"][1]
    assert runs.end(trainer) == references["after"][0]
