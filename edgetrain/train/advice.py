"""What would fit: the smallest change that brings a training step under a budget.

A step's peak is affine in the batch size (weights and their gradients, plus activations per sample), so two small
batches measured at the allocator give it for every batch. A process takes more than its allocator: the estimate is
widened by a tenth, or by what makes the step that has just failed come out above the budget. What comes out of it is
only where the search starts. By bisection, with training steps under the cap, the largest batch is found to a tenth
below the estimate, and the smallest budget to a twentieth. As two runs of one program differ, something is left over:
the batch runs in a little less than the budget, and the budget that is named is a little more than what ran.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from edgetrain.memory import measure_peak
from edgetrain.planner import Plan, UniformMode, uniform_plan
from edgetrain.runtime import wrap
from edgetrain.units import MIB

LEAN: UniformMode = "invert_layerwise"
"""The leanest of the uniform modes."""


def lean_mode(snr_limit: float) -> UniformMode:
    """The leanest of the uniform modes, or of those that invert nothing where nothing may leave noise."""
    return "recompute" if math.isinf(snr_limit) else LEAN


Change = Literal["--batch-size", "--budget"]
CHANGES: tuple[Change, ...] = ("--batch-size", "--budget")
WIDENING = 1.1
_SMALL, _LARGE = 4, 12
_SMALLEST_BATCH = 2  # batch norm needs two samples
_TRIES = 12
_MARGIN, _MARGIN_BYTES = 1.05, MIB  # what ran once runs again in so many times as much, and so much on top


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
    leanest: Sequence[UniformMode | Plan],
    lean: UniformMode = LEAN,
    input_shape: tuple[int, int, int],
    batch_size: int,
    budget_bytes: int,
    available_bytes: int,
    beside_bytes: int = 0,
    runs: Callable[[UniformMode | Plan, int, int], bool],
    device: str = "cpu",
    changes: Collection[Change] = CHANGES,
) -> str:
    """The smallest changes that would fit, as a sentence for a person.

    Args:
        leanest: what is tried inside a budget.
        lean: the mode in which batches of another size are tried.
        input_shape: (c, h, w).
        budget_bytes: in which no step of ``batch_size`` samples ran.
        available_bytes: the largest budget that the host has.
        beside_bytes: what else the budget holds, such as a teacher.
        runs: whether a plan for so many samples runs inside so many bytes.
        changes: what the person can change.
    """
    fixed, per_sample = peak_bytes(make_model, lean, input_shape=input_shape, device=device)

    def raw(samples: int) -> float:
        return fixed + per_sample * samples + beside_bytes

    widening = max(WIDENING, 1.05 * budget_bytes / raw(batch_size))
    tight_bytes = max(1, int((budget_bytes - _MARGIN_BYTES) / _MARGIN))
    estimated = next((n for n in range(batch_size - 1, 0, -1) if widening * raw(n) <= tight_bytes), 0)
    samples = mib = 0
    if "--batch-size" in changes and batch_size > _SMALLEST_BATCH:
        samples = _shrunk(estimated, lambda n: runs(lean, n, tight_bytes))
    if "--budget" in changes:
        mib = _least(
            -(-budget_bytes // MIB),
            int(widening * raw(batch_size)) // MIB + 1,
            lambda size: any(runs(plan, batch_size, size * MIB) for plan in leanest),
            most=available_bytes // MIB,
        )
    if samples:
        return f"pass --batch-size {samples}" + (f", or --budget {mib}MiB" if mib else "")
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


def _least(fails: int, mib: int, runs: Callable[[int], bool], *, most: int) -> int:
    """The least above ``fails`` that runs, to a twentieth, and the margin on top; 0 for none.

    It is at most ``most``.

    A trial may fail in what another ran in: the same one, four times for each half MiB, never ran in 20.5 MiB, once of
    four in 21 and in 21.5, and always in 22 (hybrid of width 8, 64 images of 1x16x16). Of 1x32x32 in 20 MiB, 8 images
    ran four times of four, 9 and 10 twice each, 11 never.

    Args:
        mib: to begin with; made larger, by half each time, until it runs.
    """
    known = min(max(mib, fails + 1), most)
    while known > fails and not runs(known):
        fails, known = known, min(-(-known * 3 // 2), most)
    if known <= fails:
        return 0
    while known - fails > max(1, known // 20):
        middle = (known + fails) // 2
        known, fails = (middle, fails) if runs(middle) else (known, middle)
    return min(math.ceil(_MARGIN * known) + _MARGIN_BYTES // MIB, most)
