"""Plans to fall back on when memory runs out, each with a smaller peak than the one before.

Between the peak p of the plan that runs and the least there is, p_0, the peaks aimed at fall geometrically:
p_0 + (p - p_0) 0.6^k. The last one is the leanest plan. All of them compute the same step: batch norm sees the same
samples, so the number of micro-batches changes only where no layer mixes samples, and no inversion is noisier than the
planner allows.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from edgetrain.memory import simulate
from edgetrain.memory.rates import INSTRUCTION_SECONDS, START_SECONDS, OperatorRates
from edgetrain.memory.simulate import updates_in_backward
from edgetrain.memory.step import Loss, OptimizerFactory, classification_loss
from edgetrain.planner.planning import SNR_LIMIT, Planner
from edgetrain.planner.plans import Plan
from edgetrain.planner.samples import mixing_layer
from edgetrain.runtime.program import Offload

_KEPT_EXCESS, _RUNGS = 0.6, 4

_NOMINAL = OperatorRates({1: 1e10}, 1e10, 5e9, START_SECONDS["cpu"], INSTRUCTION_SECONDS, "nominal rates")
"""Of a small device. They only rank plans of one network: nothing is timed at a moment without memory."""


def smaller_plans(planner: Planner, plan: Plan) -> Iterator[Plan]:
    """Plans with less and less memory than ``plan``, made when they are asked for; none where it is the leanest."""
    least_bytes = planner.least().peak_bytes
    last_bytes = peak_bytes(planner, plan)
    for target in [*_targets(last_bytes, least_bytes), least_bytes]:
        found = planner.fitting(target)
        if found is not None and found.peak_bytes < last_bytes:
            last_bytes = found.peak_bytes
            yield found


def planner_like(
    model: nn.Module,
    plan: Plan,
    *,
    optimizer: str | OptimizerFactory,
    loss: Loss = classification_loss,
    group: int = 1,
    snr_limit: float = SNR_LIMIT,
) -> Planner:
    """A planner of the steps that compute what ``plan`` does, without a clock.

    Args:
        snr_limit: as of :class:`Planner`.
        loss: from the model's output.
        group: samples that micro-batches must not part.
    """
    offloads = (step for step in plan.program.instructions if isinstance(step, Offload))
    exact_parts = mixing_layer(model) is None and not updates_in_backward(plan.program)
    return Planner(
        model,
        input_shape=plan.input_shape[1:],  # type: ignore[arg-type]
        batch_size=plan.input_shape[0],
        optimizer=optimizer,
        update_in_backward=updates_in_backward(plan.program),
        micro_batches=None if exact_parts else plan.micro_batches,
        allow_ghost_batchnorm=not exact_parts and plan.micro_batches > 1,
        stored_precision="bf16" if any(step.to == "bfloat16" for step in offloads) else None,
        channels_last="either" if plan.program.channels_last else False,  # some blocks invert planes alone
        times=_NOMINAL,
        loss=loss,
        group=group,
        snr_limit=snr_limit,
    )


def peak_bytes(planner: Planner, plan: Plan) -> int:
    """Predicted peak of ``plan``, also of one without costs."""
    if plan.costed is not None:
        return plan.peak_bytes
    samples = plan.program.shapes[0][0]
    costs = planner.costs(samples, plan.program.channels_last)
    return simulate(plan.program, costs).peak_bytes + planner.standing_bytes(plan.micro_batches)


def _targets(peak: int, least: int) -> list[int]:
    return [least + int((peak - least) * _KEPT_EXCESS**k) for k in range(1, _RUNGS)]
