"""From a Plan to a Report: numbers of the planner and of :mod:`edgetrain.memory`, put side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from edgetrain.errors import ModelError, UsageError
from edgetrain.memory import Costs, Times, block_seconds, compose, measure_costs, predicted_times, simulate
from edgetrain.memory.estimate import DTYPES, Precision
from edgetrain.planner import Plan
from edgetrain.planner.place import Place
from edgetrain.profiles import Profile, load_profile, profile_names
from edgetrain.report.devices import device_rows
from edgetrain.report.facts import BlockRow, Instant, Missing, Point, Report
from edgetrain.report.levels import levels_of, plan_level, run_levels
from edgetrain.report.runs import Run
from edgetrain.runtime.program import Forward, Free, Instruction, Program, describe

_NO_MODEL = "a plan holds no sizes; name the model that it was made for with --model"


def report_of(
    plan: Plan,
    *,
    title: str,
    model: nn.Module | None = None,
    family: str | None = None,
    run: Run | None = None,
    device: str | Path | Profile | None = None,
    times: Times | None = None,
    optimizer: str = "sgd",
    precision: Precision = "fp32",
    profiles: Sequence[Profile] = (),
) -> Report:
    """The report of ``plan``.

    Args:
        model: that the plan was made for; without it what needs sizes is left out, and the report says so.
        family: the model's name in the zoo.
        run: that was trained by the plan.
        device: a profile, its name or path; None: the plan's own, where it names one. On another device the plan stays
            what it is; budget and context are the other's.
        times: seconds of the instructions; None: from the rates of the device, where it has some.
        optimizer: whose state is counted where the plan does not say.
        precision: of weights and activations.
        profiles: devices to try the model on.

    Raises:
        ModelError: the model is not the one of the plan.
    """
    costed = plan.costed
    if costed is not None and costed.optimizer != "a function":
        optimizer = costed.optimizer
    profile = _profile(device, plan)
    facts = Report(
        title=title,
        device=costed.device if costed is not None else None if profile is None else profile.name,
        input_shape=plan.input_shape,
        micro_batches=plan.micro_batches,
        optimizer=optimizer,
        peak_bytes=None if costed is None else costed.peak_bytes,
        reserved_bytes=None if costed is None else costed.reserved_bytes,
        budget_bytes=None if costed is None else costed.budget_bytes,
        context_bytes=0 if profile is None else profile.context_bytes or 0,
        step_seconds=None if costed is None else costed.step_seconds,
        times=None if costed is None else costed.times,
        blocks=_rows(plan),
        front=() if costed is None else tuple(Point(name="", peak_bytes=b, seconds=s) for b, s in costed.front),
        marked=_marked(plan),
        levels=run_levels(plan, run),
        epochs=() if run is None else run.epochs,
    )
    is_moved = profile is not None and costed is not None and profile.name != costed.device
    if profile is not None and is_moved:
        # what the allocator reserves, seconds and the front are those of the device that was planned for
        there = dict.fromkeys(("reserved_bytes", "step_seconds", "times")) | {"front": (), "marked": ()}
        budget_bytes = Place.of(profile).budget_bytes
        facts = facts.model_copy(update={**there, "device": profile.name, "budget_bytes": budget_bytes})
    if model is not None:
        costs = measure_costs(
            model,
            input_shape=plan.input_shape[1:],
            batch_size=plan.program.shapes[0][0],
            dtype=DTYPES[precision],
            optimizer=optimizer,
            device="cpu" if profile is None else profile.kind,
            channels_last=plan.program.channels_last,
        )
        if (costs.names, costs.shapes) != (plan.program.names, plan.program.shapes):
            raise ModelError(
                found=f"a model of {len(costs.names)} blocks, and a plan for {len(plan.modes)} others",
                expected="the model that the plan was made for",
                action="name it with its number of classes, its pooling and its frozen blocks",
            )
        slack_bytes = 0
        if facts.reserved_bytes is not None and facts.peak_bytes is not None:
            slack_bytes = max(0, facts.reserved_bytes - facts.peak_bytes)
        memory = _instants(plan, costs, context_bytes=facts.context_bytes, slack_bytes=slack_bytes)
        times = times or _times_of(costs, profile, precision)
        peak_bytes = max(instant.total_bytes - instant.context - instant.slack for instant in memory)
        facts = facts.model_copy(
            update={
                "peak_bytes": facts.peak_bytes or peak_bytes,
                "memory": memory,
                "blocks": _rows(plan, costs, times),
                "levels": (
                    *plan_level(plan, peak_bytes),
                    *levels_of(
                        plan,
                        costs,
                        model,
                        family=family,
                        run=run,
                        profile=profile,
                        optimizer=optimizer,
                        precision=precision,
                    ),
                ),
                "devices": device_rows(
                    model,
                    input_shape=_sample(plan),
                    batch_size=plan.input_shape[0],
                    profiles=profiles,
                    optimizer=optimizer,
                    precision=precision,
                )
                if profiles
                else (),
            }
        )
    return facts.model_copy(update={"missing": _missing(facts, has_model=model is not None, has_run=run is not None)})


def all_profiles() -> tuple[Profile, ...]:
    """Those that edgetrain brings."""
    return tuple(load_profile(name) for name in profile_names())


def _profile(device: str | Path | Profile | None, plan: Plan) -> Profile | None:
    if isinstance(device, Profile):
        return device
    if device is not None:
        return load_profile(device)
    if plan.costed is not None and plan.costed.device in profile_names():
        return load_profile(plan.costed.device)
    return None


def _times_of(costs: Costs, profile: Profile | None, precision: Precision) -> Times | None:
    try:
        return None if profile is None else predicted_times(costs, profile, precision)
    except UsageError:  # the profile does not say how fast the device is
        return None


def _sample(plan: Plan) -> tuple[int, int, int]:
    _, c, h, w = plan.input_shape
    return c, h, w


def _instants(plan: Plan, costs: Costs, *, context_bytes: int, slack_bytes: int) -> tuple[Instant, ...]:
    """Of one micro-batch; what stays from part to part is there all the time."""
    parts = plan.micro_batches - 1
    gradients = costs.gradient_bytes if parts else 0
    batch = parts * math.prod(costs.shapes[0]) * costs.element_bytes[0]
    return tuple(
        Instant(
            instruction="optimiser step" if found.instruction is None else describe(found.instruction),
            block=_block(plan.program, found.instruction),
            context=context_bytes,
            weights=found.weights,
            optimizer=found.optimizer,
            batch=found.batch + batch,
            gradients=found.gradients + gradients,
            kept=found.kept,
            hidden=found.hidden,
            temporaries=found.temporaries,
            slack=slack_bytes,
        )
        for found in compose(plan.program, costs)
    )


def _block(program: Program, step: Instruction | None) -> str:
    index = getattr(step, "block", getattr(step, "last", None))
    return "" if index is None else program.names[index] or "model"


def _rows(plan: Plan, costs: Costs | None = None, times: Times | None = None) -> tuple[BlockRow, ...]:
    left = None if costs is None else _left_bytes(plan.program, costs)
    seconds = None if times is None else block_seconds(plan.program, times)
    return tuple(
        BlockRow(
            name=name or "model",
            mode=mode,
            left_bytes=None if left is None else left[i],
            seconds=None if seconds is None else seconds[i],
            snr=plan.snrs[i] if plan.snrs and math.isfinite(plan.snrs[i]) else None,
            reason=reason,
        )
        for i, (name, mode, reason) in enumerate(zip(plan.program.names, plan.modes, plan.reasons, strict=True))
    )


def _left_bytes(program: Program, costs: Costs) -> list[int]:
    """What the first pass of each block adds, and frees right behind it."""
    left = [0] * len(program.names)
    passed: set[int] = set()
    latest: int | None = None
    for moment in simulate(program, costs).moments:
        step = moment.instruction
        if isinstance(step, Forward) and step.block not in passed:
            latest = step.block
            passed.add(latest)
        elif not isinstance(step, Free):
            latest = None
        if latest is not None:
            left[latest] += moment.after_bytes - moment.before_bytes
    return left


def _marked(plan: Plan) -> tuple[Point, ...]:
    costed = plan.costed
    if costed is None:
        return ()
    found = {
        (costed.peak_bytes, costed.step_seconds): Point(
            name="chosen", peak_bytes=costed.peak_bytes, seconds=costed.step_seconds
        )
    }
    for other in costed.alternatives:
        if other.peak_bytes is not None and other.seconds is not None:
            # a mode that no block has is the same as keeping everything: once is enough
            point = Point(name=other.name, peak_bytes=other.peak_bytes, seconds=other.seconds, reason=other.reason)
            found.setdefault((point.peak_bytes, point.seconds), point)
    return tuple(found.values())


def _missing(facts: Report, *, has_model: bool, has_run: bool) -> tuple[Missing, ...]:
    reasons: list[tuple[str, bool, str]] = [
        ("memory", not facts.memory, _NO_MODEL),
        ("front", not facts.marked, "it takes a plan with costs, made for this device: edgetrain plan --device"),
        ("run", not has_run, "nothing was trained: give the folder of a run"),
        ("devices", not facts.devices, "no device was asked for" if has_model else _NO_MODEL),
        ("levels", not facts.levels, "there is nothing to compare with: no model and no run"),
    ]
    return tuple(Missing(section=section, reason=reason) for section, empty, reason in reasons if empty)
