"""Training of an exported step where PyTorch is never imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits
from typer.testing import CliRunner

import edgetrain
import edgetrain.lite
from edgetrain.cli.main import app
from edgetrain.errors import BudgetError, DataError, ExportError, StorageError
from edgetrain.export import export_onnx
from edgetrain.export.describe import About
from edgetrain.export.images import Normalisation
from edgetrain.export.train_step.write import export_train_step
from edgetrain.export.verify import open_session, run_session
from edgetrain.lite.__main__ import main
from edgetrain.train import Recipe, load_weights
from edgetrain.train.data.arrays import ArraySource, open_archive
from edgetrain.units import MIB

sys.path.insert(0, str(Path(__file__).parents[1] / "export"))
from train_steps import DATA, exported, small

SHADES = 96
"""Images, of two classes that differ in brightness; enough for a few batches."""


def shades() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    random = np.random.default_rng(0)
    labels = np.arange(SHADES) % 10
    return (random.integers(0, 40, (SHADES, 8, 8, 3)) + 20 * labels[:, None, None, None]).astype(np.uint8), labels


@pytest.fixture
def step(tmp_path: Path) -> Path:
    exported(
        small("irevnet"), "invert", tmp_path / "step", n=16, recipe=Recipe(epochs=2, batch_size=16, peak_rate=0.05)
    )
    return tmp_path / "step"


def test_nothing_imports_pytorch(step: Path, tmp_path: Path) -> None:
    """Not even where a package of the runtime would, which this environment's does."""
    images, labels = shades()
    np.savez(tmp_path / "shades.npz", images=images, labels=labels)
    code = (
        "import sys, edgetrain, edgetrain.lite\n"
        f"run = edgetrain.lite.load({str(step)!r})\n"
        f"print([r.loss for r in run.fit({str(tmp_path / 'shades.npz')!r}, epochs=1)])\n"
        "print(sorted({'torch', 'onnx', 'pydantic', 'sklearn', 'pyarrow', 'safetensors'} & set(sys.modules)))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    losses, modules = out.stdout.splitlines()
    assert len(json.loads(losses)) == 1
    assert "torch" not in modules
    assert json.loads(modules.replace("'", '"')) in ([], ["onnx"])  # the training wheel of the runtime imports onnx


def test_a_record_per_epoch_and_the_loss_falls(step: Path) -> None:
    run = edgetrain.lite.load(step)
    history = run.fit(shades(), shades(), epochs=6)
    assert [record.epoch for record in history] == [1, 2, 3, 4, 5, 6]
    assert history[-1].loss < history[0].loss
    assert history[-1].test_accuracy == pytest.approx(run.evaluate(shades()))


def test_a_run_that_goes_on_ends_as_one_that_never_stopped(step: Path, tmp_path: Path) -> None:
    whole, first, second = (edgetrain.lite.load(step) for _ in range(3))
    straight = whole.fit(shades(), epochs=3, run_dir=tmp_path / "whole")

    class StoppedError(Exception):
        pass

    def stop(number: int, *_: object) -> None:
        if number == 2 and len(first.history) == 1:
            raise StoppedError

    with pytest.raises(StoppedError):
        first.fit(shades(), epochs=3, run_dir=tmp_path / "run", on_step=stop)
    resumed = second.fit(shades(), epochs=3, run_dir=tmp_path / "run", resume=True)
    assert [record.loss for record in resumed] == [record.loss for record in straight]
    assert all(np.array_equal(second.state[name], value) for name, value in whole.state.items())


def test_pytorch_reads_the_checkpoint(step: Path, tmp_path: Path) -> None:
    run = edgetrain.lite.load(step)
    run.fit(shades(), epochs=1, run_dir=tmp_path / "run")
    model = small("irevnet")
    load_weights(tmp_path / "run" / "checkpoints" / "last.safetensors", model)
    for name, value in model.state_dict().items():
        assert np.array_equal(value.numpy(), run.state[f"model.{name}"])


def test_the_inference_model_is_the_one_that_pytorch_would_export(step: Path, tmp_path: Path) -> None:
    """Of the same weights, after training; nothing of the file but its weights has changed."""
    import onnx

    run, path = edgetrain.lite.load(step), tmp_path / "inference.onnx"
    run.fit(shades(), epochs=2, run_dir=tmp_path / "run")
    assert run.export(path) < 1e-5
    model = small("irevnet")
    load_weights(tmp_path / "run" / "checkpoints" / "last.safetensors", model)
    about = About(normalisation=Normalisation((0.5,) * 3, (0.25,) * 3))
    export_onnx(model, tmp_path / "torch.onnx", input_shape=(3, 8, 8), about=about)
    pixels = np.random.default_rng(3).random((5, 3, 8, 8), dtype=np.float32)
    found, expected, before = (
        run_session(open_session(file), pixels) for file in (path, tmp_path / "torch.onnx", step / "inference.onnx")
    )
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.abs(before - expected).max() > 0.1 * np.abs(expected).max(), "the weights have not moved"
    assert path.stat().st_size == (step / "inference.onnx").stat().st_size
    onnx.checker.check_model(onnx.load(path), full_check=True)


def test_a_state_that_is_no_number_gives_no_inference_model(step: Path, tmp_path: Path) -> None:
    run = edgetrain.lite.load(step)
    run.state["model.stem.weight"][0] = np.nan
    with pytest.raises(ExportError, match="away from the state"):
        run.export(tmp_path / "inference.onnx")
    assert not (tmp_path / "inference.onnx").exists()


def test_the_command_line_writes_the_inference_model_of_a_run(
    step: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = edgetrain.lite.load(step)
    run.fit(shades(), epochs=1, run_dir=tmp_path / "run")
    run.export(tmp_path / "expected.onnx")
    words = [str(step), "--out", str(tmp_path / "run"), "--inference", str(tmp_path / "found.onnx"), "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["difference"] < 1e-5
    assert (tmp_path / "found.onnx").read_bytes() == (tmp_path / "expected.onnx").read_bytes()


def test_a_budget_that_is_too_small_is_said_with_what_to_do(step: Path, tmp_path: Path) -> None:
    """It holds for the whole process, so even the libraries do not fit."""
    np.savez(tmp_path / "shades.npz", images=shades()[0], labels=shades()[1])
    words = [sys.executable, "-m", "edgetrain.lite", str(step), "--data", str(tmp_path / "shades.npz")]
    done = subprocess.run([*words, "--budget", "60MiB"], capture_output=True, text=True, timeout=60)
    assert done.returncode == BudgetError.exit_code, done.stderr
    assert "more than 60.0 MiB" in done.stderr
    assert "raise --budget" in done.stderr


@pytest.mark.slow
def test_digits_train_inside_200_mib_for_everything(tmp_path: Path) -> None:
    """hybrid18 at batch 32; not one step of PyTorch's runs there."""
    digits = load_digits()
    images, labels = (digits.images * 15.9).astype(np.uint8), digits.target.astype(np.int64)
    parts = {"images": images[300:], "labels": labels[300:], "test_images": images[:300], "test_labels": labels[:300]}
    np.savez(tmp_path / "digits.npz", **parts)
    model = edgetrain.create_model("hybrid18", num_classes=10)
    plan = edgetrain.uniform_plan(model, "invert", input_shape=(3, 16, 16), batch_size=32, update_in_backward=True)
    export_train_step(model, plan, tmp_path / "step", data=DATA, recipe=Recipe(epochs=4, batch_size=32))
    words = [sys.executable, "-m", "edgetrain.lite", tmp_path / "step", "--data", tmp_path / "digits.npz"]
    words += ["--budget", "200MiB", "--threads", "1", "--plain", "--json"]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["history"][-1]["test_accuracy"] > 0.9
    assert result["peak_bytes"] < 200 * MIB  # with the pages of libraries, which the limit does not count

    train = ["train", "--data", "digits", "--model", "hybrid18", "--mode", "invert", "--epochs", "1", "--quiet"]
    train += ["--image-size", "16", "--batch-size", "32", "--limit-train", "64", "--out", str(tmp_path / "torch")]
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_DATA, ({200 * MIB},) * 2)"
    code = f"{limit}; from edgetrain.cli.main import run; raise SystemExit(run({train}))"
    torch = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert torch.returncode != 0
    assert not (tmp_path / "torch" / "checkpoints").exists() or not list((tmp_path / "torch/checkpoints").iterdir())


def test_a_checkpoint_of_another_export_is_refused(step: Path, tmp_path: Path) -> None:
    edgetrain.lite.load(step).fit(shades(), epochs=1, run_dir=tmp_path / "run")
    exported(small("residual"), "keep_all", tmp_path / "other", n=16)
    with pytest.raises(StorageError, match="missing or of another shape"):
        edgetrain.lite.load(tmp_path / "other").fit(shades(), run_dir=tmp_path / "run", resume=True)


def test_data_of_other_classes_are_refused(step: Path) -> None:
    images, labels = shades()
    with pytest.raises(DataError, match="has 2 classes"):
        edgetrain.lite.load(step).fit(ArraySource(images, labels % 2))


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (np.zeros((4, 8, 8, 3)), np.zeros(4, int)),
        (np.zeros((4, 8, 8, 5), np.uint8), np.zeros(4, int)),
        (np.zeros((4, 8, 8, 3), np.uint8), np.zeros(3, int)),
        (np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4)),
    ],
)
def test_arrays_that_are_no_images_are_refused(images: Any, labels: Any) -> None:
    with pytest.raises(DataError):
        ArraySource(images, labels, classes=("a", "b"))


def test_an_archive_is_never_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", images=np.array([object()], dtype=object), labels=np.zeros(1, int))
    with pytest.raises(DataError, match="cannot be read"):
        open_archive(tmp_path / "bad.npz", "train")


def test_from_a_run_to_a_trained_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """edgetrain train, edgetrain export --format train-step, python -m edgetrain.lite."""
    run, invoke = tmp_path / "run", CliRunner().invoke
    made = invoke(
        app,
        "train --data digits --model hybrid18 --image-size 16 --epochs 1 --batch-size 32 --limit-train 64 "
        f"--limit-test 32 --mode invert --quiet --out {run}".split(),
    )
    assert made.exit_code == 0, made.output
    written = invoke(app, ["export", str(run), "--format", "train-step"])
    assert written.exit_code == 0, written.output
    assert "python -m edgetrain.lite" in written.output
    step = run / "export" / "train-step"
    arguments = [str(step), "--data", "digits", "--limit-train", "64", "--quiet", "--json"]
    assert main([*arguments, "--out", str(tmp_path / "lite")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["history"][0]["epoch"] == 1
    assert main(["--data", "digits", str(tmp_path / "nothing")]) == 7
    assert "edgetrain export --format train-step" in capsys.readouterr().err
