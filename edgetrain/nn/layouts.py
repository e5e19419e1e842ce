"""Where the channels of an image are in memory: first, each a plane of its own, or last, those of a pixel together.

torch calls the two ``torch.contiguous_format`` and ``torch.channels_last``. Convolutions, batch norm and pooling give
their results as their input comes. On a CPU convolutions are quicker where channels come last: oneDNN then works on the
tensors as they are, which it otherwise copies to a layout of its own and back.
"""

from __future__ import annotations

import torch
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """``torch.channels_last`` if that is how ``x`` is laid out and not row by row too, else ``contiguous_format``."""
    last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def with_channels_last(x: Tensor) -> Tensor:
    """The images ``x`` (n, c, h, w) with channels last; a copy if they are not. Anything else as it is."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def laid_out_as(x: Tensor, model: Tensor) -> Tensor:
    """``x`` in the layout of ``model``, without holes; a copy if it is in another."""
    return x.contiguous(memory_format=memory_format(model))


def new_like(x: Tensor, shape: tuple[int, ...], *, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a tensor of ``shape`` in the layout of ``x``, not filled.

    Args:
        dtype: None: that of ``x``.
    """
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=memory_format(x))


def channels_last_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of an image batch (n, c, h, w) whose channels come last."""
    _, c, h, w = shape
    return c * h * w, 1, c * w, c
