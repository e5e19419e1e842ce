"""``edgetrain train --objective``: every objective trains and goes on bit for bit; what is asked wrongly is refused."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from edgetrain.cli.main import run
from edgetrain.cli.trained import load_run
from edgetrain.train.run_record import RunRecord
from edgetrain.train.tensor_file import TensorFile
from edgetrain.train.trainer import Trainer

DATA = ["--data", "digits", "--image-size", "8", "--limit-train", "60", "--limit-test", "40", "--quiet", "--json"]
STUDENT = ["--model", "resnet8", "--epochs", "2", "--batch-size", "20", "--mode", "recompute"]
OBJECTIVES = {
    "distillation": ["--label-smoothing", "0.1", "--temperature", "3"],
    "attention-transfer": ["--beta", "500", "--attention-map", "sum1"],
    "attention and stored outputs": ["--alpha", "0.5"],
    "triplet": ["--margin", "0.3", "--embedding", "8"],
    "contrastive": [],
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "run"
    teaching = ["--model", "wrn-10-1", "--epochs", "1", "--batch-size", "20", "--mode", "keep_all"]
    assert run(["train", *DATA, *teaching, "--out", str(folder)]) == 0
    return folder


def arguments(name: str, teacher: Path, tmp_path: Path) -> list[str]:
    objective = "attention-transfer" if name.startswith("attention") else name
    given = ["train", *DATA, *STUDENT, "--objective", objective, *OBJECTIVES[name]]
    if objective in ("distillation", "attention-transfer"):
        given += ["--teacher", str(teacher)]
    if "stored" in name:
        given += ["--teacher-outputs", str(tmp_path / "answers")]
    return given


def weights(folder: Path) -> dict[str, bytes]:
    file = TensorFile(folder / "checkpoints" / "last.safetensors")
    return {name: file.tensor(name).numpy().tobytes() for name in file.names("")}


def losses(result: dict[str, Any]) -> list[tuple[float, float, float]]:
    return [(record["loss"], record["accuracy"], record["test_accuracy"]) for record in result["history"]]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_run_that_is_cut_goes_on_bit_for_bit(
    name: str, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(name, teacher, tmp_path)
    assert run([*given, "--out", str(tmp_path / "whole")]) == 0
    whole = json.loads(capsys.readouterr().out)
    between, steps = Trainer._between_steps, iter(range(100))

    def stopping(self: Trainer, stop: Any) -> None:
        if next(steps) == 3:
            signal.raise_signal(signal.SIGTERM)
        between(self, stop)

    with monkeypatch.context() as local:
        local.setattr(Trainer, "_between_steps", stopping)
        assert run([*given, "--out", str(tmp_path / "cut")]) == 143
    assert run(["resume", str(tmp_path / "cut"), "--json", "--quiet"]) == 0
    resumed = json.loads(capsys.readouterr().out)
    assert losses(resumed) == losses(whole)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    record = RunRecord.read(tmp_path / "cut")
    assert record.training is not None
    assert record.training.objective.name == whole["objective"]
    assert load_run(tmp_path / "cut").about.classes == (record.classes if record.embedding is None else ())


def test_stored_outputs_are_those_of_the_teacher_that_runs(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments("attention and stored outputs", teacher, tmp_path)
    assert run([*given, "--out", str(tmp_path / "first")]) == 0
    (answers,) = (tmp_path / "answers").iterdir()
    written = answers.stat().st_mtime_ns
    assert run([*given, "--out", str(tmp_path / "second")]) == 0
    assert answers.stat().st_mtime_ns == written, "the teacher was asked again"
    assert weights(tmp_path / "first") == weights(tmp_path / "second")
    assert run([*given, "--attention-map", "max1", "--out", str(tmp_path / "third")]) == 0
    assert len(list((tmp_path / "answers").iterdir())) == 2, "another question has another file"
    answers.write_bytes(answers.read_bytes()[:-8])
    assert run([*given, "--out", str(tmp_path / "fourth")]) == 0, "a damaged file is made again"
    assert weights(tmp_path / "first") == weights(tmp_path / "fourth")


@pytest.mark.slow
def test_a_budget_counts_the_teacher(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [*arguments("distillation", teacher, tmp_path), "--budget", "1MiB", "--out", str(tmp_path / "run")]
    assert run(given) == 5
    assert "of the teacher" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--objective", "distilation"], "distillation"),
        (["--objective", "distillation"], "pass --teacher DIR"),
        (["--teacher", "x"], "pass --objective distillation or attention-transfer"),
        (["--objective", "triplet", "--label-smoothing", "0.1"], "leave it out"),
        (["--objective", "triplet", "--margin", "-1"], "correct --margin"),
        (["--objective", "distillation", "--teacher", "nowhere"], "directory of a run"),
        (
            ["--objective", "attention-transfer", "--teacher", "x", "--attention-map", "mean2"],
            "correct --attention-map",
        ),
        (["--objective", "attention-transfer", "--teacher", "x", "--sample-modules", "1/2"], "leave --sample-modules"),
    ],
)
def test_what_is_asked_wrongly_is_refused(
    wrong: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", *DATA, *STUDENT, *wrong, "--out", str(tmp_path / "run")]) in (2, 7)
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_other_images_is_refused(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*arguments("distillation", teacher, tmp_path), "--image-size", "16", "--out", str(tmp_path / "run")]
    assert run(given) == 2
    assert "a teacher of images 1x8x8" in " ".join(capsys.readouterr().err.split())
