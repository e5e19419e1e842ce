"""``--budget SIZE|auto|none``: what a run may take of the memory that is there."""

from __future__ import annotations

from dataclasses import replace

from edgetrain.errors import BudgetError
from edgetrain.targets.ledger import Ledger, read_ledger
from edgetrain.units import MIB, format_mib, parse_size

RESERVE_BYTES, RESERVE = 256 * MIB, 0.1
"""What ``--budget auto`` leaves to everything else: the larger of so many bytes and that part of what is available."""


def memory_ledger(device: str | None) -> Ledger:
    """The memory of this machine now, and what the profile ``device`` says of libraries and context.

    Raises:
        UsageError: no such profile.
    """
    import torch

    ledger = read_ledger()
    if torch.cuda.is_available() and not torch.cuda.get_device_properties().is_integrated:
        from edgetrain.targets import select_target

        ledger = replace(ledger, device_bytes=select_target("cuda").probe().available_bytes)
    if device is None:
        return ledger
    from edgetrain.profiles import load_profile

    profile = load_profile(device)
    return replace(ledger, context_bytes=profile.context_bytes, framework_bytes=profile.framework_bytes)


def automatic_budget(ledger: Ledger, device: str | None) -> tuple[int, int]:
    """``(budget, reserve)`` in bytes: what is available, less a reserve, and no more than a profile allows.

    Raises:
        BudgetError: nothing is left.
        UsageError: no such profile.
    """
    available = ledger.available_bytes if ledger.device_bytes is None else ledger.device_bytes
    reserve = max(RESERVE_BYTES, int(RESERVE * available))
    budget = available - reserve
    if device is not None:
        from edgetrain.profiles import load_profile

        profile = load_profile(device)
        budget = min(budget, profile.default_budget_bytes or profile.available_bytes or budget)
    if budget <= 0:
        raise BudgetError(
            found=f"{format_mib(available)} available on this machine",
            expected=f"more than the reserve of {format_mib(reserve)} that --budget auto leaves",
            action="end other programs, or pass --budget with what may be used",
        )
    return budget, reserve


def parse_budget(budget: str, ledger: Ledger, device: str | None) -> tuple[int | None, int | None]:
    """``(budget, reserve)`` in bytes of ``auto``, ``none`` or a size; None for no budget, and for no reserve."""
    if budget == "auto":
        return automatic_budget(ledger, device)
    return (None if budget == "none" else parse_size(budget)), None
