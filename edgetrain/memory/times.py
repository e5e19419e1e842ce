"""How long a training step takes: seconds of every instruction on every block, and their sum over a Program.

A step is its instructions one after the other, so its seconds are the sum of theirs. The seconds come from one of two
places, in the same form: the rates of a device (:func:`edgetrain.memory.predicted_times`), for a device that is not
here, or a stopwatch (:func:`edgetrain.memory.measured_times`) on the one that is.

What the sum leaves out: that a tensor may still be in a cache from the instruction before, and that transfers may run
beside the arithmetic. Both make a step shorter than its sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from edgetrain.errors import ModelError
from edgetrain.runtime.program import (
    Backward,
    Fetch,
    Forward,
    Free,
    Head,
    How,
    Instruction,
    Keep,
    Offload,
    Place,
    Program,
    Recompute,
    Update,
)


@dataclass(frozen=True)
class BlockTimes:
    """Seconds of one instruction on one block; None where the block does not allow it.

    Attributes:
        forward: keep=input or keep=nothing; running it again costs the same.
        forward_all: keep=all.
        update: step of the optimiser over this block's parameters, those of earlier blocks left out.
        forward_in_place: keep=nothing of a block that works in the memory of its input; None: as ``forward``.
        forward_products: keep=products; ``forward_all_products`` likewise.
        forward_products_only: keep=products_only.
    """

    forward: float
    forward_all: float
    backward_saved: float
    backward_recompute: float | None
    backward_invert: float | None
    backward_invert_layerwise: float | None
    update: float
    forward_in_place: float | None = None
    forward_products: float | None = None
    backward_selective: float | None = None
    forward_products_only: float | None = None
    backward_invert_selective: float | None = None
    forward_all_products: float | None = None
    backward_selective_all: float | None = None

    def multiplied(self, factor: float) -> BlockTimes:
        """All seconds but the optimiser's multiplied by ``factor``."""
        scaled: dict[str, Any] = {
            field.name: None if (value := getattr(self, field.name)) is None else factor * value
            for field in fields(self)
            if field.name != "update"
        }
        return replace(self, **scaled)

    def forward_seconds(self, keep: Keep) -> float | None:
        """Of a forward pass."""
        if keep == "all":
            return self.forward_all
        if keep == "products":
            return self.forward_products
        if keep == "all_products":
            return self.forward_all_products
        if keep == "products_only":
            return self.forward_products_only
        return self.forward if keep == "input" or self.forward_in_place is None else self.forward_in_place

    def backward_seconds(self, how: How) -> float | None:
        """Of a backward pass."""
        seconds: float | None = getattr(self, f"backward_{how}")
        return seconds


@dataclass(frozen=True)
class Times:
    """Seconds of the instructions of any Program of a chain, at one batch size.

    Attributes:
        head: the caller's loss, forward and backward.
        copy_bytes_per_s: from the device to the host, or back.
        rounding_bytes_per_s: to bfloat16, or back: bytes of the tensor that is rounded.
        source: ``measured on this machine`` or ``rates of profile X``.
        shapes: of z[0] ... z[L], batch first.
        element_bytes: of one element of z[0] ... z[L].
        channels_last: as of the Program.
        step_ratio: what the seconds of instructions that were timed alone were multiplied by, so that their sum is the
            time of a whole step; None where none was timed.
    """

    blocks: tuple[BlockTimes, ...]
    head: float
    copy_bytes_per_s: float
    rounding_bytes_per_s: float
    source: str
    shapes: tuple[tuple[int, ...], ...]
    element_bytes: tuple[int, ...]
    channels_last: bool = False
    step_ratio: float | None = None

    def alone(self) -> Times:
        """The seconds of instructions timed alone: of use beside others that no whole step was timed for."""
        if self.step_ratio is None:
            return self
        blocks = tuple(block.multiplied(1 / self.step_ratio) for block in self.blocks)
        return replace(self, blocks=blocks, head=self.head / self.step_ratio, step_ratio=None)

    @property
    def batch_size(self) -> int:
        """Samples in a step."""
        return self.shapes[0][0]

    @property
    def keep_all_seconds(self) -> float:
        """Of the forward and backward passes of a step in which every block is stored, without the loss."""
        return math.fsum(block.forward_all + block.backward_saved for block in self.blocks)

    def copy_seconds(self, index: int, place: Place) -> float:
        """Of z[index] to ``place``, or back."""
        rate = self.rounding_bytes_per_s if place == "bfloat16" else self.copy_bytes_per_s
        return math.prod(self.shapes[index]) * self.element_bytes[index] / rate


def program_seconds(program: Program, times: Times) -> float:
    """Seconds of one training step of ``program``: its instructions, and the optimiser's step after it.

    A Program that updates in the backward pass has its updates inside; any other is followed by one of all parameters,
    as in :func:`edgetrain.memory.simulate`. A transfer to a file counts as one to the host: files are slower.

    Raises:
        ModelError: the times are of another chain or batch size, or a block does not allow an instruction.
    """
    if (program.shapes, program.channels_last) != (times.shapes, times.channels_last):
        raise ModelError(
            found=f"times of {len(times.blocks)} blocks for {_named(times)}",
            expected=f"those of the program: {len(program.names)} blocks for {_named(program)}",
            action="predict or measure the times of this model at this input and batch size",
        )
    away: dict[int, Place] = {}
    taken = []
    for step in program.instructions:
        if isinstance(step, Offload):
            away[step.index] = step.to
        taken.append(instruction_seconds(step, times, away))
    seconds = math.fsum(taken)
    if any(isinstance(step, Update) for step in program.instructions):
        return seconds
    return seconds + math.fsum(block.update for block in times.blocks)


def _named(step: Program | Times) -> str:
    return f"{step.shapes[0]}" + (" with channels last" if step.channels_last else "")


def block_seconds(program: Program, times: Times) -> tuple[float, ...]:
    """Seconds of a step by block: with the head's they add up to :func:`program_seconds`.

    A transfer of z[i] counts for block i.

    Raises:
        ModelError: as :func:`program_seconds`.
    """
    program_seconds(program, times)
    taken: list[list[float]] = [[] for _ in program.names]
    away: dict[int, Place] = {}
    for step in program.instructions:
        if isinstance(step, Recompute):
            for i in range(step.first, step.last + 1):
                taken[i].append(instruction_seconds(Recompute(i, i, step.keep), times, away))
        elif isinstance(step, Forward | Backward | Update):
            taken[step.block].append(instruction_seconds(step, times, away))
        elif isinstance(step, Offload | Fetch):
            if isinstance(step, Offload):
                away[step.index] = step.to
            taken[min(step.index, len(taken) - 1)].append(instruction_seconds(step, times, away))
    if not any(isinstance(step, Update) for step in program.instructions):
        for of_block, block in zip(taken, times.blocks, strict=True):
            of_block.append(block.update)
    return tuple(math.fsum(of_block) for of_block in taken)


def instruction_seconds(step: Instruction, times: Times, away: Mapping[int, Place]) -> float:
    """Seconds of ``step``.

    Args:
        away: where each z is that it fetches; the host's memory if nothing is said.

    Raises:
        ModelError: the block does not allow it.
    """
    match step:
        case Forward(block, keep):
            return _allowed(times.blocks[block].forward_seconds(keep), f"forward {keep}", block)
        case Recompute(first, last, keep):
            passes = [(i, times.blocks[i].forward_seconds(keep)) for i in range(first, last + 1)]
            return math.fsum(_allowed(seconds, f"recompute {keep}", i) for i, seconds in passes)
        case Backward(block, how):
            return _allowed(times.blocks[block].backward_seconds(how), f"backward {how}", block)
        case Update(block):
            return times.blocks[block].update
        case Offload(index, place):
            return times.copy_seconds(index, place)
        case Fetch(index):
            return times.copy_seconds(index, away.get(index, "host"))
        case Head():
            return times.head
        case Free():
            return 0.0


def _allowed(seconds: float | None, instruction: str, block: int) -> float:
    if seconds is None:
        raise ModelError(
            found=f"instruction {instruction!r} for block {block}",
            expected="one that the block allows",
            action="give the block a mode that it allows",
        )
    return seconds
