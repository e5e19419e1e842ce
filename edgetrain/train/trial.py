"""Whether a training step fits a budget, found out by running it in a process that has done nothing else.

A process that has trained before answers too kindly: its heap serves from what it holds free, and oneDNN has its
kernels already. So a helper is started that only imports torch, and is forked (before it has any thread of OpenMP)
for each trial; every fork warms up and is capped as a run is. Where that cannot be done - no fork, a model that
cannot be pickled - the trial runs in a thread of this process: oneDNN remembers a failed allocation for as long as
its thread lives, so a new thread is needed at least.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import TracebackType

import numpy as np
import torch
from torch import nn

from edgetrain.errors import BudgetError
from edgetrain.models import create_model
from edgetrain.nn.slices import SLICE_BYTES
from edgetrain.planner import Plan, UniformMode, uniform_plan
from edgetrain.targets import return_large_blocks, select_target
from edgetrain.train.data.normalise import normalised
from edgetrain.train.data.prefetch import prefetched
from edgetrain.train.data.source import Pixels
from edgetrain.train.embeddings import Contrastive, Triplet
from edgetrain.train.guard import Guard
from edgetrain.train.objectives import Objective
from edgetrain.train.passes import Batch
from edgetrain.train.recipe import Recipe
from edgetrain.train.trainer import Trainer
from edgetrain.units import MIB

EVALUATION_BATCH_SIZE = 128
"""Most samples of a test batch, in the runs of the command line and in the trials here."""

# two runs of one program differ by some MiB: threads meet in another order, and so do holes in the heap
_RESERVE_BYTES, _RESERVE = 4 * MIB, 0.03
_FITS, _FAILS, _UNKNOWN = 0, 1, 2


@dataclass(frozen=True)
class Trial:
    """A training step with a budget.

    Attributes:
        plan: one mode for all blocks, or a plan.
        objective: None: cross-entropy.
        input_shape: (c, h, w).
    """

    make_model: Callable[[], nn.Module]
    plan: UniformMode | Plan
    input_shape: tuple[int, int, int]
    batch_size: int
    budget_bytes: int
    device: str = "cpu"
    objective: Objective | None = None


class Trials:
    """Runs trials; a context, at whose end the helper is gone."""

    def __init__(self) -> None:
        self._helper: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Trials:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._helper is not None:
            self._helper.kill()
            self._helper.communicate()
            self._helper = None

    def fits(self, trial: Trial) -> bool:
        """Whether two steps and an evaluation run inside the budget; False where the host has not that much."""
        if trial.budget_bytes > select_target(trial.device).probe().available_bytes:
            return False
        outcome = self._ask(trial)
        return _in_thread(trial) if outcome == _UNKNOWN else outcome == _FITS

    def _ask(self, trial: Trial) -> int:
        if not hasattr(os, "fork"):
            return _UNKNOWN
        try:
            request = pickle.dumps((sys.path, os.getcwd(), torch.get_num_threads(), pickle.dumps(trial)))
            if self._helper is None:
                command = [sys.executable, "-c", "from edgetrain.train.trial import serve; serve()"]
                self._helper = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
                )
            assert self._helper.stdin is not None
            assert self._helper.stdout is not None
            self._helper.stdin.write(len(request).to_bytes(8, "little") + request)
            self._helper.stdin.flush()
            answer = self._helper.stdout.read(1)
        except (OSError, AttributeError, TypeError, pickle.PicklingError):
            return _UNKNOWN
        return answer[0] if answer else _UNKNOWN


def serve() -> None:
    """The helper: reads trials from stdin, forks for each, and writes one byte for each to stdout."""
    answers, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # the user's model may print
    # loads what a plan and an optimiser need, once for all forks; so few elements that no thread of OpenMP is started
    model = create_model("hybrid18", width=8)
    uniform_plan(model, "invert_layerwise", input_shape=(3, 16, 16), batch_size=2)
    Recipe().optimizer(model.parameters())
    while length := sys.stdin.buffer.read(8):
        request = sys.stdin.buffer.read(int.from_bytes(length, "little"))
        child = os.fork()
        if child == 0:
            code = _UNKNOWN
            try:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                code = _answer(request)
            finally:
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        # a failed allocation can end a process inside oneDNN or OpenMP
        os.write(answers, bytes([os.WEXITSTATUS(status) if os.WIFEXITED(status) else _FAILS]))


def _answer(request: bytes) -> int:
    from edgetrain.train.capped import warm_up

    sys.path[:], folder, threads, packed = pickle.loads(request)
    os.chdir(folder)
    torch.set_num_threads(threads)
    trial: Trial = pickle.loads(packed)
    return_large_blocks(2 * SLICE_BYTES)
    warm_up(trial.device)
    return _FITS if _run(trial) else _FAILS


def _in_thread(trial: Trial) -> bool:
    outcomes: list[bool] = []
    failures: list[Exception] = []

    def attempt() -> None:
        try:
            outcomes.append(_run(trial))
        except Exception as error:
            failures.append(error)

    gc.collect()
    thread = threading.Thread(target=attempt, name="edgetrain-trial")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return outcomes[0]


def _run(trial: Trial) -> bool:
    target = select_target(trial.device)
    capped_bytes = int(trial.budget_bytes * (1 - _RESERVE)) - _RESERVE_BYTES
    if capped_bytes <= 0:
        return False
    try:
        target.cap(capped_bytes)
        _train(trial)
        return True
    except BudgetError:  # a hard limit of the host is lower
        return False
    except Exception as error:
        if not target.is_out_of_memory(error):
            raise
        return False
    finally:
        target.uncap()


def _train(trial: Trial) -> None:
    """A run of two steps, with every batch size that a run meets: the test data end in a smaller batch."""
    n, shape = trial.batch_size, trial.input_shape
    tested = min(n, EVALUATION_BATCH_SIZE)
    model = trial.make_model().to(trial.device)
    plan = trial.plan
    if isinstance(plan, str):
        plan = uniform_plan(model, plan, input_shape=shape, batch_size=n)
    # of no rate: a network that diverges says nothing of memory
    recipe = Recipe(epochs=1, batch_size=n, peak_rate=0.0)
    with tempfile.TemporaryDirectory(prefix="edgetrain-trial-") as folder:
        objective = trial.objective
        if isinstance(objective, Triplet | Contrastive):
            objective = replace(objective, references=lambda: _Noise([tested], shape))
        nothing = Guard(select_target(trial.device), lambda _: ())
        trainer = Trainer(
            model, plan, run_dir=folder, recipe=recipe, objective=objective, device=trial.device, guard=nothing
        )
        trainer.fit(_Noise([n, n], shape), _Noise([tested, max(1, tested // 2)], shape))


class _Noise:
    """Batches of noise, made ahead by a thread as those of a loader are; they pass for the first image."""

    def __init__(self, batch_sizes: list[int], image_size: tuple[int, int, int]) -> None:
        self._batch_sizes = batch_sizes
        self.indices = torch.zeros(max(batch_sizes), dtype=torch.long)
        self._image_size = image_size

    def __len__(self) -> int:
        return len(self._batch_sizes)

    def __iter__(self) -> Iterator[Batch]:
        return prefetched(self._batch_sizes, build=self._build, finish=self._finish)

    def _build(self, batch_size: int, stop: threading.Event) -> Pixels:
        return np.random.default_rng(0).integers(256, size=(batch_size, *self._image_size), dtype=np.uint8)

    def _finish(self, pixels: Pixels) -> Batch:
        half = np.full(self._image_size[0], 0.5)
        return normalised(pixels, half, half), torch.zeros(len(pixels), dtype=torch.long)
