"""One model on many devices: one trace per mode and batch size, replayed once per kind of allocator.

What a step needs depends on a profile only by its kind, its cuBLAS workspace and its cuDNN limit; what there is, and
how fast it is, follows from the profile by arithmetic. The largest batch is looked for among the powers of two: each is
traced, so it fits by prediction; :func:`edgetrain.memory.max_batch` finds what lies between.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from edgetrain.chain import Chain, chain_of
from edgetrain.errors import UsageError
from edgetrain.memory import Costs, StepTrace, measure_costs, predicted_times, program_seconds, simulate, trace_step
from edgetrain.memory.estimate import DTYPES, Estimate, Precision, available_on, from_trace
from edgetrain.memory.operators import DeviceKind
from edgetrain.planner import Plan, UniformMode, schedule
from edgetrain.planner.uniform import UNIFORM_MODES, decide
from edgetrain.profiles import Profile
from edgetrain.report.facts import DeviceRow, Fit
from edgetrain.runtime import wrap

LARGEST_TRIED = 4096
"""Samples of the largest batch that is looked at: few train with more, and devices of any memory then share traces."""


def device_rows(
    model: nn.Module,
    *,
    input_shape: tuple[int, int, int],
    batch_size: int,
    profiles: Sequence[Profile],
    optimizer: str = "sgd",
    precision: Precision = "fp32",
) -> tuple[DeviceRow, ...]:
    """A row per profile: keeping everything, and the uniform mode with the lowest peak where that is another.

    Args:
        input_shape: (c, h, w) of one sample.
        batch_size: at which a step is rated.

    Raises:
        ModelError: the model cannot be traced.
    """
    if not profiles:
        return ()
    steps = _Steps(model, input_shape, optimizer, precision)
    costs_on = {
        kind: measure_costs(
            model,
            input_shape=input_shape,
            batch_size=batch_size,
            dtype=DTYPES[precision],
            optimizer=optimizer,
            device=kind,
        )
        for kind in {profile.kind for profile in profiles}
    }
    plans = {mode: steps.plan(mode, batch_size) for mode in UNIFORM_MODES}
    rows = []
    for profile in profiles:
        costs = costs_on[profile.kind]
        leanest = min(UNIFORM_MODES, key=lambda mode: simulate(plans[mode].program, costs).peak_bytes)
        modes: list[UniformMode] = list(dict.fromkeys(("keep_all", leanest)))
        estimates = {mode: steps.estimate(mode, batch_size, profile) for mode in modes}
        available = available_on(profile)
        fits = [
            Fit(
                mode=mode,
                needed_bytes=found.process_peak_bytes,
                fits=None if available is None else found.process_peak_bytes <= available,
                largest_batch=None if available is None else steps.largest(mode, profile, available, found),
                images_per_s=_images_per_s(plans[mode], costs, profile, precision),
            )
            for mode, found in estimates.items()
        ]
        rows.append(
            DeviceRow(
                device=profile.name,
                available_bytes=available,
                at_most=bool(profile.memory is not None and profile.unknown_overheads),
                trains=profile.training,
                fits=tuple(fits),
            )
        )
    return tuple(rows)


@dataclass
class _Steps:
    """Traces and their replays, each made once."""

    model: nn.Module
    input_shape: tuple[int, int, int]
    optimizer: str
    precision: Precision
    _traces: dict[tuple[UniformMode, int, DeviceKind], StepTrace] = field(default_factory=dict)
    _estimates: dict[tuple[UniformMode, int, str], Estimate] = field(default_factory=dict)

    @functools.cached_property
    def _chain(self) -> Chain:
        return chain_of(self.model)

    def plan(self, mode: UniformMode, batch_size: int) -> Plan:
        """As :func:`edgetrain.uniform_plan`, from one chain for all."""
        decisions = decide(self._chain.blocks, mode)
        modes = tuple(mode for mode, _ in decisions)
        names, shapes = (
            [block.name for block in self._chain.blocks],
            self._chain.shapes((batch_size, *self.input_shape)),
        )
        return Plan(modes, tuple(reason for _, reason in decisions), schedule(names, shapes, modes))

    def estimate(self, mode: UniformMode, batch_size: int, profile: Profile) -> Estimate:
        """What the step needs on ``profile``; what there is may be that of another profile of the same allocator."""
        key = mode, batch_size, f"{profile.kind} {profile.cublas_workspace_bytes} {profile.cudnn_workspace}"
        if key not in self._estimates:
            traced = mode, batch_size, profile.kind
            if traced not in self._traces:
                self._traces[traced] = self._trace(*traced)
            trace = self._traces[traced]
            self._estimates[key] = from_trace(trace, profile, batch_size=batch_size, precision=self.precision)
        return self._estimates[key]

    def largest(self, mode: UniformMode, profile: Profile, available_bytes: int, known: Estimate) -> int:
        """The largest power of two that fits ``available_bytes``; 0 where not even two samples do.

        A batch norm over single values cannot train on one sample, so two are the least that is tried.
        """
        per_sample = max(1, known.process_peak_bytes // known.batch_size)
        guess = min(max(2, available_bytes // per_sample), LARGEST_TRIED)
        batch = 1 << (guess.bit_length() - 1)

        def fits(n: int) -> bool:
            return self.estimate(mode, n, profile).process_peak_bytes <= available_bytes

        while batch >= 2 and not fits(batch):
            batch //= 2
        if batch < 2:
            return 0
        while 2 * batch <= LARGEST_TRIED and fits(2 * batch):
            batch *= 2
        return batch

    def _trace(self, mode: UniformMode, batch_size: int, device: DeviceKind) -> StepTrace:
        # keeping everything is the model's own step, to the byte, and sooner traced without a plan
        wrapped = None if mode == "keep_all" else functools.partial(wrap, plan=self.plan(mode, batch_size))
        return trace_step(
            self.model,
            input_shape=self.input_shape,
            batch_size=batch_size,
            wrap=wrapped,
            optimizer=self.optimizer,
            dtype=DTYPES[self.precision],
            device=device,
        )


def _images_per_s(plan: Plan, costs: Costs, profile: Profile, precision: Precision) -> float | None:
    try:
        times = predicted_times(costs, profile, precision)
    except UsageError:  # the profile does not say how fast the device is
        return None
    return costs.batch_size / program_seconds(plan.program, times)
