"""Batch normalisation with its statistics as values: computed once, then reused by every recomputation.

    mean = sum x / m,   var = sum (x - mean)^2 / m,   y = scale (x - mean) / sqrt(var + eps) + bias

(Ioffe and Szegedy 2015), m being the number of elements per channel. The gradient through the statistics is

    dx = scale invstd (dy - sum dy / m - xhat sum(dy xhat) / m),   dscale = sum dy xhat,   dbias = sum dy.

The reductions use torch's fused kernel for the backward pass of a *fixed* normalisation: with mean K and
variance v it gives sum dy and sum dy (x - K)/sqrt(v) in one parallel pass, in double precision on the CPU and
without a temporary the size of the tensor. The same kernel fed with dy = x gives the variance:

    sum x (x - K) / m - mean (mean - K) = var

which loses no digits as long as K is near the mean; the mean of the first sample is taken for it.

With channels last on a CPU that kernel adds up in memory, a row of one number per channel for each thread. Where rows
end inside a line of the cache, threads wait for each other: 4 MiB of 20 channels took 1.3 ms with two threads, 0.46
with one (AMD EPYC, Zen 5). So several pixels are taken for one of more channels, as many as fill whole lines: 0.07 ms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgetrain.nn.layouts import is_channels_last, laid_out_as
from edgetrain.nn.slices import is_on_cuda, is_whole_batch

_LINE_BYTES = 64  # of a processor's cache
_LONG_ROW_BYTES = 1024  # in which its ends no longer matter
_LEAST_BYTES = 4  # of a number whose partial sums may be rounded to it


@dataclass(frozen=True)
class Statistics:
    """Mean and inverse standard deviation per channel, each (c,).

    Attributes:
        from_batch: gradients flow through them (training); False for frozen running statistics.
    """

    mean: Tensor
    invstd: Tensor
    from_batch: bool = True


def channel_sums(x: Tensor, dy: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """``(sum dy, sum dy (x - mean) invstd)`` over all dimensions but the channel's, each (c,).

    Args:
        x: (n, c, ...), as ``dy``.
        mean: (c,), as ``invstd``.
    """
    mask = [False, True, True]
    var = invstd.square().reciprocal_()
    pixels = _pixels_in_lines(x, dy)
    if pixels > 1:
        x, dy = (t.permute(0, 2, 3, 1).reshape(1, -1, 1, pixels * t.shape[1]).permute(0, 3, 1, 2) for t in (x, dy))
        mean, var = mean.repeat(pixels), var.repeat(pixels)
    ones = torch.ones_like(mean)
    _, weighted, plain = torch.ops.aten.native_batch_norm_backward(dy, x, ones, mean, var, None, None, False, 0.0, mask)
    if pixels > 1:
        return plain.view(pixels, -1).sum(0), weighted.view(pixels, -1).sum(0)
    return plain, weighted


def _pixels_in_lines(x: Tensor, dy: Tensor) -> int:
    """Fewest pixels of (n, c, h, w) whose channels, which come last, fill whole lines of the cache; 1 elsewhere."""
    row_bytes = x.shape[1] * x.element_size()
    if x.element_size() < _LEAST_BYTES or row_bytes > _LONG_ROW_BYTES or is_on_cuda(x) or is_whole_batch():
        return 1
    pixels = _LINE_BYTES // math.gcd(_LINE_BYTES, row_bytes)
    whole = pixels > 1 and x.numel() // x.shape[1] % pixels == 0
    return pixels if whole and is_channels_last(x) and is_channels_last(dy) else 1


def batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of ``x`` (n, c, ...) per channel, each (c,)."""
    dims = [0, *range(2, x.dim())]
    near = x[:1].mean(dims)
    count = x.numel() // x.shape[1]
    total, weighted = channel_sums(x, x, near, torch.ones_like(near))
    mean = total / count
    var = (weighted / count - mean * (mean - near)).clamp_(min=0.0)
    return mean, var


def update_running(
    x: Tensor, mean: Tensor, var: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> None:
    """Moves running statistics towards those of ``x`` by ``momentum``, the variance unbiased, in place."""
    count = x.numel() // x.shape[1]
    if running_mean is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    if running_var is not None:
        running_var.lerp_((var * (count / max(count - 1, 1))).to(running_var.dtype), momentum)


def affine_of(statistics: Statistics, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """``(factor, offset)``, each (c,), such that the normalisation is ``factor x + offset``."""
    factor = scale * statistics.invstd
    return factor, bias - factor * statistics.mean


def _affine(x: Tensor, factor: Tensor, offset: Tensor) -> Tensor:
    """``factor x + offset`` per channel, each (c,), in one pass: a normalisation with mean 0 and variance 1."""
    zeros, ones = torch.zeros_like(factor), torch.ones_like(factor)
    return torch.native_batch_norm(x, factor, offset, zeros, ones, False, 0.0, 0.0)[0]


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, result: list[Tensor]
    ) -> Tensor:
        ctx.save_for_backward(x, scale, mean, invstd)
        if result:
            return result.pop()
        return torch.native_batch_norm(x, scale, bias, mean, invstd.square().reciprocal_(), False, 0.0, 0.0)[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):  # type: ignore[no-untyped-def]
        x, scale, mean, invstd = ctx.saved_tensors
        count, shape = x.numel() // x.shape[1], [1, -1] + [1] * (x.dim() - 2)
        dy = laid_out_as(dy, x)
        sum_dy, sum_dy_xhat = channel_sums(x, dy, mean, invstd)
        dx = None
        if ctx.needs_input_grad[0]:
            # affine in dy and x; torch's own kernel takes a second tensor of the size of x for it
            factor = scale * invstd
            slope = -factor * invstd * sum_dy_xhat / count
            offset = -factor * sum_dy / count - slope * mean
            dx = _affine(x, slope, offset).addcmul_(dy, factor.view(shape))
        return dx, sum_dy_xhat, sum_dy, None, None, None


def normalise(
    x: Tensor, scale: Tensor, bias: Tensor, statistics: Statistics, *, result: Tensor | None = None
) -> Tensor:
    """``scale (x - mean) invstd + bias``, differentiable through the statistics, which come from ``x``.

    Args:
        x: (n, c, ...).
        scale: (c,), as ``bias``.
        result: to be given a history instead of the normalisation, which is not computed.
    """
    y: Tensor = _Normalise.apply(x, scale, bias, statistics.mean, statistics.invstd, [] if result is None else [result])
    return y
