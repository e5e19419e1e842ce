"""The learning rate of a run: linear up from 0 to its peak, and down to 0 at the end."""

from __future__ import annotations


def triangular_rate(step: int, steps: int, *, peak: float, warmup: float) -> float:
    """Learning rate of step ``step``, from 0, of ``steps``.

    Args:
        warmup: part of the run until ``peak`` is reached.
    """
    rising = max(1.0, warmup * steps)
    falling = max(1.0, steps - rising)
    position = step + 1.0
    return peak * min(position / rising, max(0.0, (steps + 1.0 - position) / falling), 1.0)
