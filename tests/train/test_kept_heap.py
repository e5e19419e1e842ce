"""A run inside a cap keeps what it frees where that fits, and gives it back when memory is short."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import edgetrain
from edgetrain.models import create_model
from edgetrain.planner import Plan, Planner, uniform_plan
from edgetrain.targets import select_target
from edgetrain.targets.pressure import PressureGauge
from edgetrain.train import guard
from edgetrain.train.guard import Guard
from edgetrain.train.planned import _in_kept_heap, given
from edgetrain.train.prepared import Question, prepared
from edgetrain.train.recipe import Recipe
from edgetrain.train.trainer import Trainer
from edgetrain.units import MIB


@dataclass(frozen=True)
class Sized:
    """A plan of so many bytes and seconds."""

    peak_bytes: int
    step_seconds: float


class Planning:
    """A planner whose plans take what they may, down to 50 bytes."""

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self._seconds = seconds

    def plan(self, budget_bytes: int) -> Sized:
        return Sized(max(50, budget_bytes), self._seconds(budget_bytes))


def tried(fits: int, seconds: Callable[[int], float], most: int = 100) -> tuple[int | None, list[int]]:
    """The plan that is found in ``most`` bytes where those of up to ``fits`` run, and all that were tried."""
    asked: list[int] = []

    def runs(plan: Plan, *, keeps_freed: bool = False) -> bool:
        assert keeps_freed
        asked.append(plan.peak_bytes)
        return plan.peak_bytes <= fits

    found = _in_kept_heap(cast(Planner, Planning(seconds)), most, 50, 1.2, runs)
    return None if found is None else found.peak_bytes, asked


def test_somewhat_smaller_plans_are_tried_too_but_not_at_any_price() -> None:
    assert tried(100, lambda _: 1.0) == (90, [90])
    assert tried(85, lambda _: 1.0) == (80, [90, 80])
    assert tried(75, lambda _: 1.0) == (70, [90, 80, 70])
    assert tried(60, lambda _: 1.0) == (None, [90, 80, 70])
    assert tried(75, lambda n: 1.0 if n > 75 else 1.3) == (None, [90, 80])
    assert tried(40, lambda _: 1.0, most=60) == (None, [54])


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A heap that is said to keep what is freed until it is told otherwise, and how often it was."""
    told = {"kept": 1, "returned": 0}

    def returned(_: int) -> None:
        told["kept"] = 0
        told["returned"] += 1

    monkeypatch.setattr(guard, "keeps_freed_blocks", lambda: bool(told["kept"]))
    monkeypatch.setattr(guard, "return_large_blocks", returned)
    return told


def test_when_memory_is_short_freed_blocks_are_returned_from_then_on(settings: dict[str, int]) -> None:
    one = Guard(select_target("cpu"), lambda _: ())
    one.make_room()
    one.make_room()
    assert settings == {"kept": 0, "returned": 1}


def test_under_memory_pressure_too_where_there_is_no_smaller_plan(settings: dict[str, int], tmp_path: Path) -> None:
    class Pressed:
        def reason(self) -> str:
            return "no memory"

        def warning(self) -> None:
            return None

    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    plan = edgetrain.uniform_plan(model, "keep_all", input_shape=(1, 2, 2), batch_size=3)
    pressed = Guard(select_target("cpu"), lambda _: (), gauge=cast(PressureGauge, Pressed()))
    trainer = Trainer(model, plan, run_dir=tmp_path, recipe=Recipe(epochs=1, batch_size=3), guard=pressed)
    trainer.fit([(torch.randn(3, 1, 2, 2), torch.tensor([0, 1, 0]))])
    assert settings == {"kept": 0, "returned": 1}
    assert trainer.events == []


RUN = """
import contextlib, functools, json, sys
from pathlib import Path
import torch
from edgetrain.models import create_model
from edgetrain.targets import keeps_freed_blocks
from edgetrain.train.callbacks import Callback
from edgetrain.train.capped import train_capped
from edgetrain.train.recipe import Recipe
from edgetrain.units import MIB

make = functools.partial(create_model, "hybrid18", in_channels=1, width=8)
kept = []

class Looking(Callback):
    def on_step(self, record):
        kept.append(keeps_freed_blocks())

def batches():
    torch.manual_seed(0)
    return [(torch.randn(32, 1, 16, 16), torch.arange(32) % 10) for _ in range(3)], None

if __name__ == "__main__":
    budget = None if sys.argv[1] == "none" else int(sys.argv[1]) * MIB
    done = train_capped(
        make, batches, mode=sys.argv[2], input_shape=(1, 16, 16), recipe=Recipe(batch_size=32, epochs=1),
        run_dir=Path(sys.argv[3]), budget_bytes=budget, watch=lambda _: contextlib.nullcontext([Looking()]),
    )
    print(json.dumps([kept, [e.loss for e in done.history], done.peak_bytes, len(done.events), keeps_freed_blocks()]))
"""


def trained(budget: str, mode: str, folder: Path) -> Any:
    (folder / "run.py").write_text(RUN)
    command = [sys.executable, str(folder / "run.py"), budget, mode, str(folder / f"{mode}-{budget}")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the cap needs Linux")
def test_a_run_keeps_what_it_frees_until_it_ends(tmp_path: Path) -> None:
    free, wide = (trained(budget, "recompute", tmp_path) for budget in ("none", "200"))
    assert free[0] == wide[0] == [True] * 3
    assert free[1] == wide[1]
    assert wide[3] == 0
    assert not free[4]  # afterwards
    assert not wide[4]


@pytest.mark.parametrize("holes_fit", [False, True])
def test_a_mode_that_was_asked_for_returns_what_it_frees_where_holes_do_not_fit(holes_fit: bool) -> None:
    asked: list[bool] = []

    def runs(plan: Plan, *, keeps_freed: bool = False) -> bool:
        asked.append(keeps_freed)
        return holes_fit or not keeps_freed

    recipe = Recipe(batch_size=8)
    made = given(question().make_model, "recompute", input_shape=(1, 16, 16), recipe=recipe, runs=runs)
    assert made.keeps_freed == holes_fit
    assert made.plans
    assert asked == ([True] if holes_fit else [True, False])


def test_the_leanest_mode_that_was_asked_for_is_tried_where_what_the_allocator_finds_leaner_does_not_run() -> None:
    make, recipe = question().make_model, Recipe(batch_size=8)
    uniform = functools.partial(uniform_plan, make(), input_shape=(1, 16, 16), batch_size=8)
    lean = uniform("invert_layerwise")

    def runs(plan: Plan, *, keeps_freed: bool = False) -> bool:
        return plan == lean and not keeps_freed

    for how in ("invert_layerwise", "recompute"):
        made = given(make, how, input_shape=(1, 16, 16), recipe=recipe, runs=runs)
        assert made.plans[-1] == lean
        assert not made.keeps_freed
        assert made.plans[0] == uniform(how)


def question(**others: Any) -> Question:
    make = functools.partial(create_model, "hybrid18", in_channels=1, width=8)
    return Question(**{**ASKED, "make_model": make, **others})


ASKED: dict[str, Any] = {
    "how": "recompute",
    "input_shape": (1, 16, 16),
    "recipe": Recipe(batch_size=8),
    "budget_bytes": 200 * MIB,
    "available_bytes": 10**12,
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the cap needs Linux")
def test_a_resumed_run_finds_out_its_heap_and_a_network_of_this_process_alone_has_none() -> None:
    assert prepared(question(has_run=True)).keeps_freed
    assert not prepared(question(budget_bytes=12 * MIB, has_run=True)).keeps_freed
    model = question().make_model()
    assert not prepared(question(make_model=lambda: copy.deepcopy(model))).keeps_freed
