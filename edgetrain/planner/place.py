"""Where a step will run: what the planner wants to know of a device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from edgetrain.memory.operators import DeviceKind

if TYPE_CHECKING:
    from edgetrain.profiles import Profile


@dataclass(frozen=True)
class Place:
    """A device.

    Attributes:
        name: of its profile, or "this machine".
        profile: None: this machine.
        budget_bytes: what training may take where nobody says otherwise; None: no limit.
        offload: whether the host has another memory.
    """

    name: str
    kind: DeviceKind
    profile: Profile | None
    budget_bytes: int | None
    offload: bool

    @classmethod
    def of(cls, device: str | Path | Profile | None) -> Place:
        """The place that ``device`` names; None: this machine."""
        from edgetrain.profiles import load_profile

        if device is None:
            kind: DeviceKind = "cuda" if torch.cuda.is_available() else "cpu"
            return cls("this machine", kind, None, None, kind == "cuda")
        profile = load_profile(device) if isinstance(device, str | Path) else device
        discrete = profile.kind == "cuda" and not profile.unified
        budget = profile.default_budget_bytes or profile.available_bytes
        return cls(profile.name, profile.kind, profile, budget, discrete)
