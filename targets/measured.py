"""A measurement: several runs, their median, and how far they spread."""

from __future__ import annotations

import statistics
from dataclasses import dataclass


@dataclass(frozen=True)
class Measured:
    """The median of several runs with their quartiles, all in one unit: bytes, bytes or operations per second."""

    median: float
    lower: float
    upper: float
    runs: int


def summarise(values: list[float]) -> Measured:
    """Median and quartiles of ``values``, of which there is at least one."""
    if len(values) == 1:
        return Measured(values[0], values[0], values[0], 1)
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Measured(median, lower, upper, len(values))
