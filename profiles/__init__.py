"""Device profiles: what is known about a device, each number with its unit, source and date.

A profile is a TOML file next to this module, or any other file of the same form::

    name = "gtx750"
    kind = "cuda"
    [memory]
    value = 1
    unit = "GiB"
    source = "..."
    date = "2026-11"

A number that no source confirms says ``assumption = true`` and, in ``note``, why it was chosen.
"""

from edgetrain.profiles.load import load_profile, profile_names
from edgetrain.profiles.profile import Profile, Quantity

__all__ = ["Profile", "Quantity", "load_profile", "profile_names"]
