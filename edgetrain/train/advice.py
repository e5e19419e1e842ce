"""What would fit: the smallest change that brings a training step under a budget.

A step's peak is affine in the batch size (weights and their gradients, plus activations per sample), so two small
batches measured at the allocator give it for every batch. A process takes more than its allocator: the estimate is
widened by a tenth, or by what makes the step that has just failed come out above the budget. What comes out of it is
only where the search starts: a change is named after training steps ran under the cap with it, and is made smaller (a
batch) or larger (a budget) by a tenth until they do.
"""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable, Collection
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from edgetrain.errors import BudgetError
from edgetrain.memory import measure_peak
from edgetrain.planner import UniformMode, uniform_plan
from edgetrain.runtime import wrap
from edgetrain.targets import select_target
from edgetrain.train.recipe import Recipe
from edgetrain.train.trainer import evaluate
from edgetrain.units import MIB, format_mib

Change = Literal["--mode", "--batch-size", "--budget"]
CHANGES: tuple[Change, ...] = ("--mode", "--batch-size", "--budget")
WIDENING = 1.1
EVALUATION_BATCH_SIZE = 128
"""Most samples of a test batch, in the runs of the command line and in the trials here."""

_SMALL, _LARGE = 4, 12
_SMALLEST_BATCH = 2  # batch norm needs two samples
_TRIES = 12
# a run has loader, thread, checkpoint writer and its own fragmentation besides what a trial has
_RESERVE_BYTES, _RESERVE = 2 * MIB, 0.02


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


def fits(
    make_model: Callable[[], nn.Module],
    mode: UniformMode,
    *,
    input_shape: tuple[int, int, int],
    batch_size: int,
    budget_bytes: int,
    device: str = "cpu",
) -> bool:
    """Whether two training steps and an evaluation run under a cap that is a little below ``budget_bytes``.

    They run in a thread of their own: oneDNN remembers a failed allocation for as long as a thread lives. What the
    heap holds free from earlier work, and a new process would not have, is taken off the cap. False, too, where the
    host has not as much memory available.
    """
    target = select_target(device)
    capped_bytes = int(budget_bytes * (1 - _RESERVE)) - _RESERVE_BYTES
    gc.collect()
    if capped_bytes <= 0 or budget_bytes > target.probe().available_bytes:
        return False
    succeeded: list[bool] = []
    failures: list[Exception] = []

    def attempt() -> None:
        try:
            target.cap(max(1, capped_bytes - _reusable_bytes(device)))
            _try_training(make_model, mode, input_shape, batch_size, device)
            succeeded.append(True)
        except Exception as error:
            # a BudgetError says that a hard limit of the host is lower
            if not isinstance(error, BudgetError) and not target.is_out_of_memory(error):
                failures.append(error)
        finally:
            target.uncap()

    thread = threading.Thread(target=attempt, name="edgetrain-advice")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return bool(succeeded)


class _Mallinfo2(ctypes.Structure):
    """``struct mallinfo2`` of glibc 2.33, mallinfo(3)."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    )


def _reusable_bytes(device: str) -> int:
    """Bytes that the heaps of all threads hold free: malloc serves from them without asking the kernel."""
    if torch.device(device).type != "cpu":
        return 0
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError, TypeError):
        return 0
    mallinfo2.restype = _Mallinfo2
    return int(mallinfo2().fordblks)


def _try_training(
    make_model: Callable[[], nn.Module],
    mode: UniformMode,
    input_shape: tuple[int, int, int],
    batch_size: int,
    device: str,
) -> None:
    model = make_model().to(device)
    net = wrap(model, uniform_plan(model, mode, input_shape=input_shape, batch_size=batch_size))
    optimizer = Recipe(batch_size=batch_size).optimizer(p for p in model.parameters() if p.requires_grad)
    prefetched = torch.ones(batch_size, *input_shape, dtype=torch.uint8)
    labels = torch.zeros(batch_size, dtype=torch.long, device=device)
    x = torch.randn(batch_size, *input_shape, device=device)
    for _ in range(2):
        F.cross_entropy(net(x), labels).backward()
        optimizer.step()  # of rate 0: the weights stay as they are
        optimizer.zero_grad(set_to_none=False)
        x = prefetched.to(device, torch.float32).sub_(0.5)  # the batch before is still there
    tested = x[:EVALUATION_BATCH_SIZE].clone()
    del x
    evaluate(model, [(tested, labels[: len(tested)].cpu())], device=device)


def advise(
    make_model: Callable[[], nn.Module],
    *,
    mode: UniformMode,
    input_shape: tuple[int, int, int],
    batch_size: int,
    budget_bytes: int,
    device: str = "cpu",
    changes: Collection[Change] = CHANGES,
) -> str:
    """The smallest change that would fit, as a sentence for a person; each that is named was tried.

    A leaner mode comes first, because it changes nothing but time; then the largest batch; then the budget.

    Args:
        changes: what the person can change.
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

    def runs(candidate: UniformMode, samples: int, cap_bytes: int) -> bool:
        return fits(
            make_model,
            candidate,
            input_shape=input_shape,
            batch_size=samples,
            budget_bytes=cap_bytes,
            device=device,
        )

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
            reason = f": even {_SMALLEST_BATCH} samples do not fit in mode {lean}"
        return f"pass --budget {mib}MiB{reason}"
    return "choose a smaller model or a smaller image size: no budget that this host has would do"


def _shrunk(samples: int, runs: Callable[[int], bool]) -> int:
    """The first of ``samples`` and what is a tenth smaller each that runs, at last the smallest batch; 0 for none."""
    samples = max(samples, _SMALLEST_BATCH)
    for _ in range(_TRIES - 1):
        if runs(samples):
            return samples
        if samples == _SMALLEST_BATCH:
            return 0
        samples = max(_SMALLEST_BATCH, min(samples - 1, round(samples * 0.9)))
    return _SMALLEST_BATCH if runs(_SMALLEST_BATCH) else 0


def _grown(mib: int, runs: Callable[[int], bool]) -> int:
    """The first of ``mib`` and what is a tenth larger each that runs; 0 for none."""
    for _ in range(_TRIES):
        if runs(mib):
            return mib
        mib = max(mib + 1, round(mib * 1.1))
    return 0
