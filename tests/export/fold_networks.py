"""Small networks for the folds, and weights and statistics that no fold leaves unnoticed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import edgetrain


def randomise(model: nn.Module) -> nn.Module:
    """Running statistics and affine values away from 0 and 1, in evaluation mode."""
    torch.manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (_BatchNorm, edgetrain.nn.InvertibleBatchNorm)) and module.running_var is not None:
                module.running_mean.normal_(0.0, 0.5)
                module.running_var.uniform_(0.5, 1.5)
            if isinstance(module, (_BatchNorm, edgetrain.nn.InvertibleBatchNorm)) and module.weight is not None:
                module.weight.normal_(1.0, 0.3)
                module.bias.normal_(0.0, 0.3)
    return model.eval()


class Residual(nn.Module):
    """x + body(x)."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class TwoConvolutions(nn.Module):
    """norm(left(x) + right(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 1)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.left(x) + self.right(x))


class Normalised(nn.Module):
    """(x - mean) / std, then a convolution."""

    def __init__(self, **convolution: object) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]))
        self.register_buffer("std", torch.tensor([0.2, 0.3, 0.4]))
        self.conv = nn.Conv2d(3, 4, 3, **convolution)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.conv((x - self.mean[:, None, None]) / self.std.view(1, -1, 1, 1))


class Factor(nn.Module):
    """A classifier times a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((2, 3))) * 0.125


class UsedTwice(nn.Module):
    """The result of a convolution is normalised and used as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y.relu()


class CalledTwice(nn.Module):
    """One convolution called twice, normalised once."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.conv(x).relu()))


class Keywords(nn.Module):
    """Layers called with their input by name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.BatchNorm2d(4), nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.conv, self.drop, self.act = nn.Conv2d(4, 6, 3), nn.Dropout(0.5), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(input=self.conv(input=self.first(input=x)))
        return self.last(input=self.act(input=self.drop(input=y)))


class DataDependent(nn.Module):
    """What is computed depends on the values; inside it a sequence that is called as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if x.mean() > 0 else self.norm(x)


class InPlace(nn.Module):
    """Operations in place on results that are read again afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.drop, self.act = nn.Dropout(0.5), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        z = self.drop(y)
        y.mul_(2.0)
        y += 1.0
        return self.act(y) + z + torch.relu_(y)


class IntoAView(nn.Module):
    """A result is overwritten in place by a layer, and then half of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        self.act(y)
        y.chunk(2, 1)[0].add_(1.0)
        return y
