"""Small networks that are no Sequential: branches, functional and in-place operations, shapes, modes, tied weights.

x (n, 3, 8, 8) -> logits (n, 10). They stand apart from the tests because pytest rewrites assertions in those.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

import edgetrain


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)


class Residual(nn.Module):
    """Functional activation after the addition, both in place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(channels, channels), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = conv(channels, channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = self.norm2(self.conv2(y))
        y += x
        return F.relu_(y)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(3, 8), nn.BatchNorm2d(8)
        self.blocks = nn.ModuleList([Residual(8), Residual(8)])
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor, scale: float = 1.0, mask: Tensor | None = None) -> Tensor:
        assert x.shape[1] == 3, "colour images"
        size = x.size(0)
        x = F.relu(self.norm(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        if mask is not None:
            x = x * mask
        x = F.dropout(x, 0.3, self.training)
        return self.fc(F.adaptive_avg_pool2d(x, 1).view(size, -1)) * scale


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.reduce, self.expand = conv(3, 8), nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.act, self.last, self.fc = nn.ReLU(inplace=True), conv(8, 8, 2), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        gate = self.expand(self.act(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()
        x = self.act(self.last(x * gate))
        return self.fc(x.mean((2, 3)))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 4)
        self.layers = nn.ModuleList([conv(4 * k, 4) for k in (1, 2, 3)])
        self.transition, self.fc = nn.Conv2d(16, 8, 1), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.stem(x)]
        for layer in self.layers:
            maps.append(F.relu(layer(torch.cat(maps, 1))))
        x = F.relu(self.transition(torch.cat(maps, 1)))
        return self.fc(torch.flatten(F.avg_pool2d(x, 8), 1))


class TwoBranches(nn.Module):
    """Two branches meet, a buffer and a parameter of the root are used, a size crosses every cut."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.meet, self.fc = conv(3, 4), conv(3, 4), conv(8, 8, 2), nn.Linear(8, 10)
        self.offset = nn.Parameter(torch.randn(1, 8, 1, 1))
        self.register_buffer("mean", torch.randn(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        x = x - self.mean
        x = torch.cat([torch.tanh(self.left(x)), torch.sigmoid(self.right(x))], 1)
        x = F.gelu(self.meet(x)) + self.offset.exp()
        x = F.interpolate(x, size=size, mode="nearest")
        return self.fc(x.mean(dim=(2, 3)))


class TrainingBranch(nn.Module):
    """Noise and one more layer in training only; another factor in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last, self.fc = conv(3, 8), conv(8, 8), conv(8, 8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        if not self.training:
            x = x * 0.5
        else:
            x = x + 0.1 * torch.randn(8, 1, 1, dtype=torch.double)
            x = self.middle(x)
        x = F.relu(self.last(x))
        return self.fc(x.mean((2, 3)))


class Choice(nn.Module):
    """What is computed depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(8, 8), conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            return self.a(x)
        return self.b(self.a(x))


class WithChoice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.choice, self.last, self.fc = conv(3, 8), Choice(), conv(8, 8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.choice(torch.relu(self.stem(x)))
        return self.fc(torch.relu(self.last(x)).mean((2, 3)))


class Tied(nn.Module):
    """One module called twice, one parameter in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.norm = conv(3, 8), conv(8, 8), nn.BatchNorm2d(8)
        self.again, self.fc = conv(8, 8), nn.Linear(8, 10)
        self.again.weight = self.shared.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        x = self.norm(torch.relu(self.shared(x)))
        x = torch.relu(self.shared(x))
        return self.fc(torch.relu(self.again(x)).mean((2, 3)))


class Windows(nn.Module):
    """Shapes computed from shapes, windows folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix, self.out, self.fc = conv(3, 8), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = self.stem(x).shape
        x = F.relu(self.stem(x))
        x = x.view(n, c, h // 4, 4, w // 4, 4).transpose(3, 4).reshape(-1, c, 16)
        x = F.gelu(self.mix(x))
        x = self.out(x).relu_()
        return self.fc(x.reshape(n, -1, c, 16).mean((1, 3)))


class Reversible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = conv(3, 8), nn.BatchNorm2d(8)
        self.blocks = nn.ModuleList([edgetrain.nn.ReversibleBlock(self.half(), self.half()) for _ in range(2)])
        self.last, self.fc = conv(8, 8), nn.Linear(8, 10)

    @staticmethod
    def half() -> nn.Module:
        return nn.Sequential(conv(4, 4), nn.BatchNorm2d(4), nn.Dropout(0.2), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        x = F.relu(self.last(x))
        return self.fc(x.mean((2, 3)))


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.fc = (
            spectral_norm(conv(3, 8)),
            nn.Sequential(conv(8, 8), conv(8, 8)),
            nn.Linear(8, 10),
        )
        self.inner.register_forward_hook(lambda module, args, output: output * 2)
        parametrize.register_parametrization(self.fc, "weight", Doubled())

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.inner(F.relu(self.stem(x)))).mean((2, 3)))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "residual": (ResNet, ["conv..norm", "blocks.0", "blocks.1", "fc"]),
    "squeeze-excite": (SqueezeExcite, ["stem", "reduce..expand", "last", "fc"]),
    "dense": (Dense, ["stem", "layers.0..2", "transition", "fc"]),
    "two branches": (TwoBranches, ["left..right", "meet", "fc"]),
    "training branch": (TrainingBranch, ["first", "middle", "last", "fc"]),
    "choice": (WithChoice, ["stem", "choice", "last", "fc"]),
    "tied": (Tied, ["stem..norm", "shared..norm", "shared", "again", "fc"]),
    "windows": (Windows, []),
    "reversible": (Reversible, ["stem..norm", "blocks.0", "blocks.1", "last", "fc"]),
    "hooks": (Hooked, ["stem", "inner", "fc"]),
}
"""By name: how to make it, and the names of its blocks."""
