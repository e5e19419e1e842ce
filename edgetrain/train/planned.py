"""The plan of a run inside a cap: made for the allocator, tried as a process.

The planner counts what torch's allocator hands out. A process takes more: code that libraries generate, holes in its
heap, batches that are being decoded. So the plan is made for a part of the budget, run for two steps in a process of
its own under the cap (:mod:`edgetrain.train.trial`), and made for less until that goes well.

A heap that keeps what is freed spares a step its page faults, and has holes (:mod:`edgetrain.targets.glibc`). So it is
tried first, also with somewhat smaller plans, as long as recomputing more costs less than the faults.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from edgetrain.chain import chain_of, measure_noise
from edgetrain.errors import ModelError
from edgetrain.memory import Guest
from edgetrain.memory.simulate import updates_in_backward
from edgetrain.planner import SNR_LIMIT, Plan, Planner, UniformMode, uniform_plan
from edgetrain.planner.smaller import planner_like, smaller_plans
from edgetrain.train.advice import lean_mode
from edgetrain.train.objectives import Objective, group_of, rehearsal_of
from edgetrain.train.recipe import Recipe
from edgetrain.train.trial import capped_bytes
from edgetrain.units import KIB, MIB, format_mib

_LOG = logging.getLogger(__name__)

_LIBRARY_BYTES, _KERNEL_BYTES = 8 * MIB, 200 * KIB
_SHARE, _SMALLER = 0.95, 0.92
# holes took a tenth to a quarter of what plans take; hybrid18's plans in 450 MiB were even at 1.1 times the time
_KEPT_SHARES, _FAULTS = (0.9, 0.8, 0.7), 1.1
_NOBODY = Guest()


@dataclass(frozen=True)
class Made:
    """Plans of a run.

    Attributes:
        plans: the one to begin with and smaller ones to fall back on; empty where none of them runs.
        leanest: what the least budget is found with.
        keeps_freed: whether the first of them ran in a heap that keeps what is freed.
    """

    plans: list[Plan]
    leanest: list[UniformMode | Plan]
    keeps_freed: bool = False


class Runs(Protocol):
    """Whether a plan's run stays inside the budget, in a heap that returns what is freed or in one that keeps it."""

    def __call__(self, plan: Plan, *, keeps_freed: bool = False) -> bool: ...


def planned(
    make_model: Callable[[], nn.Module],
    *,
    input_shape: tuple[int, int, int],
    recipe: Recipe,
    budget_bytes: int | None,
    runs: Runs,
    device: str = "cpu",
    sample: Tensor | None = None,
    update_in_backward: bool = False,
    snr_limit: float = SNR_LIMIT,
    objective: Objective | None = None,
    guest: Guest = _NOBODY,
) -> Made:
    """The fastest plan whose run stays inside ``budget_bytes``, and smaller ones.

    Args:
        make_model: makes the network.
        input_shape: (c, h, w).
        runs: whether a plan stays inside.
        sample: some images (n, c, h, w), on which the noise of inversions is measured; None: random numbers.
        update_in_backward: step the optimiser of each block as soon as its gradients are there.
        snr_limit: least ratio of signal to noise of what is inverted; infinity: no inversion leaves noise.
        objective: None: cross-entropy.
        guest: what it has in memory beside the step.
    """
    torch.manual_seed(recipe.seed)
    model = make_model().to(device)
    chain_of(model).shapes((recipe.batch_size, *input_shape))  # names the block that does not take its input
    planner = Planner(
        model,
        input_shape=input_shape,
        batch_size=recipe.batch_size,
        optimizer=recipe.optimizer_for(model),
        update_in_backward=update_in_backward,
        snr_limit=snr_limit,
        noise=None if sample is None else measure_noise(model, sample),
        loss=rehearsal_of(objective),
        guest=guest,
        group=group_of(objective),
    )
    if budget_bytes is None:
        plan = planner.plan()
        return Made([plan, *smaller_plans(planner, plan)], [])
    # libraries generate code for every kind of convolution, forward and backward
    kinds = {(m.weight.shape, m.stride, m.groups) for m in model.modules() if isinstance(m, nn.Conv2d)}
    batch_bytes = 4 * recipe.batch_size * input_shape[0] * input_shape[1] * input_shape[2]
    aside = _LIBRARY_BYTES + 2 * _KERNEL_BYTES * len(kinds) + 2 * batch_bytes  # the next batch, and its images
    least_bytes = planner.least().peak_bytes
    target = max(int(_SHARE * budget_bytes) - aside, least_bytes)
    plan = planner.plan(target)
    if device == "cpu":
        kept_bytes = capped_bytes(budget_bytes, keeps_freed=True) - aside
        kept = _in_kept_heap(planner, kept_bytes, least_bytes, _FAULTS * plan.step_seconds, runs)
        if kept is not None:
            return Made([kept, *smaller_plans(planner, kept)], [], keeps_freed=True)
    while True:
        _LOG.info("trying a plan of %s in a process of %s", format_mib(plan.peak_bytes), format_mib(budget_bytes))
        if runs(plan):
            return Made([plan, *smaller_plans(planner, plan)], [])
        if plan.peak_bytes <= least_bytes:
            break
        plan = planner.plan(max(least_bytes, int(_SMALLER * plan.peak_bytes)))
    lean = uniform_plan(
        model,
        lean_mode(snr_limit),
        input_shape=input_shape,
        batch_size=recipe.batch_size,
        update_in_backward=update_in_backward,
    )
    if runs(lean):  # what is leanest for the allocator need not be so for the process
        return Made([lean, *smaller_plans(planner, lean)], [])
    return Made([], [plan, lean])


def _in_kept_heap(planner: Planner, most_bytes: int, least_bytes: int, most_seconds: float, runs: Runs) -> Plan | None:
    """The largest of some plans that runs in a heap that keeps what is freed; None: none that is fast enough does."""
    for share in _KEPT_SHARES:
        target = int(share * most_bytes)
        if target < least_bytes:
            return None
        plan = planner.plan(target)
        if plan.step_seconds > most_seconds:
            return None
        _LOG.info("trying a plan of %s in a heap that keeps what is freed", format_mib(plan.peak_bytes))
        if runs(plan, keeps_freed=True):
            return plan
    return None


def given(
    make_model: Callable[[], nn.Module],
    how: UniformMode | Plan,
    *,
    input_shape: tuple[int, int, int],
    recipe: Recipe,
    runs: Runs,
    device: str = "cpu",
    snr_limit: float = SNR_LIMIT,
    objective: Objective | None = None,
) -> Made:
    """The plan that was asked for, also where it does not run, and smaller ones, of which the first or the last does.

    Args:
        how: the plan, or the mode of all blocks.
        input_shape, runs, snr_limit, objective: as of :func:`planned`; the limit is that of the smaller ones.
    """
    torch.manual_seed(recipe.seed)
    model = make_model().to(device)
    plan = how
    if isinstance(plan, str):
        plan = uniform_plan(model, plan, input_shape=input_shape, batch_size=recipe.batch_size)
    optimizer, loss, group = recipe.optimizer_for(model), rehearsal_of(objective), group_of(objective)
    plans = [plan]
    with contextlib.suppress(ModelError):  # no shapes without values in its forward: no plan but those that are given
        planner = planner_like(model, plan, optimizer=optimizer, loss=loss, group=group, snr_limit=snr_limit)
        plans += smaller_plans(planner, plan)
    if device == "cpu" and runs(plan, keeps_freed=True):
        return Made(plans, [], keeps_freed=True)
    if runs(plans[-1]):
        return Made(plans, [])
    lean = uniform_plan(
        model,
        lean_mode(snr_limit),
        input_shape=input_shape,
        batch_size=recipe.batch_size,
        update_in_backward=updates_in_backward(plan.program),
    )
    if lean == plans[-1]:
        return Made([], [lean])
    if runs(lean):  # also where it is the one that was asked for: what is leaner for the allocator did not run
        before = plans[: plans.index(lean)] if lean in plans else plans
        return Made([*before, lean], [])
    return Made([], [plans[-1], lean])
