"""What a run inside a cap refuses and advises, without a cap on this process."""

from __future__ import annotations

import functools
import math
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from edgetrain.errors import BudgetError
from edgetrain.models import create_model
from edgetrain.planner import UniformMode
from edgetrain.train import trial
from edgetrain.train.advice import _least, _shrunk, lean_mode
from edgetrain.train.helper import Helper
from edgetrain.train.prepared import Question, check_budget, prepared, would_fit
from edgetrain.train.recipe import Recipe
from edgetrain.train.trial import Trial, fits
from edgetrain.units import MIB

make = functools.partial(create_model, "hybrid18", in_channels=1, width=8)


def test_budget_below_the_weights():
    needed = 3 * sum(p.numel() * 4 for p in make().parameters())
    with pytest.raises(BudgetError, match="before any activation"):
        check_budget(make, needed)
    check_budget(make, 2 * needed)


@pytest.mark.parametrize("most", [0, 2, 3, 17, 40, 99, 100])
def test_shrunk_finds_the_largest_to_a_tenth_in_twelve_tries(most: int):
    tried: list[int] = []

    def runs(n: int) -> bool:
        tried.append(n)
        return n <= most

    found = _shrunk(100, runs)
    assert len(tried) <= 12
    assert found == most or (0.85 * most <= found <= most and found in tried)


@pytest.mark.parametrize("needed", [25, 38, 77, 78, 120])
def test_the_least_budget_is_found_to_a_twentieth_and_has_room_for_another_run(needed: int):
    tried: list[int] = []

    def runs(mib: int) -> bool:
        tried.append(mib)
        return mib >= needed

    named = _least(24, 77, runs, most=1000)
    found = min(mib for mib in tried if mib >= needed)
    assert needed <= found <= 1.05 * needed + 1
    assert 1.05 * found < named <= 1.05 * found + 2
    assert len(tried) <= 12


@pytest.mark.parametrize(("needed", "first", "most"), [(230, 210, 300), (40, 77, 70), (300, 10, 300), (11, 10, 11)])
def test_the_least_budget_is_looked_for_up_to_what_the_host_has(needed: int, first: int, most: int):
    assert needed <= _least(4, first, lambda mib: needed <= mib <= most, most=most) <= most


@pytest.mark.parametrize("most", [3, 4, 5, 300])
def test_no_budget_is_named_where_none_runs(most: int):
    tried: list[int] = []
    assert _least(4, 10, lambda mib: bool(tried.append(mib)), most=most) == 0
    assert len(tried) <= 10
    assert max(tried, default=0) <= most


def here(*_: object) -> bool:
    raise AssertionError("tried in this process")


def make_here_alone() -> nn.Module:
    """In another process nothing is left of the attempt, as after the kernel has found no memory for it."""
    if os.environ["MADE_IN"] != str(os.getpid()):
        os._exit(1)
    return make()


def question(make_model: Callable[[], nn.Module], budget_mib: int, how: UniformMode | None = "recompute") -> Question:
    return Question(make_model, how, (1, 16, 16), Recipe(batch_size=8), budget_mib * MIB, 10**12)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the cap needs Linux")
def test_a_mode_that_was_asked_for_has_smaller_plans():
    made = prepared(question(make, 100))
    assert made.keeps_freed
    plans = made.plans
    assert {*plans[0].modes} <= {"recompute", "store"}
    assert len(plans) > 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the cap needs Linux")
def test_a_network_that_cannot_be_pickled_is_planned_here():
    made = prepared(question(lambda: make(), 200))
    assert made.plans
    assert not made.keeps_freed  # the heap of this process serves other things


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the helper is forked")
def test_a_helper_that_ends_is_told_and_takes_no_other_news_with_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MADE_IN", str(os.getpid()))
    asked = question(make_here_alone, 100)
    with pytest.raises(BudgetError, match="the process that plans the run ended"):
        prepared(asked)
    assert would_fit(asked, "recompute") == "raise --budget, or lower --batch-size or --image-size"
    with pytest.raises(BudgetError, match=r"weights, gradients and momentum.+raise --budget"):
        prepared(replace(asked, budget_bytes=MIB // 2))


def diverging() -> nn.Module:
    """One whose loss is not a number."""
    model = make()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    return model


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the cap needs Linux")
def test_a_loss_of_noise_that_is_no_number_says_nothing_of_memory():
    with Helper() as helper:
        assert fits(Trial(diverging, "recompute", (1, 16, 16), 4, 100 * MIB), helper)
        assert not fits(Trial(diverging, "recompute", (1, 16, 16), 512, 8 * MIB), helper)


class KilledInASecondStep(nn.Module):
    """By then a trial has its folder."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16 * 16, 2)
        self.steps = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += x.device.type == "cpu" and x.data_ptr() != 0
        if self.steps > 1:
            Path(os.environ["SEEN"]).write_text(" ".join(os.listdir(tempfile.gettempdir())))
            os._exit(1)
        return self.layer(x.flatten(1))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the helper is forked")
def test_a_trial_that_is_killed_leaves_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with Helper() as helper:
        assert not fits(Trial(KilledInASecondStep, "recompute", (1, 16, 16), 4, 500 * MIB), helper)
    assert "edgetrain-trial-" in (tmp_path / "seen").read_text()
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the cap needs Linux")
def test_where_nothing_may_leave_noise_nothing_is_inverted_to_fall_back_on():
    asked = replace(question(make, 100), snr_limit=math.inf, budget_bytes=None)
    found = [one for plan in prepared(asked).plans for one in zip(plan.program.names, plan.modes, strict=True)]
    assert not any(mode.startswith("invert") for name, mode in found if name.startswith("stage"))
    assert lean_mode(math.inf) == "recompute"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the cap needs Linux")
def test_trial_in_a_helper(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trial, "in_fresh_thread", here)
    with Helper() as helper:
        assert fits(Trial(make, "invert_layerwise", (1, 16, 16), 4, 100 * MIB), helper)
        assert not fits(Trial(make, "invert_layerwise", (1, 16, 16), 512, 8 * MIB), helper)
