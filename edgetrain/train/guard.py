"""The memory guard of a run: what is a shortage of memory, and which plan comes after it.

A step that runs out of memory is begun again with a smaller plan, on a thread that has not failed; the trainer goes
back to its start (:mod:`edgetrain.train.step_start`). Where the system as a whole is short of memory the smaller plan
is taken between two steps, before anything fails (:mod:`edgetrain.targets.pressure`).
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from edgetrain.errors import BudgetError
from edgetrain.memory.step import OptimizerFactory
from edgetrain.nn.slices import SLICE_BYTES
from edgetrain.planner import Plan
from edgetrain.planner.smaller import planner_like, smaller_plans
from edgetrain.targets import (
    Target,
    keeps_freed_blocks,
    release_free_memory,
    return_large_blocks,
    select_target,
)
from edgetrain.targets.cpu import CAPPED_TEXTS
from edgetrain.targets.pressure import PressureGauge
from edgetrain.train.objectives import Objective, group_of, rehearsal_of
from edgetrain.train.records import MemoryEvent, MemoryKind, Position
from edgetrain.train.spare_threads import SpareThreads
from edgetrain.units import format_mib

_LOG = logging.getLogger(__name__)

SmallerPlans = Callable[[Plan], Iterable[Plan]]


class ExhaustedError(BudgetError):
    """Memory ran out with the smallest plan.

    Attributes:
        reason: what the failed allocation said, in one line.
    """

    def __init__(self, plan: Plan, *, step: int, reason: str, tried: int) -> None:
        n, *sample = plan.input_shape
        size = "" if plan.costed is None else f" of {format_mib(plan.peak_bytes)}"
        super().__init__(
            found=f"memory ran out in step {step + 1} with the smallest plan{size}, "
            f"after {tried} larger {'one' if tried == 1 else 'ones'} ({reason})",
            expected=f"a step of {n} samples of {'x'.join(map(str, sample))} to fit",
            action="stop other programs, raise --budget, or lower --batch-size or --image-size",
        )
        self.reason = reason


class Guard:
    """Decides what a run does about memory.

    Args:
        target: of the device; says which errors are shortages.
        smaller: plans to fall back on after the one given, each with a smaller peak; asked once, when the first is
            needed.
        gauge: of the system's memory pressure; None: only failed allocations count.
        threads: spare ones for steps; on the CPU oneDNN remembers a failed allocation for as long as its thread lives.
    """

    def __init__(
        self,
        target: Target,
        smaller: SmallerPlans,
        *,
        gauge: PressureGauge | None = None,
        threads: SpareThreads | None = None,
    ) -> None:
        self._target = target
        self._smaller = smaller
        self._plans: Iterator[Plan] | None = None
        self._gauge = gauge
        self.threads = threads or SpareThreads()
        self._tried = 0
        self._thread_failed = False

    @classmethod
    def of(
        cls,
        model: nn.Module,
        optimizer: OptimizerFactory,
        device: str | torch.device,
        *,
        objective: Objective | None = None,
    ) -> Guard:
        """A guard that makes smaller plans for ``model``, which is trained by ``optimizer``, when they are needed."""
        loss, group = rehearsal_of(objective), group_of(objective)

        def smaller(plan: Plan) -> Iterable[Plan]:
            return smaller_plans(planner_like(model, plan, optimizer=optimizer, loss=loss, group=group), plan)

        return cls(select_target(device), smaller)

    def shortage(self, error: BaseException) -> str | None:
        """What ``error`` says in one line where it is a failed allocation, else None."""
        if not self._target.is_out_of_memory(error):
            return None
        self._thread_failed = any(text in str(error) for text in CAPPED_TEXTS)
        return first_line(error)

    def pressure(self) -> str | None:
        """Why the system is short of memory now; None: it is not, or nobody looks."""
        return None if self._gauge is None else self._gauge.reason()

    def warning(self) -> str | None:
        """News of swapping, once for each time that it begins; None: none."""
        return None if self._gauge is None else self._gauge.warning()

    def after_failure(self, plan: Plan, *, step: int, reason: str) -> Plan:
        """The plan that follows ``plan``, with which memory ran out.

        Raises:
            ExhaustedError: there is none.
        """
        self.make_room()
        found = self.next_plan(plan)
        if found is None:
            raise ExhaustedError(plan, step=step, reason=reason, tried=self._tried)
        return found

    def next_plan(self, plan: Plan) -> Plan | None:
        """The plan that follows ``plan``; None: it is the smallest."""
        if self._plans is None:
            self._plans = iter(self._smaller(plan))
        found = next(self._plans, None)
        self._tried += found is not None
        return found

    def make_room(self) -> None:
        """Gives back what a failed step leaves: cycles of its frames, free heap, the allocator's cache.

        And leaves a thread in which oneDNN has failed, and a heap that keeps what is freed.
        """
        if self._thread_failed:
            self.threads.change()
        gc.collect()
        return_freed()  # of the host, whatever the target is
        self._target.release_cache()


def return_freed() -> None:
    """Gives back what the heap has free, and from now on large blocks when they are freed, where it kept them."""
    if keeps_freed_blocks():
        _LOG.info("what is freed goes back to the system from now on")
        return_large_blocks(2 * SLICE_BYTES)
    release_free_memory()


def first_line(error: BaseException) -> str:
    """What ``error`` says, in one line; a MemoryError of Python's says nothing but its name."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True)
class Switch:
    """A change of plan that is to come.

    Attributes:
        kind, reason: of the :class:`MemoryEvent`.
        step: it comes when so many steps are done.
    """

    kind: MemoryKind
    step: int
    reason: str
    plan: Plan

    def event(self, position: Position, before: Plan) -> MemoryEvent:
        """Its record at ``position``, where the plan was ``before``."""
        before_bytes, after_bytes = (None if plan.costed is None else plan.peak_bytes for plan in (before, self.plan))
        return MemoryEvent(self.kind, position.epoch, position.step, self.reason, before_bytes, after_bytes)
