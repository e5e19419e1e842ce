"""Numbers and facts with their origin, and the units a number may be in."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

from edgetrain.units import GIB, KIB, MIB

_DECIMAL = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
SIZES: dict[str, float] = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": KIB, "MiB": MIB, "GiB": GIB}
BANDWIDTHS = {f"{unit}/s": factor for unit, factor in SIZES.items()}
FLOAT_RATES = {f"{prefix}FLOP/s": factor for prefix, factor in _DECIMAL.items()}
INTEGER_RATES = {f"{prefix}OP/s": factor for prefix, factor in _DECIMAL.items()}
# 2:4 sparsity skips every second multiplication and vendors count it as done; dense layers get half
INTEGER_RATES |= {f"{unit} sparse": factor / 2 for unit, factor in INTEGER_RATES.items()}
CAPABILITIES = {"major.minor": 1.0}
OPSETS = {"opset": 1.0}


class Strict(BaseModel):
    """A table in which a misspelt key is an error, not a default."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Sourced(Strict):
    """Something with where it comes from.

    Attributes:
        source: who printed it; may be left out for an assumption.
        date: when it was read there, ``YYYY-MM`` or ``YYYY-MM-DD``.
        assumption: true where no source confirms it.
        note: why it was assumed, or what to know about it.
    """

    source: str | None = None
    date: str | None = Field(default=None, pattern=r"^\d{4}-\d{2}(-\d{2})?$")
    assumption: bool = False
    note: str | None = None

    @model_validator(mode="after")
    def _has_an_origin(self) -> Sourced:
        if self.assumption and not self.note:
            raise ValueError("an assumption needs a note that says why")
        if not self.assumption and not (self.source and self.date):
            raise ValueError("it needs source and date, or assumption = true with a note")
        return self


class Quantity(Sourced):
    """A number.

    Attributes:
        value: the number, in ``unit``.
        unit: as written in the source.
    """

    value: float = Field(gt=0, allow_inf_nan=False)
    unit: str


class Fact(Sourced):
    """Something that is no number, such as a version.

    Attributes:
        value: as written in the source.
    """

    value: str = Field(min_length=1)
