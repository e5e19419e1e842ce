"""``edgetrain finetune --objective``: from a teacher, with smoothed and weighted labels, resumed bit for bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from edgetrain.cli import finetuning
from edgetrain.cli.main import run
from edgetrain.cli.trained import load_run
from edgetrain.train import CrossEntropy, TeacherObjective, Trainer
from edgetrain.train.data.balance import balancing_weights
from edgetrain.train.run_record import RunRecord
from edgetrain.train.tensor_file import TensorFile

DIGITS = ["--data", "digits", "--image-size", "8", "--mode", "recompute", "--quiet", "--json"]
TRAIN = ["train", *DIGITS, "--limit-train", "200", "--limit-test", "40", "--batch-size", "40", "--epochs", "1"]
OBJECTIVES = {
    "distillation": ["--label-smoothing", "0.1", "--temperature", "3", "--balance", "loss", "--train", "last:3"],
    "attention-transfer": [
        "--beta",
        "500",
        "--alpha",
        "0.5",
        "--teacher-outputs",
        "ANSWERS",
        "--learning-rate",
        "0.02",
    ],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A teacher, a student, and a network that embeds."""
    folder = tmp_path_factory.mktemp("runs")
    options = {"wrn-10-1": [], "resnet8": [], "embeds": ["--objective", "triplet", "--embedding", "12"]}
    for name, given in options.items():
        model = "resnet8" if name == "embeds" else name
        assert run([*TRAIN, "--model", model, *given, "--out", str(folder / name)]) == 0
    return {"teacher": folder / "wrn-10-1", "student": folder / "resnet8", "embeds": folder / "embeds"}


def arguments(runs: dict[str, Path], *options: object) -> list[str]:
    given = ["finetune", *DIGITS, "--from", runs["student"], "--budget", "none", "--batch-size", "240", "--no-export"]
    return [str(part) for part in (*given, *options)]


def taught(name: str, runs: dict[str, Path], tmp_path: Path) -> list[str]:
    options = [str(tmp_path / "answers") if part == "ANSWERS" else part for part in OBJECTIVES[name]]
    return arguments(runs, "--epochs", 2, "--objective", name, "--teacher", runs["teacher"], *options)


def weights(folder: Path) -> dict[str, bytes]:
    file = TensorFile(folder / "checkpoints" / "last.safetensors")
    return {name: file.tensor(name).numpy().tobytes() for name in file.names("")}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_goes_on_bit_for_bit(
    name: str,
    runs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = taught(name, runs, tmp_path)
    assert run([*given, "--out", str(tmp_path / "whole")]) == 0
    whole = json.loads(capsys.readouterr().out)
    between, steps = Trainer._between_steps, iter(range(100))

    def stopping(self: Trainer, stop: Any) -> None:
        if next(steps) == 8:  # of 6 in an epoch
            signal.raise_signal(signal.SIGTERM)
        between(self, stop)

    with monkeypatch.context() as local:
        local.setattr(Trainer, "_between_steps", stopping)
        assert run([*given, "--out", str(tmp_path / "cut")]) == 143
    capsys.readouterr()
    assert run(["resume", str(tmp_path / "cut"), "--json", "--quiet"]) == 0
    resumed = json.loads(capsys.readouterr().out)
    assert [epoch["loss"] for epoch in resumed["history"]] == [epoch["loss"] for epoch in whole["history"]]
    assert (resumed["confusion"], resumed["objective"]) == (whole["confusion"], name)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert whole["history"][-1]["loss"] < whole["history"][0]["loss"]
    assert run(["eval", str(tmp_path / "cut"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["confusion"] == whole["confusion"]


def test_smoothed_and_weighted_labels_go_together(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[finetuning.Finetune] = []
    monkeypatch.setattr(finetuning, "run_finetuning", lambda job, **_: prepared.append(job))
    options = ["--balance", "loss", "--label-smoothing", "0.1", "--out", tmp_path]
    assert run(arguments(runs, *options)) == 0
    assert run(arguments(runs, *options, "--objective", "distillation", "--teacher", runs["teacher"])) == 0
    plain, taught = (one.job.setup for one in prepared)
    expected = CrossEntropy(0.1, balancing_weights(prepared[0].divided.train.labels, 10))
    assert expected.class_weights is not None
    assert plain is not None
    assert plain.objective == expected
    assert taught is not None
    assert isinstance(taught.objective, TeacherObjective)
    assert taught.objective.hard == expected
    assert plain.guest.standing_bytes == 0 < taught.guest.standing_bytes


def test_a_network_that_embeds_gets_a_head(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--from", runs["embeds"], "--train", "head", "--epochs", 1, "--out", tmp_path]
    assert run(arguments(runs, *options)) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["finetuning"]["new_head"], result["finetuning"]["made_for"]) == (True, 12)
    record = RunRecord.read(tmp_path)
    assert record.embedding is None
    assert load_run(tmp_path).model(torch.zeros(2, *record.input_shape)).shape == (2, 10)


def test_says_who_teaches(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = arguments(runs, "--epochs", 1, "--objective", "distillation", "--teacher", runs["teacher"])
    given.remove("--quiet")
    assert run([*given, "--out", str(tmp_path)]) == 0
    assert f"distillation from {runs['teacher']}, which takes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--objective", "triplet"], "edgetrain train --objective triplet"),
        (["--objective", "attention-transfer", "--teacher", "TEACHER", "--train", "head"], "pass --train last:K"),
        (["--objective", "distillation", "--teacher", "TEACHER", "--out", "TEACHER"], "the run of the teacher"),
        (["--objective", "distillation", "--teacher", "EMBEDS"], "a teacher of images 1x8x8 and embeddings of 12"),
        (["--objective", "distillation"], "pass --teacher DIR"),
        (["--temperature", "2"], "--temperature with --objective cross-entropy"),
    ],
)
def test_what_makes_no_sense_is_refused(
    options: list[str], words: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = {"TEACHER": str(runs["teacher"]), "EMBEDS": str(runs["embeds"])}
    assert run(arguments(runs, "--out", tmp_path / "out", *(folders.get(part, part) for part in options))) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
