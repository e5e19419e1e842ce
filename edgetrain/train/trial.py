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
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import torch
import torch.nn.functional as F
from torch import nn

from edgetrain.errors import BudgetError
from edgetrain.nn.slices import SLICE_BYTES
from edgetrain.planner import UniformMode, uniform_plan
from edgetrain.runtime import wrap
from edgetrain.targets import return_large_blocks, select_target
from edgetrain.train.recipe import Recipe
from edgetrain.train.trainer import evaluate
from edgetrain.units import MIB

EVALUATION_BATCH_SIZE = 128
"""Most samples of a test batch, in the runs of the command line and in the trials here."""

# a run has the loader's thread and the checkpoint writer besides what a trial has
_RESERVE_BYTES, _RESERVE = 2 * MIB, 0.02
_FITS, _FAILS, _UNKNOWN = 0, 1, 2


@dataclass(frozen=True)
class Trial:
    """A training step with a budget.

    Attributes:
        input_shape: (c, h, w).
    """

    make_model: Callable[[], nn.Module]
    mode: UniformMode
    input_shape: tuple[int, int, int]
    batch_size: int
    budget_bytes: int
    device: str = "cpu"


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
    n, device = trial.batch_size, trial.device
    model = trial.make_model().to(device)
    net = wrap(model, uniform_plan(model, trial.mode, input_shape=trial.input_shape, batch_size=n))
    optimizer = Recipe(batch_size=n).optimizer(p for p in model.parameters() if p.requires_grad)
    labels = torch.zeros(n, dtype=torch.long)
    prefetched = torch.ones(n, *trial.input_shape, dtype=torch.uint8)
    x = torch.randn(n, *trial.input_shape).to(device)
    for _ in range(2):
        F.cross_entropy(net(x), labels.to(device)).backward()
        optimizer.step()  # of rate 0: the weights stay as they are
        optimizer.zero_grad(set_to_none=False)
        x = prefetched.to(device, torch.float32).sub_(0.5)  # the batch before is still there
    tested = x[:EVALUATION_BATCH_SIZE].clone()
    del x
    evaluate(model, [(tested, labels[: len(tested)])], device=device)
