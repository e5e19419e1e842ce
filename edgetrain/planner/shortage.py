"""When no plan fits: the smallest peak there is, and what would fit, the cheapest change first.

Cheap is what alters the trained network least: first what leaves the arithmetic as it is, then how a batch is taken,
then the recipe, the numbers, the images, what is trained at all. Every change that is named was planned for: with it
alone the leanest plan fits.
"""

from __future__ import annotations

import bisect
import contextlib
import copy
import importlib.util
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from edgetrain.chain import SampledNetwork, Tapped, freeze, parts_of
from edgetrain.errors import BudgetError, EdgetrainError, ModelError
from edgetrain.planner.samples import mixing_layer, possible_counts
from edgetrain.units import MIB, format_mib

if TYPE_CHECKING:
    from edgetrain.planner.planning import Planner

_SIDE_STEPS = (32, 16, 8)
"""Pixels. Poolings halve a side up to five times; the finer steps are tried between the coarser."""

_EIGHT_BIT = {"sgd": "sgd-8bit", "adamw": "adamw-8bit"}

Shape = tuple[int, int, int]


def shortage(planner: Planner, budget_bytes: int) -> BudgetError:
    """The error of a planner that found nothing within ``budget_bytes``."""
    least_bytes, _ = planner.needed()
    changes = [*_changes(planner, budget_bytes), f"raise --budget to {-(-least_bytes // MIB)}MiB"]
    return BudgetError(
        found=f"a budget of {format_mib(budget_bytes)} for {planner.batch_size} samples on {planner.place.name}",
        expected=f"at least {format_mib(least_bytes)}, what the leanest plan found needs",
        action=", or ".join(changes),
    )


def _changes(planner: Planner, budget_bytes: int) -> Iterator[str]:
    def fits(*, frozen: int = 0, **changes: Any) -> bool:
        with contextlib.suppress(EdgetrainError):  # such as a layer that has no kernel for half precision
            model = freeze(copy.deepcopy(planner.model), frozen) if frozen else None
            return planner.changed(model, **changes).fits(budget_bytes)
        return False

    given = planner.arguments
    if not planner.updates_in_backward and fits(update_in_backward=True):
        yield "step the optimiser in the backward pass (--update-in-backward)"
    if mixing_layer(planner.model) and not given["allow_ghost_batchnorm"] and given["micro_batches"] is None:
        counts = possible_counts(planner.batch_size, planner.arguments["group"])[1:]
        parts = next((n for n in counts if fits(micro_batches=n, allow_ghost_batchnorm=True)), None)
        if parts is not None:
            yield f"allow {parts} micro-batches, each with its own batch norm (--allow-ghost-batchnorm)"
    unit = (given["micro_batches"] or 1) * given["group"]
    samples = unit * _most(lambda n: fits(batch_size=n * unit), planner.batch_size // unit)
    if samples:
        yield f"pass --batch {samples}"
    eight_bit = _EIGHT_BIT.get(given["optimizer"]) if importlib.util.find_spec("bitsandbytes") else None
    if eight_bit is not None and fits(optimizer=eight_bit):
        yield f"hold the optimiser's state in 8 bit (--optimizer {eight_bit})"
    if fits(optimizer="sgd-plain"):
        yield "use an optimiser without state (--optimizer sgd-plain)"
    if planner.precision == "fp32" and fits(precision="bf16", stored_precision=None):
        yield "pass --precision bf16"
    smaller = _largest_input(planner, lambda shape: fits(input_shape=shape))
    if smaller is not None:
        yield f"lower the resolution (--input {'x'.join(map(str, smaller))})"
    # of a sampled network other blocks are counted: it is frozen first and sampled then
    blocks = (
        0
        if isinstance(planner.model, SampledNetwork | Tapped)
        else _fewest_frozen(planner.model, lambda n: fits(frozen=n))
    )
    if blocks:
        yield f"freeze the first blocks (--freeze {blocks})"


def _most(fits: Callable[[int], bool], present: int) -> int:
    """The largest number below ``present`` that fits, to an eighth; 0 where none does."""
    known, fails = 0, present
    while not known and fails > 1:
        half = fails // 2
        known, fails = (half, fails) if fits(half) else (0, half)
    while known and fails - known > max(1, known // 8):
        middle = (known + fails) // 2
        known, fails = (middle, fails) if fits(middle) else (known, middle)
    return known


def _largest_input(planner: Planner, fits: Callable[[Shape], bool]) -> Shape | None:
    """The largest smaller input that the model takes and that fits, of the same proportions; None where none does.

    By bisection: of the multiples of 32, then of finer steps between the largest that fits and the next.
    """
    present = planner.input_shape
    known, fails, found = 0, min(present[1:]), None
    for step in _SIDE_STEPS:
        sides = range(known - known % step + step, fails, step)
        shapes = [(side, _scaled(present, side, step)) for side in sides]
        shapes = [(side, shape) for side, shape in shapes if _takes(planner, shape)]
        fitting = bisect.bisect_left(shapes, True, key=lambda pair: not fits(pair[1]))
        if fitting:
            known, found = shapes[fitting - 1]
        if fitting < len(shapes):
            fails = shapes[fitting][0]
    return found


def _fewest_frozen(model: nn.Module, fits: Callable[[int], bool]) -> int:
    """The fewest leading blocks without whose training a plan fits; 0 where the last one alone is too much."""
    parts = parts_of(model)
    last = max((i for i, part in enumerate(parts) if any(p.requires_grad for p in part.module.parameters())), default=0)
    found = bisect.bisect_left(range(1, last + 1), True, key=fits)
    return found + 1 if found < last else 0


def _scaled(shape: Shape, side: int, step: int) -> Shape:
    """``shape`` with ``side`` pixels on its shorter side, and a multiple of ``step`` on the other."""
    channels, height, width = shape
    height, width = (max(step, round(side * n / min(height, width) / step) * step) for n in (height, width))
    return channels, height, width


def _takes(planner: Planner, shape: Shape) -> bool:
    """Whether the model gives as many outputs for images of ``shape`` as it does for the present ones."""
    with contextlib.suppress(ModelError):
        now, then = planner.shapes(planner.input_shape)[-1], planner.shapes(shape)[-1]
        return len(now) != 2 or now == then
    return False
