"""The volume-preserving families of the source's Table 3.1: i-RevNet, layer-wise invertible, hybrid.

All are stem - stage - pool - stage - ... - head, with invertible pooling between the stages; they differ in the
block. Widths follow from the pooling sequence: channel pooling multiplies them by 4, batch pooling keeps them.

| family     | block                                             | weights  | blocks  | pooling     |
|------------|---------------------------------------------------|----------|---------|-------------|
| i-RevNet   | reversible, f and g two convolutions each on c/2  | 9 c^2    | 2-2-2-1 | Pc Pc Pc    |
| layer-wise | coupling layer                                    | 4.5 c^2  | 4-4-4-2 | Pc Pc Pb    |
| hybrid     | reversible, f and g two coupling layers each      | 4.5 c^2  | 2-2-2-1 | Pc Pc Pb    |

Block counts are recovered from the printed parameter counts (42.8 M, 7.4 M, 3.7 M). Weights start as torch
initialises convolutions: their variance, 1/(3 fan_in), keeps what a coupling adds below what it leaves, and with it
the noise of an inversion.

Deviation: i-RevNet and hybrid end in an invertible batch norm before the head, of which the source says nothing.
Blocks add to a stream that nothing normalises (standard deviation 5.7, largest value 89 at the end of a fresh
hybrid), and the recipe's learning rate diverges on logits of that scale within ten steps; with the batch norm it
trains. It costs 2 c parameters and no memory. A layer-wise network ends normalised as it is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import nn

from edgetrain.models.parts import Head, check_stages, pool, stem
from edgetrain.nn import CouplingLayer, DiracConv2d, HybridBlock, InvertibleBatchNorm, ReversibleBlock


def residual_module(channels: int, *, depth: int = 2, slope: float = 0.1, dirac: bool = False) -> nn.Sequential:
    """``depth`` times conv -> batch norm -> leaky ReLU on ``channels``, the f and g of RevNet and i-RevNet."""
    convolution = DiracConv2d if dirac else nn.Conv2d
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [
            convolution(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.LeakyReLU(slope, inplace=True),
        ]
    return nn.Sequential(*layers)


def irevnet(
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    width: int = 32,
    blocks: Sequence[int] = (2, 2, 2, 1),
    pooling: Sequence[str] = ("channel", "channel", "channel"),
    depth: int = 2,
    slope: float = 0.1,
    exact: bool = False,
    dirac: bool = False,
) -> nn.Sequential:
    """i-RevNet (Jacobsen et al. 2018) with RevNet-like modules: x (n, in_channels, h, w) -> logits (n, num_classes).

    Args:
        width: channels of the first stage.
        blocks: reversible blocks per stage.
        pooling: "channel" or "batch" between the stages.
        depth: convolutions per module.
        slope: of the leaky ReLU.
        exact: invert without noise, :class:`ReversibleBlock`.
        dirac: convolutions with a Dirac weight, :mod:`edgetrain.nn.dirac`, but for the first one.
    """

    def block(channels: int) -> nn.Module:
        return ReversibleBlock(
            residual_module(channels // 2, depth=depth, slope=slope, dirac=dirac),
            residual_module(channels // 2, depth=depth, slope=slope, dirac=dirac),
            exact=exact,
        )

    return _volume_preserving(block, num_classes, in_channels, width, blocks, pooling, norm=InvertibleBatchNorm)


def layerwise(
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    width: int = 32,
    blocks: Sequence[int] = (4, 4, 4, 2),
    pooling: Sequence[str] = ("channel", "channel", "batch"),
    slope: float = 0.1,
    eps_i: float = 0.1,
    dirac: bool = False,
) -> nn.Sequential:
    """Layer-wise invertible network (Hascoet et al. 2023, Figure 7); arguments as :func:`irevnet`.

    Args:
        blocks: coupling layers per stage.
        eps_i: of the invertible batch norm, (3.23).
    """
    return _volume_preserving(
        lambda channels: CouplingLayer(channels, slope=slope, eps_i=eps_i, dirac=dirac),
        num_classes,
        in_channels,
        width,
        blocks,
        pooling,
        norm=None,
    )


def hybrid(
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    width: int = 32,
    blocks: Sequence[int] = (2, 2, 2, 1),
    pooling: Sequence[str] = ("channel", "channel", "batch"),
    depth: int = 2,
    slope: float = 0.1,
    eps_i: float = 0.1,
    exact: bool = False,
    dirac: bool = False,
) -> nn.Sequential:
    """Hybrid network (Hascoet et al. 2023, Figure 8); arguments as :func:`irevnet`.

    Args:
        depth: coupling layers per module.
        eps_i: of the invertible batch norm, (3.23).
    """
    return _volume_preserving(
        lambda channels: HybridBlock(channels, depth=depth, slope=slope, eps_i=eps_i, exact=exact, dirac=dirac),
        num_classes,
        in_channels,
        width,
        blocks,
        pooling,
        norm=lambda channels: InvertibleBatchNorm(channels, eps_i=eps_i),
    )


def _volume_preserving(
    block: Callable[[int], nn.Module],
    num_classes: int,
    in_channels: int,
    width: int,
    blocks: Sequence[int],
    pooling: Sequence[str],
    *,
    norm: Callable[[int], nn.Module] | None,
) -> nn.Sequential:
    check_stages(blocks, len(pooling))
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=stem(in_channels, width))
    channels, parts = width, 1
    for k, count in enumerate(blocks):
        if k > 0:
            layers[f"pool{k}"], channel_factor, batch_factor = pool(pooling[k - 1])
            channels, parts = channels * channel_factor, parts * batch_factor
        layers[f"stage{k + 1}"] = nn.Sequential(*[block(channels) for _ in range(count)])
    if norm is not None:
        layers["norm"] = norm(channels)
    layers["head"] = Head(channels, num_classes, parts=parts)
    return nn.Sequential(layers)
