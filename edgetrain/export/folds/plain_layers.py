"""Every layer of this package as plain operations of torch in evaluation mode.

    invertible batch norm (3.23)   batch norm with |gamma + eps_i| for gamma
    leaky ReLU (3.24)              LeakyReLU
    channel pooling (3.29)         PixelUnshuffle(2), whose order of channels is the same: 4 c + 2 i + j
    batch pooling (3.29)           reshape (n, c, h/2, 2, w/2, 2), transpose, reshape (4 n, c, h/2, w/2)
    couplings, reversible blocks   chunk, add, cat; ``exact`` ones round to their grid as in training
    MaxPoolPad                     MaxPool2d, each half padded with zero channels
    Head                           maximum over pixels and parts, linear, factor

No custom autograd function, no write into part of a tensor and no size of the batch is left. Layers inside keep their
names, so that paths stay what they were. A subclass with a ``forward`` of its own is none of these.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgetrain.models.parts import HEAD_SCALE, Head, MaxPoolPad
from edgetrain.nn import (
    BatchPool,
    ChannelPool,
    CouplingConv,
    CouplingLayer,
    CouplingStack,
    HybridBlock,
    InvertibleBatchNorm,
    InvertibleLeakyReLU,
    InvertibleSequential,
    ReversibleBlock,
)
from edgetrain.nn.grid import grid_of


def plain_layer(module: nn.Module) -> nn.Module | None:
    """What ``module`` is in evaluation mode, with the same submodules; None for a module of another package."""
    make = _PLAIN.get(type(module))
    return None if make is None else make(module)


class Coupling(nn.Module):
    """y1 = x1 + f(x2),  y2 = x2 + g(y1)  on the halves of the channels.

    Args:
        exact: round the input and both residuals to the grid of :mod:`edgetrain.nn.grid`.
    """

    def __init__(self, f: nn.Module, g: nn.Module, *, exact: bool = False) -> None:
        super().__init__()
        self.f, self.g, self.exact = f, g, exact

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = self._rounded(x).chunk(2, 1)
        y1 = x1 + self._rounded(self.f(x2))
        y2 = x2 + self._rounded(self.g(y1))
        return torch.cat([y1, y2], 1)

    def _rounded(self, x: Tensor) -> Tensor:
        if not self.exact:
            return x
        step = 2.0 ** -grid_of(next(self.parameters()).dtype).bits
        return torch.round(x / step) * step


class BatchUnshuffle(nn.Module):
    """(n, c, h, w) -> (4n, c, h/2, w/2): sample 4 n' + 2 i + j is pixel (i, j) of sample n'."""

    def forward(self, x: Tensor) -> Tensor:
        _, c, h, w = x.shape
        y = x.reshape(-1, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4)  # (n, 2, 2, c, h/2, w/2)
        return y.reshape(-1, c, h // 2, w // 2)


class MaxPoolWiden(nn.Module):
    """2x2 maximum, then ``zeros`` more channels after each half.

    Args:
        slope: of a leaky ReLU after it; None for none.
    """

    def __init__(self, zeros: int, slope: float | None) -> None:
        super().__init__()
        self.zeros, self.slope = zeros, slope

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(x, 2)
        x = x if self.slope is None else F.leaky_relu(x, self.slope)
        if not self.zeros:
            return x
        x1, x2 = x.chunk(2, 1)
        zeros = (0, 0, 0, 0, 0, self.zeros)
        return torch.cat([F.pad(x1, zeros), F.pad(x2, zeros)], 1)


class MaxHead(nn.Module):
    """Maximum over the pixels of all ``parts`` of an image, linear, factor."""

    def __init__(self, linear: nn.Linear, *, parts: int, factor: float) -> None:
        super().__init__()
        self.linear, self.parts, self.factor = linear, parts, factor

    def forward(self, x: Tensor) -> Tensor:
        y = x.amax((2, 3))  # (parts n, c)
        if self.parts > 1:
            y = y.reshape(-1, self.parts, self.linear.in_features).amax(1)
        return self.linear(y) * self.factor


def _batch_norm(layer: InvertibleBatchNorm) -> nn.Module:
    norm = nn.BatchNorm2d(layer.channels, eps=layer.eps, momentum=layer.momentum)
    norm.weight = nn.Parameter(layer.scale().detach(), requires_grad=False)
    norm.bias = layer.bias
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        setattr(norm, name, getattr(layer, name))
    return norm


def _sequence(layer: InvertibleSequential) -> nn.Module:
    return nn.Sequential(OrderedDict((name, plain_layer(inner) or inner) for name, inner in layer.named_children()))


def _coupling(block: ReversibleBlock | CouplingConv) -> nn.Module:
    f, g = (plain_layer(inner) or inner for inner in (block.f, block.g))
    return Coupling(f, g, exact=isinstance(block, ReversibleBlock) and block.exact)


def _head(head: Head) -> nn.Module:
    return MaxHead(head.linear, parts=head.parts, factor=HEAD_SCALE)


def _widen(pool: MaxPoolPad) -> nn.Module:
    return MaxPoolWiden((pool.out_channels - pool.in_channels) // 2, pool.slope)


_PLAIN: dict[type[nn.Module], Callable] = {
    BatchPool: lambda layer: BatchUnshuffle(),
    ChannelPool: lambda layer: nn.PixelUnshuffle(2),
    CouplingConv: _coupling,
    CouplingLayer: _sequence,
    CouplingStack: _sequence,
    Head: _head,
    HybridBlock: _coupling,
    InvertibleBatchNorm: _batch_norm,
    InvertibleLeakyReLU: lambda layer: nn.LeakyReLU(layer.slope),
    InvertibleSequential: _sequence,
    MaxPoolPad: _widen,
    ReversibleBlock: _coupling,
}
