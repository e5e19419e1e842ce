"""The form of a device profile.

To add a quantity: a field of type ``Quantity | None`` in :class:`Profile`, and its dimension in ``_DIMENSIONS``.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from edgetrain.units import parse_size

_DIMENSIONS = {
    "memory": ("B", "kB", "MB", "GB", "KiB", "MiB", "GiB"),
    "default_budget": ("B", "kB", "MB", "GB", "KiB", "MiB", "GiB"),
    "compute_capability": ("major.minor",),
}


class _Strict(BaseModel):
    # a misspelt key is an error, not a default
    model_config = ConfigDict(extra="forbid", frozen=True)


class Quantity(_Strict):
    """A number with where it comes from.

    Attributes:
        value: the number, in ``unit``.
        unit: as written in the source.
        source: who printed it; may be left out for an assumption.
        date: when it was read there, ``YYYY-MM`` or ``YYYY-MM-DD``.
        assumption: true where no source confirms it.
        note: why it was assumed, or what to know about it.
    """

    value: float = Field(gt=0)
    unit: str
    source: str | None = None
    date: str | None = Field(default=None, pattern=r"^\d{4}-\d{2}(-\d{2})?$")
    assumption: bool = False
    note: str | None = None

    @model_validator(mode="after")
    def _has_an_origin(self) -> Quantity:
        if self.assumption and not self.note:
            raise ValueError("an assumption needs a note that says why")
        if not self.assumption and not (self.source and self.date):
            raise ValueError("a number needs source and date, or assumption = true with a note")
        return self


class Profile(_Strict):
    """What is known about a device. None means: ask the host.

    Attributes:
        name: short name, as given to ``--device``.
        description: one line for a person.
        kind: which target runs it.
        unified: whether GPU and host share one memory.
        memory: what the device has.
        default_budget: what training may take where nobody says otherwise.
        compute_capability: CUDA's, major.minor.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    description: str
    kind: Literal["cpu", "cuda"]
    unified: bool
    memory: Quantity | None = None
    default_budget: Quantity | None = None
    compute_capability: Quantity | None = None

    @model_validator(mode="after")
    def _has_known_units(self) -> Profile:
        for field, units in _DIMENSIONS.items():
            quantity = getattr(self, field)
            if quantity is not None and quantity.unit not in units:
                raise ValueError(f"{field} is in {quantity.unit!r}, expected one of {', '.join(units)}")
        if (self.default_budget_bytes or 0) > (self.memory_bytes or self.default_budget_bytes or 0):
            raise ValueError("default_budget is above memory")
        return self

    @property
    def memory_bytes(self) -> int | None:
        """Bytes of the device; None: as many as the host has."""
        return _bytes(self.memory)

    @property
    def default_budget_bytes(self) -> int | None:
        """Budget in bytes where none is given; None: what the host has available."""
        return _bytes(self.default_budget)

    @property
    def compute_capability_pair(self) -> tuple[int, int] | None:
        """Compute capability as (major, minor); None on a CPU or where the device has to be asked."""
        if self.compute_capability is None:
            return None
        tenths = round(self.compute_capability.value * 10)
        return tenths // 10, tenths % 10


def _bytes(quantity: Quantity | None) -> int | None:
    return None if quantity is None else parse_size(f"{quantity.value:f}{quantity.unit}")
