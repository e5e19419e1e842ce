"""What would fit: the smallest change that brings a training step under a budget.

A step's peak is affine in the batch size (weights and their gradients, plus activations per sample), so two small
batches measured at the allocator give it for every batch. A process takes more than its allocator: the estimate is
widened by a tenth, or by what makes the step that has just failed come out above the budget. What comes out of it is
only where the search starts: a change is named after training steps ran under the cap with it, and is made smaller (a
batch, by bisection) or larger (a budget, by a tenth) until they do.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from edgetrain.memory import measure_peak
from edgetrain.planner import UniformMode, uniform_plan
from edgetrain.runtime import wrap
from edgetrain.train.trial import Trial, Trials
from edgetrain.units import MIB, format_mib

Change = Literal["--mode", "--batch-size", "--budget"]
CHANGES: tuple[Change, ...] = ("--mode", "--batch-size", "--budget")
WIDENING = 1.1
_SMALL, _LARGE = 4, 12
_SMALLEST_BATCH = 2  # batch norm needs two samples
_TRIES = 12


def peak_bytes(
    make_model: Callable[[], nn.Module],
    mode: UniformMode,
    *,
    input_shape: tuple[int, int, int],
    device: str = "cpu",
) -> tuple[float, float]:
    """``(fixed, per_sample)``: bytes of a training step with momentum as an affine function of the batch size.

    Args:
        input_shape: (c, h, w).
    """
    model = make_model().to(device)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    peaks = []
    for batch_size in (2, _SMALL, _LARGE):  # the first creates the gradients
        plan = uniform_plan(model, mode, input_shape=input_shape, batch_size=batch_size)
        net = wrap(model, plan)
        x = torch.randn(batch_size, *input_shape, device=device)
        labels = torch.zeros(batch_size, dtype=torch.long, device=device)

        def step(net: nn.Module = net, x: torch.Tensor = x, labels: torch.Tensor = labels) -> None:
            F.cross_entropy(net(x), labels).backward()

        measured = measure_peak(step, device=device).allocator_peak_bytes
        peaks.append(measured + 2 * x.numel() * x.element_size())  # the batch itself, decoded and prefetched
    per_sample = (peaks[2] - peaks[1]) / (_LARGE - _SMALL)
    return weights + 2 * trained + peaks[1] - per_sample * _SMALL, per_sample


def advise(
    make_model: Callable[[], nn.Module],
    *,
    mode: UniformMode,
    input_shape: tuple[int, int, int],
    batch_size: int,
    budget_bytes: int,
    decoding_bytes: int = 0,
    device: str = "cpu",
    changes: Collection[Change] = CHANGES,
) -> str:
    """The smallest change that would fit, as a sentence for a person; each that is named was tried.

    A leaner mode comes first, because it changes nothing but time; then the largest batch; then the budget.

    Args:
        decoding_bytes: of the budget, which a step cannot have.
        changes: what the person can change.
    """
    estimates: dict[UniformMode, tuple[float, float]] = {}

    def raw(candidate: UniformMode, samples: int) -> float:
        if candidate not in estimates:
            estimates[candidate] = peak_bytes(make_model, candidate, input_shape=input_shape, device=device)
        fixed, per_sample = estimates[candidate]
        return fixed + per_sample * samples + decoding_bytes

    widening = max(WIDENING, 1.05 * budget_bytes / raw(mode, batch_size))

    def need(candidate: UniformMode, samples: int) -> float:
        return widening * raw(candidate, samples)

    def runs(candidate: UniformMode, samples: int, cap_bytes: int) -> bool:
        step_bytes = max(1, cap_bytes - decoding_bytes)
        return trials.fits(Trial(make_model, candidate, input_shape, samples, step_bytes, device))

    with Trials() as trials:
        lean: UniformMode = mode
        if "--mode" in changes and need("invert_layerwise", batch_size) < need(mode, batch_size):
            lean = "invert_layerwise"
            if need(lean, batch_size) <= budget_bytes and runs(lean, batch_size, budget_bytes):
                return f"pass --mode {lean}, which needs about {format_mib(need(lean, batch_size))} for the same batch"
        with_mode = "" if lean == mode else f"--mode {lean} and "

        estimated = next((n for n in range(batch_size - 1, 0, -1) if need(lean, n) <= budget_bytes), 0)
        samples = 0
        if "--batch-size" in changes and batch_size > _SMALLEST_BATCH:
            samples = _shrunk(estimated, lambda n: runs(lean, n, budget_bytes))
        mib = _grown(int(need(mode, batch_size)) // MIB + 1, lambda m: runs(mode, batch_size, m * MIB))
    if samples:
        raised = f", or --budget {mib}MiB" if mib and "--budget" in changes else ""
        return f"pass {with_mode}--batch-size {samples}{raised}"
    if mib:
        reason = ""
        if "--batch-size" in changes:
            reason = f": even {_SMALLEST_BATCH} samples did not fit in a trial in mode {lean}"
        return f"pass --budget {mib}MiB{reason}"
    return "choose a smaller model or a smaller image size: no budget that this host has would do"


def _shrunk(samples: int, runs: Callable[[int], bool]) -> int:
    """The most samples up to ``samples`` that run, found by bisection to a tenth; 0 where the smallest does not."""
    fails = max(samples, _SMALLEST_BATCH)
    if runs(fails):
        return fails
    if fails == _SMALLEST_BATCH or not runs(_SMALLEST_BATCH):
        return 0
    known = _SMALLEST_BATCH
    for _ in range(_TRIES - 2):
        if fails - known <= max(1, known // 10):
            break
        middle = (known + fails) // 2
        known, fails = (middle, fails) if runs(middle) else (known, middle)
    return known


def _grown(mib: int, runs: Callable[[int], bool]) -> int:
    """The first of ``mib`` and what is a tenth larger each that runs; 0 for none."""
    for _ in range(_TRIES):
        if runs(mib):
            return mib
        mib = max(mib + 1, round(mib * 1.1))
    return 0
