"""Writing a profile as TOML."""

from __future__ import annotations

from typing import Any

from edgetrain.profiles.profile import Profile


def to_toml(profile: Profile) -> str:
    """``profile`` as the text of a file that :func:`edgetrain.profiles.load_profile` reads.

    Fields that were never set are left out, and so stay with the profile it ``extends``.
    """
    import tomli_w

    return tomli_w.dumps(_value_first(profile.model_dump(mode="json", exclude_unset=True, exclude_none=True)))


def _value_first(table: dict[str, Any]) -> dict[str, Any]:
    """``table`` and those inside it in the order in which a person reads them: the number, then its origin."""
    first = [key for key in ("value", "unit") if key in table]
    keys = first + [key for key in table if key not in first]
    return {key: _value_first(table[key]) if isinstance(table[key], dict) else table[key] for key in keys}
