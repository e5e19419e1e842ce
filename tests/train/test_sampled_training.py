"""Training with sampled modules: the draws of a run, what it leaves, and what scaling and recalibration are for."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from edgetrain.chain import SampledNetwork
from edgetrain.cli.main import run
from edgetrain.models import cifar_resnet
from edgetrain.planner import Plan, uniform_plan
from edgetrain.train import Recipe, Trainer, evaluate, load_weights
from edgetrain.train.data.digits import DigitsSource
from edgetrain.train.stopping import Stop

SHAPE = (1, 8, 8)


def network(depth: int) -> nn.Module:
    torch.manual_seed(0)
    return cifar_resnet(depth, in_channels=1, width=8)


def trainer(depth: int, folder: Path, *, keep: str, batch_size: int, **recipe: Any) -> tuple[Trainer, SampledNetwork]:
    sampled = SampledNetwork(network(depth), keep, input_shape=SHAPE, seed=3)
    plan = uniform_plan(sampled, "keep_all", input_shape=SHAPE, batch_size=batch_size)
    return Trainer(sampled, plan, run_dir=folder, recipe=Recipe(batch_size=batch_size, **recipe)), sampled


def batches(split: Any, batch_size: int, count: int | None = None) -> DataLoader[tuple[Tensor, ...]]:
    source = DigitsSource(split)
    images = torch.from_numpy(np.stack([source.decode(i) for i in range(len(source))]))[:count]
    labels = torch.from_numpy(source.labels)[:count]
    pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    order = torch.Generator().manual_seed(0)
    training = split == "train"
    data = TensorDataset(pixels, labels)
    return DataLoader(data, batch_size=batch_size, shuffle=training, drop_last=training, generator=order)


def test_draws_of_a_run_and_of_one_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training, sampled = trainer(20, tmp_path, keep="2/3", batch_size=16, epochs=2)
    draws: list[Any] = []
    draw = SampledNetwork.draw

    def noted(self: SampledNetwork, step: int) -> Any:
        draws.append((step, draw(self, step)))
        return draws[-1][1]

    monkeypatch.setattr(SampledNetwork, "draw", noted)
    training.fit(batches("train", 16, 80), batches("test", 16, 32))
    monkeypatch.undo()
    assert [step for step, _ in draws] == list(range(10))
    other, again = trainer(20, tmp_path / "again", keep="2/3", batch_size=16)
    step = load_weights(training.checkpoint, other.model)["step"]
    assert [again.draw(k) for k in range(10)] == [drawn for _, drawn in draws]
    assert step == 10
    assert [again.draw(k) for k in range(step, 20)] == [sampled.draw(k) for k in range(step, 20)]


def test_parts_of_a_batch_run_the_same_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampled = SampledNetwork(network(20), "1/3", input_shape=SHAPE)
    whole = uniform_plan(sampled, "keep_all", input_shape=SHAPE, batch_size=8)
    plan = Plan(whole.modes, whole.reasons, whole.program, micro_batches=2)
    training = Trainer(sampled, plan, run_dir=tmp_path, recipe=Recipe(epochs=1, batch_size=16))
    steps: list[int] = []
    draw = sampled.draw
    monkeypatch.setattr(sampled, "draw", lambda step: steps.append(step) or draw(step))  # type: ignore[func-returns-value]
    training.fit(batches("train", 16, 48))
    assert steps == [0, 1, 2]


def test_what_a_run_leaves_is_a_plain_network(tmp_path: Path) -> None:
    training, sampled = trainer(20, tmp_path, keep="1/3", batch_size=16, epochs=1)
    training.fit(batches("train", 16, 64))
    plain = cifar_resnet(20, in_channels=1, width=8).eval()
    load_weights(training.checkpoint, plain)
    x = torch.randn(4, *SHAPE)
    with torch.no_grad():
        assert torch.equal(plain(x), sampled.model.eval()(x))
    assert training.model is sampled.model
    assert all(int(m.num_batches_tracked) > 0 for m in plain.modules() if isinstance(m, nn.BatchNorm2d))


def test_an_epoch_before_the_last_leaves_the_weights_alone(tmp_path: Path) -> None:
    training, sampled = trainer(20, tmp_path, keep="1/3", batch_size=16, epochs=2)
    before = copy.deepcopy(dict(sampled.model.named_parameters()))
    with training._whole(batches("train", 16, 64), Stop(), last=False):
        assert not torch.equal(sampled.model.get_parameter("stage1.0.norm2.weight"), before["stage1.0.norm2.weight"])
    assert all(torch.equal(p, before[name]) for name, p in sampled.model.named_parameters())


def test_scaling_and_recalibration_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """5 of 9 modules per stage: without them the whole network guesses."""
    training, sampled = trainer(56, tmp_path, keep="5/9", batch_size=64, epochs=4)
    without: list[float] = []
    finish = sampled.finish

    def evaluated(images: Any) -> nn.Module:
        without.append(evaluate(sampled.model, batches("test", 128)))
        return finish(images)

    monkeypatch.setattr(sampled, "finish", evaluated)
    history = training.fit(batches("train", 64), batches("test", 128))
    accuracy = history[-1].test_accuracy
    assert accuracy is not None
    print(f"error {1 - without[0]:.1%} without, {1 - accuracy:.1%} with")
    assert accuracy > 0.75
    assert accuracy > without[0] + 0.3


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--num-classes", "10", "--input", "1x8x8", "--batch", "16", "--device", "rpi5-4gb"]
    peaks = []
    for more in ([], ["--sample-modules", "2,1,1"]):
        assert run(["plan", "resnet20", *options, *more, "--json"]) == 0
        peaks.append(json.loads(capsys.readouterr().out)["costed"]["peak_bytes"])
    assert peaks[1] < peaks[0]
    assert run(["plan", "resnet20", *options, "--sample-modules", "2,1,1"]) == 0
    assert "2 of 3, 1 of 2, 1 of 2 modules" in capsys.readouterr().out
    assert run(["plan", "resnet20", *options, "--sample-modules", "4,1,1"]) == 2
    assert "a number for each of 3 stages of 3, 2, 2" in capsys.readouterr().err
    train = ["train", "--data", "digits", "--model", "resnet20", "--limit-train", "64", "--limit-test", "32"]
    train += ["--epochs", "2", "--batch-size", "16", "--image-size", "8", "--quiet", "--json"]
    assert run([*train, "--sample-modules", "2,1,1", "--out", str(tmp_path)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["sample_modules"] == "2,1,1"
    plan = Plan.from_json((tmp_path / "plan.json").read_text())
    assert sum("stage" in name for name in plan.program.names) == 2 + 2 + 2
    assert load_weights(Path(result["checkpoint"]), cifar_resnet(20, in_channels=1))["step"] == 8
