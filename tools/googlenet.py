"""GoogLeNet (Szegedy et al. 2015, table 1), each convolution with batch norm (Ioffe, Szegedy 2015); timm has none.

As in the version that is most in use, the branch of 5x5 convolutions has 3x3 ones; no auxiliary classifiers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# outputs of: 1x1, reduction before 3x3, 3x3, reduction before 5x5, 5x5, projection after pooling; None: max pooling
_INCEPTIONS: tuple[tuple[int, int, int, int, int, int] | None, ...] = (
    (64, 96, 128, 16, 32, 32),
    (128, 128, 192, 32, 96, 64),
    None,
    (192, 96, 208, 16, 48, 64),
    (160, 112, 224, 24, 64, 64),
    (128, 128, 256, 24, 64, 64),
    (112, 144, 288, 32, 64, 64),
    (256, 160, 320, 32, 128, 128),
    None,
    (256, 160, 320, 32, 128, 128),
    (384, 192, 384, 48, 128, 128),
)


class _Convolution(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, size: int, *, stride: int = 1) -> None:
        convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class _Inception(nn.Module):
    def __init__(self, inputs: int, widths: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        one, before_three, three, before_five, five, projection = widths
        self.branches = nn.ModuleList(
            (
                _Convolution(inputs, one, 1),
                nn.Sequential(_Convolution(inputs, before_three, 1), _Convolution(before_three, three, 3)),
                nn.Sequential(_Convolution(inputs, before_five, 1), _Convolution(before_five, five, 3)),
                nn.Sequential(nn.MaxPool2d(3, 1, 1), _Convolution(inputs, projection, 1)),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


def googlenet(num_classes: int = 1000) -> nn.Module:
    """The network for (n, 3, 224, 224) with random weights."""
    layers: list[nn.Module] = [
        _Convolution(3, 64, 7, stride=2),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        _Convolution(64, 64, 1),
        _Convolution(64, 192, 3),
        nn.MaxPool2d(3, 2, ceil_mode=True),
    ]
    channels = 192
    for widths in _INCEPTIONS:
        if widths is None:
            layers.append(nn.MaxPool2d(3, 2, ceil_mode=True))
        else:
            layers.append(_Inception(channels, widths))
            channels = widths[0] + widths[2] + widths[4] + widths[5]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(channels, num_classes)
    )
