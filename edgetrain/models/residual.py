"""The families of the source's Table 3.1 that pool by maximum: ResNet and RevNet.

| family | widths           | blocks  | block                                             | weights |
|--------|------------------|---------|---------------------------------------------------|---------|
| ResNet | 32-64-128-256    | 2-2-2-2 | two convolutions c -> c                           | 18 c^2  |
| RevNet | 40-80-256-320    | 2-2-2-2 | reversible, f and g two convolutions each on c/2  | 9 c^2   |

Channels are padded with zeros at each pooling. A leaky ReLU rises, so that max pooling gives the same before it as
after it: ResNet's last activation of a stage is applied to the pooled stream, and what it keeps for its gradient is the
input of the next convolution. 3.13 M and 3.17 M convolution weights, as printed. RevNet's stream is
normalised before the head; :mod:`edgetrain.models.reversible` says why.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from edgetrain.models.parts import Head, MaxPoolPad, check_stages, stem
from edgetrain.models.reversible import residual_module
from edgetrain.nn import InvertibleBatchNorm, ReversibleBlock


class ResidualBlock(nn.Module):
    """conv -> batch norm -> leaky ReLU -> conv -> batch norm, plus the input, then leaky ReLU.

    Args:
        activated: whether the last leaky ReLU is here; False where the pooling that follows has it.
    """

    branch_ends: ClassVar[tuple[str, ...]] = ("norm2",)

    def __init__(self, channels: int, *, slope: float = 0.1, activated: bool = True) -> None:
        super().__init__()
        self.slope, self.activated = slope, activated
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu_(self.norm1(self.conv1(x)), self.slope)
        y = self.norm2(self.conv2(y)).add_(x)
        return F.leaky_relu_(y, self.slope) if self.activated else y


def resnet(
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    widths: Sequence[int] = (32, 64, 128, 256),
    blocks: Sequence[int] = (2, 2, 2, 2),
    slope: float = 0.1,
) -> nn.Sequential:
    """ResNet-18 like network of the source: x (n, in_channels, h, w) -> logits (n, num_classes).

    Args:
        widths: channels per stage.
        blocks: residual blocks per stage.
        slope: of the leaky ReLU.
    """

    def block(channels: int, pooled: bool) -> nn.Module:
        return ResidualBlock(channels, slope=slope, activated=not pooled)

    return _max_pooled(block, num_classes, in_channels, widths, blocks, pool_slope=slope, normalise_stream=False)


def revnet(
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    widths: Sequence[int] = (40, 80, 256, 320),
    blocks: Sequence[int] = (2, 2, 2, 2),
    depth: int = 2,
    slope: float = 0.1,
    exact: bool = False,
    dirac: bool = False,
) -> nn.Sequential:
    """RevNet of the source (Gomez et al. 2017); arguments as :func:`resnet`.

    Args:
        depth: convolutions per module.
        exact: invert without noise, :class:`ReversibleBlock`.
        dirac: convolutions with a Dirac weight, :mod:`edgetrain.nn.dirac`, but for the first one.
    """

    def block(channels: int, pooled: bool) -> nn.Module:
        return ReversibleBlock(
            residual_module(channels // 2, depth=depth, slope=slope, dirac=dirac),
            residual_module(channels // 2, depth=depth, slope=slope, dirac=dirac),
            exact=exact,
        )

    return _max_pooled(block, num_classes, in_channels, widths, blocks, pool_slope=None, normalise_stream=True)


def _max_pooled(
    block: Callable[[int, bool], nn.Module],
    num_classes: int,
    in_channels: int,
    widths: Sequence[int],
    blocks: Sequence[int],
    *,
    pool_slope: float | None,
    normalise_stream: bool,
) -> nn.Sequential:
    """``block(channels, pooled)`` makes a block; ``pooled``: a pooling follows, with a leaky ReLU of ``pool_slope``."""
    check_stages(blocks, len(widths) - 1)
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=stem(in_channels, widths[0]))
    for k, (channels, count) in enumerate(zip(widths, blocks, strict=True)):
        if k > 0:
            layers[f"pool{k}"] = MaxPoolPad(widths[k - 1], channels, slope=pool_slope)
        pooled = [k < len(widths) - 1 and b == count - 1 for b in range(count)]
        layers[f"stage{k + 1}"] = nn.Sequential(*[block(channels, last) for last in pooled])
    if normalise_stream:
        layers["norm"] = InvertibleBatchNorm(widths[-1])
    layers["head"] = Head(widths[-1], num_classes)
    return nn.Sequential(layers)
