"""``edgetrain export --format train-step`` and ``ort-training``: the run's own step, or a refusal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from edgetrain.cli.main import run
from edgetrain.cli.plain_step import plain_step
from edgetrain.cli.trained import load_run
from edgetrain.errors import MissingExtraError
from edgetrain.ort_steps import training_api
from edgetrain.planner import Plan
from edgetrain.runtime import wrap
from edgetrain.train import Recipe
from edgetrain.train.run_record import ObjectiveRecord, RunRecord

DATA = ["--data", "digits", "--image-size", "8", "--mode", "recompute", "--epochs", "1", "--quiet"]
FINETUNED = {
    "last": ["--train", "last:3", "--balance", "none"],
    "bias-norm": ["--train", "bias-norm", "--batch-norm", "fixed"],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    options = ["--model", "resnet8", "--limit-train", "80", "--limit-test", "20", "--batch-size", "16"]
    assert run(["train", *DATA, *options, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module", params=FINETUNED)
def finetuned(request: pytest.FixtureRequest, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetuned") / "run"
    options = ["--from", str(trained), "--budget", "none", "--batch-size", "120", "--no-export"]
    assert run(["finetune", *DATA, *options, *FINETUNED[request.param], "--out", str(folder)]) == 0
    return folder


def exported(folder: Path, format: str, out: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert run(["export", str(folder), "--format", format, "--out", str(out), "--json"]) == 0, capsys.readouterr().err
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_the_step_of_a_fine_tuned_run_moves_what_the_run_trains(
    finetuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against one step of torch's optimiser under the same plan."""
    document = exported(finetuned, "train-step", tmp_path / "step", capsys)
    found = load_run(finetuned)
    assert found.record.finetuning is not None
    assert (document["note"] is not None) == (found.record.finetuning.balance in ("root", "sampling"))
    model = plain_step(finetuned, found.record, found.model, "train-step")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = Plan.read(finetuned / "plan.json")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(plan.input_shape, generator=generator)
    labels = torch.arange(len(images)) % 10
    optimizer = Recipe().optimizer_for(model)(model.parameters())
    for group in optimizer.param_groups:
        group["lr"] = 0.05
    loss = F.cross_entropy(wrap(model.train(), plan)(images), labels)
    loss.backward()
    optimizer.step()

    files = document["manifest"]["graphs"]
    assert list(files) == ["train_step.onnx", "eval.onnx", "fold.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "step" / "train_step.onnx", providers=["CPUExecutionProvider"])
    feeds = {name: value.numpy() for name, value in load_file(tmp_path / "step" / "state.safetensors").items()}
    feeds |= {name: np.zeros(shape, np.float32) for name, shape in document["manifest"]["zeros"].items()}
    feeds |= {"images": images.numpy(), "labels": labels.numpy(), "learning_rate": np.array(0.05, np.float32)}
    wanted = {value.name for value in session.get_inputs()}
    outputs = [value.name for value in session.get_outputs()]
    given = dict(zip(outputs, session.run(outputs, {k: v for k, v in feeds.items() if k in wanted}), strict=True))
    assert float(given["loss"]) == pytest.approx(loss.item(), rel=1e-5)
    moved = set()
    for name, after in model.state_dict().items():
        new = given.get(f"new.model.{name}")
        if new is None:
            assert torch.equal(after, before[name]), f"{name} moves, and not in the graph"
            continue
        torch.testing.assert_close(torch.from_numpy(np.asarray(new)), after, rtol=1e-4, atol=1e-6)
        moved.add(name)
    assert {name for name, p in model.named_parameters() if p.requires_grad} <= moved
    assert not {name for name, p in model.named_parameters() if not p.requires_grad} & moved


def test_onnx_runtime_trains_what_the_run_trains(
    finetuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        training_api()
    except MissingExtraError as error:
        pytest.skip(error.found)
    found = load_run(finetuned)
    assert found.record.finetuning is not None
    if found.record.finetuning.batch_norm == "fixed":  # whose scales are trained
        assert run(["export", str(finetuned), "--format", "ort-training", "--out", str(tmp_path / "artifacts")]) == 8
        assert "of a batch norm by running statistics" in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "artifacts").exists()
        return
    model = plain_step(finetuned, found.record, found.model, "ort-training")
    document = exported(finetuned, "ort-training", tmp_path / "artifacts", capsys)
    assert document["parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert document["parameters"] < sum(p.numel() for p in model.parameters())


def _objective(record: RunRecord, **fields: Any) -> RunRecord:
    assert record.training is not None
    return record.model_copy(
        update={"training": record.training.model_copy(update={"objective": ObjectiveRecord(**fields)})}
    )


@pytest.mark.parametrize("format", ["train-step", "ort-training"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "distillation", "teacher": "t"}, "learns from distillation"),
        ({"name": "attention-transfer", "teacher": "t"}, "learns from attention-transfer"),
        ({"label_smoothing": 0.1}, "whose labels are smoothed by 0.1"),
    ],
)
def test_another_loss_is_refused(
    change: dict[str, Any],
    words: str,
    format: str,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(trained, tmp_path / "run")
    _objective(RunRecord.read(folder), **change).write(folder)
    assert_refused(folder, format, words, capsys)


@pytest.mark.parametrize("format", ["train-step", "ort-training"])
def test_weights_sampled_modules_and_taps_are_refused(
    format: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, own = shutil.copytree(trained, tmp_path / "run"), RunRecord.read(trained)
    assert own.training is not None
    own.model_copy(update={"training": own.training.model_copy(update={"sample_modules": "1/2"})}).write(folder)
    assert_refused(folder, format, "trains other modules in every step", capsys)
    own.model_copy(update={"training": None}).write(folder)
    plan = (folder / "plan.json").read_text()
    name = Plan.read(folder / "plan.json").program.names[1]
    (folder / "plan.json").write_text(plan.replace(f'"{name}"', f'"{name}+attention"'))
    assert_refused(folder, format, "whose plan has attention taps", capsys)


def test_weighted_classes_are_refused(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--from", str(trained), "--budget", "none", "--batch-size", "360", "--balance", "loss", "--no-export"]
    assert run(["finetune", *DATA, *options, "--train", "head", "--out", str(tmp_path / "run")]) == 0
    for format in ("train-step", "ort-training"):
        assert_refused(tmp_path / "run", format, "--balance loss", capsys)


def test_an_embedding_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "resnet8", "--limit-train", "60", "--batch-size", "30", "--objective", "triplet"]
    assert run(["train", *DATA, *options, "--embedding", "8", "--out", str(tmp_path / "run")]) == 0
    for format in ("train-step", "ort-training"):
        assert_refused(tmp_path / "run", format, "learns from triplet", capsys)


def assert_refused(folder: Path, format: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(["export", str(folder), "--format", format]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert words in said
    assert "edgetrain resume" in said
    assert not (folder / "export").exists()
