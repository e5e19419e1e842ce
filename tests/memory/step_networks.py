"""Small networks of what torch has, x (n, 3, 32, 32) -> logits (n, 5) or (n, 5, h, w), whose steps are predicted."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Conv2d as Conv


def head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5)]


class Residual(nn.Module):
    def __init__(self, c: int = 24) -> None:
        super().__init__()
        self.stem, self.head = Conv(3, c, 3, padding=1), nn.Linear(c, 5)
        self.branch = nn.Sequential(
            Conv(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c), nn.ReLU(), Conv(c, c, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(x + self.branch(x)).mean((2, 3)))


class Tokens(nn.Module):
    """A transformer's block on patches."""

    def __init__(self, c: int = 24, heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.patches, self.norm, self.qkv = Conv(3, c, 4, stride=4), nn.LayerNorm(c), nn.Linear(c, 3 * c)
        self.out, self.head, self.heads, self.dropout = nn.Linear(c, c), nn.Linear(c, 5), heads, dropout
        self.mlp = nn.Sequential(nn.LayerNorm(c), nn.Linear(c, 4 * c), nn.GELU(), nn.Linear(4 * c, c))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        n, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout).transpose(1, 2).reshape(n, t, c)
        x = x + self.out(y)
        return self.head((x + self.mlp(x)).mean(1))


class PermutedNorm(nn.Module):
    """Layer norm over the channels, then a convolution on what lies channels last."""

    def __init__(self, c: int = 20) -> None:
        super().__init__()
        self.conv, self.norm, self.depthwise = Conv(3, c, 3, padding=1), nn.LayerNorm(c), Conv(c, c, 7, 1, 3, groups=c)
        self.head = nn.Linear(c, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head((x + self.depthwise(x)).mean((2, 3)))


class Summed(nn.Module):
    """The gradient of the convolution is one number per channel, expanded: many elements in one place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = Conv(3, 16, 3, padding=1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).sum((2, 3)))


class Tied(nn.Module):
    """One convolution under two names, one weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = Conv(3, 16, 1), Conv(16, 16, 3, padding=1)
        self.second, self.head, self.other = self.first, nn.Linear(16, 5), nn.Linear(16, 5)
        self.other.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(F.relu(self.first(self.stem(x)))).mean((2, 3))
        return self.head(x) + self.other(F.relu(x))


def frozen() -> nn.Module:
    net = nn.Sequential(
        Conv(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), Conv(16, 16, 3, padding=1), nn.ReLU(), *head(16)
    )
    net[0].requires_grad_(False)
    return net


def of(layers: Callable[[], list[nn.Module]]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers())


STEPS: dict[str, Callable[[], nn.Module]] = {
    "conv, batch norm": of(
        lambda: [
            *(Conv(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU()),
            *(Conv(12, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(inplace=True), *head(24)),
        ]
    ),
    "20 and 40 channels": of(
        lambda: [Conv(3, 20, 3, padding=1), nn.ReLU(), Conv(20, 40, 3, 2, padding=1), nn.ReLU(), *head(40)]
    ),
    "grouped": of(
        lambda: [
            *(Conv(3, 32, 1), nn.ReLU(), Conv(32, 64, 3, padding=1, groups=4), nn.ReLU()),
            *(Conv(64, 24, 3, groups=2, padding=1), *head(24)),
        ]
    ),
    "depthwise": of(
        lambda: [
            *(Conv(3, 24, 1), nn.BatchNorm2d(24), nn.Hardswish(), Conv(24, 24, 3, padding=1, groups=24)),
            *(nn.BatchNorm2d(24), nn.SiLU(), Conv(24, 40, 1), *head(40)),
        ]
    ),
    "strided": of(
        lambda: [
            *(Conv(3, 16, 7, stride=2, padding=3), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
            *(Conv(16, 32, 3, stride=2, padding=1), nn.ReLU(), *head(32)),
        ]
    ),
    "dilated": of(
        lambda: [Conv(3, 16, 3, padding=2, dilation=2), nn.ReLU(), Conv(16, 16, 3, 1, 4, 4), nn.ReLU(), *head(16)]
    ),
    "1x1": of(lambda: [Conv(3, 16, 1), nn.ReLU(), Conv(16, 48, 1), nn.GELU(), Conv(48, 20, 1), *head(20)]),
    "transposed": of(
        lambda: [
            *(Conv(3, 16, 3, stride=2, padding=1), nn.ReLU(), nn.ConvTranspose2d(16, 12, 2, stride=2), nn.ReLU()),
            *(nn.ConvTranspose2d(12, 8, 3, padding=1), *head(8)),
        ]
    ),
    "labels per pixel": of(
        lambda: [Conv(3, 16, 3, stride=2, padding=1), nn.ReLU(), nn.ConvTranspose2d(16, 5, 2, stride=2)]
    ),
    "pooling": of(
        lambda: [
            *(Conv(3, 16, 3, padding=1), nn.AvgPool2d(2), nn.ReLU(), Conv(16, 32, 3, padding=1), nn.MaxPool2d(2)),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 5)),
        ]
    ),
    "adaptive max pooling": of(
        lambda: [Conv(3, 16, 3, padding=1), nn.AdaptiveMaxPool2d(3), nn.Flatten(), nn.Linear(144, 5)]
    ),
    "group norm": of(
        lambda: [
            *(Conv(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU()),
            *(Conv(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.GELU(), *head(16)),
        ]
    ),
    "instance norm": of(lambda: [Conv(3, 16, 3, padding=1), nn.InstanceNorm2d(16), nn.LeakyReLU(), *head(16)]),
    "dropout": of(
        lambda: [
            *(Conv(3, 16, 3, padding=1), nn.ReLU(), nn.Dropout(0.3)),
            *(Conv(16, 16, 3, padding=1), nn.Dropout2d(0.3), *head(16)),
        ]
    ),
    "interpolation": of(
        lambda: [
            *(Conv(3, 16, 3, padding=1), nn.MaxPool2d(2), nn.Upsample(scale_factor=2), Conv(16, 8, 3, padding=1)),
            *(nn.Upsample(scale_factor=2, mode="bilinear"), *head(8)),
        ]
    ),
    "activations": of(
        lambda: [
            *(Conv(3, 16, 3, padding=1), nn.PReLU(16), Conv(16, 16, 3, padding=1), nn.ELU(), nn.Softplus(), nn.Mish()),
            *(nn.Tanh(), nn.Sigmoid(), *head(16)),
        ]
    ),
    "pixel shuffle": of(
        lambda: [Conv(3, 16, 3, padding=1), nn.PixelUnshuffle(2), Conv(64, 16, 1), nn.PixelShuffle(2), *head(4)]
    ),
    "channels last": lambda: nn.Sequential(
        Conv(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), Conv(16, 24, 3, padding=1), nn.ReLU(), *head(24)
    ).to(memory_format=torch.channels_last),
    "residual": Residual,
    "layer norm, permuted": PermutedNorm,
    "attention": Tokens,
    "attention, dropout": lambda: Tokens(dropout=0.1),
    "transformer": of(
        lambda: [
            *(Conv(3, 32, 4, stride=4), nn.Flatten(2), nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)),
            *(nn.Flatten(), nn.Linear(32 * 64, 5)),
        ]
    ),
    "linear": of(lambda: [nn.Flatten(), nn.Linear(3072, 256), nn.ReLU(), nn.LayerNorm(256), nn.Linear(256, 5)]),
    "summed": Summed,
    "tied": Tied,
    "frozen": frozen,
}
