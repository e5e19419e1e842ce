"""CIFAR ResNets of depth 6n + 2 (He et al. 2016, section 4.2): widths 16-32-64, n blocks each, option A shortcuts.

Parameters: 269,722 (20), 464,154 (32), 658,586 (44), 853,018 (56), 1,727,962 (110), 19,421,274 (1202).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from edgetrain.errors import UsageError


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm; the shortcut drops pixels and pads channels with zeros (option A)."""

    branch_ends: ClassVar[tuple[str, ...]] = ("norm2",)

    def __init__(self, in_channels: int, channels: int, *, stride: int) -> None:
        super().__init__()
        self.stride, self.padding = stride, channels - in_channels
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu_(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.stride > 1 or self.padding:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.padding))
        return F.relu_(y.add_(x))


class AveragePoolHead(nn.Module):
    """Mean over the pixels, then linear."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((2, 3)))


def cifar_resnet(depth: int, num_classes: int = 10, *, in_channels: int = 3, width: int = 16) -> nn.Sequential:
    """ResNet of ``depth`` = 6n + 2 layers: x (n, in_channels, h, w) -> logits (n, num_classes).

    Args:
        width: channels of the first stage; the others have twice and four times as many.

    Raises:
        UsageError: the depth is not 6n + 2.
    """
    if depth < 8 or (depth - 2) % 6:
        near = max(1, round((depth - 2) / 6)) * 6 + 2
        raise UsageError(
            found=f"a CIFAR ResNet of depth {depth}", expected="a depth of 6n + 2", action=f"use resnet{near}"
        )
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        stem=nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
    )
    previous = width
    for k in range(3):
        channels = width * 2**k
        stage: list[nn.Module] = []
        for i in range((depth - 2) // 6):
            stage.append(BasicBlock(previous, channels, stride=2 if k > 0 and i == 0 else 1))
            previous = channels
        layers[f"stage{k + 1}"] = nn.Sequential(*stage)
    layers["head"] = AveragePoolHead(previous, num_classes)
    model = nn.Sequential(layers)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
