"""Device profiles: what is known about a device, each number with its unit, source and date.

A profile is a TOML file next to this module, in the user's folder of profiles, or any other file of the same form::

    name = "gtx750"
    kind = "cuda"
    extends = "desktop-cu126"
    [memory]
    value = 1
    unit = "GiB"
    source = "..."
    date = "2026-11"

A number that no source confirms says ``assumption = true`` and, in ``note``, why it was chosen. ``docs/devices.md``
says what each field means.
"""

from edgetrain.profiles.load import load_profile, profile_names, user_profile_folder, user_profile_names
from edgetrain.profiles.profile import Profile, default_cublas_workspace_bytes
from edgetrain.profiles.quantity import Fact, Quantity
from edgetrain.profiles.write import to_toml

__all__ = [
    "Fact",
    "Profile",
    "Quantity",
    "default_cublas_workspace_bytes",
    "load_profile",
    "profile_names",
    "to_toml",
    "user_profile_folder",
    "user_profile_names",
]
