"""The hybrid network at half the width of hybrid18 (a quarter of the weights and arithmetic, half the activations),
also with exact blocks, and at a quarter of it.

For the command line, which makes networks of the zoo at their own width only: ``--model narrow_hybrid:hybrid18_half``.
"""

from __future__ import annotations

from torch import nn

from edgetrain.models import hybrid


def hybrid18_half(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """x (n, in_channels, h, w) -> logits (n, num_classes), 16 channels in the first stage."""
    return hybrid(num_classes, in_channels=in_channels, width=16)


def hybrid18_half_exact(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """The same with residual streams on a fixed-point grid, which are inverted without noise."""
    return hybrid(num_classes, in_channels=in_channels, width=16, exact=True)


def hybrid18_quarter(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """x (n, in_channels, h, w) -> logits (n, num_classes), 8 channels in the first stage."""
    return hybrid(num_classes, in_channels=in_channels, width=8)
