"""Convolution under autograd, a slice of the batch at a time.

The result is that of ``torch.nn.functional.conv2d``; what differs is the memory that oneDNN and cuDNN take for
layout copies and scratch, which is bounded by a slice instead of the batch. On CPUs it is faster too: scratch that
is reused stays in the cache and needs no fresh pages from the kernel.

Where channels come last without holes, oneDNN works on float32 tensors as they are, and what a slice gives would be
copied for nothing: there the batch is one slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from edgetrain.nn.layouts import is_channels_last, new_like
from edgetrain.nn.slices import batch_slices, is_on_cuda


class _SlicedConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings, ctx.bias_sizes = settings, None if bias is None else list(bias.shape)
        y: Tensor | None = None
        for s in _slices(x):
            part = F.conv2d(x[s], weight, bias, *settings)
            if y is None:
                y = new_like(part, (x.shape[0], *part.shape[1:]))
            y[s] = part
        assert y is not None
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.settings
        settings = ConvolutionSettings(stride, padding, dilation, False, [0, 0], groups)
        mask = list(ctx.needs_input_grad[:3])
        return *convolution_gradients(dy, x, weight, ctx.bias_sizes, settings, mask), None


class ConvolutionSettings(NamedTuple):
    """As ``torch.ops.aten.convolution_backward`` takes them: a number for each dimension."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int


def convolution_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, bias_sizes: list[int] | None, settings: ConvolutionSettings, mask: list[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients with respect to x (n, c, ...), weight and bias, those that ``mask`` asks for, slice by slice."""
    slices = list(_slices(x, dy))
    if len(slices) <= 1:
        return tuple(torch.ops.aten.convolution_backward(dy, x, weight, bias_sizes, *settings, mask))
    dx: Tensor | None = None
    sums: list[Tensor | None] = [None, None]
    for s in slices:
        parts = torch.ops.aten.convolution_backward(dy[s], x[s], weight, bias_sizes, *settings, mask)
        if parts[0] is not None:
            dx = new_like(parts[0], x.shape) if dx is None else dx
            dx[s] = parts[0]
        for k, part in enumerate(parts[1:]):
            total = sums[k]
            if part is not None:
                sums[k] = part if total is None else total.add_(part)
    return dx, sums[0], sums[1]


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Tensor:
    """As ``torch.nn.functional.conv2d`` on x (n, c, h, w), which it calls where one slice holds the batch."""
    if x.dim() != 4 or isinstance(padding, str) or len(list(_slices(x))) <= 1:
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    settings = (*(_pair(value) for value in (stride, padding, dilation)), groups)
    return _SlicedConv.apply(x, weight, bias, settings)


def _slices(*tensors: Tensor) -> Iterator[slice]:
    """Of the batch, whose ``tensors`` are (n, c, ...); all of it where oneDNN copies none of them."""
    x = tensors[0]
    onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled and not is_on_cuda(x)
    if onednn and all(t.dtype == torch.float32 and is_channels_last(t) for t in tensors):
        return iter((slice(0, x.shape[0]),))
    return batch_slices(x)


def _pair(value: int | tuple[int, ...]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)
