"""Plain chains of convolution, batch norm and ReLU, without skip-connections: VGG, and the control of DiracNet.

| name      | chain                                                              | parameters           |
|-----------|--------------------------------------------------------------------|----------------------|
| vgg16     | 64 x2, 128 x2, 256 x4, 512 x4, 512 x4, pooled after each; mean     | 20 M (Table 5.10)    |
| plain-n-k | DiracNet-n-k with ordinary weights, :mod:`edgetrain.models.diracnet` | those, less a, b and P |

Recovered: the source's Table 5.10 gives its VGG for CIFAR 16 layers and 20 M parameters. The thirteen convolutions of
Simonyan and Zisserman's network D have 14.7 M; sixteen, as in their E, and one linear layer have 20.0 M, and these are
taken. Their D with its three linear layers is ``vgg(layers=(2, 2, 3, 3, 3), hidden=(4096, 4096))``, 138.4 M on
ImageNet (Table 5.11). Batch norm after every convolution (its biases are left out with it) is not theirs.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import nn

from edgetrain.models.cifar_resnet import AveragePoolHead
from edgetrain.models.parts import blocks_per_group, check_stages

VGG_WIDTHS = (64, 128, 256, 512, 512)


def vgg(
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    layers: Sequence[int] = (2, 2, 4, 4, 4),
    hidden: Sequence[int] = (),
    dropout: float = 0.5,
) -> nn.Sequential:
    """VGG with batch norm: x (n, in_channels, h, w) -> logits (n, num_classes); h and w at least 32.

    Args:
        layers: convolutions in each of the five groups.
        hidden: widths of linear layers before the last one, which then see 7x7 pixels; without, the mean of all pixels.
        dropout: after each hidden layer.

    Raises:
        UsageError: not five groups, or an empty one.
    """
    check_stages(layers, len(VGG_WIDTHS) - 1)
    found: OrderedDict[str, nn.Module] = OrderedDict()
    previous = in_channels
    for k, (channels, count) in enumerate(zip(VGG_WIDTHS, layers, strict=True)):
        group: list[nn.Module] = []
        for _ in range(count):
            group.append(activated(plain_convolution(previous, channels)))
            previous = channels
        found[f"group{k + 1}"] = nn.Sequential(*group)
        found[f"pool{k + 1}"] = nn.MaxPool2d(2)
    if not hidden:
        found["head"] = AveragePoolHead(previous, num_classes)
        return nn.Sequential(found)
    found["pool"], found["flatten"] = nn.AdaptiveAvgPool2d(7), nn.Flatten()
    previous *= 7 * 7
    for k, units in enumerate(hidden):
        found[f"hidden{k + 1}"] = nn.Sequential(nn.Linear(previous, units), nn.ReLU(inplace=True), nn.Dropout(dropout))
        previous = units
    found["head"] = nn.Linear(previous, num_classes)
    return nn.Sequential(found)


def plain(
    depth: int, widening: int = 1, num_classes: int = 10, *, in_channels: int = 3, width: int = 16
) -> nn.Sequential:
    """The control of :func:`edgetrain.models.diracnet.diracnet`, whose arguments it takes, with ordinary weights."""
    return pooled_chain(
        plain_convolution,
        family="plain",
        depth=depth,
        widening=widening,
        num_classes=num_classes,
        in_channels=in_channels,
        width=width,
    )


def pooled_chain(
    convolution: Callable[[int, int], nn.Conv2d],
    *,
    family: str,
    depth: int,
    widening: int,
    num_classes: int,
    in_channels: int,
    width: int,
) -> nn.Sequential:
    """Stem, three groups of 2N convolutions with maximum pooling between them, mean, linear: the source's Table 5.9.

    Args:
        convolution: makes one of the groups from its channels in and out.
        family: for the message of an error.
        depth: 6N + 4; ``widening`` is k.
        width: channels of the stem, which is an ordinary convolution.

    Raises:
        UsageError: the depth is not 6N + 4, or k below 1.
    """
    count = 2 * blocks_per_group(family, depth, widening)
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=activated(plain_convolution(in_channels, width)))
    previous = width
    for k in range(3):
        if k > 0:
            layers[f"pool{k}"] = nn.MaxPool2d(2)
        channels = width * widening * 2**k
        layers[f"group{k + 1}"] = chain_group(convolution, previous, channels, count)
        previous = channels
    layers["head"] = AveragePoolHead(previous, num_classes)
    return nn.Sequential(layers)


def chain_group(
    convolution: Callable[[int, int], nn.Conv2d], in_channels: int, channels: int, count: int
) -> nn.Sequential:
    """``count`` layers, of which the first one changes the width."""
    widths = [in_channels, *[channels] * count]
    return nn.Sequential(*[activated(convolution(a, b)) for a, b in itertools.pairwise(widths)])


def activated(convolution: nn.Conv2d) -> nn.Sequential:
    """``convolution``, batch norm, ReLU."""
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU(inplace=True))


def plain_convolution(in_channels: int, channels: int, kernel_size: int = 3, *, stride: int = 1) -> nn.Conv2d:
    """Without bias, padded to keep the pixels, from He et al.'s distribution (2015)."""
    conv = nn.Conv2d(in_channels, channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv
