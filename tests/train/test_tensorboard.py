"""Event files, read back by tensorboard's own reader; and the trainer with a plain DataLoader that has workers."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from edgetrain.errors import MissingExtraError, StorageError
from edgetrain.models import hybrid
from edgetrain.planner import uniform_plan
from edgetrain.train import Callback, Recipe, StepRecord, Trainer
from edgetrain.train.tensorboard import TensorBoard

pytest.importorskip("tensorboard", reason="needs the package tensorboard")

STEP_TAGS = ["train/loss", "train/accuracy", "train/learning_rate", "train/images_per_second"]


def scalars(folder: Path) -> dict[str, list[Any]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder)).Reload()
    return {tag: reader.Scalars(tag) for tag in reader.Tags()["scalars"]}


def loader(workers: int = 0) -> DataLoader:
    generator = torch.Generator().manual_seed(2)
    data = TensorDataset(torch.randn(24, 1, 16, 16, generator=generator), torch.arange(24) % 3)
    return DataLoader(data, batch_size=8, num_workers=workers)


def trainer(folder: Path, *callbacks: Callback) -> Trainer:
    torch.manual_seed(0)
    model = hybrid(3, in_channels=1, width=8)
    plan = uniform_plan(model, "invert_layerwise", input_shape=(1, 16, 16), batch_size=8)
    recipe = Recipe(batch_size=8, epochs=3)
    return Trainer(model, plan, run_dir=folder, recipe=recipe, callbacks=callbacks, checkpoint_every=2)


class Seen(Callback):
    def __init__(self, stop_after: int = 10**9) -> None:
        self.records: list[StepRecord] = []
        self._stop_after = stop_after

    def on_step(self, record: StepRecord) -> None:
        self.records.append(record)
        if len(self.records) == self._stop_after:
            raise RuntimeError("the power went")


def test_every_step_and_epoch_is_there(tmp_path: Path):
    seen = Seen()
    peaks = iter(range(2**20, 2**30, 2**20))
    with TensorBoard(tmp_path / "tb", peak_bytes=lambda: next(peaks), budget_bytes=50 * 2**20) as board:
        history = trainer(tmp_path, seen, board).fit(loader(), loader())
    found = scalars(tmp_path / "tb")
    assert set(found) == {
        *STEP_TAGS, "memory/peak_MiB", "memory/budget_MiB", "epoch/loss", "epoch/accuracy", "epoch/test_accuracy"
    }  # fmt: skip
    for tag in (*STEP_TAGS, "memory/peak_MiB"):
        assert [event.step for event in found[tag]] == list(range(1, 10)), tag
    assert [event.value for event in found["train/loss"]] == pytest.approx([r.loss for r in seen.records])
    rates = [Recipe(batch_size=8, epochs=3).rate(step, 9) for step in range(9)]
    assert [event.value for event in found["train/learning_rate"]] == pytest.approx(rates)
    assert [event.value for event in found["memory/peak_MiB"]] == list(range(1, 10))
    assert [(event.step, event.value) for event in found["epoch/test_accuracy"]] == [
        (3 * record.epoch, pytest.approx(record.test_accuracy)) for record in history
    ]


def test_a_run_that_goes_on_doubles_no_point(tmp_path: Path):
    """Lost after step 5, one step after a checkpoint, with step 5 written: it goes on with a second step 5."""
    with TensorBoard(tmp_path / "tb") as board, pytest.raises(RuntimeError, match="the power went"):
        trainer(tmp_path, board, Seen(stop_after=5)).fit(loader())
    assert [event.step for event in scalars(tmp_path / "tb")["train/loss"]] == [1, 2, 3, 4, 5]
    again = Seen()
    with TensorBoard(tmp_path / "tb") as board:
        trainer(tmp_path, board, again).resume(loader())
    assert len(again.records) == 5
    found = scalars(tmp_path / "tb")
    for tag in STEP_TAGS:
        assert [event.step for event in found[tag]] == list(range(1, 10)), tag
    assert [event.step for event in found["epoch/loss"]] == [3, 6, 9]


def test_a_new_run_in_the_same_folder_takes_the_place_of_the_old(tmp_path: Path):
    for _ in range(2):
        with TensorBoard(tmp_path / "tb") as board:
            trainer(tmp_path, board).fit(loader())
    assert [event.step for event in scalars(tmp_path / "tb")["train/loss"]] == list(range(1, 10))


def test_command_and_resume(tmp_path: Path):
    """In processes of their own: in one that has worked before a run takes free heap, and grows by nothing."""

    def run(words: list[str]) -> int:
        return subprocess.run([sys.executable, "-m", "edgetrain.cli.main", *words], cwd=tmp_path).returncode

    command = "train --data digits --model resnet8 --limit-train 64 --limit-test 16 --batch-size 32 --epochs 1 "
    command += "--mode keep_all --tensorboard --budget 200MiB --quiet --out run"
    assert run(command.split()) == 0
    found = scalars(tmp_path / "run" / "tensorboard")
    assert [event.step for event in found["train/loss"]] == [1, 2]
    assert 0 < found["memory/peak_MiB"][-1].value <= 200
    assert {event.value for event in found["memory/budget_MiB"]} == {200.0}
    assert run(["resume", "run", "--quiet"]) == 0
    assert [event.step for event in scalars(tmp_path / "run" / "tensorboard")["train/loss"]] == [1, 2]


def test_what_the_writer_takes(tmp_path: Path):
    """A step's events cost the disk below a kilobyte, and the process next to nothing, however long the run."""
    record = StepRecord(1, 1, 1, 4000, 0.5, 0.5, 100.0, 0.1)
    with TensorBoard(tmp_path) as board:
        board.on_start(0)
        tracemalloc.start()
        for _ in range(4000):
            board.on_step(record)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2**20
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 4000 * 1024


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        trainer(tmp_path / "run", TensorBoard(tmp_path / "file" / "tb")).fit(loader())
    monkeypatch.setitem(__import__("sys").modules, "tensorboard.summary.writer", None)
    with pytest.raises(MissingExtraError, match="tensorboard"):
        TensorBoard(tmp_path / "tb")


def test_a_dataloader_with_workers_gives_the_same_run(tmp_path: Path):
    losses = []
    for workers in (0, 2):
        seen = Seen()
        trainer(tmp_path / str(workers), seen).fit(loader(workers))
        losses.append([record.loss for record in seen.records])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 9
