"""``edgetrain eval``: the accuracy that the run ended with, other images of the same classes, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgetrain.cli.evaluating import label_order
from edgetrain.cli.main import run
from edgetrain.errors import DataError
from edgetrain.train.run_record import RunRecord

DIGITS = ["--data", "digits", "--image-size", "16", "--limit-train", "480", "--limit-test", "60", "--seed", "3"]
STEP = ["--batch-size", "24", "--mode", "keep_all", "--quiet", "--json"]
CLASSES = {"dark": 40, "grey": 130, "white": 220}


def photographs(root: Path, count: int, *, mode: str = "RGB", side: int = 40) -> Path:
    """Classes told apart by brightness."""
    rng = np.random.default_rng(side)
    for name, value in CLASSES.items():
        (root / name).mkdir(parents=True)
        for k in range(count):
            pixels = rng.normal(value, 8, (side, side + 8, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).convert(mode).save(root / name / f"{k}.png")
    return root


def answered(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert run([str(part) for part in arguments]) == 0, capsys.readouterr().err
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def complaint(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    capsys.readouterr()
    assert run([str(part) for part in arguments]) == code
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    assert run(["train", *DIGITS, *STEP, "--model", "resnet8", "--epochs", "6", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def adapted(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fine-tuned on photographs of which a part is held out."""
    folder = tmp_path_factory.mktemp("adapted")
    data = photographs(folder / "data", 20)
    options = ["--budget", "none", "--epochs", "2", "--no-export", "--out", str(folder / "run")]
    assert run(["finetune", "--from", str(digits), "--data", str(data), *STEP, *options]) == 0
    return folder / "run"


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def test_is_the_last_test_accuracy_of_the_run(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answered(capsys, "eval", digits, "--json")
    assert found["accuracy"] == results(digits)["history"][-1]["test_accuracy"]
    assert found["accuracy"] > 0.5  # chance is 0.1
    counts = np.array(found["confusion"])
    assert counts.sum() == found["images"] == 60
    assert found["accuracy"] == counts.trace() / 60
    recalls = [row["recall"] for row in found["per_class"]]
    assert recalls == pytest.approx((counts.diagonal() / counts.sum(1)).tolist())
    assert (found["epoch"], found["split"], found["classes"]) == (6, "test", list("0123456789"))


def test_split_limit_and_batch_size(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = answered(capsys, "eval", digits, "--split", "train", "--json", "--batch-size", "7")
    assert (train["images"], train["split"]) == (480, "train")
    some = answered(capsys, "eval", digits, "--limit", "30", "--json")
    assert [row["images"] for row in some["per_class"]] == [3] * 10
    named = answered(capsys, "eval", digits, "--data", "digits", "--json")
    assert named["images"] == 60  # its own data, which it was tested on 60 of


def test_of_a_fine_tuned_run(adapted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, before = answered(capsys, "eval", adapted, "--json"), results(adapted)
    same = ("accuracy", "macro_f1", "per_class", "confusion")
    assert {name: found[name] for name in same} == {name: before[name] for name in same}
    assert found["images"] == before["images"]["test"]
    train = answered(capsys, "eval", adapted, "--split", "train", "--json")
    assert train["images"] == before["images"]["train"]


def test_of_a_run_that_embeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "resnet8", "--epochs", "3", "--objective", "triplet", "--embedding", "16"]
    trained = answered(capsys, "train", *DIGITS, *STEP, *options, "--out", tmp_path)
    found = answered(capsys, "eval", tmp_path, "--json")
    assert found["accuracy"] == trained["history"][-1]["test_accuracy"]
    assert found["accuracy"] > 0.3  # chance is 0.1
    assert len(found["confusion"]) == 10
    assert found["embedding"] == 16
    assert run(["eval", str(tmp_path)]) == 0
    assert "embeddings of 16 by nearest centroid" in capsys.readouterr().out


def test_of_sampled_modules_when_the_run_has_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "resnet20", "--epochs", "1", "--sample-modules", "1/2", "--out", tmp_path]
    trained = answered(capsys, "train", *DIGITS, *STEP, *options)
    assert answered(capsys, "eval", tmp_path, "--json")["accuracy"] == trained["history"][-1]["test_accuracy"]
    record = RunRecord.read(tmp_path)
    assert record.training is not None
    longer = record.training.model_copy(update={"epochs": 2})
    record.model_copy(update={"training": longer}).write(tmp_path)
    said = complaint(capsys, 2, "eval", tmp_path)
    assert "stands at epoch 1 of 2" in said
    assert f"edgetrain resume {tmp_path}" in said


def test_other_images_in_grey_of_another_size_and_a_broken_one(
    adapted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    data = photographs(tmp_path / "grey", 5, mode="L", side=90)
    (data / "dark" / "0.png").write_bytes(b"no image")
    with caplog.at_level(logging.ERROR):
        found = answered(capsys, "eval", adapted, "--data", data, "--json")
        assert (found["images"], found["split"]) == (14, "all")
        assert [row["images"] for row in found["per_class"]] == [4, 5, 5]
        assert [item["path"] for item in found["broken_images"]] == [str(data / "dark" / "0.png")]
        assert run(["eval", str(adapted), "--data", str(data)]) == 0
    out = capsys.readouterr().out
    assert "14 images of grey, all images" in out
    assert "left out 1 broken images" in out
    assert "-> white" in out
    assert f"accuracy {found['accuracy']:.2%}, macro-F1 {found['macro_f1']:.2%}" in out


def test_labels_follow_the_names_of_the_classes() -> None:
    assert label_order(["b", "c", "a"], ["a", "b", "c"], name="x").tolist() == [1, 2, 0]
    with pytest.raises(DataError, match="the network does not know: d; no images of: a, b"):
        label_order(["c", "d"], ["a", "b", "c"], name="x")


def test_what_is_asked_wrongly_is_refused(
    digits: Path, adapted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = complaint(capsys, 4, "eval", adapted, "--data", "digits")
    assert "classes that the network does not know: 0, 1, 2, 3" in said
    assert "no images of: dark, grey, white" in said
    assert "edgetrain finetune" in said
    assert "one of test, train" in complaint(capsys, 2, "eval", digits, "--split", "val")
    assert "does not exist" in complaint(capsys, 4, "eval", digits, "--data", tmp_path / "nowhere")
    assert "the directory of a run" in complaint(capsys, 7, "eval", tmp_path)
    photographs(tmp_path / "data" / "train", 2)
    assert "or pass --split train" in complaint(capsys, 4, "eval", adapted, "--data", tmp_path / "data")
    assert answered(capsys, "eval", adapted, "--data", tmp_path / "data", "--split", "train", "--json")["images"] == 6


def test_without_memory_a_smaller_batch_is_named(
    digits: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("edgetrain.cli.evaluating.predictions", full)
    assert "pass --batch-size 12" in complaint(capsys, 5, "eval", digits)
