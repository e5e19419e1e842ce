"""Volume-preserving pooling, (3.29): every 2x2 neighbourhood is stacked along the channels or along the batch.

    channel pooling  (n, c, h, w) -> (n, 4c, h/2, w/2)      output channel 4c' + 2i + j is pixel (i, j) of channel c'
    batch pooling    (n, c, h, w) -> (4n, c, h/2, w/2)      output sample 4n' + 2i + j is pixel (i, j) of sample n'

Both are permutations of the elements of one sample, so forward and inverse are exact, gradients take the same
way as activations, and a batch can be permuted in its own memory a slice at a time. Keeping the four parts of a
sample next to each other (instead of stacking four whole batches) is what allows the latter. What comes with channels
last is given so.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from edgetrain.errors import ModelError
from edgetrain.nn.invertible import Invertible
from edgetrain.nn.layouts import memory_format, new_like
from edgetrain.nn.slices import batch_slices


class InvertiblePool(Invertible):
    """A pooling that permutes the elements of each sample."""

    @property
    def noiseless(self) -> bool:
        return True

    @property
    def keeps_layout(self) -> bool:
        return True

    def forward_(self, x: Tensor, *, replay: bool = False) -> Tensor:
        """``y`` of :meth:`forward` in the memory of ``x`` (n, c, h, w)."""
        y = _in_shape(x, self.output_shape(x.shape))
        parts = y.shape[0] // x.shape[0]
        for s in batch_slices(x):
            y[s.start * parts : s.stop * parts] = _apart(self.permute(x[s]), x)
        return y

    def inverse_(self, y: Tensor) -> Tensor:
        x = _in_shape(y, self.input_shape(y.shape))
        parts = y.shape[0] // x.shape[0]
        for s in batch_slices(x):
            x[s] = _apart(self.permute_back(y[s.start * parts : s.stop * parts]), y)
        return x

    @torch.no_grad()
    def backward_from_output(self, y: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        return self.inverse_(y), self.inverse_(dy)

    def backward_holding(self, y: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        return self.backward_from_output(y, dy)

    def forward(self, x: Tensor) -> Tensor:
        self.output_shape(x.shape)
        if torch.is_grad_enabled() and x.requires_grad and memory_format(x) == torch.channels_last:
            y: Tensor = _Permutation.apply(x, self)
            return y
        return self.permute(x)

    @abstractmethod
    def permute(self, x: Tensor) -> Tensor:
        """``y`` of :meth:`forward`; with channels first, at a single pixel, a view of ``x``."""

    @abstractmethod
    def permute_back(self, y: Tensor) -> Tensor:
        """The inverse, likewise."""

    @abstractmethod
    def output_shape(self, shape: torch.Size) -> tuple[int, int, int, int]:
        """Shape of ``y`` for ``x`` of ``shape``.

        Raises:
            ModelError: height or width is odd.
        """

    @abstractmethod
    def input_shape(self, shape: torch.Size) -> tuple[int, int, int, int]:
        """Shape of ``x`` for ``y`` of ``shape``."""


class _Permutation(torch.autograd.Function):
    """Its gradient is permuted back as it comes; autograd would lay it out row by row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pool: InvertiblePool) -> Tensor:
        ctx.pool = pool
        return pool.permute(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return ctx.pool.permute_back(dy), None


class ChannelPool(InvertiblePool):
    """Channel pooling (Jacobsen et al. 2018), the P_c of (3.29)."""

    def permute(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4)  # (n, c, 2, 2, h/2, w/2)
        if memory_format(x) == torch.channels_last:
            # neighbourhoods first, then channels: in one copy, of single elements, it takes five times as long
            y = y.permute(0, 4, 5, 2, 3, 1).contiguous().permute(0, 5, 3, 4, 1, 2)
        return _joined(y, (1, 3, 1, 1), x)

    def permute_back(self, y: Tensor) -> Tensor:
        n, c, h, w = y.shape
        x = y.reshape(n, c // 4, 2, 2, h, w)
        if memory_format(y) == torch.channels_last:
            x = x.permute(0, 4, 5, 2, 3, 1).contiguous().permute(0, 5, 3, 4, 1, 2)
        x = x.permute(0, 1, 4, 2, 5, 3)  # (n, c/4, h, 2, w, 2)
        return _joined(x, (1, 1, 2, 2), y)

    def output_shape(self, shape: torch.Size) -> tuple[int, int, int, int]:
        n, c, h, w = shape
        _check_even(h, w)
        return n, 4 * c, h // 2, w // 2

    def input_shape(self, shape: torch.Size) -> tuple[int, int, int, int]:
        n, c, h, w = shape
        return n, c // 4, 2 * h, 2 * w


class BatchPool(InvertiblePool):
    """Batch pooling (Hascoet et al. 2023), the P_b of (3.29)."""

    def permute(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4)  # (n, 2, 2, c, h/2, w/2)
        return _joined(y, (3, 1, 1, 1), x)

    def permute_back(self, y: Tensor) -> Tensor:
        n, c, h, w = y.shape
        x = y.reshape(n // 4, 2, 2, c, h, w).permute(0, 3, 4, 1, 5, 2)  # (n/4, c, h, 2, w, 2)
        return _joined(x, (1, 1, 2, 2), y)

    def output_shape(self, shape: torch.Size) -> tuple[int, int, int, int]:
        n, c, h, w = shape
        _check_even(h, w)
        return 4 * n, c, h // 2, w // 2

    def input_shape(self, shape: torch.Size) -> tuple[int, int, int, int]:
        n, c, h, w = shape
        return n // 4, c, 2 * h, 2 * w


def _joined(parts: Tensor, counts: tuple[int, int, int, int], like: Tensor) -> Tensor:
    """(n, c, h, w), each made of so many of the dimensions of ``parts``; laid out as ``like``."""
    dims, shape, first = [], [], 0
    for count in counts:
        dims.append(range(first, first + count))
        shape.append(math.prod(parts.shape[first : first + count]))
        first += count
    if memory_format(like) == torch.contiguous_format:
        return parts.reshape(shape)
    of_n, of_c, of_h, of_w = dims
    y = new_like(like, tuple(shape))  # not a view: an operator may work in place on what a Function gives
    parts = parts.permute(*of_n, *of_h, *of_w, *of_c)
    y.permute(0, 2, 3, 1).view(parts.shape).copy_(parts)
    return y


def _in_shape(x: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """The memory of ``x`` (n, c, h, w) as another batch of images, in the same layout."""
    if memory_format(x) == torch.contiguous_format:
        return x.view(shape)
    n, c, h, w = shape
    return x.permute(0, 2, 3, 1).view(n, h, w, c).permute(0, 3, 1, 2)


def _apart(part: Tensor, whole: Tensor) -> Tensor:
    """``part`` in memory of its own: at a single pixel a permutation is a view of what it is about to overwrite."""
    return part.clone() if part.untyped_storage()._cdata == whole.untyped_storage()._cdata else part


def _check_even(height: int, width: int) -> None:
    if height % 2 or width % 2:
        raise ModelError(
            found=f"a pooling of {height}x{width} pixels",
            expected="even height and width, because every 2x2 neighbourhood is stacked",
            action="choose an image size divisible by 2 for every pooling of the model (8 for three of them)",
        )
