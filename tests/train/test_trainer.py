"""The training loop with a plain DataLoader, and the recipe's schedule."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from edgetrain.errors import TrainingError
from edgetrain.models import hybrid
from edgetrain.planner import Plan, uniform_plan
from edgetrain.train import Recipe, Trainer
from edgetrain.train.checkpoint import load_weights


def trainer(tmp_path: Path, **recipe: object) -> Trainer:
    torch.manual_seed(0)
    model = hybrid(3, in_channels=1, width=8)
    plan = uniform_plan(model, "invert_layerwise", input_shape=(1, 16, 16), batch_size=8)
    return Trainer(model, plan, run_dir=tmp_path, recipe=Recipe(batch_size=8, **recipe))


def batches(count: int) -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(count, 1, 16, 16), torch.arange(count) % 3), batch_size=8)


def test_fit_with_a_dataloader_whose_last_batch_is_smaller(tmp_path: Path):
    training = trainer(tmp_path, epochs=2)
    history = training.fit(batches(20), batches(6))
    assert [record.epoch for record in history] == [1, 2]
    assert all(record.test_accuracy is not None for record in history)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [record.loss for record in history]
    assert Plan.from_json((tmp_path / "plan.json").read_text()) == training.plan
    assert load_weights(training.checkpoint, hybrid(3, in_channels=1, width=8)) == {"epoch": 2, "step": 6}


def test_weights_that_break_in_the_last_step_are_not_saved(tmp_path: Path):
    training = trainer(tmp_path, epochs=1, peak_rate=float("inf"))
    with pytest.raises(TrainingError, match="not finite after step 1"):
        training.fit(batches(8))
    model = hybrid(3, in_channels=1, width=8)
    assert load_weights(training.checkpoint, model)["epoch"] == 0
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("steps", [10, 100, 1000])
def test_rate_rises_to_a_tenth_and_falls_to_zero(steps: int):
    recipe = Recipe(peak_rate=0.4)
    rates = [recipe.rate(step, steps) for step in range(steps)]
    # section 3.5: linear from 0 to the peak at 10 % and to 0 at the end; the steps are the points in between
    top = steps / 10
    expected = np.interp(np.arange(1, steps + 1), [0, top, top + 1, steps + 1], [0, 0.4, 0.4, 0])
    np.testing.assert_allclose(rates, expected, atol=1e-12)


def test_rate_scales_with_the_batch():
    assert max(Recipe(batch_size=128).rate(step, 100) for step in range(100)) == pytest.approx(0.1)
