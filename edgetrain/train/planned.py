"""The plan of a run inside a cap: made for the allocator, tried as a process.

The planner counts what torch's allocator hands out. A process takes more: code that libraries generate, holes in its
heap, batches that are being decoded. So the plan is made for a part of the budget, run for two steps in a process of
its own under the cap (:mod:`edgetrain.train.trial`), and made for less until that goes well.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from edgetrain.chain import chain_of, measure_noise
from edgetrain.memory import Guest
from edgetrain.planner import Plan, Planner, UniformMode, uniform_plan
from edgetrain.planner.smaller import planner_like, smaller_plans
from edgetrain.targets import release_free_memory
from edgetrain.train.objectives import Objective, group_of, rehearsal_of
from edgetrain.train.recipe import Recipe
from edgetrain.train.trial import Trial, Trials
from edgetrain.units import KIB, MIB, format_mib

_LOG = logging.getLogger(__name__)

LEAN: UniformMode = "invert_layerwise"
"""The leanest of the uniform modes."""

_LIBRARY_BYTES, _KERNEL_BYTES = 8 * MIB, 200 * KIB
_SHARE, _SMALLER = 0.95, 0.92
_NOBODY = Guest()


def planned(
    make_model: Callable[[], nn.Module],
    *,
    input_shape: tuple[int, int, int],
    recipe: Recipe,
    budget_bytes: int | None,
    device: str = "cpu",
    sample: Tensor | None = None,
    update_in_backward: bool = False,
    objective: Objective | None = None,
    guest: Guest = _NOBODY,
) -> list[Plan]:
    """The fastest plan whose run stays inside ``budget_bytes``, and smaller ones to fall back on.

    Empty where not even the leanest stays inside.

    Args:
        make_model: makes the network.
        input_shape: (c, h, w).
        sample: some images (n, c, h, w), on which the noise of inversions is measured; None: random numbers.
        update_in_backward: step the optimiser of each block as soon as its gradients are there.
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
        noise=None if sample is None else measure_noise(model, sample),
        loss=rehearsal_of(objective),
        guest=guest,
        group=group_of(objective),
    )
    if budget_bytes is None:
        plan = planner.plan()
        return [plan, *smaller_plans(planner, plan)]
    # libraries generate code for every kind of convolution, forward and backward
    kinds = {(m.weight.shape, m.stride, m.groups) for m in model.modules() if isinstance(m, nn.Conv2d)}
    batch_bytes = 4 * recipe.batch_size * input_shape[0] * input_shape[1] * input_shape[2]
    aside = _LIBRARY_BYTES + 2 * _KERNEL_BYTES * len(kinds) + 2 * batch_bytes  # the next batch, and its images
    least_bytes = planner.least().peak_bytes
    target = max(int(_SHARE * budget_bytes) - aside, least_bytes)
    found: Plan | None = None

    def trial(plan: Plan) -> Trial:
        return Trial(make_model, plan, input_shape, recipe.batch_size, budget_bytes, device, objective)

    with Trials() as trials:
        while found is None:
            plan = planner.plan(target)
            _LOG.info("trying a plan of %s in a process of %s", format_mib(plan.peak_bytes), format_mib(budget_bytes))
            if trials.fits(trial(plan)):
                found = plan
            elif plan.peak_bytes <= least_bytes:
                break
            target = max(least_bytes, int(_SMALLER * plan.peak_bytes))
        if found is None:  # what is leanest for the allocator need not be so for the process
            plan = uniform_plan(
                model,
                LEAN,
                input_shape=input_shape,
                batch_size=recipe.batch_size,
                update_in_backward=update_in_backward,
            )
            found = plan if trials.fits(trial(plan)) else None
    plans = [] if found is None else [found, *smaller_plans(planner, found)]
    del model, planner
    _forget()
    return plans


def fallbacks(
    make_model: Callable[[], nn.Module],
    plan: Plan,
    *,
    recipe: Recipe,
    objective: Objective | None = None,
) -> list[Plan]:
    """Smaller plans to fall back on from ``plan``, which was given."""
    torch.manual_seed(recipe.seed)
    model = make_model()
    optimizer, loss, group = recipe.optimizer_for(model), rehearsal_of(objective), group_of(objective)
    planner = planner_like(model, plan, optimizer=optimizer, loss=loss, group=group)
    plans = list(smaller_plans(planner, plan))
    del model, planner
    _forget()
    return plans


def _forget() -> None:
    gc.collect()  # frozen modules refer to themselves
    release_free_memory()
