"""``edgetrain resume``: after SIGTERM, of a run that waited, and of what is no run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edgetrain.cli.main import run
from edgetrain.train import newest_checkpoint
from edgetrain.train.tensor_file import TensorFile

OPTIONS = [
    *("train", "--data", "digits", "--model", "resnet20", "--image-size", "8", "--limit-train", "96", "--seed", "4"),
    *("--limit-test", "32", "--epochs", "2", "--batch-size", "16", "--mode", "recompute", "--checkpoint-every", "4"),
]


def weights(folder: Path) -> dict[str, bytes]:
    file = TensorFile(folder / "checkpoints" / "last.safetensors")
    return {name: file.tensor(name).numpy().tobytes() for name in file.names("")}


def metrics(result: dict[str, Any]) -> list[tuple[float, float, float]]:
    return [(record["loss"], record["accuracy"], record["test_accuracy"]) for record in result["history"]]


def test_a_paused_run_that_gets_sigterm_goes_on_bit_for_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*OPTIONS, "--json", "--quiet", "--out", str(tmp_path / "whole")]) == 0
    whole = json.loads(capsys.readouterr().out)
    folder, pause = tmp_path / "cut", tmp_path / "pause"
    pause.touch()
    command = [sys.executable, "-c", "from edgetrain.cli.main import main; main()", *OPTIONS, "--out", str(folder)]
    process = subprocess.Popen(
        [*command, "--pause-file", str(pause)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (folder / "checkpoints" / "last.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1.0)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert time.monotonic() - asked < 5
    assert out == ""
    assert f"waiting: {pause} exists" in " ".join(err.split())
    assert f"edgetrain resume {folder} goes on" in " ".join(err.split())
    assert newest_checkpoint(folder / "checkpoints").state["position"]["step"] == 1
    assert run(["resume", str(folder), "--json", "--quiet"]) == 0
    resumed = json.loads(capsys.readouterr().out)
    assert metrics(resumed) == metrics(whole)
    assert weights(folder) == weights(tmp_path / "whole")


def test_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["resume", str(tmp_path)]) == 7
    assert "run.json cannot be read" in capsys.readouterr().err


def test_a_run_without_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*OPTIONS, "--epochs", "1", "--quiet", "--out", str(tmp_path)]) == 0
    for file in (tmp_path / "checkpoints").iterdir():
        file.unlink()
    assert run(["resume", str(tmp_path), "--quiet"]) == 7
    assert "last.safetensors cannot be read: No such file" in capsys.readouterr().err


def test_a_run_started_from_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*OPTIONS, "--epochs", "1", "--quiet", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(record | {"training": None}))
    capsys.readouterr()
    assert run(["resume", str(tmp_path)]) == 2
    assert "make the Trainer again in Python" in capsys.readouterr().err


def test_a_limit_below_the_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("edgetrain.train.throttle.hottest_celsius", lambda: None)
    assert run([*OPTIONS, "--max-temp", "70", "--out", str(tmp_path)]) == 2
    assert "leave --max-temp out" in capsys.readouterr().err
