"""A program for tests: kills a run with SIGKILL at random moments, resumes it each time, and compares it at the end.

    kill_runs.py FOLDER KILLS SEED

Every process is forked from this one, which has loaded the libraries and has no thread. Prints what it saw as JSON.
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from interrupted_runs import assert_equal, make_run

from edgetrain.errors import StorageError
from edgetrain.train import Callback, StepRecord
from edgetrain.train.tensor_file import TensorFile

EVERY = 2
KIND = "dropout"


class Steps(Callback):
    """Adds a byte to a file for every step done."""

    def __init__(self, path: Path, done: int) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(self._file, b"." * done)

    def on_step(self, record: StepRecord) -> None:
        os.write(self._file, b".")


def train(folder: Path, seed: int) -> None:
    try:
        done = TensorFile(folder / "checkpoints" / "last.safetensors").state["position"]["step"]
    except StorageError:
        done = None
    steps = Steps(folder.with_suffix(".steps"), done or 0)
    trainer, batches, tested = make_run(KIND, folder, seed=seed, checkpoint_every=EVERY, callbacks=[steps])
    (trainer.fit if done is None else trainer.resume)(batches, tested)


def in_child(work: Callable[[], None], *, seconds: float | None = None) -> int:
    """The status of a forked process that does ``work``, killed after ``seconds``; 0 where it ended well before."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)  # it is not waited for yet, so the number is still its own
    return os.waitpid(child, 0)[1]


def main(base: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    make_run(KIND, base / "unused")  # loads what a run needs, once for all children
    numbers = random.Random(seed)
    began = time.monotonic()
    assert in_child(lambda: train(base / "whole", 0)) == 0
    whole_seconds = time.monotonic() - began
    folder = base / "killed"
    folder.mkdir()
    runs, killed, in_write, lost_most = 0, 0, 0, 0
    while killed < kills:
        is_new = not (folder / "checkpoints" / "last.safetensors").exists()
        work = functools.partial(train, folder, 0 if is_new else numbers.randrange(1, 10**6))
        status = in_child(work, seconds=numbers.uniform(0, 0.6 * whole_seconds))
        assert status in (0, signal.SIGKILL), status
        killed += status == signal.SIGKILL
        in_write += any(folder.rglob("*.partial"))
        files = list(folder.glob("checkpoints/[!.]*"))
        steps = [TensorFile(file).state["position"]["step"] for file in files]  # none is partial under a final name
        done = folder.with_suffix(".steps").stat().st_size if folder.with_suffix(".steps").exists() else 0
        if steps:
            lost_most = max(lost_most, done - max(steps))
        if status == 0:
            runs += 1
            assert_equal(folder / "checkpoints/last.safetensors", base / "whole/checkpoints/last.safetensors")
            folder = base / f"killed{runs}"
            folder.mkdir()
    assert in_child(lambda: train(folder, 0)) == 0
    assert_equal(folder / "checkpoints/last.safetensors", base / "whole/checkpoints/last.safetensors")
    print(json.dumps({"killed": killed, "runs": runs + 1, "left a partial file": in_write, "steps lost": lost_most}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
