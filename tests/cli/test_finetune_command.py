"""``edgetrain finetune``: from a run, a checkpoint or a function, with another head, resumed bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from edgetrain.cli.main import run
from edgetrain.cli.trained import load_run
from edgetrain.models import create_model
from edgetrain.train import InterruptedRunError, Trainer
from edgetrain.train.data.augment import Choice, choose
from edgetrain.train.run_record import RunRecord

SIDE = 16


def photographs(root: Path) -> Path:
    """48 x 40 in colour: two common classes and a rare one, told apart by brightness."""
    rng = np.random.default_rng(0)
    for value, (name, count) in enumerate({"dark": 30, "grey": 30, "white": 6}.items()):
        (root / name).mkdir(parents=True)
        for k in range(count):
            pixels = rng.normal(60 + 70 * value, 8, (40, 48, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{k}.jpg")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photographs(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on grey digits."""
    folder = tmp_path_factory.mktemp("digits")
    options = ["--image-size", str(SIDE), "--limit-train", "64", "--limit-test", "20", "--epochs", "1"]
    network = ["--model", "resnet20", "--batch-size", "16", "--mode", "keep_all"]
    assert run(["train", "--data", "digits", *network, *options, "--quiet", "--out", str(folder)]) == 0
    return folder


def finetuned(capsys: pytest.CaptureFixture[str], *options: str | Path) -> dict[str, Any]:
    arguments = ["finetune", "--budget", "none", "--mode", "keep_all", "--json", "--quiet", *map(str, options)]
    assert run(arguments) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "last.safetensors")


def test_a_run_with_another_head(data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = finetuned(capsys, "--from", trained, "--data", data, "--epochs", "3", "--out", tmp_path)
    assert result["images"] == {"train": 53, "test": 13, "held_out": True}
    assert result["finetuning"]["balance"] == "root"
    assert result["input_shape"] == [1, SIDE, SIDE]  # of the run: colour becomes grey
    assert result["classes"] == ["dark", "grey", "white"]
    assert result["finetuning"]["head"] == "head.linear"
    assert result["finetuning"]["new_head"]
    confusion = np.array(result["confusion"])
    assert confusion.sum(1).tolist() == [row["images"] for row in result["per_class"]] == [6, 6, 1]
    assert result["accuracy"] == confusion.trace() / 13 == result["history"][-1]["test_accuracy"]
    assert result["macro_f1"] == pytest.approx(np.mean([row["f1"] for row in result["per_class"]]))
    assert result["choices"][0]["trained"] == "all"
    assert {choice["trained"] for choice in result["choices"]} >= {"all", "head", "bias-norm"}
    for choice in result["choices"]:
        assert choice["least_bytes"] <= choice["keep_all_bytes"] <= result["choices"][0]["keep_all_bytes"]
    graph = onnx.load(result["export"]).graph
    assert graph.output[0].type.tensor_type.shape.dim[1].dim_value == 3
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert load_run(tmp_path).model(torch.zeros(2, 1, SIDE, SIDE)).shape == (2, 3)


def test_nothing_is_cut_out_unless_asked_for(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut: list[bool] = []

    def noted(indices: Any, *, cutout: bool, **options: Any) -> Choice:
        cut.append(cutout)
        return choose(indices, cutout=cutout, **options)

    monkeypatch.setattr("edgetrain.train.data.loader.choose", noted)
    given = ["--from", trained, "--data", data, "--train", "head", "--epochs", "1", "--no-export"]
    for options, expected in (([], False), (["--cutout"], True)):
        result = finetuned(capsys, *given, *options, "--out", tmp_path / str(expected))
        assert result["finetuning"]["cutout"] is expected
        assert cut
        assert set(cut) == {expected}
        cut.clear()
    told = json.loads((tmp_path / "False" / "run.json").read_text())
    del told["finetuning"]["cutout"]  # as a version that always had it
    record = RunRecord.model_validate(told)
    assert record.finetuning is not None
    assert record.finetuning.cutout


def test_only_the_head_is_trained(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--train", "head", "--epochs", "1", "--no-export", "--out", tmp_path]
    result = finetuned(capsys, "--from", trained / "checkpoints" / "last.safetensors", "--data", data, *options)
    before, after = weights(trained), weights(tmp_path)
    changed = {name for name, value in before.items() if name.startswith("model.") and not value.equal(after[name])}
    assert changed == {"model.head.linear.weight", "model.head.linear.bias"}
    assert result["export"] is None
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--train", "last:3", "--balance", "root", "--cutout"],
        pytest.param(["--train", "bias-norm", "--batch-norm", "fixed", "--balance", "loss"], marks=pytest.mark.slow),
    ],
)
def test_goes_on_bit_for_bit(
    options: list[str],
    data: Path,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = ["--from", trained, "--data", data, "--epochs", "2", "--batch-size", "12", "--no-export", *options]
    whole = finetuned(capsys, *given, "--out", tmp_path / "whole")

    def stops(self: Trainer, stop: Any) -> None:
        if self._position.step == 6:  # in the second epoch
            raise InterruptedRunError(self.checkpoint, 15)
        between_steps(self, stop)

    between_steps = Trainer._between_steps
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_between_steps", stops)
        cut = ["finetune", "--budget", "none", "--mode", "keep_all", "--quiet", "--checkpoint-every", "1"]
        assert run([*cut, *map(str, given), "--out", str(tmp_path / "cut")]) == 143
    capsys.readouterr()
    assert run(["resume", str(tmp_path / "cut"), "--json", "--quiet"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert [epoch["loss"] for epoch in again["history"]] == [epoch["loss"] for epoch in whole["history"]]
    for key in ("confusion", "finetuning", "choices"):
        assert again[key] == whole[key]
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def colour_network() -> nn.Module:
    """For ten classes and three channels, whatever is asked for."""
    torch.manual_seed(5)
    return create_model("resnet20", 10, width=4)


@pytest.mark.slow
def test_a_function_of_ones_own_and_its_run_again(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    spec = f"{Path(__file__).stem}:colour_network"
    options = ["--image-size", str(SIDE), "--epochs", "1", "--train", "head", "--no-export"]
    first = finetuned(capsys, "--from", spec, "--data", "digits", *options, "--out", tmp_path / "first")
    assert first["input_shape"] == [3, SIDE, SIDE]
    assert not first["finetuning"]["new_head"]  # ten digits
    own = colour_network().state_dict()
    stem = "stem.0.weight" if "stem.0.weight" in own else next(iter(own))
    assert weights(tmp_path / "first")[f"model.{stem}"].equal(own[stem])
    options = ["--from", tmp_path / "first", "--epochs", "1", "--train", "head", "--no-export"]
    second = finetuned(capsys, *options, "--data", data, "--out", tmp_path / "second")
    assert (second["finetuning"]["made_for"], second["finetuning"]["new_head"]) == (10, True)
    assert load_run(tmp_path / "second").model(torch.zeros(2, 3, SIDE, SIDE)).shape == (2, 3)


def test_says_what_it_is_going_to_do(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--budget", "none", "--mode", "keep_all", "--epochs", "1", "--train", "last:2", "--no-export"]
    assert run(["finetune", "--from", str(trained), "--data", str(data), *options, "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "new head head.linear for 3 classes" in err
    assert "53 images to train on, 13 to test on, 20% of each class held out" in err
    assert "a photograph of 48x40 pixels becomes 16x16: details of less than 3 pixels are lost, --image-size" in err
    assert "> last:2" in err
    assert "macro-F1" in out
    assert "-> white" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--from", "nowhere"], "which does not exist"),
        (["--from", "resnet20"], "edgetrain train --model NAME"),
        (["--train", "last:99"], "a network with"),
        (["--train", "heads"], "all, last:K, head or bias-norm"),
        (["--batch-norm", "frozen"], "one of live, fixed"),
        (["--balance", "weights"], "one of sampling, root, loss, none"),
        (["--holdout", "2"], "between 0 and 1"),
        (["--out", "SOURCE"], "another directory"),
    ],
)
def test_wrong_usage(
    options: list[str],
    words: str,
    data: Path,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = {"--from": str(trained), "--data": str(data), "--out": str(tmp_path), "--budget": "none"}
    given |= {options[0]: options[1].replace("SOURCE", str(trained))}
    assert run(["finetune", "--quiet", *(part for pair in given.items() for part in pair)]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
