"""What a person may get wrong at the command line: the exit code, and one paragraph that says what to do."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgetrain.cli.main import run
from edgetrain.models import hybrid
from edgetrain.train.checkpoint import load_weights

MODELS = """
import torch
from edgetrain.models import hybrid
def net(num_classes, in_channels): return hybrid(num_classes, in_channels=in_channels, width=8)
def odd(num_classes, in_channels): return hybrid(num_classes, in_channels=in_channels, width=7)
def misfit(num_classes):
    return torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(7, num_classes))
def raises(): raise ValueError("of its own")
"""
TINY = ["--limit-train", "64", "--limit-test", "32", "--image-size", "16", "--batch-size", "16", "--epochs", "1"]
NET = ["--quiet", "--out", "run", "--model", "bad_input_models:net"]
DIGITS = ["train", "--data", "digits", *TINY, *NET, "--mode", "invert_layerwise"]
COMMAND = [sys.executable, "-m", "edgetrain.cli.main"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "bad_input_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "bad_input_models", raising=False)
    return tmp_path


def assert_paragraph(text: str) -> None:
    assert text.count("\n") == 1, text
    assert re.fullmatch(r"edgetrain: Found: .+ Expected: .+ To do: .+[.?]\n", text), text
    assert "Traceback" not in text


def fresh(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ("--model hybrd18", 2, "hybrid18"),
        ("--model no_such_module:net", 2, "no_such_module"),
        ("--model bad_input_models:missing", 2, "missing"),
        ("--device gtx75", 2, "gtx750"),
        ("--mode invertt", 2, "invert_layerwise"),
        ("--budget 4xyz", 2, "400MiB"),
        ("--budget 0", 2, "more than zero"),
        ("--epochs many", 2, "--epochs"),
        ("--no-such-option", 2, "--no-such-option"),
        ("--seed -1", 2, "--seed"),
        ("--learning-rate -0.1", 2, "--learning-rate"),
        ("--image-size 18", 3, "divisible by 2"),
        ("--model bad_input_models:odd", 3, "7 channels"),
        ("--model bad_input_models:misfit", 3, "block 2"),
        ("--model bad_input_models:raises", 3, "of its own"),
        ("--data nowhere", 4, "digits"),
        ("--budget 1MiB", 5, "weights, gradients and momentum"),
    ],
)
def test_wrong_argument(arguments: str, code: int, said: str, capfd: pytest.CaptureFixture[str]):
    assert run([*DIGITS, *arguments.split()]) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert_paragraph(err)
    assert said in err
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ("--image-size 18", 3, "divisible by 2"),
        ("--model bad_input_models:odd", 3, "7 channels"),
        ("--model bad_input_models:misfit", 3, "block 2"),
        ("--model bad_input_models:raises", 3, "of its own"),
        ("--budget 1MiB", 5, "weights, gradients and momentum"),
    ],
)
def test_wrong_argument_of_a_run_that_plans(
    arguments: str, code: int, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run([*DIGITS, "--mode", "planned", *arguments.split()]) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert_paragraph(err)
    assert said in err


def images(root: Path, *, count: int, classes: int = 2) -> list[Path]:
    pixels, files = np.random.default_rng(0), []
    for split in ("train", "test"):
        for label in range(classes):
            (root / split / f"c{label}").mkdir(parents=True)
            for k in range(count if split == "train" else 4):
                files.append(root / split / f"c{label}" / f"{k}.png")
                Image.fromarray(pixels.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(files[-1])
    return files


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:90])


def folder_arguments(root: Path) -> list[str]:
    return (
        f"train --data {root} --model bad_input_models:net --image-size 16 --batch-size 16 --epochs 1 --quiet".split()
    )


def test_empty_class_folder(folder: Path, capfd: pytest.CaptureFixture[str]):
    images(folder / "data", count=4)
    (folder / "data/train/c2").mkdir()
    assert run(folder_arguments(folder / "data")) == 4
    err = capfd.readouterr().err
    assert_paragraph(err)
    assert "data/train/c2" in err


def test_one_truncated_image_is_named_and_counted(folder: Path):
    broken = images(folder / "data", count=32)[0]  # the first, which also decides the default size
    truncate(broken)
    done = fresh(*" ".join(folder_arguments(folder / "data")).replace("--image-size 16", "--json").split())
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["broken_images"] == 1
    assert str(broken) in done.stderr
    assert done.stderr.count("\n") == 1


def test_many_truncated_images(folder: Path, capfd: pytest.CaptureFixture[str]):
    for file in images(folder / "data", count=32)[:5]:
        truncate(file)
    assert run(folder_arguments(folder / "data")) == 4
    assert_paragraph(capfd.readouterr().err)


def test_label_out_of_range(folder: Path, capfd: pytest.CaptureFixture[str]):
    records = np.zeros((20, 3073), np.uint8)
    records[7, 0] = 11
    (folder / "data").mkdir()
    for name in ("data_batch_1.bin", "test_batch.bin"):
        (folder / "data" / name).write_bytes(records.tobytes())
    assert run(folder_arguments(folder / "data")) == 4
    err = capfd.readouterr().err
    assert_paragraph(err)
    assert "11" in err


def test_loss_that_is_not_a_number(folder: Path, capfd: pytest.CaptureFixture[str]):
    assert run([*DIGITS, "--learning-rate", "1e30"]) == 6
    err = capfd.readouterr().err
    assert_paragraph(err)
    assert "step 2" in err
    assert load_weights(folder / "run/checkpoints/last.safetensors", hybrid(in_channels=1, width=8))["epoch"] == 0


def test_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    real, checkpoint = os.fsync, folder / "run/checkpoints/last.safetensors"
    present = [False]

    def fsync(file: int) -> None:
        if present[0]:  # the first checkpoint is there, its folder synced
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file)
        present[0] = checkpoint.exists()

    monkeypatch.setattr(os, "fsync", fsync)
    assert run(DIGITS) == 7
    err = capfd.readouterr().err
    assert_paragraph(err)
    assert "No space left" in err
    assert load_weights(checkpoint, hybrid(in_channels=1, width=8))["epoch"] == 0
    assert not list(folder.rglob("*.partial"))


def test_json_is_one_document(capfd: pytest.CaptureFixture[str]):
    assert run([*DIGITS, "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["history"][0]["epoch"] == 1
    assert err == ""


def test_ctrl_c_leaves_a_checkpoint(folder: Path):
    process = subprocess.Popen(
        [*COMMAND, *DIGITS, "--epochs", "1000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    checkpoint, deadline = folder / "run/checkpoints/last.safetensors", time.monotonic() + 60
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert err.startswith("edgetrain: Found: Ctrl-C. Expected:")
    assert "Traceback" not in err
    assert load_weights(checkpoint, hybrid(in_channels=1, width=8))["step"] > 0


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the cap needs Linux")
def test_cap_names_a_batch_size_that_fits():
    arguments = [*DIGITS, "--image-size", "32", "--budget", "20MiB"]
    done = fresh(*arguments, "--batch-size", "64")
    assert done.returncode == 5, done.stderr
    assert_paragraph(done.stderr)
    named = re.search(r"--batch-size (\d+), or --budget \d+MiB", done.stderr)
    assert named is not None, done.stderr
    again = fresh(*arguments, "--batch-size", named.group(1))
    assert again.returncode == 0, f"{done.stderr}\n{again.stderr}"
