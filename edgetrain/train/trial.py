"""Whether a training step fits a budget, found out by running it in a process that has done nothing else.

A process that has trained before answers too kindly (:mod:`edgetrain.train.helper`); in one of its own a trial warms up
and is capped as a run is. Where there is none - no fork, a model that cannot be pickled - the trial runs in a thread of
this process: oneDNN remembers a failed allocation for as long as its thread lives, so a new thread is needed at least.
"""

from __future__ import annotations

import functools
import gc
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from edgetrain.errors import BudgetError, TrainingError
from edgetrain.nn.slices import SLICE_BYTES
from edgetrain.planner import Plan, UniformMode, uniform_plan
from edgetrain.targets import keep_freed_blocks, return_large_blocks, select_target
from edgetrain.train.data.normalise import normalised
from edgetrain.train.data.prefetch import prefetched
from edgetrain.train.data.source import Pixels
from edgetrain.train.embeddings import Contrastive, Triplet
from edgetrain.train.guard import Guard
from edgetrain.train.helper import Helper, HelperDiedError, NoHelperError
from edgetrain.train.objectives import Objective
from edgetrain.train.passes import Batch
from edgetrain.train.recipe import Recipe
from edgetrain.train.trainer import Trainer
from edgetrain.train.warm_up import warm_up
from edgetrain.units import MIB

T = TypeVar("T")

EVALUATION_BATCH_SIZE = 128
"""Most samples of a test batch, in the runs of the command line and in the trials here."""

# two runs of one program differ by some MiB: threads meet in another order, and so do holes in the heap
_RESERVE_BYTES, _RESERVE = 4 * MIB, 0.03
_KEPT_RESERVE = 0.1  # of a heap that keeps what is freed: its holes go on changing after two steps


@dataclass(frozen=True)
class Trial:
    """A training step with a budget.

    Attributes:
        plan: one mode for all blocks, or a plan.
        objective: None: cross-entropy.
        input_shape: (c, h, w).
        keeps_freed: whether its heap keeps what is freed (:func:`edgetrain.targets.keep_freed_blocks`).
    """

    make_model: Callable[[], nn.Module]
    plan: UniformMode | Plan
    input_shape: tuple[int, int, int]
    batch_size: int
    budget_bytes: int
    device: str = "cpu"
    objective: Objective | None = None
    keeps_freed: bool = False


def capped_bytes(budget_bytes: int, *, keeps_freed: bool) -> int:
    """In what a trial must run, so that a run does in ``budget_bytes``."""
    return int(budget_bytes * (1 - (_KEPT_RESERVE if keeps_freed else _RESERVE))) - _RESERVE_BYTES


def fits(trial: Trial, helper: Helper) -> bool:
    """Whether two steps and an evaluation run inside the budget."""
    # not made by the one who is capped, which may be killed by it
    with tempfile.TemporaryDirectory(prefix="edgetrain-trial-") as folder:
        try:
            return helper.ask(functools.partial(_in_process, trial, folder))
        except HelperDiedError:
            return False
        except NoHelperError:
            # the heap of this process serves other things
            return not trial.keeps_freed and in_fresh_thread(functools.partial(_run, trial, folder))


def _in_process(trial: Trial, folder: str, _: Helper) -> bool:
    return_large_blocks(2 * SLICE_BYTES)
    warm_up(trial.device)
    return (not trial.keeps_freed or keep_freed_blocks()) and _run(trial, folder)


def in_fresh_thread(work: Callable[[], T]) -> T:
    """What ``work`` gives, in a thread that has not failed; Ctrl-C does not wait for it."""
    outcomes: list[T] = []
    failures: list[BaseException] = []

    def attempt() -> None:
        try:
            outcomes.append(work())
        except BaseException as error:
            failures.append(error)

    gc.collect()
    thread = threading.Thread(target=attempt, name="edgetrain-trial", daemon=True)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return outcomes[0]


def _run(trial: Trial, folder: str) -> bool:
    target = select_target(trial.device)
    cap_bytes = capped_bytes(trial.budget_bytes, keeps_freed=trial.keeps_freed)
    if cap_bytes <= 0:
        return False
    try:
        target.cap(cap_bytes)
        _train(trial, folder)
        return True
    except BudgetError:  # a hard limit of the host is lower
        return False
    except TrainingError:  # the loss of noise is not a number, which says nothing of memory
        return True
    except Exception as error:
        if not target.is_out_of_memory(error):
            raise
        return False
    finally:
        target.uncap()


def _train(trial: Trial, folder: str) -> None:
    """A run of two steps, with every batch size that a run meets: the test data end in a smaller batch."""
    n, shape = trial.batch_size, trial.input_shape
    tested = min(n, EVALUATION_BATCH_SIZE)
    model = trial.make_model().to(trial.device)
    plan = trial.plan
    if isinstance(plan, str):
        plan = uniform_plan(model, plan, input_shape=shape, batch_size=n)
    # of no rate: a network that diverges says nothing of memory
    recipe = Recipe(epochs=1, batch_size=n, peak_rate=0.0)
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
