"""What a run inside a cap finds out before it begins: its plan, those to fall back on, or why there is none.

All of it happens in another process (:mod:`edgetrain.train.helper`), which hands over plans. Tracing, timing and the
planner's table leave 35 MiB of a heap free that a cap set afterwards would not count (hybrid18, 32 images of 1x16x16).
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from edgetrain.chain import SampledNetwork
from edgetrain.errors import BudgetError
from edgetrain.memory import Guest
from edgetrain.planner import SNR_LIMIT, Plan, UniformMode
from edgetrain.targets import release_free_memory
from edgetrain.train.advice import CHANGES, Change, advise, lean_mode
from edgetrain.train.helper import Helper, HelperDiedError, NoHelperError
from edgetrain.train.objectives import Objective
from edgetrain.train.planned import Made, given, planned
from edgetrain.train.recipe import Recipe
from edgetrain.train.trial import Trial, fits, in_fresh_thread
from edgetrain.train.warm_up import warm_up
from edgetrain.units import format_mib

T = TypeVar("T")
_NOBODY = Guest()


@dataclass(frozen=True)
class Question:
    """What is to be trained, in what memory.

    Attributes:
        make_model: makes the network.
        how: the same mode for all blocks, or a plan; None: the fastest plan that stays inside the budget.
        input_shape: (c, h, w).
        budget_bytes: the cap; None: none.
        available_bytes: of the host, before any process was started to answer.
        decoding_bytes: what decoding an image takes besides the batch.
        sample: some images (n, c, h, w), on which the noise of inversions is measured; None: random numbers.
        update_in_backward: whether a plan that is made steps the optimiser block by block.
        snr_limit: least ratio of signal to noise of what a plan that is made inverts.
        objective: None: cross-entropy.
        guest: what it has in memory beside a step.
        has_run: whether the plan ran before, inside this cap: then only the heap for it is found out.
        changes: what a refusal may advise.
    """

    make_model: Callable[[], nn.Module]
    how: UniformMode | Plan | None
    input_shape: tuple[int, int, int]
    recipe: Recipe
    budget_bytes: int | None
    available_bytes: int
    decoding_bytes: int = 0
    device: str = "cpu"
    sample: Tensor | None = None
    update_in_backward: bool = False
    snr_limit: float = SNR_LIMIT
    objective: Objective | None = None
    guest: Guest = _NOBODY
    has_run: bool = False
    changes: Collection[Change] = CHANGES

    def runs(
        self,
        plan: UniformMode | Plan,
        helper: Helper,
        *,
        budget_bytes: int,
        batch_size: int,
        keeps_freed: bool = False,
    ) -> bool:
        """Whether ``plan`` runs in ``budget_bytes``, what decoding takes left out, and the host has so much."""
        trial = Trial(
            self.make_model,
            plan,
            self.input_shape,
            batch_size,
            max(1, budget_bytes - self.decoding_bytes),
            self.device,
            self.objective,
            keeps_freed,
        )
        return budget_bytes <= self.available_bytes and fits(trial, helper)


def prepared(question: Question) -> Made:
    """The plan to begin with, smaller ones to fall back on, and the heap for it.

    Raises:
        BudgetError: none of them runs inside the budget; names the smallest that was found to do.
        ModelError: the network does not take the input, or not this plan.
    """
    if question.budget_bytes is None:
        made = _made(question, Helper())
        _forget()
        return made
    try:
        check_budget(question.make_model, question.budget_bytes, standing_bytes=question.guest.standing_bytes)
    except BudgetError as error:
        if "--budget" not in question.changes:
            raise
        action = f"{_advised(question, _would_hold)}, or choose a smaller --model"
        raise BudgetError(found=error.found, expected=error.expected, action=action) from None
    try:
        return _elsewhere(functools.partial(_plans, question), question.device)
    except HelperDiedError:
        raise BudgetError(
            found="the process that plans the run ended before it had a plan",
            expected="memory for it beside this one",
            action="end other programs, or pass the --plan that edgetrain plan --out made elsewhere",
        ) from None


def would_fit(question: Question, smallest: UniformMode | Plan) -> str:
    """What to change after a run has used up its budget with ``smallest``, as a sentence for a person."""
    return _advised(question, functools.partial(_advice, leanest=[smallest, lean_mode(question.snr_limit)]))


def _advised(question: Question, advice: Callable[[Question, Helper], str]) -> str:
    try:
        return _elsewhere(functools.partial(advice, question), question.device)
    except HelperDiedError:  # no memory to find it out in
        return "raise --budget, or lower --batch-size or --image-size"


def _warm(work: Callable[[Helper], T], device: str, helper: Helper) -> T:
    warm_up(device)  # what is timed has its libraries loaded
    return work(helper)


def _elsewhere(work: Callable[[Helper], T], device: str) -> T:
    """``work`` done by a helper; in this process where there can be none.

    Raises:
        HelperDiedError: the helper could not be asked to the end.
    """
    with Helper() as helper:
        with contextlib.suppress(NoHelperError):
            return helper.ask(functools.partial(_warm, work, device))
        found = in_fresh_thread(functools.partial(work, helper))
    _forget()
    return found


def _forget() -> None:
    gc.collect()  # frozen modules refer to themselves
    release_free_memory()


def _plans(question: Question, helper: Helper) -> Made:
    made, budget = _made(question, helper), question.budget_bytes
    if made.plans:
        return made
    assert budget is not None
    raise BudgetError(
        found=f"a budget of {format_mib(budget)}, within which not even the leanest plan ran in a trial",
        expected=f"a step of {question.recipe.batch_size} samples of {'x'.join(map(str, question.input_shape))} to fit",
        action=_advice(question, helper, leanest=made.leanest),
    )


def _made(question: Question, helper: Helper) -> Made:
    budget = question.budget_bytes

    def runs(plan: Plan, *, keeps_freed: bool = False) -> bool:
        if budget is None:
            return not keeps_freed
        if question.has_run and question.how is not None and not keeps_freed:
            return True
        batch_size = question.recipe.batch_size
        return question.runs(plan, helper, budget_bytes=budget, batch_size=batch_size, keeps_freed=keeps_freed)

    if question.how is not None:
        return given(
            question.make_model,
            question.how,
            input_shape=question.input_shape,
            recipe=question.recipe,
            runs=runs,
            device=question.device,
            snr_limit=question.snr_limit,
            objective=question.objective,
        )
    return planned(
        question.make_model,
        input_shape=question.input_shape,
        recipe=question.recipe,
        budget_bytes=None if budget is None else max(1, budget - question.decoding_bytes),
        runs=runs,
        device=question.device,
        sample=question.sample,
        update_in_backward=question.update_in_backward,
        snr_limit=question.snr_limit,
        objective=question.objective,
        guest=question.guest,
    )


def _would_hold(question: Question, helper: Helper) -> str:
    """The budget to pass instead of one that does not even hold the weights."""
    leanest = _made(question, helper).leanest or [lean_mode(question.snr_limit)]
    return _advice(question, helper, leanest=leanest, changes={"--budget"})


def _advice(
    question: Question,
    helper: Helper,
    *,
    leanest: Sequence[UniformMode | Plan],
    changes: Collection[Change] | None = None,
) -> str:
    assert question.budget_bytes is not None

    def runs(plan: UniformMode | Plan, samples: int, cap_bytes: int) -> bool:
        return question.runs(plan, helper, budget_bytes=cap_bytes, batch_size=samples)

    return advise(
        question.make_model,
        leanest=leanest,
        lean=lean_mode(question.snr_limit),
        input_shape=question.input_shape,
        batch_size=question.recipe.batch_size,
        budget_bytes=question.budget_bytes,
        available_bytes=question.available_bytes,
        beside_bytes=question.guest.standing_bytes + question.decoding_bytes,
        runs=runs,
        device=question.device,
        changes=question.changes if changes is None else changes,
    )


def check_budget(make_model: Callable[[], nn.Module], budget_bytes: int, *, standing_bytes: int = 0) -> None:
    """Refuses a budget that does not hold weights, gradients and momentum, before anything is allocated.

    Args:
        standing_bytes: of what is there besides, such as a teacher.

    Raises:
        BudgetError: with the bytes needed.
    """
    state = torch.get_rng_state()
    try:
        with torch.device("meta"):
            model = make_model()
    except (NotImplementedError, RuntimeError):  # the user's function looks at the values of its weights
        model = make_model()
    torch.set_rng_state(state)
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    drawn = model.drawn if isinstance(model, SampledNetwork) else model  # what has gradients in one step
    trained = [p.numel() * p.element_size() for p in model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in drawn.parameters() if p.requires_grad)
    needed = parameters + sum(trained) + gradients + buffers + standing_bytes
    if budget_bytes <= needed:
        frozen = "" if sum(trained) == parameters else ", some of which are frozen"
        besides = f", and {format_mib(standing_bytes)} of the teacher" if standing_bytes else ""
        raise BudgetError(
            found=f"a budget of {format_mib(budget_bytes)}",
            expected=f"more than {format_mib(needed)}: weights, gradients and momentum of "
            f"{sum(p.numel() for p in model.parameters()):,} parameters{frozen}{besides}, before any activation",
            action=f"raise --budget above {format_mib(needed)} or choose a smaller --model",
        )
