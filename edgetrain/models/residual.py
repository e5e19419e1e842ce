"""The families of the source's Table 3.1 that pool by maximum: ResNet and RevNet.

| family | widths           | blocks  | block                                             | weights |
|--------|------------------|---------|---------------------------------------------------|---------|
| ResNet | 32-64-128-256    | 2-2-2-2 | two convolutions c -> c                           | 18 c^2  |
| RevNet | 40-80-256-320    | 2-2-2-2 | reversible, f and g two convolutions each on c/2  | 9 c^2   |

Channels are padded with zeros at each pooling. 3.13 M and 3.17 M convolution weights, as printed. RevNet's stream is
normalised before the head; :mod:`edgetrain.models.reversible` says why.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from edgetrain.models.parts import Head, MaxPoolPad, check_stages, stem
from edgetrain.models.reversible import residual_module
from edgetrain.nn import InvertibleBatchNorm, ReversibleBlock


class ResidualBlock(nn.Module):
    """conv -> batch norm -> leaky ReLU -> conv -> batch norm, plus the input, then leaky ReLU."""

    def __init__(self, channels: int, *, slope: float = 0.1) -> None:
        super().__init__()
        self.slope = slope
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu_(self.norm1(self.conv1(x)), self.slope)
        return F.leaky_relu_(self.norm2(self.conv2(y)).add_(x), self.slope)


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
    return _max_pooled(
        lambda c: ResidualBlock(c, slope=slope), num_classes, in_channels, widths, blocks, normalise_stream=False
    )


def revnet(
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    widths: Sequence[int] = (40, 80, 256, 320),
    blocks: Sequence[int] = (2, 2, 2, 2),
    depth: int = 2,
    slope: float = 0.1,
) -> nn.Sequential:
    """RevNet of the source (Gomez et al. 2017); arguments as :func:`resnet`.

    Args:
        depth: convolutions per module.
    """

    def block(channels: int) -> nn.Module:
        return ReversibleBlock(
            residual_module(channels // 2, depth=depth, slope=slope),
            residual_module(channels // 2, depth=depth, slope=slope),
        )

    return _max_pooled(block, num_classes, in_channels, widths, blocks, normalise_stream=True)


def _max_pooled(
    block: Callable[[int], nn.Module],
    num_classes: int,
    in_channels: int,
    widths: Sequence[int],
    blocks: Sequence[int],
    *,
    normalise_stream: bool,
) -> nn.Sequential:
    check_stages(blocks, len(widths) - 1)
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=stem(in_channels, widths[0]))
    for k, (channels, count) in enumerate(zip(widths, blocks, strict=True)):
        if k > 0:
            layers[f"pool{k}"] = MaxPoolPad(widths[k - 1], channels)
        layers[f"stage{k + 1}"] = nn.Sequential(*[block(channels) for _ in range(count)])
    if normalise_stream:
        layers["norm"] = InvertibleBatchNorm(widths[-1])
    layers["head"] = Head(widths[-1], num_classes)
    return nn.Sequential(layers)
