"""Will it fit: the memory of a training step on a device, before it runs.

The step is traced (:mod:`edgetrain.memory.step`), its allocations are replayed by the device's allocator, and what
libraries take besides is added from the device's profile, each by its name.

On a CPU the process counts: glibc as :func:`edgetrain.targets.return_large_blocks` sets it up (blocks of 1 MiB and more
go back to the kernel when they are freed), and memory that libraries take once. ``tools/prediction_error.py`` compares
it with measurements; without that setting a process grows more, see :mod:`edgetrain.memory.glibc_heap`.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from edgetrain.errors import ModelError, UsageError
from edgetrain.memory.cuda_allocator import Allocation, MemoryEvent, replay
from edgetrain.memory.glibc_heap import process_peak_bytes
from edgetrain.memory.measure import measure_peak
from edgetrain.memory.operators import DeviceKind
from edgetrain.memory.step import Loss, OptimizerFactory, classification_loss, optimizer_factory, trace_step
from edgetrain.memory.timeline import Timeline, timeline
from edgetrain.memory.trace import KINDS, StepTrace
from edgetrain.targets import select_target
from edgetrain.targets.glibc import DEFAULT_THRESHOLD_BYTES, KEPT_BLOCKS
from edgetrain.units import KIB, MIB, format_mib

if TYPE_CHECKING:
    from edgetrain.profiles import Profile

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# what a process takes besides its tensors: fitted to 16 runs of eight networks on two cores of an AMD EPYC
_PROCESS_BYTES = 8 * MIB
_KERNEL_BYTES = 200 * KIB  # code that oneDNN generates for a convolution, forward or backward
_PACKING_BYTES = 20 * MIB  # buffers of the matrix multiplication, taken by the first large one
_EIGHT_BIT_BYTES = 52 * MIB  # bitsandbytes 0.50 and the modules that it imports
_LARGE_MATMUL = 2**27  # multiplications
_OWNERS = 3
_MEASURED_BATCHES = (2, 4)


@dataclass(frozen=True)
class Line:
    """One part of the memory of a step.

    Attributes:
        name: for people.
        nbytes: of it when the step is at its peak.
        note: where the figure comes from, "" where the trace gives it.
    """

    name: str
    nbytes: int
    note: str = ""


@dataclass(frozen=True)
class Estimate:
    """The memory of one training step.

    Attributes:
        device: name of the profile.
        batch_size: samples in the step.
        lines: the parts, which add up to ``process_peak_bytes``.
        peak_bytes: most bytes that torch's allocator has handed out at once; weights and batch included.
        reserved_bytes: most bytes that the allocator holds for it; the same on a CPU.
        process_peak_bytes: all that the step needs of the device's memory.
        available_bytes: what the device has for it; None: unknown.
        owners: (block, bytes) of those blocks that own most of what is alive at the peak.
        peak_operator: what runs at the peak.
        unknown: overheads that nobody measured for this device, by name; they come on top.
        timeline: every allocation; None where the step was measured.
    """

    device: str
    batch_size: int
    precision: str
    lines: tuple[Line, ...]
    peak_bytes: int
    reserved_bytes: int
    process_peak_bytes: int
    available_bytes: int | None
    owners: tuple[tuple[str, int], ...]
    peak_operator: str
    unknown: tuple[str, ...]
    timeline: Timeline | None

    @property
    def fits(self) -> bool | None:
        """Whether the device has enough; None where nobody knows how much it has."""
        return None if self.available_bytes is None else self.process_peak_bytes <= self.available_bytes

    def to_dict(self) -> dict[str, Any]:
        """What goes to JSON: everything but the timeline."""
        return {
            "device": self.device,
            "batch_size": self.batch_size,
            "precision": self.precision,
            "lines": [{"name": line.name, "bytes": line.nbytes, "note": line.note} for line in self.lines],
            "peak_bytes": self.peak_bytes,
            "reserved_bytes": self.reserved_bytes,
            "process_peak_bytes": self.process_peak_bytes,
            "available_bytes": self.available_bytes,
            "fits": self.fits,
            "owners": [{"block": name, "bytes": nbytes} for name, nbytes in self.owners],
            "peak_operator": self.peak_operator,
            "unknown_overheads": list(self.unknown),
        }

    def table(self) -> str:
        """The parts as a table of plain text, one line each, and whether it fits."""
        rows = [(line.name, format_mib(line.nbytes), line.note) for line in self.lines]
        rows.append(("total", format_mib(self.process_peak_bytes), ""))
        if self.available_bytes is not None:
            free = self.available_bytes - self.process_peak_bytes
            rows.append(("available", format_mib(self.available_bytes), ""))
            rows.append(("free" if free >= 0 else "missing", format_mib(abs(free)), ""))
        widths = [max(len(row[k]) for row in rows) for k in range(2)]
        lines = [f"{name:<{widths[0]}}  {size:>{widths[1]}}  {note}".rstrip() for name, size, note in rows]
        shares = ", ".join(f"{name or 'no module'} {format_mib(nbytes)}" for name, nbytes in self.owners)
        if shares:
            lines.append(f"At the peak ({self.peak_operator}) most is held by: {shares}")
        if self.unknown:
            lines.append("Not known for this device, and on top: " + ", ".join(self.unknown))
        return "\n".join(lines)


def estimate(
    model: nn.Module | Callable[[], nn.Module],
    *,
    input_shape: tuple[int, ...],
    batch_size: int,
    device: str | Path | Profile = "cpu",
    optimizer: str | OptimizerFactory | None = "sgd",
    precision: Precision = "fp32",
    wrap: Callable[[nn.Module], nn.Module] | None = None,
    loss: Loss = classification_loss,
    measured: bool = True,
) -> Estimate:
    """The memory of a training step of ``model`` on ``device``; nothing is run but small convolutions.

    Args:
        model: a module, which is left alone, or a function that makes one without arguments.
        input_shape: of one sample, (c, h, w).
        device: name of a profile, path of one, or a profile.
        optimizer: a name of :data:`edgetrain.memory.OPTIMIZERS`, a function of the parameters, or None.
        precision: of weights, activations and gradients alike.
        wrap: makes of the model what is trained, such as ``lambda m: edgetrain.wrap(m, plan)``.
        measured: whether convolutions may be run here on a few samples, to see what they take inside (CPU only).

    Raises:
        ModelError: the step cannot be traced; names the module.
        UsageError: an unknown device, optimizer or precision.
    """
    profile = _profile(device)
    trace = trace_step(
        model,
        input_shape=input_shape,
        batch_size=batch_size,
        wrap=wrap,
        optimizer=optimizer,
        loss=loss,
        dtype=_dtype(precision),
        device=profile.kind,
    )
    return from_trace(trace, profile, batch_size=batch_size, precision=precision, measured=measured)


def max_batch(make: Callable[[int], Estimate], *, limit: int = 65536) -> Estimate | None:
    """The estimate of the largest batch that fits; None where not even one sample does.

    From 64 samples on, it is the largest but for a 64th of it.

    Memory is nearly affine in the batch, so two estimates say where to look and a few more make sure.

    Args:
        make: the estimate for a batch size.
        limit: largest batch asked for.

    Raises:
        UsageError: nobody knows how much the device has.
    """
    try:
        first = 1
        small, large = make(1), make(2)
    except ModelError:  # a batch norm over single values needs two samples
        first = 2
        small, large = make(2), make(3)
    if small.available_bytes is None:
        raise UsageError(
            found=f"--max-batch for {small.device}, of which nobody knows how much memory it has",
            expected="a device with a known memory",
            action="name a device of edgetrain devices",
        )
    if not small.fits:
        return None
    best, best_batch, too_large = small, first, limit + 1
    slope = max(large.process_peak_bytes - small.process_peak_bytes, 1)
    guess = first + (small.available_bytes - small.process_peak_bytes) // slope
    while too_large - best_batch > 1:
        guess = min(max(guess, best_batch + 1), too_large - 1)
        tried = make(guess)
        if tried.fits:
            best, best_batch = tried, guess
        else:
            too_large = guess
        slope = max((tried.process_peak_bytes - small.process_peak_bytes) // max(guess - first, 1), 1)
        proposed = first + (small.available_bytes - small.process_peak_bytes) // slope
        guess = proposed if best_batch < proposed < too_large else best_batch + max((too_large - best_batch) // 2, 1)
        if best_batch >= 64 and too_large - best_batch <= best_batch // 64:
            break  # a search to the sample would cost more than it tells
    return best


def estimate_measured(
    model: nn.Module | Callable[[], nn.Module],
    *,
    input_shape: tuple[int, ...],
    batch_size: int,
    device: str | Path | Profile = "cpu",
    optimizer: str | OptimizerFactory | None = "sgd",
    loss: Loss = classification_loss,
) -> Estimate:
    """As :func:`estimate`, for a model whose operators depend on its data: by real steps of two and of four samples.

    The peak is continued in a straight line from the two, which holds as long as the same operator is at the peak.
    Steps run on the CPU in fp32; a CUDA device's allocator is not simulated.
    """
    profile = _profile(device)
    built = model if isinstance(model, nn.Module) else model()
    built.train()
    factory = None if optimizer is None else optimizer_factory(optimizer)
    stepper = None if factory is None else factory([p for p in built.parameters() if p.requires_grad])

    def step(batch: torch.Tensor) -> None:
        loss(built(batch)).backward()
        if stepper is not None:
            stepper.step()

    peaks = []
    for n in (1, *_MEASURED_BATCHES):  # the first makes the state of the optimiser
        batch = torch.randn(max(n, 2), *input_shape)  # batch norm needs two samples
        for parameter in built.parameters():
            parameter.grad = None
        peaks.append(measure_peak(functools.partial(step, batch)).allocator_peak_bytes)
    small, large = _MEASURED_BATCHES
    per_sample = (peaks[2] - peaks[1]) / (large - small)
    rest = max(int(peaks[1] + per_sample * (batch_size - small)), 0)
    state = 0 if stepper is None else sum(_nbytes(value) for value in stepper.state.values())
    batch_bytes = 4 * batch_size * math.prod(input_shape)
    weights = sum(t.numel() * t.element_size() for t in [*built.parameters(), *built.buffers()])
    lines = (
        Line("weights", weights),
        Line("optimizer state", state),
        Line("batch", batch_bytes),
        Line("gradients, activations, temporaries", rest, f"measured with {small} and {large} samples"),
        Line("libraries", _PROCESS_BYTES, "kernels and buffers, measured on x86-64"),
    )
    total = sum(line.nbytes for line in lines)
    return Estimate(
        device=profile.name,
        batch_size=batch_size,
        precision="fp32",
        lines=lines,
        peak_bytes=total - _PROCESS_BYTES,
        reserved_bytes=total - _PROCESS_BYTES,
        process_peak_bytes=total,
        available_bytes=available_on(profile),
        owners=(),
        peak_operator="not known from a measurement",
        unknown=profile.unknown_overheads if profile.memory is not None else (),
        timeline=None,
    )


def _nbytes(state: dict[str, Any]) -> int:
    return sum(v.numel() * v.element_size() for v in state.values() if isinstance(v, torch.Tensor))


def available_on(profile: Profile) -> int | None:
    """What a training step may take of the device; None: nobody knows."""
    available = profile.available_bytes
    if available is None and (profile.kind == "cpu" or torch.cuda.is_available()):
        available = select_target(profile.kind).probe().available_bytes
    budget = profile.default_budget_bytes
    return available if budget is None else min(budget, available or budget)


def from_trace(
    trace: StepTrace, profile: Profile, *, batch_size: int, precision: str = "fp32", measured: bool = True
) -> Estimate:
    """The estimate for a step that was traced already; arguments as :func:`estimate`."""
    kind: DeviceKind = profile.kind
    line = timeline(trace, kind, measured=measured)
    lines = _parts(line)
    unknown = list(profile.unknown_overheads) if profile.memory is not None else []
    if kind == "cpu":
        process = process_peak_bytes(
            line.events,
            mmap_threshold_bytes=DEFAULT_THRESHOLD_BYTES,
            trim_threshold_bytes=KEPT_BLOCKS * DEFAULT_THRESHOLD_BYTES,
        )
        reserved = line.peak_bytes
        lines.append(Line("heap", process - line.peak_bytes, "holes and pages, large blocks returned"))
        lines.append(Line("libraries", _library_bytes(trace), "kernels and buffers, measured on x86-64"))
    else:
        events, workspaces = _with_workspaces(trace, line, profile)
        report = replay(events)
        reserved = report.peak_reserved_bytes
        lines += workspaces
        lines.append(
            Line("allocator slack", reserved - line.peak_bytes - sum(w.nbytes for w in workspaces), "segments not full")
        )
        if profile.cudnn_workspace is not None and profile.cudnn_workspace.cap is None:
            unknown.append("cudnn_workspace")
    return Estimate(
        device=profile.name,
        batch_size=batch_size,
        precision=precision,
        lines=tuple(lines),
        peak_bytes=line.peak_bytes,
        reserved_bytes=reserved,
        process_peak_bytes=sum(part.nbytes for part in lines),
        available_bytes=available_on(profile),
        owners=tuple(_blocks(line).most_common(_OWNERS)),
        peak_operator=_operator(line),
        unknown=tuple(unknown),
        timeline=line,
    )


def _parts(line: Timeline) -> list[Line]:
    names = {"optimizer": "optimizer state", "temporaries": "temporaries"}
    inner = line.peak_bytes - sum(line.kinds.get(kind, 0) for kind in KINDS)
    sizes = {kind: line.kinds.get(kind, 0) for kind in KINDS}
    sizes["temporaries"] += inner
    return [Line(names.get(kind, kind), nbytes) for kind, nbytes in sizes.items()]


def _with_workspaces(trace: StepTrace, line: Timeline, profile: Profile) -> tuple[list[MemoryEvent], list[Line]]:
    """The events with the libraries' workspaces among them: both come from torch's allocator."""
    events = list(line.events)
    workspaces = []
    cublas = profile.cublas_workspace_bytes
    if cublas and any(_is_matmul(call.operator) for call in trace.calls):
        workspaces.append(Line("cuBLAS workspace", cublas, "kept from the first matrix product on"))
    policy = profile.cudnn_workspace
    cap = None if policy is None or policy.cap is None else int(policy.cap.value * _size_unit(policy.cap.unit))
    if cap and any(call.operator.startswith("aten.convolution") for call in trace.calls):
        workspaces.append(Line("cuDNN workspace", cap, "as much as its limit allows"))
    first = max((event.block for event in events if isinstance(event, Allocation)), default=0) + 1
    added = [Allocation(first + k, workspace.nbytes) for k, workspace in enumerate(workspaces)]
    return [*added, *events], workspaces


def _size_unit(unit: str) -> float:
    from edgetrain.profiles.quantity import SIZES

    return SIZES[unit]


def _library_bytes(trace: StepTrace) -> int:
    convolutions = {
        (call.operator, call.arguments) for call in trace.calls if call.operator.startswith("aten.convolution")
    }
    packing = any(
        _is_matmul(call.operator) and _multiplications(call.arguments) >= _LARGE_MATMUL for call in trace.calls
    )
    eight_bit = any(call.operator.startswith("bitsandbytes.") for call in trace.calls)
    code = _KERNEL_BYTES * len(convolutions) + _EIGHT_BIT_BYTES * eight_bit
    return _PROCESS_BYTES + code + _PACKING_BYTES * packing


def _is_matmul(operator: str) -> bool:
    return operator.split(".")[1] in ("mm", "addmm", "bmm", "baddbmm", "addbmm", "addmv", "mv")


def _multiplications(arguments: tuple[Any, ...]) -> int:
    shapes = [a.shape for a in arguments if hasattr(a, "shape") and len(a.shape) >= 2][-2:]
    if len(shapes) < 2:
        return 0
    count = 1
    for extent in (*shapes[0], shapes[1][-1]):
        count *= extent
    return count


def _blocks(line: Timeline) -> Counter[str]:
    """Bytes at the peak by block: two parts of a module's path are as deep as a person names blocks."""
    blocks: Counter[str] = Counter()
    for module, nbytes in line.modules.items():
        blocks[".".join(module.split(".")[:2])] += nbytes
    return blocks


def _operator(line: Timeline) -> str:
    if line.peak_call is None:
        return "before the first operator"
    name = line.peak_call.operator.removeprefix("aten.").partition(".")[0]
    where = f" of {line.peak_call.module}" if line.peak_call.module else ""
    return f"{name}{where}, {line.peak_call.phase}"


def _profile(device: str | Path | Profile) -> Profile:
    from edgetrain.profiles import load_profile

    return load_profile(device) if isinstance(device, (str, Path)) else device


def _dtype(precision: str) -> torch.dtype:
    if precision not in DTYPES:
        raise UsageError(
            found=f"precision {precision!r}", expected="one of " + ", ".join(get_args(Precision)), action="pass fp32"
        )
    return DTYPES[precision]
