"""What would fit: the smallest change that brings a training step under a budget.

A step's peak is affine in the batch size (weights and their gradients, plus activations per sample), so two small
batches measured at the allocator give it for every batch. A process takes more than its allocator: the estimate is
widened by a tenth, or by what makes the step that has just failed come out above the budget.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from edgetrain.memory import measure_peak
from edgetrain.planner import UniformMode, uniform_plan
from edgetrain.runtime import wrap
from edgetrain.units import format_mib

WIDENING = 1.1
_SMALL, _LARGE = 4, 12


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
    return 3 * weights + peaks[1] - per_sample * _SMALL, per_sample


def advise(
    make_model: Callable[[], nn.Module],
    *,
    mode: UniformMode,
    input_shape: tuple[int, int, int],
    batch_size: int,
    budget_bytes: int,
    device: str = "cpu",
) -> str:
    """The smallest change that would fit, as a sentence for a person.

    A leaner mode comes first, because it changes nothing but time; then the largest batch; then the budget.
    """
    estimates: dict[UniformMode, tuple[float, float]] = {}

    def raw(candidate: UniformMode, samples: int) -> float:
        if candidate not in estimates:
            estimates[candidate] = peak_bytes(make_model, candidate, input_shape=input_shape, device=device)
        fixed, per_sample = estimates[candidate]
        return fixed + per_sample * samples

    widening = max(WIDENING, 1.05 * budget_bytes / raw(mode, batch_size))

    def need(candidate: UniformMode, samples: int) -> float:
        return widening * raw(candidate, samples)

    if mode != "invert_layerwise" and need("invert_layerwise", batch_size) <= min(budget_bytes, need(mode, batch_size)):
        return (
            f"pass --mode invert_layerwise, which needs about {format_mib(need('invert_layerwise', batch_size))} "
            f"for the same batch"
        )
    lean: UniformMode = mode
    if need("invert_layerwise", batch_size) < need(mode, batch_size):
        lean = "invert_layerwise"
    fits = next((n for n in range(batch_size - 1, 0, -1) if need(lean, n) <= budget_bytes), 0)
    with_mode = "" if lean == mode else f"--mode {lean} and "
    raised = f"--budget {int(need(mode, batch_size)) // 2**20 + 1}MiB"
    if fits:
        return f"pass {with_mode}--batch-size {fits}, or {raised}"
    return f"pass {raised}: even one sample needs about {format_mib(need(lean, 1))} in mode {lean}"
