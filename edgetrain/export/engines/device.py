"""For which chip an engine is built, and in whose place: from a profile, a compute capability, or this machine."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgetrain.errors import UsageError
from edgetrain.export.engines.builders import Capability, capability_text, cuda_capability

if TYPE_CHECKING:
    from edgetrain.profiles import Profile


@dataclass(frozen=True)
class Target:
    """A chip, and the device whose memory counts.

    Attributes:
        capability: of the chip to build for.
        profile: of the device; None: none was named.
        notes: that the chip is not the device's, where it is not.
    """

    capability: Capability
    profile: Profile | None
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str | None:
        """Of the profile."""
        return None if self.profile is None else self.profile.name

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """Of the chip, and of the device that it stands in for."""
        own = None if self.profile is None else self.profile.compute_capability_pair
        return (self.capability,) if own is None or own == self.capability else (self.capability, own)


def target_for(device: str | Path | Profile | None, compute_capability: str | Capability | None) -> Target:
    """What to build for; see :func:`edgetrain.build_engine` for the arguments.

    Raises:
        UsageError: no such profile, a device without a GPU, no compute capability at all.
    """
    from edgetrain.profiles import load_profile

    profile = load_profile(device) if isinstance(device, str | Path) else device
    if profile is not None and profile.kind != "cuda":
        raise UsageError(
            found=f"device {profile.name}, which has no CUDA device",
            expected="a profile with a compute capability",
            action="run the ONNX file itself there, or list the others with edgetrain devices",
        )
    own = None if profile is None else profile.compute_capability_pair
    wanted = own if compute_capability is None else parse_capability(compute_capability)
    if wanted is None:
        wanted = cuda_capability()
    if wanted is None:
        raise UsageError(
            found="no device is named" if profile is None else f"profile {profile.name} names no compute capability",
            expected="one, as this machine has no CUDA device to ask",
            action="name a profile that edgetrain devices lists, such as --device orin-nano-8gb, or in Python a "
            "compute_capability",
        )
    if profile is None or own is None or wanted == own:
        return Target(wanted, profile)
    note = (
        f"built for compute capability {capability_text(wanted)}, and {profile.name} has {capability_text(own)}: it "
        "shows that the graph builds within that device's memory and does not run there"
    )
    return Target(wanted, profile, (note,))


def parse_capability(text: str | Capability) -> Capability:
    """``"8.6"`` as (8, 6).

    Raises:
        UsageError: it is none.
    """
    match = re.fullmatch(r"(\d+)\.(\d)", capability_text(text) if isinstance(text, tuple) else text)
    if match is None:
        raise UsageError(
            found=f"compute capability {text!r}", expected="major.minor", action="write it like 8.6, in quotation marks"
        )
    return int(match[1]), int(match[2])
