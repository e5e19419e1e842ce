"""A run that ended before its time goes on as if it had not: weights, buffers, optimiser, random states and metrics."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted_runs import EPOCHS, KINDS, STEPS, assert_equal, make_run

from edgetrain.errors import StorageError
from edgetrain.train import Callback, EpochRecord, InterruptedRunError, StepRecord, newest_checkpoint


class PowerCutError(Exception):
    pass


class PowerCut(Callback):
    """Ends the run after a step, without a word to anybody."""

    def __init__(self, step: int) -> None:
        self._left = step

    def on_step(self, record: StepRecord) -> None:
        self._left -= 1
        if not self._left:
            raise PowerCutError


def uninterrupted(kind: str, folder: Path) -> Path:
    trainer, batches, tested = make_run(kind, folder)
    trainer.fit(batches, tested)
    return trainer.checkpoint


@pytest.mark.parametrize("kind", KINDS)
def test_bit_for_bit_after_a_power_cut(kind: str, tmp_path: Path) -> None:
    """Cut in the first epoch, and again in the second, each time between two checkpoints of every second step."""
    whole = uninterrupted(kind, tmp_path / "whole")
    folder = tmp_path / "cut"
    trainer, batches, tested = make_run(kind, folder, checkpoint_every=2, callbacks=[PowerCut(3)])
    with pytest.raises(PowerCutError):
        trainer.fit(batches, tested)
    assert newest_checkpoint(folder / "checkpoints").state["position"]["step"] == 2
    trainer, batches, tested = make_run(kind, folder, seed=11, checkpoint_every=2, callbacks=[PowerCut(7)])
    with pytest.raises(PowerCutError):
        trainer.resume(batches, tested)
    assert newest_checkpoint(folder / "checkpoints").state["position"]["step"] == 8
    trainer, batches, tested = make_run(kind, folder, seed=12)
    history = trainer.resume(batches, tested)
    assert [record.epoch for record in history] == [1, 2]
    assert_equal(trainer.checkpoint, whole)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [record.loss for record in history]


@pytest.mark.parametrize("kind", KINDS)
def test_bit_for_bit_from_the_start_of_an_epoch(kind: str, tmp_path: Path) -> None:
    """A DataLoader draws from the generators when a pass of it begins, which the checkpoint is older than."""
    whole = uninterrupted(kind, tmp_path / "whole")
    trainer, batches, tested = make_run(kind, tmp_path / "cut", callbacks=[PowerCut(STEPS + 2)])
    with pytest.raises(PowerCutError):
        trainer.fit(batches, tested)
    assert newest_checkpoint(tmp_path / "cut/checkpoints").state["position"]["step"] == STEPS
    trainer, batches, tested = make_run(kind, tmp_path / "cut", seed=13)
    trainer.resume(batches, tested)
    assert_equal(trainer.checkpoint, whole)


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    whole = uninterrupted("dropout", tmp_path / "whole")
    trainer, batches, tested = make_run("dropout", tmp_path / "other", seed=1)
    trainer.fit(batches, tested)
    with pytest.raises(AssertionError):
        assert_equal(trainer.checkpoint, whole)


@pytest.mark.parametrize("kind", ["dropout", "sampled", "own generator"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_evaluation(kind: str, number: signal.Signals, code: int, tmp_path: Path) -> None:
    """Of the last epoch, after which sampling ends for good."""
    whole = uninterrupted(kind, tmp_path / "whole")
    trainer, batches, tested = make_run(kind, tmp_path / "cut")
    passes = []

    class Signalling:
        def __iter__(self) -> Any:
            passes.append(1)
            for batch in tested:
                if len(passes) == EPOCHS:
                    os.kill(os.getpid(), number)
                yield batch

    with pytest.raises(InterruptedRunError) as raised:
        trainer.fit(batches, Signalling())
    assert raised.value.exit_code == code
    assert len(trainer.history) == EPOCHS - 1
    trainer, batches, tested = make_run(kind, tmp_path / "cut", seed=9)
    trainer.resume(batches, tested)
    assert_equal(trainer.checkpoint, whole)


def test_a_damaged_checkpoint_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = uninterrupted("loader", tmp_path / "whole")
    folder = tmp_path / "cut"
    trainer, batches, tested = make_run("loader", folder, checkpoint_every=1, callbacks=[PowerCut(4)])
    with pytest.raises(PowerCutError):
        trainer.fit(batches, tested)
    content = bytearray(trainer.checkpoint.read_bytes())
    content[len(content) // 2] ^= 16
    trainer.checkpoint.write_bytes(content)
    trainer, batches, tested = make_run("loader", folder)
    trainer.resume(batches, tested)
    (warning,) = caplog.messages
    assert "last.safetensors cannot be read: its digest does not match its content" in warning
    assert "of step 2" in warning
    assert (folder / "checkpoints" / "damaged.safetensors").read_bytes() == content
    assert_equal(trainer.checkpoint, whole)


def test_no_good_checkpoint(tmp_path: Path) -> None:
    whole = uninterrupted("dropout", tmp_path)
    for file in whole.parent.iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    trainer, batches, tested = make_run("dropout", tmp_path)
    with pytest.raises(StorageError, match=r"previous\.safetensors cannot be read"):
        trainer.resume(batches, tested)


def test_a_new_run_leaves_nothing_of_the_old_one(tmp_path: Path) -> None:
    uninterrupted("dropout", tmp_path)
    trainer, batches, tested = make_run("dropout", tmp_path, callbacks=[PowerCut(1)])
    with pytest.raises(PowerCutError):
        trainer.fit(batches, tested)
    assert [file.name for file in trainer.checkpoint.parent.iterdir()] == ["last.safetensors"]


def test_a_run_that_has_ended(tmp_path: Path) -> None:
    whole = uninterrupted("loader", tmp_path)
    before = whole.read_bytes()
    trainer, batches, tested = make_run("loader", tmp_path)
    assert [record.epoch for record in trainer.resume(batches, tested)] == [1, 2]
    assert whole.read_bytes() == before


def test_callbacks_get_the_news_in_order(tmp_path: Path) -> None:
    news: list[str] = []

    class Listener(Callback):
        def on_step(self, record: StepRecord) -> None:
            news.append(f"step {record.epoch}.{record.step} of {record.steps}")

        def on_epoch(self, record: EpochRecord) -> None:
            news.append(f"epoch {record.epoch}")

        def on_checkpoint(self, path: Path) -> None:
            news.append(path.name)

    trainer, batches, _ = make_run("dropout", tmp_path, checkpoint_every=4, callbacks=[Listener()])
    trainer.fit(batches)
    first = [f"step 1.{k} of {STEPS}" for k in range(1, 6)]
    second = [f"step 2.{k} of {STEPS}" for k in range(1, 6)]
    last = "last.safetensors"
    assert news == [last, *first[:4], last, first[4], "epoch 1", last, *second[:3], last, *second[3:], "epoch 2", last]


def test_weights_that_are_not_finite_replace_no_checkpoint(tmp_path: Path) -> None:
    class Breaking(Callback):
        def on_step(self, record: StepRecord) -> None:
            if record.step == 3:
                with torch.no_grad():
                    trainer.model[0][0].weight[0] = float("nan")  # type: ignore[index]

    trainer, batches, tested = make_run("dropout", tmp_path, checkpoint_every=1, callbacks=[Breaking()])
    with pytest.raises(Exception, match="not finite after step 3"):
        trainer.fit(batches, tested)
    assert newest_checkpoint(trainer.checkpoint.parent).state["position"]["step"] == 2
