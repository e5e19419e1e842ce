"""DiracNet-n-k: plain chains of Dirac convolutions (Zagoruyko and Komodakis 2017; Zagoruyko, thesis, section 5.3.3).

    conv 16 - [conv 16k] x 2N - max pool - [conv 32k] x 2N - max pool - [conv 64k] x 2N - mean - linear,  n = 6N + 4

each convolution of size 3 followed by batch norm and ReLU, the order of (5.6); those of the groups have the weight
(5.5), the first one an ordinary weight. Folded, it is a chain of convolution-ReLU pairs. On ImageNet: the stem and the
block counts of ResNet-18 and ResNet-34, 2N layers for N blocks, maximum pooling between the groups.

| network        | parameters, printed | here       | without P |
|----------------|---------------------|------------|-----------|
| DiracNet-28-5  | 9.1 M               | 9,141,034  | 9.1 M     |
| DiracNet-28-10 | 36.5 M              | 36,495,994 | 36.2 M    |
| DiracNet-18    | 11.7 M              | 11,694,504 | 11.5 M    |
| DiracNet-34    | 21.8 M              | 21,810,088 | 21.6 M    |

Recovered: the first layer of a group that changes the number of channels. Table 5.9 omits such "dimensionality changing
layers for clarity", n counts three layers besides the first one and the 6N of the groups, and every printed parameter
count has those of a convolution of size 1 in parallel, as ResNet's shortcuts do. So P + diag(b) W_norm is taken there,
:class:`edgetrain.nn.DiracProjection`, with P such a convolution inside the weight. The authors' early code has a delta
of repeated identities instead, negative concatenated ReLU, one a and b per layer, and five blocks in the last group of
DiracNet-34; the chapter has none of them.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from edgetrain.errors import UsageError
from edgetrain.models.cifar_resnet import AveragePoolHead
from edgetrain.models.plain import activated, chain_group, plain_convolution, pooled_chain
from edgetrain.nn import DiracConv2d, dirac_projection_

_IMAGENET_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


def diracnet(
    depth: int, widening: int, num_classes: int = 10, *, in_channels: int = 3, width: int = 16
) -> nn.Sequential:
    """DiracNet-``depth``-``widening``: x (n, in_channels, h, w) -> logits (n, num_classes).

    Args:
        depth: 6N + 4.
        widening: k, at least 1.
        width: channels of the first convolution; the groups have k, 2k and 4k times as many.

    Raises:
        UsageError: the depth is not 6N + 4, or k below 1.
    """
    return pooled_chain(
        dirac_convolution,
        family="diracnet",
        depth=depth,
        widening=widening,
        num_classes=num_classes,
        in_channels=in_channels,
        width=width,
    )


def imagenet_diracnet(depth: int, num_classes: int = 1000, *, in_channels: int = 3, width: int = 64) -> nn.Sequential:
    """DiracNet-18 or DiracNet-34 for images of 224x224 pixels; at least 32x32.

    Args:
        width: channels of the first group; the others have twice, four and eight times as many.

    Raises:
        UsageError: another depth.
    """
    if depth not in _IMAGENET_BLOCKS:
        raise UsageError(
            found=f"diracnet-{depth}",
            expected="depth 18 or 34, those of the source for ImageNet",
            action="use one of them, or diracnet-<6N+4>-<k> for small images",
        )
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        stem=activated(plain_convolution(in_channels, width, 7, stride=2)), pool0=nn.MaxPool2d(3, 2, padding=1)
    )
    previous = width
    for k, blocks in enumerate(_IMAGENET_BLOCKS[depth]):
        if k > 0:
            layers[f"pool{k}"] = nn.MaxPool2d(2)
        layers[f"group{k + 1}"] = chain_group(dirac_convolution, previous, width * 2**k, 2 * blocks)
        previous = width * 2**k
    layers["head"] = AveragePoolHead(previous, num_classes)
    return nn.Sequential(layers)


def dirac_convolution(in_channels: int, channels: int) -> nn.Conv2d:
    """3x3 with the weight (5.5); with a projection where the number of channels changes."""
    if in_channels == channels:
        return DiracConv2d(channels, channels, 3, padding=1)
    return dirac_projection_(nn.Conv2d(in_channels, channels, 3, padding=1, bias=False))
