"""The pooling sequence too: for a network that is built from scratch, the sequence whose fastest plan is fastest.

The families that can be inverted pool between two stages by channels, (n, c, h, w) -> (n, 4c, h/2, w/2), or by batch,
-> (4n, c, h/2, w/2), equation (3.29) of M. Hascoet et al. (2023). Both keep the volume, so that activations take the
same bytes under every sequence. The width does not stay the same: behind a batch pooling in place of a channel pooling
a convolution has a sixteenth of the weights and does a quarter of the arithmetic. What differs is weights, gradients,
optimiser state, temporary memory, time, and the noise of inversions, which limits what may be inverted.

Every sequence (2^k for k poolings) is planned by itself, as :class:`edgetrain.planner.Planner` plans it. Sequences are
different networks, and nothing here says how well one of them learns: batch pooling mixes nothing between samples, but
makes the four pixels of a neighbourhood samples of their own. Convolutions behind it see every second pixel, as if
dilated; the parts share weights and batch norm statistics, and meet again in the maximum at the head.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from edgetrain.errors import BudgetError, UsageError
from edgetrain.memory.estimate import Precision
from edgetrain.memory.step import Loss, OptimizerFactory, classification_loss
from edgetrain.models import create_model, pooling_letters, pooling_sequences
from edgetrain.planner.planning import SNR_LIMIT, Planner, StoredPrecision
from edgetrain.planner.plans import Plan
from edgetrain.planner.search import pareto
from edgetrain.planner.shortage import shortage
from edgetrain.units import format_mib

if TYPE_CHECKING:
    from edgetrain.profiles import Profile

NOTE = (
    "Each pooling sequence is another network, with other parameters and another accuracy. Only the memory and the "
    "time of a step are compared here."
)


@dataclass(frozen=True)
class SequencePlan:
    """What a network with one pooling sequence costs.

    Attributes:
        pooling: between the stages, as :func:`edgetrain.create_model` takes it.
        parameters: of the network, in numbers.
        least_bytes: of the allocator, the smallest peak of a step.
        plan: its fastest that fits; None where nothing does.
        needed_bytes: of the device, by its leanest step, where nothing fits; None where a plan does.
        front: (peak_bytes, seconds) of steps that nothing beats in both, leanest first, at the micro-batches of
            ``plan``, or of the leanest step where nothing fits.
    """

    pooling: tuple[str, ...]
    parameters: int
    least_bytes: int
    plan: Plan | None
    needed_bytes: int | None
    front: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class SequencePoint:
    """A step of the network with ``pooling``: most bytes of the allocator, and seconds."""

    peak_bytes: int
    seconds: float
    pooling: tuple[str, ...]


@dataclass(frozen=True)
class PlanFromScratch:
    """The fastest plan over all pooling sequences of a network, and all that it was compared with.

    Attributes:
        name: of the network.
        pooling: the sequence that was chosen, for ``create_model(name, pooling=...)``.
        plan: the fastest of that network.
        sequences: one for each.
        front: of time against peak over all of them, leanest first.
    """

    name: str
    pooling: tuple[str, ...]
    plan: Plan
    sequences: tuple[SequencePlan, ...]
    front: tuple[SequencePoint, ...]

    def summary(self) -> str:
        """What was chosen, the table of sequences, and what was not compared."""
        lines = [f"pooling {pooling_letters(self.pooling)} ({', '.join(self.pooling)})", self.plan.summary()]
        lines.append(f"{'pooling':<10}{'parameters':>12}{'least':>14}{'peak':>14}{'step':>12}")
        for row in self.sequences:
            plan = row.plan
            peak, step = ("-", "-") if plan is None else (format_mib(plan.peak_bytes), _ms(plan.step_seconds))
            lines.append(
                f"{pooling_letters(row.pooling):<10}{row.parameters:>12,}{format_mib(row.least_bytes):>14}"
                f"{peak:>14}{step:>12}  {self.reason(row)}"
            )
        return "\n".join([*lines, NOTE])

    def explain(self) -> str:
        """:meth:`summary`, the joint front, and :meth:`Plan.explain` of the plan that was chosen."""
        points = ", ".join(
            f"{pooling_letters(point.pooling)} {format_mib(point.peak_bytes)} {_ms(point.seconds)}"
            for point in self.front
        )
        return "\n".join([self.summary(), f"time against peak over all sequences: {points}", self.plan.explain()])

    def reason(self, row: SequencePlan) -> str:
        """Why ``row`` was chosen or not."""
        if row.plan is None:
            assert row.needed_bytes is not None
            return f"does not fit: needs {format_mib(row.needed_bytes)} at least"
        if row.pooling == self.pooling:
            return "the fastest that fits"
        return f"{row.plan.step_seconds / self.plan.step_seconds - 1:+.1%} time"

    def to_json(self) -> str:
        """One document; under ``plan`` that of :meth:`Plan.to_json`. ``letters`` are what ``--pooling`` takes."""
        data = {
            "model": self.name,
            "note": NOTE,
            "pooling": self.pooling,
            "letters": pooling_letters(self.pooling),
            "sequences": [{**_costs(row), "reason": self.reason(row)} for row in self.sequences],
            "front": [asdict(point) for point in self.front],
            "plan": json.loads(self.plan.to_json()),
        }
        return json.dumps(data, indent=1)


def _costs(row: SequencePlan) -> dict[str, Any]:
    costed = None if row.plan is None else row.plan.costed
    return {
        "pooling": row.pooling,
        "letters": pooling_letters(row.pooling),
        "parameters": row.parameters,
        "least_bytes": row.least_bytes,
        "needed_bytes": row.needed_bytes,
        "peak_bytes": None if costed is None else costed.peak_bytes,
        "reserved_bytes": None if costed is None else costed.reserved_bytes,
        "step_seconds": None if costed is None else costed.step_seconds,
    }


def plan_from_scratch(
    name: str,
    *,
    input_shape: tuple[int, int, int],
    batch_size: int,
    budget: str | int | None = None,
    device: str | Path | Profile | None = None,
    optimizer: str | OptimizerFactory = "sgd",
    precision: Precision = "fp32",
    loss: Loss = classification_loss,
    update_in_backward: bool = False,
    micro_batches: int | None = None,
    allow_ghost_batchnorm: bool = False,
    snr_limit: float = SNR_LIMIT,
    stored_precision: StoredPrecision | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    on_sequence: Callable[[SequencePlan], None] | None = None,
) -> PlanFromScratch:
    """The fastest step that fits ``budget`` over all pooling sequences of a network of the zoo.

    This changes what is trained: each sequence is another network. Hand the answer to
    ``create_model(name, pooling=found.pooling, ...)`` or ``edgetrain train --pooling``.

    Without ``device`` each network's blocks are timed here, which takes some seconds per sequence. Times of two
    sequences are then of two measurements: a difference of a few per cent says nothing.

    Args:
        name: of a network whose pooling can be chosen: irevnet18, layerwise18, hybrid18.
        options: of :func:`edgetrain.create_model`, such as ``num_classes`` or ``blocks``; pooling left out.
            ``in_channels`` is that of ``input_shape`` unless given.
        seed: of every network's weights, whose noise is measured.
        on_sequence: gets what was found of each sequence as soon as it is known.

    The others are as for :func:`edgetrain.plan`.

    Raises:
        BudgetError: no sequence fits; names the smallest feasible peak of all, and the cheapest changes.
        UsageError: no network of the zoo, or one whose pooling cannot be chosen; arguments that contradict each other.
        ModelError: the network does not take the input. All poolings halve height and width, so none does then.
    """
    chosen = {"in_channels": input_shape[0], **(options or {})}
    if "pooling" in chosen:
        raise UsageError(
            found=f"the option pooling={chosen['pooling']!r} of a network whose pooling is to be chosen",
            expected="options without it",
            action="leave it out, or plan this one network with edgetrain.plan",
        )
    sequences: list[SequencePlan] = []
    leanest: tuple[int, tuple[str, ...], Planner] | None = None  # of those that do not fit
    for pooling in pooling_sequences(name, **chosen):
        with torch.random.fork_rng():  # the same weights whatever was planned before
            torch.manual_seed(seed)
            planner = Planner(
                create_model(name, pooling=pooling, **chosen),
                input_shape=input_shape,
                batch_size=batch_size,
                device=device,
                optimizer=optimizer,
                precision=precision,
                loss=loss,
                update_in_backward=update_in_backward,
                micro_batches=micro_batches,
                allow_ghost_batchnorm=allow_ghost_batchnorm,
                snr_limit=snr_limit,
                stored_precision=stored_precision,
                channels_last=False,
            )
            found = _planned(planner, pooling, budget)
        sequences.append(found)
        if found.needed_bytes is not None and (leanest is None or found.needed_bytes < leanest[0]):
            leanest = found.needed_bytes, pooling, planner
        if on_sequence is not None:
            on_sequence(found)
    fitting = [(row.plan, row.pooling) for row in sequences if row.plan is not None]
    if not fitting:
        assert leanest is not None
        raise _shortage(*leanest[1:], budget, len(sequences))
    plan, pooling = min(fitting, key=lambda pair: (pair[0].step_seconds, pair[0].peak_bytes))
    points = [SequencePoint(peak, seconds, row.pooling) for row in sequences for peak, seconds in row.front]
    return PlanFromScratch(name, pooling, plan, tuple(sequences), pareto(points))


def _planned(planner: Planner, pooling: tuple[str, ...], budget: str | int | None) -> SequencePlan:
    plan, least_bytes = planner.fitting(budget), planner.least().peak_bytes
    parameters = sum(parameter.numel() for parameter in planner.model.parameters())
    if plan is not None:
        assert plan.costed is not None
        return SequencePlan(pooling, parameters, least_bytes, plan, None, plan.costed.front)
    needed_bytes, count = planner.needed()
    front = tuple((point.peak_bytes, point.seconds) for point in planner.front(count))
    return SequencePlan(pooling, parameters, least_bytes, None, needed_bytes, front)


def _shortage(pooling: tuple[str, ...], planner: Planner, budget: str | int | None, count: int) -> BudgetError:
    """That of the leanest network, which the changes are for too."""
    limit = planner.limit_bytes(budget)
    assert limit is not None
    error = shortage(planner, limit)
    letters = pooling_letters(pooling)
    return BudgetError(
        found=error.found,
        expected=f"{error.expected}, with pooling {letters}, the leanest of {count} sequences",
        action=f"with --pooling {letters} in the place of --from-scratch: {error.action}",
    )


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"
