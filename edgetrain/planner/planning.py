"""``edgetrain.plan``: from a model and a budget to a Plan.

    bytes of every instruction      edgetrain.memory.measure_costs, under fake tensors
    seconds of every instruction    measured on this machine, or from a profile's rates
    noise of every inversion        edgetrain.chain.measure_noise, eight samples
        -> the search for each number of micro-batches -> the fastest that fits -> Plan

The search itself (:mod:`edgetrain.planner.search`) is pure: same numbers, same plan.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from edgetrain.chain import Block, chain_of
from edgetrain.chain.measure_noise import measure_noise
from edgetrain.chain.noise import Noise
from edgetrain.errors import BudgetError, EdgetrainError, UsageError
from edgetrain.memory import Costs, measure_costs
from edgetrain.memory.estimate import DTYPES, Precision, from_trace
from edgetrain.memory.measured_times import measured_times
from edgetrain.memory.operators import DeviceKind
from edgetrain.memory.predicted_times import predicted_times
from edgetrain.memory.step import Loss, OptimizerFactory, classification_loss, trace_step
from edgetrain.memory.times import Times
from edgetrain.nn import Invertible, InvertibleBatchNorm
from edgetrain.planner.plans import Alternative, Costed, Plan
from edgetrain.planner.reasons import explain, modes_of
from edgetrain.planner.search import Candidate, Search, at_micro_batches
from edgetrain.runtime import wrap
from edgetrain.units import MIB, format_mib, parse_size

if TYPE_CHECKING:
    from edgetrain.profiles import Profile

SNR_LIMIT = 1e4
"""Signal over noise (a ratio of powers) below which no activation may fall."""

_NOISE_SAMPLES, _NOISE_SIDE, _NOISE_FACTORS = 8, 16, (8, 7, 6, 5, 4, 3, 2)
_MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
_ROUNDS = 12


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
    times: Times | None = None,
    noise: Noise | None = None,
) -> Plan:
    """The fastest training step whose predicted peak fits ``budget``.

    Args:
        model: any module, with its weights; left as it is.
        input_shape: (c, h, w) of one sample.
        batch_size: samples per step of the optimiser.
        budget: bytes, or text like "400MiB": on a CPU for the peak of the allocator, on a CUDA device for what its
            allocator reserves. None: what the profile says, or no limit.
        device: a profile, its name or path; None: this machine, on which the blocks are then timed.
        optimizer: a name of :data:`edgetrain.memory.OPTIMIZERS`, or a function of the parameters.
        precision: of weights and activations.
        update_in_backward: step the optimiser of each block as soon as its gradients are there; they then take no
            memory until the end of the step. The optimiser is given to :func:`edgetrain.wrap`.
        micro_batches: parts of a batch; None: one where the batch norm is live, else the number with the fastest step.
        allow_ghost_batchnorm: allow parts although batch norm then sees other statistics: as few as fit.
        snr_limit: least ratio of signal to noise of an activation that was inverted.
        times: of a step at this batch size; None: measured here, or from the profile's rates.
        noise: of the model; None: measured with samples of random numbers.

    Raises:
        BudgetError: nothing fits; names the smallest feasible peak and the cheapest change that would.
        UsageError: arguments that contradict each other.
        ModelError: the model does not take the input.
    """
    place = _Place.of(device, precision)
    budget_bytes = place.budget_bytes if budget is None else parse_size(budget) if isinstance(budget, str) else budget
    blocks = chain_of(model).blocks
    parts = _parts(model, batch_size, micro_batches, allow_ghost_batchnorm=allow_ghost_batchnorm)
    if update_in_backward and parts[0] > 1:
        raise UsageError(
            found=f"{parts[0]} micro-batches and updates in the backward pass",
            expected="one of them: gradients of all parts are added before an update",
            action="leave one out",
        )
    if noise is None and any(isinstance(block.module, Invertible) for block in blocks):
        noise = _probed_noise(model, input_shape)
    request = _Request(model, blocks, input_shape, optimizer, precision, loss, update_in_backward, place, times)
    noise = noise and noise.in_dtype(DTYPES[precision])
    reach = _reach(noise, snr_limit)
    found = least = None
    for count in parts if not update_in_backward else (1,):
        fitting, tried = _search(request, batch_size // count, count, budget_bytes, reach)
        least = tried if least is None or tried.whole.peak_bytes < least.whole.peak_bytes else least
        if fitting is not None and (found is None or fitting.whole.seconds < found.whole.seconds):
            found = fitting
        if found is not None and (allow_ghost_batchnorm or found.is_unhindered):
            break  # every further part would change the statistics more, or cost only time
    if found is None:
        assert least is not None
        assert budget_bytes is not None
        raise _infeasible(request, batch_size, budget_bytes, least, reach)
    modes = modes_of(found.candidate.program)
    reasons, rejected = explain(found.candidate.program, blocks, found.costs, found.times)
    return Plan(
        modes,
        reasons,
        found.candidate.program,
        micro_batches=found.micro_batches,
        rejected=rejected,
        snrs=noise.snrs(modes) if noise is not None else (),
        costed=Costed(
            peak_bytes=found.whole.peak_bytes,
            reserved_bytes=found.reserved_bytes,
            step_seconds=found.whole.seconds,
            bound_seconds=found.bound_seconds,
            budget_bytes=budget_bytes,
            device=place.name,
            times=found.times.source,
            optimizer=optimizer if isinstance(optimizer, str) else getattr(optimizer, "__name__", "a function"),
            alternatives=found.alternatives,
            front=tuple((c.peak_bytes, c.seconds) for c in found.front),
        ),
    )


@dataclass(frozen=True)
class _Place:
    """Where the step will run."""

    name: str
    kind: DeviceKind
    profile: Profile | None
    budget_bytes: int | None
    offload: bool

    @classmethod
    def of(cls, device: str | Path | Profile | None, precision: Precision) -> _Place:
        from edgetrain.profiles import load_profile

        if precision not in DTYPES:
            raise UsageError(
                found=f"precision {precision!r}", expected="one of " + ", ".join(DTYPES), action="pass fp32"
            )
        if device is None:
            kind: DeviceKind = "cuda" if torch.cuda.is_available() else "cpu"
            return cls("this machine", kind, None, None, kind == "cuda")
        profile = load_profile(device) if isinstance(device, str | Path) else device
        discrete = profile.kind == "cuda" and not profile.unified
        return cls(
            profile.name, profile.kind, profile, profile.default_budget_bytes or profile.available_bytes, discrete
        )


@dataclass(frozen=True)
class _Request:
    """What :func:`plan` was asked, without batch and budget."""

    model: nn.Module
    blocks: Sequence[Block]
    input_shape: tuple[int, int, int]
    optimizer: str | OptimizerFactory
    precision: Precision
    loss: Loss
    update_in_backward: bool
    place: _Place
    times: Times | None

    def costs(self, samples: int) -> Costs:
        return measure_costs(
            self.model,
            input_shape=self.input_shape,
            batch_size=samples,
            dtype=DTYPES[self.precision],
            optimizer=self.optimizer,
            loss=self.loss,
            device=self.place.kind,
        )

    def times_of(self, costs: Costs) -> Times:
        if self.times is not None and self.times.shapes == costs.shapes:
            return self.times
        if self.place.profile is not None:
            return predicted_times(costs, self.place.profile, self.precision)
        return measured_times(
            self.model,
            input_shape=self.input_shape,
            batch_size=costs.batch_size,
            optimizer=self.optimizer,
            dtype=DTYPES[self.precision],
            loss=self.loss,
        )

    def search(self, costs: Costs, times: Times, reach: Sequence[int] | None) -> Search:
        return Search(
            self.blocks,
            costs,
            times,
            reach=reach,
            offload=self.place.offload,
            update_in_backward=self.update_in_backward,
        )

    def reserved_bytes(self, candidate: Candidate) -> int | None:
        """What the CUDA caching allocator takes for a step of ``candidate``; None on a CPU."""
        if self.place.kind == "cpu" or self.place.profile is None:
            return None
        program = _Programmed(candidate)
        optimizer = None if self.update_in_backward else self.optimizer
        factory: Callable[..., torch.optim.Optimizer] | None = None
        if self.update_in_backward:
            from edgetrain.memory.step import optimizer_factory

            factory = optimizer_factory(self.optimizer)
        trace = trace_step(
            self.model,
            input_shape=self.input_shape,
            batch_size=candidate.program.shapes[0][0],
            wrap=lambda module: wrap(module, program, optimizer=factory),
            optimizer=optimizer,
            loss=self.loss,
            dtype=DTYPES[self.precision],
        )
        return from_trace(trace, self.place.profile, batch_size=candidate.program.shapes[0][0]).reserved_bytes


@dataclass(frozen=True)
class _Programmed:
    """Carries a Program, for :func:`edgetrain.wrap`."""

    candidate: Candidate

    @property
    def program(self):  # type: ignore[no-untyped-def]
        return self.candidate.program


@dataclass(frozen=True)
class _Found:
    """A candidate with everything that led to it.

    Attributes:
        whole: the candidate for all micro-batches.
    """

    candidate: Candidate
    whole: Candidate
    micro_batches: int
    costs: Costs
    times: Times
    reserved_bytes: int | None = None
    bound_seconds: float = 0.0
    alternatives: tuple[Alternative, ...] = ()
    front: tuple[Candidate, ...] = ()

    @property
    def is_unhindered(self) -> bool:
        """Whether the budget costs no time: every block keeps what autograd saves."""
        return set(modes_of(self.candidate.program)) == {"store"}


def _search(
    request: _Request, samples: int, micro_batches: int, budget_bytes: int | None, reach: Sequence[int] | None
) -> tuple[_Found | None, _Found]:
    """What fits, if anything; and what has the lowest peak where nothing does."""
    costs = request.costs(samples)
    times = request.times_of(costs)
    search = request.search(costs, times, reach)
    after = sum(block.update for block in times.blocks)

    def whole(candidate: Candidate) -> Candidate:
        return at_micro_batches(candidate, micro_batches, gradient_bytes=costs.gradient_bytes, after=after)

    def found(candidate: Candidate) -> _Found:
        return _Found(candidate, whole(candidate), micro_batches, costs, times)

    keep_all = search.uniform["keep_all"]
    standing = whole(keep_all).peak_bytes - keep_all.peak_bytes
    limit = budget_bytes if budget_bytes is not None else whole(keep_all).peak_bytes
    best, reserved = _fitting(request, search, limit - standing, bounded=budget_bytes is not None)
    if best is None:
        least = found(search.least())
        return None, least
    chosen = replace(
        found(best),
        reserved_bytes=None if reserved is None else reserved + standing,
        bound_seconds=min(
            (search.bound_seconds(limit - standing) - after) * micro_batches + after, whole(best).seconds
        ),
        alternatives=tuple(_alternatives(search, whole, best, limit)),
        front=tuple(whole(candidate) for candidate in search.front()),
    )
    return chosen, chosen


def _fitting(
    request: _Request, search: Search, limit_bytes: int, *, bounded: bool
) -> tuple[Candidate | None, int | None]:
    """The fastest candidate whose reserved bytes fit too, and those."""
    target = limit_bytes
    for _ in range(_ROUNDS):
        best = search.under(target)
        if best is None:
            break
        reserved = request.reserved_bytes(best)
        if reserved is None or not bounded or reserved <= limit_bytes:
            return best, reserved
        target = best.peak_bytes - max(1, (reserved - limit_bytes) // 4)
    return None, None


def _alternatives(
    search: Search, whole: Callable[[Candidate], Candidate], best: Candidate, limit_bytes: int
) -> list[Alternative]:
    found = []
    for mode, candidate in search.uniform.items():
        if candidate.program.instructions == best.program.instructions:
            continue
        costed = whole(candidate)
        over = costed.peak_bytes - limit_bytes
        slower = costed.seconds / whole(best).seconds - 1
        reason = f"{format_mib(over)} over the budget" if over > 0 else f"{slower:+.1%} time"
        found.append(Alternative(f"uniform {mode}", reason, costed.peak_bytes, costed.seconds))
    return found


def _parts(
    model: nn.Module, batch_size: int, micro_batches: int | None, *, allow_ghost_batchnorm: bool
) -> tuple[int, ...]:
    """Numbers of micro-batches to try, in this order."""
    mixing = _mixing(model)
    if micro_batches is not None:
        if micro_batches < 1 or batch_size % micro_batches:
            raise UsageError(
                found=f"{micro_batches} micro-batches of a batch of {batch_size}",
                expected="a number that divides the batch",
                action="choose another batch size or number",
            )
        if micro_batches > 1 and mixing and not allow_ghost_batchnorm:
            raise UsageError(
                found=f"{micro_batches} micro-batches with a live batch norm ({mixing})",
                expected="layers that treat every sample alone: otherwise the parts have other statistics",
                action="freeze it, use group norm, or pass allow_ghost_batchnorm (--allow-ghost-batchnorm)",
            )
        return (micro_batches,)
    if mixing and not allow_ghost_batchnorm:
        return (1,)
    return tuple(n for n in _MICRO_BATCHES if batch_size % n == 0 and batch_size // n >= 2)


def _mixing(model: nn.Module) -> str | None:
    """Name of a layer in which the samples of a batch meet."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | InvertibleBatchNorm) and module.training:
            return name
    return None


def _probed_noise(model: nn.Module, input_shape: tuple[int, int, int]) -> Noise:
    """From a few random samples, small ones where the model takes them: noise is a matter of channels."""
    channels, height, width = input_shape
    for factor in _NOISE_FACTORS:
        if height % factor == width % factor == 0 and min(height, width) // factor >= _NOISE_SIDE:
            with contextlib.suppress(EdgetrainError, RuntimeError):
                return measure_noise(model, (_NOISE_SAMPLES, channels, height // factor, width // factor))
    return measure_noise(model, (_NOISE_SAMPLES, *input_shape))


def _reach(noise: Noise | None, snr_limit: float) -> tuple[int, ...] | None:
    if noise is None:
        return None
    runs = [noise.longest_runs(snr_limit, way=way) for way in ("invert", "invert_layerwise")]
    return tuple(max(firsts) for firsts in zip(*runs, strict=True))


def _infeasible(
    request: _Request, batch_size: int, budget_bytes: int, least: _Found, reach: Sequence[int] | None
) -> BudgetError:
    """The smallest feasible peak, and the cheapest change that would fit."""
    return BudgetError(
        found=f"a budget of {format_mib(budget_bytes)} for {batch_size} samples on {request.place.name}",
        expected=f"at least {format_mib(least.whole.peak_bytes)}, the smallest peak of any plan found",
        action=_changes(request, batch_size, budget_bytes, least, reach),
    )


def _changes(request: _Request, batch_size: int, budget_bytes: int, least: _Found, reach: Sequence[int] | None) -> str:
    """What would fit, the change that costs least first."""
    over = least.whole.peak_bytes - budget_bytes
    changes = []
    if (
        not request.update_in_backward
        and least.micro_batches == 1
        and _fits_updating(request, budget_bytes, least, reach)
    ):
        changes.append("step the optimiser in the backward pass (--update-in-backward)")
    if least.costs.optimizer_bytes >= over:
        changes.append("use an optimiser without state (--optimizer sgd-plain)")
    samples = _largest_batch(request, batch_size, budget_bytes, least, reach)
    if samples:
        changes.append(f"pass --batch {samples}")
        parts = next((n for n in _MICRO_BATCHES[1:] if batch_size % n == 0 and batch_size // n <= samples), None)
        if parts is not None and least.micro_batches == 1 and _mixing(request.model):
            changes.append(f"allow {parts} micro-batches, each with its own batch norm (--allow-ghost-batchnorm)")
    if request.precision == "fp32" and least.whole.peak_bytes / 2 <= budget_bytes:
        changes.append("pass --precision bf16")
    changes.append(f"raise --budget to {-(-least.whole.peak_bytes // MIB)}MiB")
    return ", or ".join(changes)


def _fits_updating(request: _Request, budget_bytes: int, least: _Found, reach: Sequence[int] | None) -> bool:
    updating = replace(request, update_in_backward=True)
    return updating.search(least.costs, least.times, reach).least().peak_bytes <= budget_bytes


def _largest_batch(
    request: _Request, batch_size: int, budget_bytes: int, least: _Found, reach: Sequence[int] | None
) -> int:
    """The most samples that fit, to an eighth; 0 where none do."""
    wasted = max(0, (least.reserved_bytes or 0) - least.whole.peak_bytes)

    def fits(samples: int) -> bool:
        costs = request.costs(samples)
        same = replace(least.times, shapes=costs.shapes)  # how long it takes does not matter here
        return request.search(costs, same, reach).least().peak_bytes + wasted <= budget_bytes

    known, fails = 0, batch_size
    while not known and fails > 1:
        known, fails = (fails // 2, fails) if fits(fails // 2) else (0, fails // 2)
    while known and fails - known > max(1, known // 8):
        middle = (known + fails) // 2
        known, fails = (middle, fails) if fits(middle) else (known, middle)
    return known
