"""The source's closed formulas: bytes per input pixel of one training step, activations and their gradients.

``M = M_theta + (M'_z + M'_g) px bpe`` (3.5), with px = batch x height x width. With c channels in the first stage,
every stage of a volume-preserving network has c channels' worth of pixels, and the peak is in the first:

    ResNet      sum over parameterised layers of c_i / 4^stage, plus the gradient at the last one      (3.7d), (3.9)
    RevNet      hidden activations of a block, 4 c, and the gradient, c: 5 c                           (3.11)
    i-RevNet    5 c                                                                                    (3.13)
    layer-wise  activation c, gradient c, half of a coupling c/2: 2.5 c                                (3.30)
    hybrid      c, c, hidden activations of a module c/2, half of a coupling inside it c/4: 2.75 c     (3.31)
"""

from __future__ import annotations

from collections.abc import Sequence

PRINTED = {"resnet18": 1928, "revnet18": 640, "irevnet18": 640, "layerwise18": 320, "hybrid18": 352}
"""Bytes per pixel as the source prints them, at 32 channels."""


def resnet_bytes_per_pixel(
    widths: Sequence[int] = (32, 64, 128, 256), blocks: Sequence[int] = (2, 2, 2, 2), *, element_bytes: int = 4
) -> float:
    """Four kept tensors per block (inputs of two convolutions and two batch norms), and the last gradient."""
    kept = sum(4 * count * width / 4**k for k, (width, count) in enumerate(zip(widths, blocks, strict=True)))
    gradient = widths[-1] / 4 ** (len(widths) - 1)
    return element_bytes * (kept + gradient)


def reversible_bytes_per_pixel(family: str, width: int = 32, *, element_bytes: int = 4) -> float:
    """For ``family`` in revnet18, irevnet18, layerwise18, hybrid18 with ``width`` channels in the first stage."""
    channels = {"revnet18": 5.0, "irevnet18": 5.0, "layerwise18": 2.5, "hybrid18": 2.75}[family]
    return element_bytes * channels * width


def floor_bytes_per_pixel(width: int = 32, *, element_bytes: int = 4) -> float:
    """One activation and one gradient: no exact step that keeps both can take less."""
    return element_bytes * 2.0 * width
