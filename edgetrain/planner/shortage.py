"""When no plan fits: the smallest peak there is, and what would fit, the cheapest change first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgetrain.errors import BudgetError
from edgetrain.planner.samples import mixing_layer, possible_counts
from edgetrain.units import MIB, format_mib

if TYPE_CHECKING:
    from edgetrain.planner.planning import Planner


def shortage(planner: Planner, budget_bytes: int) -> BudgetError:
    """The error of a planner that found nothing within ``budget_bytes``."""
    least_bytes, count = planner.needed()
    return BudgetError(
        found=f"a budget of {format_mib(budget_bytes)} for {planner.batch_size} samples on {planner.place.name}",
        expected=f"at least {format_mib(least_bytes)}, what the leanest plan found needs",
        action=", or ".join(_changes(planner, budget_bytes, least_bytes, count)),
    )


def _changes(planner: Planner, budget_bytes: int, least_bytes: int, count: int) -> list[str]:
    batch = planner.batch_size
    changes = []
    updating = not planner.updates_in_backward and count == 1
    if updating and planner.least_bytes(batch, update_in_backward=True) <= budget_bytes:
        changes.append("step the optimiser in the backward pass (--update-in-backward)")
    if planner.costs(batch // count).optimizer_bytes >= least_bytes - budget_bytes:
        changes.append("use an optimiser without state (--optimizer sgd-plain)")
    samples = _largest_batch(planner, budget_bytes)
    if samples:
        changes.append(f"pass --batch {samples}")
        parts = next((n for n in possible_counts(batch)[1:] if batch // n <= samples), None)
        if parts is not None and count == 1 and mixing_layer(planner.model):
            changes.append(f"allow {parts} micro-batches, each with its own batch norm (--allow-ghost-batchnorm)")
    if planner.precision == "fp32" and least_bytes / 2 <= budget_bytes:
        changes.append("pass --precision bf16")
    changes.append(f"raise --budget to {-(-least_bytes // MIB)}MiB")
    return changes


def _largest_batch(planner: Planner, budget_bytes: int) -> int:
    """The most samples that fit, to an eighth; 0 where none do."""
    known, fails = 0, planner.batch_size
    while not known and fails > 1:
        half = fails // 2
        known, fails = (half, fails) if planner.least_bytes(half) <= budget_bytes else (0, half)
    while known and fails - known > max(1, known // 8):
        middle = (known + fails) // 2
        known, fails = (middle, fails) if planner.least_bytes(middle) <= budget_bytes else (known, middle)
    return known
