"""What the families of the source's Table 3.1 share: stem, pooling sequence, head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgetrain.errors import ModelError, UsageError
from edgetrain.nn import BatchPool, ChannelPool
from edgetrain.nn.layouts import new_like
from edgetrain.nn.max_pool import max_pool2d
from edgetrain.nn.pooling import InvertiblePool
from edgetrain.nn.slices import batch_slices

HEAD_SCALE = 0.125
"""Factor on the logits in the authors' recipe."""


class Head(nn.Module):
    """Maximum over everything that remains, linear without bias, times 0.125.

    Args:
        channels: of the last stage.
        num_classes: width of the output.
        parts: samples of the batch that belong to one image: 4 for every batch pooling before.
    """

    def __init__(self, channels: int, num_classes: int, *, parts: int = 1) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(channels, num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            pooled = _GlobalMax.apply(x, self.parts)
        else:
            pooled = x.amax((2, 3)).view(-1, self.parts, x.shape[1]).amax(1)
        return self.linear(pooled) * HEAD_SCALE

    def extra_repr(self) -> str:
        return f"parts={self.parts}"


class _GlobalMax(torch.autograd.Function):
    """Maximum over pixels and parts: x (parts * n, c, h, w) -> (n, c); keeps one position for each output.

    At the head the last activation and its gradient are both alive, which makes it the peak of a layer-wise
    network: torch's pooling would keep 8 bytes per channel of every part besides.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: int) -> Tensor:
        n, c = x.shape[0] // parts, x.shape[1]
        grouped = x.reshape(n, parts, c, -1)  # (n, parts, c, h w)
        values, positions = x.new_empty(n, c), torch.empty(n, c, dtype=torch.int32, device=x.device)
        for s in batch_slices(grouped):
            largest = grouped[s].transpose(1, 2).flatten(2).max(2)
            values[s], positions[s] = largest
        ctx.save_for_backward(positions)
        ctx.shape, ctx.grouped_shape = x.shape, grouped.shape
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        positions = ctx.saved_tensors[0].long()
        n, _, c, pixels = ctx.grouped_shape
        dx = dy.new_zeros(ctx.grouped_shape)
        index = torch.arange(n, device=dy.device).view(n, 1), torch.arange(c, device=dy.device).view(1, c)
        dx[index[0], positions // pixels, index[1], positions % pixels] = dy
        return dx.view(ctx.shape), None


class MaxPoolPad(nn.Module):
    """2x2 max pooling, then zero channels up to ``out_channels``: how ResNet and RevNet widen between stages.

    Each half of the channels gets half of the zeros: a reversible block works on halves, and a half of zeros alone
    would give its batch norm nothing to normalise.

    Args:
        slope: of a leaky ReLU after it; None for none.
    """

    def __init__(self, in_channels: int, out_channels: int, *, slope: float | None = None) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.slope = in_channels, out_channels, slope

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        if h % 2 or w % 2:
            raise ModelError(
                found=f"a pooling of {h}x{w} pixels",
                expected="even height and width",
                action="choose an image size divisible by 2 for every pooling of the model (8 for three of them)",
            )
        pooled = max_pool2d(x, 2)
        y = new_like(pooled, (n, self.out_channels, h // 2, w // 2)).zero_()
        halves = y.view(n, 2, self.out_channels // 2, h // 2, w // 2)
        halves[:, :, : c // 2] = pooled.view(n, 2, c // 2, h // 2, w // 2)
        return y if self.slope is None else F.leaky_relu_(y, self.slope)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}" + ("" if self.slope is None else f", slope={self.slope}")


def stem(in_channels: int, channels: int) -> nn.Conv2d:
    """The first convolution, 3x3 without bias; it is not inverted."""
    return nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)


POOLINGS: dict[str, tuple[type[InvertiblePool], int, int]] = {
    "channel": (ChannelPool, 4, 1),
    "batch": (BatchPool, 1, 4),
}
"""By name: the layer, its factor on the channels, its factor on the batch."""


def pool(name: str) -> tuple[nn.Module, int, int]:
    """``(layer, factor on the channels, factor on the batch)`` of the pooling ``"channel"`` or ``"batch"``.

    Raises:
        UsageError: another name.
    """
    if name in POOLINGS:
        layer, channel_factor, batch_factor = POOLINGS[name]
        return layer(), channel_factor, batch_factor
    raise UsageError(
        found=f"a pooling called {name!r}",
        expected="'channel' or 'batch', the two that can be inverted",
        action="give a sequence like ('channel', 'channel', 'batch')",
    )


def check_stages(blocks: Sequence[int], transitions: int) -> None:
    """Raises UsageError where there is not one stage more than transitions between stages, or an empty stage."""
    if len(blocks) != transitions + 1 or min(blocks) < 1:
        raise UsageError(
            found=f"blocks {tuple(blocks)} for {transitions} transitions between stages",
            expected="one stage more than transitions, each with a block at least",
            action=f"give {transitions + 1} block counts above zero",
        )


def blocks_per_group(family: str, depth: int, widening: int) -> int:
    """N of a network of three groups and n = 6N + 4 layers.

    Raises:
        UsageError: the depth is another, or ``widening``, its k, below 1.
    """
    if depth < 10 or (depth - 4) % 6 or widening < 1:
        near = 6 * max(1, round((depth - 4) / 6)) + 4
        raise UsageError(
            found=f"{family}-{depth}-{widening}",
            expected="a depth of 6N + 4 and a width of at least 1",
            action=f"use {family}-{near}-{max(1, widening)}",
        )
    return (depth - 4) // 6
