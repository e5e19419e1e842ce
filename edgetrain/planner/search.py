"""The fastest program whose exact peak fits: the dynamic programme proposes, the byte-exact simulation decides.

The table of :mod:`edgetrain.planner.dynamic` holds the best schedule for every number of slots. Its bytes are rounded
and leave out what only the simulator knows, so the schedules are simulated from the dearest in memory downwards until
one fits. Uniform modes, one way for all blocks, are candidates too: no plan is slower than they are.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from edgetrain.chain import Block, Mode
from edgetrain.memory import Costs, simulate
from edgetrain.memory.times import Times, program_seconds
from edgetrain.planner.dynamic import Table
from edgetrain.planner.schedule import schedule
from edgetrain.planner.stages import problem_of
from edgetrain.planner.uniform import UNIFORM_MODES, UniformMode, decide
from edgetrain.runtime.program import INVERSIONS, Instruction, Program

CLOCK_ERROR = 0.03
"""Part of a step's time that measured times do not resolve."""

_NEIGHBOURS = 4
"""Schedules above the first that fits which are tried too: peaks do not rise quite as slots do."""


@dataclass(frozen=True)
class Candidate:
    """A program with what it costs.

    Attributes:
        peak_bytes: most bytes of the allocator, weights and batch included.
        seconds: of a step.
    """

    program: Program
    peak_bytes: int
    seconds: float


class Search:
    """Programs of one chain at one batch size.

    Args:
        costs: bytes of every instruction.
        times: seconds of every instruction.
        reach: how far runs of inversions may go, :class:`edgetrain.planner.stages.Problem`; None: anywhere.
        rounded_reach: likewise from a rounded activation.
        too_noisy: for each block the modes that noise forbids; None: none.
        offload: whether activations may go to the host's memory.
        stored_bfloat16: whether they may be kept in bfloat16.
        update_in_backward: whether the optimiser steps block by block.
        slots: of the table.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        costs: Costs,
        times: Times,
        *,
        reach: Sequence[int] | None = None,
        rounded_reach: Sequence[int] | None = None,
        too_noisy: Sequence[Collection[Mode]] | None = None,
        offload: bool = False,
        stored_bfloat16: bool = False,
        update_in_backward: bool = False,
        slots: int = 500,
    ) -> None:
        self._blocks, self._costs, self._times, self._slots = blocks, costs, times, slots
        self._update = update_in_backward
        self._reach, self._too_noisy = reach, too_noisy
        self._problem = problem_of(
            blocks,
            costs,
            times,
            reach=reach,
            rounded_reach=rounded_reach,
            too_noisy=too_noisy,
            offload=offload,
            stored_bfloat16=stored_bfloat16,
            update_in_backward=update_in_backward,
        )

    @functools.cached_property
    def uniform(self) -> dict[UniformMode, Candidate]:
        """The same mode in every block that allows it; those that noise forbids are left out."""
        found = {}
        for mode in UNIFORM_MODES:
            modes = [choice for choice, _ in decide(self._blocks, mode)]
            if self._within_reach(modes):
                program = schedule(self._costs.names, self._costs.shapes, modes, update_in_backward=self._update)
                found[mode] = self._candidate(program.instructions)
        return found

    def under(self, budget_bytes: int) -> Candidate | None:
        """The fastest candidate with a peak of at most ``budget_bytes``; None where there is none."""
        fitting = [candidate for candidate in self.uniform.values() if candidate.peak_bytes <= budget_bytes]
        keep_all = self.uniform["keep_all"]
        table = self._table(budget_bytes)
        if table is not None:
            fitting += self._fitting(table, budget_bytes)
        best = min(fitting, key=lambda found: (found.seconds, found.peak_bytes), default=None)
        if best is not None and keep_all in fitting and best.seconds > (1 - CLOCK_ERROR) * keep_all.seconds:
            return keep_all  # computing something twice is not faster: times are
        return best

    def bound_seconds(self, budget_bytes: int) -> float:
        """Of the fastest schedule within ``budget_bytes`` with every size rounded down to a slot; may be infinite.

        By the planner's own count of bytes, which is coarser than the simulation and sometimes too high: then a
        schedule that the simulation lets through is faster than this.
        """
        top = min(budget_bytes, self.uniform["keep_all"].peak_bytes) - self._resident_bytes
        if top <= 0:
            return float("inf")
        table = Table(self._problem, top, slots=self._slots, rounding="down")
        return table.seconds(self._slots) + self._after

    def least(self) -> Candidate:
        """The candidate with the lowest peak."""
        top = self.uniform["keep_all"].peak_bytes
        table = self._table(top)
        found = list(self.uniform.values())
        if table is not None:
            lean = self._table(min(found, key=lambda c: c.peak_bytes).peak_bytes) or table
            for candidates in (table, lean):
                found += [self._from(candidates, m) for m in candidates.steps()[: 2 * _NEIGHBOURS]]
        return min(found, key=lambda candidate: (candidate.peak_bytes, candidate.seconds))

    def front(self, count: int = 24) -> tuple[Candidate, ...]:
        """Candidates that nothing beats in both time and peak, leanest first.

        Args:
            count: of schedules taken from the table, evenly over its different times.
        """
        found = [*self.uniform.values(), self.least()]
        table = self._table(self.uniform["keep_all"].peak_bytes)
        if table is not None:
            steps = table.steps()
            chosen = (
                steps if len(steps) <= count else [steps[k * (len(steps) - 1) // (count - 1)] for k in range(count)]
            )
            found += [self._from(table, m) for m in chosen]
        return pareto(found)

    @property
    def _resident_bytes(self) -> int:
        costs = self._costs
        return costs.weight_bytes + costs.optimizer_bytes + self._problem.input_bytes

    @property
    def _after(self) -> float:
        """Seconds of the optimiser, the same under every plan."""
        return sum(block.update for block in self._times.blocks)

    @functools.lru_cache(maxsize=4)  # noqa: B019 - a search lives as long as its tables
    def _table(self, budget_bytes: int) -> Table | None:
        top = min(budget_bytes, self.uniform["keep_all"].peak_bytes) - self._resident_bytes
        return Table(self._problem, top, slots=self._slots) if top > 0 else None

    def _fitting(self, table: Table, budget_bytes: int) -> list[Candidate]:
        """The dearest schedule of the table that fits, and neighbours that do."""
        steps = table.steps()
        low, high = -1, len(steps)
        found: list[Candidate] = []
        while high - low > 1:
            middle = (low + high) // 2
            candidate = self._from(table, steps[middle])
            if candidate.peak_bytes <= budget_bytes:
                found.append(candidate)
                low = middle
            else:
                high = middle
        for m in steps[high + 1 : high + 1 + _NEIGHBOURS]:
            candidate = self._from(table, m)
            if candidate.peak_bytes <= budget_bytes:
                found.append(candidate)
        return found

    def _from(self, table: Table, m: int) -> Candidate:
        return self._candidate(table.instructions(m, update_in_backward=self._update))

    def _candidate(self, instructions: Iterable[Instruction]) -> Candidate:
        costs = self._costs
        program = Program(costs.names, costs.shapes, tuple(instructions), costs.channels_last)
        return Candidate(program, simulate(program, costs).peak_bytes, program_seconds(program, self._times))

    def _within_reach(self, modes: Sequence[Mode]) -> bool:
        if self._reach is None:
            return True
        last: int | None = None
        for i in reversed(range(len(modes))):
            if self._too_noisy is not None and modes[i] in self._too_noisy[i]:
                return False
            if modes[i] not in INVERSIONS:
                last = None
                continue
            last = i if last is None else last
            if self._reach[last] > i:
                return False
        return True


class Point(Protocol):
    """Whatever has a peak and takes time."""

    @property
    def peak_bytes(self) -> int: ...

    @property
    def seconds(self) -> float: ...


AnyPoint = TypeVar("AnyPoint", bound=Point)


def pareto(candidates: Iterable[AnyPoint]) -> tuple[AnyPoint, ...]:
    """Those that no other beats in both time and peak, leanest first."""
    front: list[AnyPoint] = []
    for candidate in sorted(candidates, key=lambda c: (c.peak_bytes, c.seconds)):
        if not front or candidate.seconds < front[-1].seconds:
            front.append(candidate)
    return tuple(front)


def at_micro_batches(candidate: Candidate, micro_batches: int, *, standing_bytes: int, after: float) -> Candidate:
    """A candidate for a part of the batch, as a step of ``micro_batches`` of them.

    Args:
        standing_bytes: what is there besides: the other parts, and from the second on gradients of all parameters.
        after: seconds of the optimiser, which steps once.
    """
    if micro_batches == 1:
        return candidate
    return replace(
        candidate,
        peak_bytes=candidate.peak_bytes + standing_bytes,
        seconds=(candidate.seconds - after) * micro_batches + after,
    )
