"""What an operator does with memory between its call and its return, step by step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Inner:
    """One thing that an operator does with memory.

    Attributes:
        name: of a temporary, in its operator; None for a result.
        nbytes: above zero for an allocation, zero for a free.
    """

    name: int | None
    nbytes: int


RESULTS = Inner(None, 0)
"""All results that have not been allocated yet, in order."""

Steps = tuple[Inner, ...]
