"""A training run inside a hard memory cap, from the data to the record of what it took.

The cap counts everything that the run adds to a process that has already loaded its libraries and run one small
step: weights, gradients, optimiser, activations, batches being decoded. On the CPU it is a process limit, on CUDA
a fraction of the allocator; an allocation beyond it fails, and the step begins again with a smaller plan. Where there
is none the failure ends the run with advice.
"""

from __future__ import annotations

import contextlib
import gc
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edgetrain.errors import BudgetError
from edgetrain.memory import Guest
from edgetrain.nn.slices import SLICE_BYTES
from edgetrain.planner import SNR_LIMIT, Plan, UniformMode, uniform_plan
from edgetrain.targets import Target, keep_freed_blocks, return_large_blocks, select_target
from edgetrain.targets.pressure import PressureGauge
from edgetrain.train.advice import CHANGES, Change
from edgetrain.train.callbacks import Callback
from edgetrain.train.guard import ExhaustedError, Guard, first_line, return_freed
from edgetrain.train.objectives import Objective
from edgetrain.train.passes import Batches
from edgetrain.train.prepared import Question, prepared, would_fit
from edgetrain.train.recipe import Recipe
from edgetrain.train.records import EpochRecord, MemoryEvent
from edgetrain.train.run_record import RunRecord
from edgetrain.train.spare_threads import SpareThreads
from edgetrain.train.throttle import Throttle
from edgetrain.train.trainer import Trainer
from edgetrain.train.warm_up import warm_up
from edgetrain.units import format_mib

ModelMaker = Callable[[], nn.Module]
Watch = Callable[[Target], contextlib.AbstractContextManager[Sequence[Callback]]]

_SPARE_THREADS = 2


@dataclass(frozen=True)
class CappedRun:
    """What a run inside a cap gave.

    Attributes:
        model: trained.
        plan: of its last steps.
        history: a record per epoch.
        events: one per time that memory was short.
        peak_bytes: the most that the run added to the process (CPU) or to the allocator (CUDA).
        file_bytes: what of it are pages of files, at the end; the cap does not count them.
        budget_bytes: the cap, None where none was asked for.
        checkpoint: where the last state is.
    """

    model: nn.Module
    plan: Plan
    history: list[EpochRecord]
    events: list[MemoryEvent]
    peak_bytes: int
    file_bytes: int
    budget_bytes: int | None
    checkpoint: Path


def _unwatched(_: Target) -> contextlib.AbstractContextManager[Sequence[Callback]]:
    return contextlib.nullcontext(())


def train_capped(
    make_model: ModelMaker,
    make_batches: Callable[[], tuple[Batches, Batches | None]],
    *,
    mode: UniformMode | Plan | None,
    input_shape: tuple[int, int, int],
    recipe: Recipe,
    objective: Objective | None = None,
    run_dir: Path,
    record: RunRecord | None = None,
    budget_bytes: int | None,
    decoding_bytes: int = 0,
    device: str = "cpu",
    resume: bool = False,
    watch: Watch = _unwatched,
    checkpoint_every: int | None = None,
    throttle: Throttle | None = None,
    changes: Collection[Change] = CHANGES,
    sample: Tensor | None = None,
    update_in_backward: bool = False,
    snr_limit: float = SNR_LIMIT,
    guest: Guest | None = None,
    gauge: PressureGauge | None = None,
) -> CappedRun:
    """Trains and evaluates inside ``budget_bytes``.

    Args:
        make_model: makes the network; called inside the cap.
        make_batches: makes training and test data, likewise.
        mode: the same for all blocks, or a plan; None: the fastest plan that stays inside the budget.
        input_shape: (c, h, w).
        objective: the loss; None: cross-entropy.
        record: what the network is, for whoever opens the run directory.
        decoding_bytes: what decoding an image takes besides the batch, :func:`edgetrain.train.data.decoding_bytes`;
            plans leave it free.
        resume: go on with the run in ``run_dir``, whose plan is given as ``mode``.
        watch: entered while the run is counted, with the target, whose memory may be read; gives callbacks.
        checkpoint_every, throttle: see :class:`Trainer`.
        changes: what an error may advise.
        sample: some images (n, c, h, w), for a plan.
        update_in_backward: whether that plan steps the optimiser block by block.
        snr_limit: least ratio of signal to noise of what that plan and smaller ones invert.
        guest: what the objective has in memory beside a step, such as a teacher; None: nothing.
        gauge: of the system's memory pressure, under which smaller plans are taken before anything fails.

    Raises:
        BudgetError: the budget does not even hold the weights, or the cap was hit; names what would fit.
    """

    target = select_target(device)
    question = Question(
        make_model,
        mode,
        input_shape,
        recipe,
        budget_bytes,
        target.probe().available_bytes,
        decoding_bytes=decoding_bytes,
        device=device,
        sample=sample,
        update_in_backward=update_in_backward,
        snr_limit=snr_limit,
        objective=objective,
        guest=guest or Guest(),
        has_run=resume,
        changes=changes,
    )
    if budget_bytes is not None:
        # blocks larger than a slice go back to the kernel when they are freed: no holes that count and serve nobody,
        # unless the run turns out to have room for them
        return_large_blocks(2 * SLICE_BYTES)
    warm_up(device)
    with _capped(target, budget_bytes):
        pass  # a host that cannot do it says so before plans are made
    plans: list[Plan] = []
    keeps_freed = budget_bytes is None and device == "cpu"
    if budget_bytes is not None or mode is None or snr_limit != SNR_LIMIT:
        made = prepared(question)
        plans, keeps_freed = made.plans, keeps_freed or made.keeps_freed
    guard = None
    if plans:
        smaller = plans[1:]
        threads = SpareThreads(_SPARE_THREADS if budget_bytes is not None and device == "cpu" else 0)
        guard = Guard(target, lambda _: smaller, gauge=gauge, threads=threads)

    def run(callbacks: Sequence[Callback]) -> CappedRun:
        _seed(recipe.seed)
        model = make_model()
        plan = plans[0] if plans else mode
        assert plan is not None
        if isinstance(plan, str):
            plan = uniform_plan(model, plan, input_shape=input_shape, batch_size=recipe.batch_size)
        batches, test_batches = make_batches()
        trainer = Trainer(
            model,
            plan,
            run_dir=run_dir,
            recipe=recipe,
            objective=objective,
            record=record,
            device=device,
            callbacks=callbacks,
            checkpoint_every=checkpoint_every,
            throttle=throttle,
            guard=guard,
        )
        history = (trainer.resume if resume else trainer.fit)(batches, test_batches)
        return CappedRun(
            trainer.model,
            trainer.plan,
            history,
            trainer.events,
            target.peak_bytes(),
            target.file_bytes(),
            budget_bytes,
            trainer.checkpoint,
        )

    if keeps_freed:
        keep_freed_blocks()
    target.start()
    with _returning(), _capped(target, budget_bytes), watch(target) as callbacks:
        try:
            return run(callbacks)
        except Exception as error:
            exhausted = error.found if isinstance(error, ExhaustedError) else None
            if budget_bytes is None or not (exhausted or target.is_out_of_memory(error)):
                raise
            peak_bytes, reason = target.peak_bytes(), exhausted or first_line(error)
    # outside the handler, so that the run's network and the failed step's tensors are gone before anything is tried
    gc.collect()
    words = f"in mode {mode}" if isinstance(mode, str) else "by its plan"
    raise BudgetError(
        found=f"the budget of {format_mib(budget_bytes)} was used up at {format_mib(peak_bytes)} ({reason})",
        expected=f"a step of {recipe.batch_size} samples of {'x'.join(map(str, input_shape))} {words} to fit",
        action=would_fit(question, plans[-1]),
    )


@contextlib.contextmanager
def _returning() -> Iterator[None]:
    """Afterwards nothing is kept that a run has freed."""
    try:
        yield
    finally:
        return_freed()


def _seed(seed: int) -> None:
    """All generators that a model or its data may draw from, so that a run repeats."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextlib.contextmanager
def _capped(target: Target, budget_bytes: int | None) -> Iterator[None]:
    if budget_bytes is None:
        yield
        return
    target.cap(budget_bytes)
    try:
        yield
    finally:
        target.uncap()
