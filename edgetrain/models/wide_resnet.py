"""Wide residual networks WRN-n-k (Zagoruyko and Komodakis 2016; Zagoruyko, thesis, section 5.2).

A convolution of 16 channels, three groups of N pre-activation blocks (He et al. 2016b) with 16k, 32k and 64k channels,
batch norm, ReLU, mean over the pixels, linear; n = 6N + 4. Block B(3, 3): BN - ReLU - conv - BN - ReLU - [dropout] -
conv; where the width or the stride changes, the shortcut is a convolution of size 1 of the activated input. n counts
those three and the first convolution: n = 1 + 6N + 3.

Parameters, 10 classes: 0.2 M (16-1), 0.7 M (16-2), 0.6 M (40-1), 2.2 M (40-2), 2.7 M (16-4), 8.9 M (40-4), 11.0 M
(16-8), 36.5 M (28-10).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from edgetrain.models.cifar_resnet import AveragePoolHead
from edgetrain.models.parts import blocks_per_group


class PreActivationBlock(nn.Module):
    """B(3, 3): x (n, in_channels, h, w) -> (n, channels, h / stride, w / stride).

    Args:
        dropout: probability between the convolutions; 0 for none.
    """

    branch_ends: ClassVar[tuple[str, ...]] = ("conv2",)

    def __init__(self, in_channels: int, channels: int, *, stride: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        changes = stride > 1 or in_channels != channels
        self.shortcut = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu_(self.norm1(x))
        if self.shortcut is not None:
            x = self.shortcut(y)
        y = F.relu_(self.norm2(self.conv1(y)))
        if self.dropout > 0:
            y = F.dropout(y, self.dropout, self.training)
        return self.conv2(y).add_(x)

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}"


def wide_resnet(
    depth: int, widening: int, num_classes: int = 10, *, in_channels: int = 3, width: int = 16, dropout: float = 0.0
) -> nn.Sequential:
    """WRN-``depth``-``widening``: x (n, in_channels, h, w) -> logits (n, num_classes).

    Args:
        depth: 6N + 4.
        widening: k, at least 1.
        width: channels of the first convolution; the groups have k, 2k and 4k times as many.
        dropout: between the convolutions of a block; the source takes 0.3 on CIFAR and 0.4 on SVHN, or none.

    Raises:
        UsageError: the depth is not 6N + 4, or k below 1.
    """
    count = blocks_per_group("wrn", depth, widening)
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=nn.Conv2d(in_channels, width, 3, padding=1, bias=False))
    previous = width
    for k in range(3):
        channels = width * widening * 2**k
        group: list[nn.Module] = []
        for i in range(count):
            stride = 2 if k > 0 and i == 0 else 1
            group.append(PreActivationBlock(previous, channels, stride=stride, dropout=dropout))
            previous = channels
        layers[f"group{k + 1}"] = nn.Sequential(*group)
    layers["norm"] = nn.Sequential(nn.BatchNorm2d(previous), nn.ReLU(inplace=True))
    layers["head"] = AveragePoolHead(previous, num_classes)
    model = nn.Sequential(layers)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
