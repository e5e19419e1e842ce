"""``edgetrain.plan``: from a model and a budget to a Plan.

    bytes of every instruction      edgetrain.memory.measure_costs, under fake tensors
    seconds of every instruction    measured on this machine, or from a profile's rates
    noise of every inversion        edgetrain.chain.measure_noise, eight samples
        -> the search for each number of micro-batches -> the fastest that fits -> Plan

The search itself (:mod:`edgetrain.planner.search`) is pure: same numbers, same plan.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import nn

from edgetrain.chain import Mode, chain_of
from edgetrain.chain.noise import BFLOAT16_NSR, Noise
from edgetrain.errors import UsageError
from edgetrain.memory import Costs, Guest
from edgetrain.memory.estimate import DTYPES, Precision, from_trace
from edgetrain.memory.rates import OperatorRates
from edgetrain.memory.step import Loss, OptimizerFactory, classification_loss, optimizer_factory, trace_step
from edgetrain.memory.times import Times
from edgetrain.nn import Invertible
from edgetrain.planner.measures import Asked, Measures
from edgetrain.planner.place import Place
from edgetrain.planner.plans import Alternative, Costed, Plan
from edgetrain.planner.reasons import explain, modes_of, rounded_in
from edgetrain.planner.samples import micro_batch_counts, probed_noise, reach_of
from edgetrain.planner.search import CLOCK_ERROR, Candidate, Search, at_micro_batches, pareto
from edgetrain.planner.shortage import shortage
from edgetrain.runtime import Program, wrap
from edgetrain.runtime.program import Inversion
from edgetrain.units import format_mib, parse_size

if TYPE_CHECKING:
    from edgetrain.profiles import Profile

StoredPrecision = Literal["bf16"]
"""In which a checkpoint may wait, other than that of the step."""

SNR_LIMIT = 1e4
"""Signal over noise (a ratio of powers) below which no activation may fall."""

_ROUNDS = 12
_NOBODY = Guest()


def plan(
    model: nn.Module,
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
    channels_last: bool | Literal["either"] | None = None,
    times: Times | OperatorRates | None = None,
    noise: Noise | None = None,
    guest: Guest = _NOBODY,
    group: int = 1,
) -> Plan:
    """The fastest training step whose predicted peak fits ``budget``.

    For several budgets make one :class:`Planner` and ask it; the arguments are the same.

    Args:
        model: any module, with its weights; left as it is.
        input_shape: (c, h, w) of one sample.
        batch_size: samples per step of the optimiser.
        budget: bytes, or text like "400MiB": on a CPU for the peak of the allocator, on a CUDA device for what its
            allocator reserves. None: what the profile says, or no limit.
        device: a profile, its name or path; None: this machine, on which the blocks are then timed.
        optimizer: a name of :data:`edgetrain.memory.OPTIMIZERS`, or a function of the parameters.
        precision: of weights and activations.
        loss: from the model's output.
        update_in_backward: step the optimiser of each block as soon as its gradients are there; they then take no
            memory until the end of the step. The optimiser is given to :func:`edgetrain.wrap`.
        micro_batches: parts of a batch; None: one where the batch norm is live, else the number with the fastest step.
        allow_ghost_batchnorm: allow parts although batch norm then sees other statistics: as few as fit.
        snr_limit: least ratio of signal to noise of an activation that was inverted, or rounded; infinity: what is
            inverted comes back as it was, blocks that leave noise are stored or run again, and a batch is split on
            request alone.
        stored_precision: ``"bf16"``: an input that is kept until its block is run again, or an inversion starts from
            it, may wait in bfloat16, at half its bytes. Gradients then differ by that rounding: at most 2^-8 of each
            value that waits. None: no activation is rounded.
        channels_last: whether the batch is copied so that its channels come last, :mod:`edgetrain.nn.layouts`, which
            changes results by rounding alone, unless there is dropout of whole activations. None: where blocks are
            timed on this machine's CPU, what is faster; else not, as with such dropout or an infinite ``snr_limit``.
            ``"either"``: whatever makes the faster plan.
        times: of a step at this batch size, or the rates from which they follow; None: measured here, or from the
            profile's rates.
        noise: of the model; None: measured with samples of random numbers. Real samples are better, see
            :func:`edgetrain.chain.measure_noise`.
        guest: what shares the memory with the step, such as a teacher.
        group: samples that micro-batches must not part: 3 for triplets, 2 for pairs.

    Raises:
        BudgetError: nothing fits; names the smallest feasible peak and the cheapest changes that would.
        UsageError: arguments that contradict each other.
        ModelError: the model does not take the input.
    """
    return Planner(
        model,
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
        channels_last=channels_last,
        times=times,
        noise=noise,
        guest=guest,
        group=group,
    ).plan(budget)


class Planner:
    """Plans of one model at one batch size; costs are measured once. Arguments as :func:`plan`."""

    def __init__(
        self,
        model: nn.Module,
        *,
        input_shape: tuple[int, int, int],
        batch_size: int,
        device: str | Path | Profile | None = None,
        optimizer: str | OptimizerFactory = "sgd",
        precision: Precision = "fp32",
        loss: Loss = classification_loss,
        update_in_backward: bool = False,
        micro_batches: int | None = None,
        allow_ghost_batchnorm: bool = False,
        snr_limit: float = SNR_LIMIT,
        stored_precision: StoredPrecision | None = None,
        channels_last: bool | Literal["either"] | None = None,
        times: Times | OperatorRates | None = None,
        noise: Noise | None = None,
        guest: Guest = _NOBODY,
        group: int = 1,
    ) -> None:
        if precision not in DTYPES:
            raise UsageError(
                found=f"precision {precision!r}", expected="one of " + ", ".join(DTYPES), action="pass fp32"
            )
        _check_stored(stored_precision, precision, snr_limit)
        self.model, self.input_shape, self.batch_size = model, input_shape, batch_size
        self.place, self.precision, self.updates_in_backward = Place.of(device), precision, update_in_backward
        self._optimizer, self._loss = optimizer, loss
        self._chain = chain_of(model)
        self.shapes(input_shape)  # names the block that does not take its input
        self._blocks = self._chain.blocks
        self._few = allow_ghost_batchnorm
        if micro_batches is None and math.isinf(snr_limit) and not allow_ghost_batchnorm:
            micro_batches = 1  # sums of parts are rounded in another order
        self._guest = guest
        self._counts = micro_batch_counts(
            model, batch_size, micro_batches, allow_ghost_batchnorm=self._few, group=group
        )
        if update_in_backward:
            if self._counts[0] > 1:
                raise UsageError(
                    found=f"{self._counts[0]} micro-batches and updates in the backward pass",
                    expected="one of them: gradients of all parts are added before an update",
                    action="leave one out",
                )
            self._counts = (1,)
        if noise is None and any(isinstance(block.module, Invertible) for block in self._blocks):
            noise = probed_noise(model, input_shape)
        self.arguments: dict[str, Any] = {
            "input_shape": input_shape,
            "batch_size": batch_size,
            "device": device,
            "optimizer": optimizer,
            "precision": precision,
            "loss": loss,
            "update_in_backward": update_in_backward,
            "micro_batches": micro_batches,
            "allow_ghost_batchnorm": allow_ghost_batchnorm,
            "snr_limit": snr_limit,
            "noise": noise,
            "stored_precision": stored_precision,
            "channels_last": channels_last,
            "guest": guest,
            "group": group,
        }
        self._noise = None if noise is None else noise.in_dtype(DTYPES[precision])
        self._reach = self._rounded_reach = None
        self._too_noisy: Sequence[Mapping[Mode, float]] | None = None
        if self._noise is not None:
            self._reach = reach_of(self._noise, snr_limit)
            self._rounded_reach = reach_of(self._noise, snr_limit, output_nsr=BFLOAT16_NSR)
            self._too_noisy = [_with_selective(ways) for ways in self._noise.forbidden(snr_limit)]
        self._stored = stored_precision
        asked = Asked(
            model,
            input_shape,
            self.place,
            precision,
            optimizer,
            loss,
            channels_last,
            not math.isinf(snr_limit),
            times,
            guest,
        )
        self._measures = Measures(asked, batch_size // self._counts[0])
        self._searches: dict[tuple[int, bool], tuple[Search, Times]] = {}

    def plan(self, budget: str | int | None = None) -> Plan:
        """The fastest plan within ``budget``; see :func:`edgetrain.plan`."""
        found, limit = self.fitting(budget), self.limit_bytes(budget)
        if found is None:
            assert limit is not None
            raise shortage(self, limit)
        return found

    def limit_bytes(self, budget: str | int | None = None) -> int | None:
        """Bytes of ``budget``, or the device's own; None: no limit."""
        return self.place.budget_bytes if budget is None else parse_size(budget) if isinstance(budget, str) else budget

    def fitting(self, budget: str | int | None = None) -> Plan | None:
        """As :meth:`plan`, but None where nothing fits."""
        limit = self.limit_bytes(budget)
        best: Found | None = None
        for count, channels_last in itertools.product(self._counts, self._measures.layouts):
            if best is not None and (best.is_unhindered or (self._few and count != best.count)):
                break  # further parts would change the statistics more, or cost only time
            found = self._fastest(count, limit, channels_last)
            if found is not None and (best is None or found.is_faster_than(best)):
                best = found
        if best is None:
            return None
        modes = modes_of(best.candidate.program)
        costs = self.costs(best.samples, best.candidate.program.channels_last)
        search, times = self._search_for(best.candidate)
        reasons, rejected = explain(best.candidate.program, self._blocks, costs, times, self._too_noisy)
        fastest = replace(best.candidate, seconds=search.bound_seconds(best.limit_bytes))
        return Plan(
            modes,
            reasons,
            best.candidate.program,
            micro_batches=best.count,
            rejected=rejected,
            snrs=self._snrs(best.candidate.program, modes),
            costed=Costed(
                peak_bytes=best.whole.peak_bytes,
                reserved_bytes=best.reserved_bytes,
                step_seconds=best.whole.seconds,
                bound_seconds=min(self._whole(fastest, best.count).seconds, best.whole.seconds),
                budget_bytes=limit,
                device=self.place.name,
                times=times.source,
                optimizer=self._optimizer if isinstance(self._optimizer, str) else "a function",
                alternatives=tuple(self._alternatives(best, limit)),
                front=tuple((c.peak_bytes, c.seconds) for c in self.front(best.count)),
            ),
        )

    def _snrs(self, program: Program, modes: tuple[Mode, ...]) -> tuple[float, ...]:
        rounded = rounded_in(program)
        if self._noise is None and not rounded:
            return ()
        noise = self._noise or Noise((None,) * len(modes), DTYPES[self.precision], "nothing is inverted")
        return noise.snrs(modes, rounded=rounded)

    def front(self, micro_batches: int = 1) -> tuple[Candidate, ...]:
        """Steps that nothing beats in both peak and time, leanest first."""
        samples = self.batch_size // micro_batches
        found = [self._search(samples, last)[0].front() for last in self._measures.layouts]
        if len(found) == 1:
            return tuple(self._whole(candidate, micro_batches) for candidate in found[0])
        return pareto(self._whole(candidate, micro_batches) for front in found for candidate in front)

    def least(self) -> Candidate:
        """The step with the smallest peak."""
        found = [self._whole(candidate, n) for n in self._counts for candidate in self._leanest(n)]
        return min(found, key=lambda candidate: candidate.peak_bytes)

    def needed(self) -> tuple[int, int]:
        """Bytes that the leanest step needs of the device, and its number of micro-batches."""
        return min((self._need(count), count) for count in self._counts)

    def fits(self, budget_bytes: int) -> bool:
        """Whether :meth:`plan` finds something, asked of the fewest and the most micro-batches alone."""
        return any(self._need(count) <= budget_bytes for count in {self._counts[-1], self._counts[0]})

    def changed(self, model: nn.Module | None = None, **changes: Any) -> Planner:
        """A planner with other arguments, to ask whether something fits.

        Args:
            model: None: the same; or with blocks frozen.
            changes: arguments as of :class:`Planner`. Little is measured but bytes: the noise of the same model is
                taken over, and of the seconds only that there are some.
        """
        if model is not None:
            changes["noise"] = None  # its blocks may be others
        other = Planner(self.model if model is None else model, **{**self.arguments, **changes})
        other._measures.take_seconds_of(self._measures)
        return other

    def shapes(self, input_shape: tuple[int, int, int]) -> tuple[tuple[int, ...], ...]:
        """Shapes of z[0] ... z[L] for samples of ``input_shape``; raises ModelError where the model refuses them."""
        return self._chain.shapes((self.batch_size, *input_shape))

    def _need(self, count: int) -> int:
        """Bytes that the leanest step of ``count`` micro-batches needs of the device."""
        return min(self._need_of(candidate, count) for candidate in self._leanest(count))

    def _need_of(self, candidate: Candidate, count: int) -> int:
        peak = self._whole(candidate, count).peak_bytes
        reserved = self._reserved_bytes(candidate)
        return max(peak, (reserved or 0) + peak - candidate.peak_bytes)  # gradients that stay from part to part

    def _leanest(self, count: int) -> list[Candidate]:
        """The leanest step of one of ``count`` micro-batches, in each layout."""
        return [self._search(self.batch_size // count, last)[0].least() for last in self._measures.layouts]

    def costs(self, samples: int, channels_last: bool = False) -> Costs:
        """Bytes of every instruction on a batch of ``samples``; what a guest holds is among the weights."""
        return self._measures.costs(samples, channels_last)

    def times_of(self, plan: Plan) -> Times:
        """Seconds of every instruction, from which those of ``plan`` follow."""
        return self._measures.times(plan.program.shapes[0][0], plan.program.channels_last)

    def _search_for(self, candidate: Candidate) -> tuple[Search, Times]:
        """Where ``candidate`` was found."""
        return self._search(candidate.program.shapes[0][0], candidate.program.channels_last)

    def _search(self, samples: int, channels_last: bool) -> tuple[Search, Times]:
        key = samples, channels_last
        if key not in self._searches:
            times = self._measures.times(samples, channels_last)
            forbidden: Sequence[Collection[Mode]] | None = self._too_noisy
            if (turning := self._measures.forbidden(samples, channels_last)) is not None:
                noisy = forbidden or [()] * len(turning)
                forbidden = [(*modes, *others) for modes, others in zip(noisy, turning, strict=True)]
            search = Search(
                self._blocks,
                self.costs(samples, channels_last),
                times,
                reach=self._reach,
                rounded_reach=self._rounded_reach,
                too_noisy=forbidden,
                offload=self.place.offload,
                stored_bfloat16=self._stored == "bf16",
                update_in_backward=self.updates_in_backward,
            )
            self._searches[key] = search, times
        return self._searches[key]

    def _whole(self, candidate: Candidate, count: int) -> Candidate:
        """``candidate`` as one of ``count`` micro-batches."""
        after = sum(block.update for block in self._search_for(candidate)[1].blocks)
        whole = at_micro_batches(candidate, count, standing_bytes=self.standing_bytes(count), after=after)
        return replace(whole, peak_bytes=max(whole.peak_bytes, self._before_bytes(count)))

    def _before_bytes(self, count: int) -> int:
        """Most bytes before the step, or one of ``count`` micro-batches, when the guest is busy; 0 without one."""
        if not self._guest.before_bytes:
            return 0
        costs = self.costs(self.batch_size // count, self._measures.layouts[0])
        batch_bytes = math.prod(costs.shapes[0]) * costs.element_bytes[0]
        resident = costs.weight_bytes + costs.optimizer_bytes + batch_bytes
        return resident + self.standing_bytes(count) + self._guest.before_bytes

    def standing_bytes(self, count: int) -> int:
        """What stays from one of ``count`` micro-batches to the next: gradients, and the rest of the batch."""
        if count == 1:
            return 0
        costs = self.costs(self.batch_size // count, self._measures.layouts[0])
        return costs.gradient_bytes + (count - 1) * math.prod(costs.shapes[0]) * costs.element_bytes[0]

    def _fastest(self, count: int, budget_bytes: int | None, channels_last: bool) -> Found | None:
        """The fastest candidate with ``count`` micro-batches whose peak, and what is reserved for it, fit."""
        samples = self.batch_size // count
        search, _ = self._search(samples, channels_last)
        standing = self.standing_bytes(count)
        if budget_bytes is not None and self._before_bytes(count) > budget_bytes:
            return None
        limit = search.uniform["keep_all"].peak_bytes if budget_bytes is None else budget_bytes - standing
        target = limit
        for left in reversed(range(_ROUNDS)):
            best = (search.under(target) if left else None) or search.least()
            if best.peak_bytes > limit:
                return None
            reserved = self._reserved_bytes(best)
            if reserved is None or budget_bytes is None or reserved <= limit:
                whole = self._whole(best, count)
                return Found(best, whole, count, samples, limit, None if reserved is None else reserved + standing)
            if best.peak_bytes > target:
                return None  # not even the leanest
            target = best.peak_bytes - max(1, (reserved - limit) // 4)
        return None

    def _reserved_bytes(self, candidate: Candidate) -> int | None:
        """What the CUDA caching allocator takes for a step of ``candidate``; None on a CPU."""
        if self.place.kind == "cpu" or self.place.profile is None:
            return None
        own = optimizer_factory(self._optimizer) if self.updates_in_backward else None
        samples = candidate.program.shapes[0][0]
        trace = trace_step(
            self.model,
            input_shape=self.input_shape,
            batch_size=samples,
            wrap=functools.partial(wrap, plan=candidate, optimizer=own),
            optimizer=None if self.updates_in_backward else self._optimizer,
            loss=self._loss,
            dtype=DTYPES[self.precision],
            device=self.place.kind,
        )
        return from_trace(trace, self.place.profile, batch_size=samples).reserved_bytes

    def _alternatives(self, best: Found, limit_bytes: int | None) -> list[Alternative]:
        found = self._other_layout(best)
        for mode, candidate in self._search_for(best.candidate)[0].uniform.items():
            if candidate.program.instructions == best.candidate.program.instructions:
                continue
            whole = self._whole(candidate, best.count)
            over = 0 if limit_bytes is None else whole.peak_bytes - limit_bytes
            slower = whole.seconds / best.whole.seconds - 1
            reason = f"{format_mib(over)} over the budget" if over > 0 else f"{slower:+.1%} time"
            found.append(Alternative(f"uniform {mode}", reason, whole.peak_bytes, whole.seconds))
        return found

    def _other_layout(self, best: Found) -> list[Alternative]:
        """What keeping everything takes in the layout that was not chosen, where both were timed."""
        other = not best.candidate.program.channels_last
        found = [self._measures.timed(best.samples, last) for last in (other, not other)]
        if found[0] is None or found[1] is None:
            return []
        seconds = [times.keep_all_seconds for times in found if times is not None]
        reason = f"{seconds[0] / seconds[1] - 1:+.1%} time of keeping everything"
        return [Alternative("channels last" if other else "channels first", reason)]


def _with_selective(too_noisy: Mapping[Inversion, float]) -> dict[Mode, float]:
    """With the mode in which an invertible block gets its hidden activations back from its output, if that is among."""
    found: dict[Mode, float] = dict(too_noisy.items())
    if "invert_layerwise" in too_noisy:
        found["selective"] = too_noisy["invert_layerwise"]
    return found


def _check_stored(stored: str | None, precision: str, snr_limit: float) -> None:
    """Whether checkpoints can wait in ``stored`` precision.

    Raises:
        UsageError: they cannot, or have nothing to gain, or the limit forbids it.
    """
    if stored is None:
        return
    if stored not in get_args(StoredPrecision):
        raise UsageError(
            found=f"stored precision {stored!r}", expected="bf16, or none at all", action="pass bf16, or leave it out"
        )
    if precision != "fp32":
        raise UsageError(
            found=f"stored precision {stored} in a step in {precision}",
            expected="a step in fp32: nothing that is kept would be shorter",
            action="leave --stored-precision out",
        )
    if BFLOAT16_NSR * snr_limit > 1:
        raise UsageError(
            found=f"stored precision {stored} with a limit of {snr_limit:g} on signal over noise",
            expected=f"at most {1 / BFLOAT16_NSR:.0f}, what rounding to bfloat16 leaves",
            action="lower --snr-limit, or leave --stored-precision out",
        )


@dataclass(frozen=True)
class Found:
    """A candidate that fits.

    Attributes:
        whole: the candidate for all ``count`` micro-batches, of ``samples`` each.
        limit_bytes: what the candidate's own peak may be.
        reserved_bytes: by the device's allocator; None: the same as its peak.
    """

    candidate: Candidate
    whole: Candidate
    count: int
    samples: int
    limit_bytes: int
    reserved_bytes: int | None

    def is_faster_than(self, other: Found) -> bool:
        """By the clock; channels come last only where that is faster by more than the clock's error."""
        last, other_last = self.candidate.program.channels_last, other.candidate.program.channels_last
        gained = (1 - CLOCK_ERROR) ** (int(last) - int(other_last))
        return self.whole.seconds < gained * other.whole.seconds

    @property
    def is_unhindered(self) -> bool:
        """Whether the budget costs no time: every block keeps what autograd saves."""
        return set(modes_of(self.candidate.program)) == {"store"}
