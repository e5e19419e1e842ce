"""Each prediction beside what checks it: the simulation by a trace, the trace by a run, seconds by a run."""

from __future__ import annotations

import functools

from torch import nn

from edgetrain.memory import Costs, resnet_bytes_per_pixel, reversible_bytes_per_pixel, simulate, trace_step
from edgetrain.memory.estimate import DTYPES, Precision, from_trace
from edgetrain.planner import Plan, UniformMode, uniform_plan
from edgetrain.profiles import Profile, load_profile
from edgetrain.report.facts import Level
from edgetrain.report.runs import Run
from edgetrain.runtime import wrap
from edgetrain.runtime.program import Update


def levels_of(
    plan: Plan,
    costs: Costs,
    model: nn.Module,
    *,
    family: str | None,
    run: Run | None,
    profile: Profile | None,
    optimizer: str,
    precision: Precision,
) -> tuple[Level, ...]:
    """The levels of one micro-batch of ``plan``, from the cheapest to the truest.

    Args:
        family: name of the network in the zoo, for which the source may have a formula.
    """
    samples = plan.program.shapes[0][0]
    found = _closed_form(plan, costs, model, family)
    if any(isinstance(step, Update) for step in plan.program.instructions):
        return (*found, *run_levels(plan, run))  # its optimisers live in the wrapped model: a trace has no state
    trace = trace_step(
        model,
        input_shape=plan.input_shape[1:],
        batch_size=samples,
        wrap=functools.partial(wrap, plan=plan),
        optimizer=optimizer,
        dtype=DTYPES[precision],
        device="cpu" if profile is None else profile.kind,
    )
    traced = from_trace(trace, profile or load_profile("cpu"), batch_size=samples, precision=precision)
    found.append(
        Level(
            name="simulated program",
            predicted=simulate(plan.program, costs).peak_bytes,
            against="trace of the whole step",
            found=traced.peak_bytes,
            unit="B",
        )
    )
    is_cuda = profile is not None and profile.kind == "cuda"
    found.append(
        Level(
            name="trace of the whole step",
            predicted=traced.peak_bytes,
            against="simulated allocator" if is_cuda else "simulated process",
            found=traced.reserved_bytes if is_cuda else traced.process_peak_bytes,
            unit="B",
        )
    )
    if run is not None and run.peak_bytes and plan.micro_batches == 1:
        found.append(
            Level(
                name="simulated process",
                predicted=traced.process_peak_bytes,
                against="measured by the run",
                found=run.peak_bytes,
                unit="B",
            )
        )
    return (*found, *run_levels(plan, run))


def plan_level(plan: Plan, simulated_bytes: int) -> tuple[Level, ...]:
    """What the plan says beside what this model gives: another optimiser, precision or frozen block shows here."""
    if plan.costed is None:
        return ()
    said = plan.costed.peak_bytes
    return (Level(name="the plan's peak", predicted=said, against="simulated again", found=simulated_bytes, unit="B"),)


def run_levels(plan: Plan, run: Run | None) -> tuple[Level, ...]:
    """What a run alone tells."""
    if run is None or plan.costed is None or run.step_seconds is None:
        return ()
    predicted = plan.costed.step_seconds
    seconds = Level(
        name="step time", predicted=predicted, against="measured by the run", found=run.step_seconds, unit="s"
    )
    if not run.peak_bytes:
        return (seconds,)
    peak = Level(
        name="allocator peak",
        predicted=plan.costed.peak_bytes,
        against="measured by the run, process",
        found=run.peak_bytes,
        unit="B",
    )
    return (peak, seconds)


_SOURCE_MODES: dict[str, UniformMode] = {
    "resnet18": "keep_all",
    "revnet18": "invert",
    "irevnet18": "invert",
    "layerwise18": "invert_layerwise",
    "hybrid18": "invert_layerwise",
}


def _closed_form(plan: Plan, costs: Costs, model: nn.Module, family: str | None) -> list[Level]:
    """The source's formula, where the network is one of its table and runs as it does there."""
    if family not in _SOURCE_MODES:
        return []
    n, c, h, w = plan.program.shapes[0]
    source = uniform_plan(model, _SOURCE_MODES[family], input_shape=(c, h, w), batch_size=n)
    if source.modes != plan.modes:
        return []
    formula = resnet_bytes_per_pixel() if family == "resnet18" else reversible_bytes_per_pixel(family)
    weights = costs.weight_bytes + costs.gradient_bytes + costs.optimizer_bytes
    simulated = simulate(plan.program, costs).peak_bytes
    predicted = weights + formula * n * h * w
    return [Level(name="closed formula", predicted=predicted, against="simulated program", found=simulated, unit="B")]
