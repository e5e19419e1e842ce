"""A fixed-point grid for residual streams: on it ``(x + r) - r == x`` bit for bit.

Numbers are multiples of ``step = 2**-bits``. A float of ``digits`` significant bits (24 in float32, 53 in float64)
holds every multiple up to ``limit = 2**(digits - bits)``, and the sum of two multiples is one. So if x and r are on the
grid and |x + r| <= limit, the sum is not rounded, and neither is the difference that gives x back. r needs no bound of
its own: a float too large for fractions of a step is a multiple already.

| type    | step   | limit | rounding a stream of standard deviation 1 to it: signal-to-noise ratio, 12 / step**2 |
|---------|--------|-------|--------------------------------------------------------------------------------------|
| float32 | 2**-12 | 4096  | 2e8, once per residual and never again; bfloat16 has 1e5                             |
| float64 | 2**-40 | 8192  | 1e25                                                                                 |

The limit is generous because residual streams are not normalised: a fresh hybrid network reaches 89. Beyond it the sum
would be rounded, so :func:`check_range` ends the run instead. Half-width types have too few bits for such a grid.

The gradient of rounding is taken to be that of the identity (straight-through; Bengio et al. 2013): the step is far
below the scale on which a network varies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgetrain.errors import ModelError, TrainingError


@dataclass(frozen=True)
class Grid:
    """Multiples of ``2**-bits``.

    Attributes:
        limit: up to which each is a float.
    """

    bits: int
    limit: float

    def round_(self, x: Tensor) -> Tensor:
        """``x`` moved to the nearest multiples in place, ties to the even one, without autograd."""
        with torch.no_grad():
            return x.mul_(2.0**self.bits).round_().mul_(2.0**-self.bits)

    def round(self, x: Tensor) -> Tensor:
        """The nearest multiples; the gradient goes through unchanged."""
        rounded: Tensor = _Round.apply(x, self)
        return rounded

    def check_range(self, y: Tensor) -> None:
        """Reads ``y`` (on a GPU this waits for it); tensors without data have no range.

        Raises:
            TrainingError: a value lies beyond the limit, or is none.
        """
        if y.data_ptr() == 0 or y.numel() == 0:
            return
        smallest, largest = (float(value) for value in torch.aminmax(y))
        if -self.limit <= smallest and largest <= self.limit:
            return
        raise TrainingError(
            found=f"a residual stream between {smallest:g} and {largest:g}",
            expected=f"values within {self.limit:g}, which the fixed-point grid of exact blocks holds",
            action="lower the learning rate, normalise the stream, or build the model with exact=False",
        )


_GRIDS = {torch.float32: Grid(12, 2.0**12), torch.float64: Grid(40, 2.0**13)}


def grid_of(dtype: torch.dtype) -> Grid:
    """The grid for streams of ``dtype``.

    Raises:
        ModelError: there is none.
    """
    grid = _GRIDS.get(dtype)
    if grid is None:
        raise ModelError(
            found=f"an exact reversible block on {dtype}",
            expected="torch.float32 or torch.float64, which have the bits for a fixed-point grid",
            action="train in float32, or build the model with exact=False",
        )
    return grid


def with_value(value: Tensor, y: Tensor) -> Tensor:
    """``value`` with the gradient of ``y``, which is the same up to round-off."""
    result: Tensor = _WithValue.apply(value, y)
    return result


class _WithValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, y: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
        return None, dy


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Grid) -> Tensor:
        return grid.round_(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None
