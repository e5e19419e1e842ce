"""``edgetrain plan --from-scratch``, and that ``--pooling`` makes use of its answer."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

import edgetrain
from edgetrain import models
from edgetrain.cli.main import run
from edgetrain.errors import StorageError
from edgetrain.planner import Plan
from edgetrain.train.checkpoint import load_weights

PLAN = ["plan", "small", "--from-scratch", "--num-classes", "10", "--input", "1x16x16", "--batch", "16"]
PLAN += ["--device", "rpi5-4gb"]
TRAIN = ["train", "--data", "digits", "--model", "small", "--limit-train", "64", "--limit-test", "32", "--epochs", "1"]
TRAIN += ["--quiet", "--json"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name for a hybrid network with one pooling."""
    maker = functools.partial(models.hybrid, width=8, blocks=(1, 1), pooling=("channel",))
    monkeypatch.setitem(models._TABLE_MODELS, "small", maker)


def test_the_answer_is_trained_saved_and_exported(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file, out = tmp_path / "plan.json", tmp_path / "run"
    assert run([*PLAN, "--json", "--out", str(file)]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert [line.split(":")[0] for line in printed.err.splitlines()] == ["pooling c", "pooling b"]
    assert found["letters"] == "b"  # not the network's own
    assert Plan.from_json(file.read_text()) == Plan.from_json(json.dumps(found["plan"]))

    assert run([*TRAIN, "--pooling", "b", "--plan", str(file), "--out", str(out)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["pooling"] == "b"
    trained = edgetrain.create_model("small", in_channels=1, pooling=found["pooling"])
    load_weights(Path(result["checkpoint"]), trained)
    with pytest.raises(StorageError, match="--pooling"):
        load_weights(Path(result["checkpoint"]), edgetrain.create_model("small", in_channels=1))
    pytest.importorskip("onnxruntime")
    edgetrain.export_onnx(trained.eval(), tmp_path / "model.onnx", input_shape=(1, 16, 16))
    assert (tmp_path / "model.onnx").exists()

    assert run([*TRAIN, "--plan", str(file), "--out", str(out)]) == 3
    assert "pass the --model and --pooling of the plan" in capsys.readouterr().err


def test_explains_all_sequences_and_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*PLAN, "--explain"]) == 0
    out = capsys.readouterr().out
    assert "another network" in out
    assert "time against peak over all sequences: " in out
    assert "stage1.0" in out


def test_a_given_sequence_is_planned_and_estimated(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--input", "1x16x16", "--batch", "16", "--device", "rpi5-4gb", "--json"]
    step: dict[str, Any] = {"input_shape": (1, 16, 16), "batch_size": 16, "device": "rpi5-4gb"}
    peaks = set()
    for letters, pooling in (("c", ("channel",)), ("b", ("batch",))):
        model = edgetrain.create_model("small", in_channels=1, pooling=pooling)
        assert run(["plan", "small", "--pooling", letters, *shape]) == 0
        plan = Plan.from_json(capsys.readouterr().out)
        assert plan.peak_bytes == edgetrain.plan(model, **step).peak_bytes
        assert run(["estimate", "small", "--pooling", letters, *shape]) == 0
        estimated = json.loads(capsys.readouterr().out)["peak_bytes"]
        assert estimated == edgetrain.estimate(model, **step).peak_bytes
        peaks |= {("plan", plan.peak_bytes), ("estimate", estimated)}
    assert len(peaks) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "resnet18", "--from-scratch"], "resnet18, which downsamples in one way alone"),
        (["plan", "my_models:make_net", "--from-scratch"], "my_models:make_net, which is no network of the zoo"),
        (["plan", "small", "--from-scratch", "--pooling", "c"], "--from-scratch chooses the pooling sequence"),
        (["plan", "hybrid18", "--pooling", "cmb"], "one of ccc, ccb, cbc, cbb, bcc, bcb, bbc, bbb"),
        (["estimate", "resnet20", "--pooling", "cc"], "resnet20, which downsamples in one way alone"),
        ([*TRAIN, "--pooling", "cb"], "--pooling cb for small"),
    ],
)
def test_refusals(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    assert message in capsys.readouterr().err
