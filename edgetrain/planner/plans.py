"""A Plan: the Program of a step, what it costs, and why each block does what it does."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from torch import nn

from edgetrain.chain import MODES, Mode, chain_of
from edgetrain.errors import ModelError, UsageError, near_matches
from edgetrain.nn.layouts import check_channels_last
from edgetrain.planner.schedule import schedule
from edgetrain.planner.uniform import UniformMode, decide
from edgetrain.runtime.program import Program
from edgetrain.units import MIB, format_mib

FORMAT_VERSION = 2
MOST_BYTES = 8 * MIB
"""Of the file of a plan; that of a network of 1202 layers takes 0.2 MiB."""


@dataclass(frozen=True)
class Alternative:
    """What was not chosen.

    Attributes:
        name: a mode of a block, or a plan for all of them.
        reason: why not.
        peak_bytes: of the allocator, for a plan for all blocks; ``seconds`` of a step, likewise.
    """

    name: str
    reason: str
    peak_bytes: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Costed:
    """What a plan costs by prediction.

    Attributes:
        peak_bytes: most bytes of the allocator, weights, gradients, optimiser and batch included.
        reserved_bytes: what the allocator of the device takes for them; None where that is the same.
        step_seconds: of a step.
        bound_seconds: of the fastest schedule of the family if every size is rounded down to a slot, by the same times:
            how much a finer search could gain at most. Where the exact simulation allows more than the planner's own
            count of bytes, the plan's own seconds.
        budget_bytes: what ``peak_bytes``, or ``reserved_bytes``, must not exceed; None: no limit was given.
        device: name of the profile, or "this machine".
        times: where the seconds come from.
        optimizer: whose state is counted.
        alternatives: plans for all blocks that were not chosen.
        front: (peak_bytes, seconds) of plans that nothing beats in both, leanest first.
    """

    peak_bytes: int
    reserved_bytes: int | None
    step_seconds: float
    bound_seconds: float
    budget_bytes: int | None
    device: str
    times: str
    optimizer: str
    alternatives: tuple[Alternative, ...] = ()
    front: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Plan:
    """What is kept and what is computed again in one training step.

    Attributes:
        modes: one per block.
        reasons: why, one per block.
        program: the step, of one micro-batch where there are several.
        micro_batches: parts of a batch, whose gradients are added before the optimiser steps.
        rejected: per block, what it does not do and why.
        snrs: per block the smallest ratio of signal to noise that it meets, by prediction; empty: not asked for.
        costed: what it costs; None where nobody asked.
    """

    modes: tuple[Mode, ...]
    reasons: tuple[str, ...]
    program: Program
    micro_batches: int = 1
    rejected: tuple[tuple[Alternative, ...], ...] = ()
    snrs: tuple[float, ...] = ()
    costed: Costed | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of a batch, (n, c, h, w)."""
        n, *rest = self.program.shapes[0]
        return (n * self.micro_batches, *rest)

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of the allocator in bytes.

        Raises:
            ModelError: the plan was made without costs.
        """
        return self._known.peak_bytes

    @property
    def step_seconds(self) -> float:
        """Predicted seconds of a step; raises as :attr:`peak_bytes`."""
        return self._known.step_seconds

    @property
    def _known(self) -> Costed:
        if self.costed is None:
            raise ModelError(
                found="a plan without costs",
                expected="one of edgetrain.plan, which predicts memory and time",
                action="make it with edgetrain.plan(...)",
            )
        return self.costed

    def summary(self) -> str:
        """Peak, time and how many blocks do what, in one line each."""
        counts = ", ".join(f"{self.modes.count(mode)} {mode}" for mode in MODES if mode in self.modes)
        lines = [f"{len(self.modes)} blocks: {counts}"]
        if self.program.channels_last:
            lines.append("channels last")
        if self.micro_batches > 1:
            lines.append(f"{self.micro_batches} micro-batches of {self.program.shapes[0][0]} samples")
        if self.costed is not None:
            costed = self.costed
            limit = "" if costed.budget_bytes is None else f" of {format_mib(costed.budget_bytes)}"
            reserved = "" if costed.reserved_bytes is None else f", reserved {format_mib(costed.reserved_bytes)}"
            lines.append(f"peak {format_mib(costed.peak_bytes)}{reserved}{limit}")
            gap = costed.step_seconds / costed.bound_seconds - 1
            lines.append(
                f"step {1e3 * costed.step_seconds:.1f} ms ({costed.times}), {gap:.1%} above the planner's own bound"
            )
        return "\n".join(lines)

    def explain(self) -> str:
        """Mode and reason of every block as text, what it does not do and why, and the plans not chosen."""
        lines = [self.summary()] if self.costed is not None else []
        for i, (name, mode, reason) in enumerate(zip(self.program.names, self.modes, self.reasons, strict=True)):
            snr = f"  SNR {self.snrs[i]:.1e}" if self.snrs and self.snrs[i] < float("inf") else ""
            lines.append(f"{name or 'model':<24} {mode:<18} {reason}{snr}")
            for other in self.rejected[i] if self.rejected else ():
                lines.append(f"{'':<24} not {other.name:<14} {other.reason}")
        if self.costed is not None:
            lines += [_line(other) for other in self.costed.alternatives]
            if self.costed.front:
                points = ", ".join(f"{format_mib(peak)} {1e3 * s:.0f} ms" for peak, s in self.costed.front)
                lines.append(f"time against peak: {points}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """JSON that :meth:`from_json` reads without loss."""
        data = {
            "version": FORMAT_VERSION,
            "modes": self.modes,
            "reasons": self.reasons,
            "micro_batches": self.micro_batches,
            "rejected": [[asdict(other) for other in block] for block in self.rejected],
            "snrs": [snr if snr < float("inf") else None for snr in self.snrs],
            "costed": None if self.costed is None else asdict(self.costed),
            "program": json.loads(self.program.to_json()),
        }
        return json.dumps(data, indent=1)

    @classmethod
    def read(cls, path: Path) -> Plan:
        """The Plan in the file ``path``.

        Raises:
            ModelError: it holds none, or more than :data:`MOST_BYTES`.
        """
        return cls.from_json(plan_text(path))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The Plan that :meth:`to_json` wrote.

        Raises:
            ModelError: the text is none, or of another version.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            modes = tuple(data["modes"])
            if data["version"] != FORMAT_VERSION or not set(modes) <= set(MODES):
                raise ValueError("another version or an unknown mode")
            program = Program.from_json(json.dumps(data["program"]))
            if not len(modes) == len(data["reasons"]) == len(program.names):
                raise ValueError("as many modes and reasons as blocks are needed")
            if not isinstance(data["micro_batches"], int) or data["micro_batches"] < 1:
                raise ValueError(f"{data['micro_batches']} micro-batches")
            costed = data["costed"]
            if costed is not None:
                others = tuple(Alternative(**other) for other in costed.pop("alternatives"))
                front = tuple((int(peak), float(seconds)) for peak, seconds in costed.pop("front"))
                costed = Costed(**costed, alternatives=others, front=front)
            return cls(
                modes,
                tuple(str(reason) for reason in data["reasons"]),
                program,
                micro_batches=data["micro_batches"],
                rejected=tuple(tuple(Alternative(**other) for other in block) for block in data["rejected"]),
                snrs=tuple(float("inf") if snr is None else float(snr) for snr in data["snrs"]),
                costed=costed,
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(
                found=f"a plan that cannot be read ({error})",
                expected=f"JSON of a plan of version {FORMAT_VERSION}",
                action="make the plan again with this version of edgetrain",
            ) from error


def plan_text(path: Path) -> str:
    """What is in the file of a plan; raises ModelError where that is more than any plan."""
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ModelError(
            found=f"{path} with more than {MOST_BYTES // MIB} MiB",
            expected="a plan, which takes a small part of that",
            action="name a file that edgetrain plan --out wrote",
        )
    return content.decode(errors="replace")


def uniform_plan(
    model: nn.Module,
    mode: UniformMode,
    *,
    input_shape: tuple[int, int, int],
    batch_size: int,
    update_in_backward: bool = False,
    channels_last: bool = False,
) -> Plan:
    """The same mode in every block that allows it.

    Args:
        model: any module; a ``torch.nn.Sequential`` is cut into its blocks.
        mode: ``"keep_all"``, ``"selective"``, ``"recompute"``, ``"invert"``, ``"invert_selective"`` or
            ``"invert_layerwise"``.
        input_shape: (c, h, w) of one sample.
        batch_size: samples per step.
        update_in_backward: step the optimiser of each block as soon as its gradients are there; the optimiser is
            then given to :func:`edgetrain.wrap`.
        channels_last: copy the batch so that its channels come last, :mod:`edgetrain.nn.layouts`.

    Raises:
        UsageError: no such mode.
        ModelError: the model does not take the input, or must not run with channels last.
    """
    if mode not in get_args(UniformMode):
        raise UsageError(
            found=f"no mode is called {mode!r}",
            expected="one of " + ", ".join(get_args(UniformMode)),
            action=near_matches(mode, list(get_args(UniformMode))),
        )
    if channels_last:
        check_channels_last(model)
    chain = chain_of(model)
    decisions = decide(chain.blocks, mode)
    modes = tuple(mode for mode, _ in decisions)
    program = schedule(
        [block.name for block in chain.blocks],
        chain.shapes((batch_size, *input_shape)),
        modes,
        update_in_backward=update_in_backward,
        channels_last=channels_last,
    )
    return Plan(modes, tuple(reason for _, reason in decisions), program)


def _line(other: Alternative) -> str:
    peak = "" if other.peak_bytes is None else format_mib(other.peak_bytes)
    seconds = "" if other.seconds is None else f"{1e3 * other.seconds:.1f} ms"
    return f"not {other.name:<20} {peak:>12} {seconds:>12}  {other.reason}"
