"""Shapes and settings that have no inverse are refused with what to do about them."""

from __future__ import annotations

import pytest
import torch

from edgetrain.errors import ModelError
from edgetrain.nn import BatchPool, ChannelPool, CouplingConv, HybridBlock, InvertibleLeakyReLU, ReversibleBlock


@pytest.mark.parametrize("layer", [ChannelPool(), BatchPool()])
def test_pooling_of_odd_sizes(layer: torch.nn.Module) -> None:
    with pytest.raises(ModelError, match=r"pooling of 5x6 pixels.*divisible by 2"):
        layer(torch.randn(1, 4, 5, 6))


def test_odd_channels() -> None:
    with pytest.raises(ModelError, match=r"7 channels.*use 8 channels"):
        CouplingConv(7)
    with pytest.raises(ModelError, match=r"3 channels"):
        HybridBlock(6)
    with pytest.raises(ModelError, match=r"5 channels"):
        ReversibleBlock(torch.nn.Identity(), torch.nn.Identity())(torch.randn(1, 5, 2, 2))


def test_even_kernel() -> None:
    with pytest.raises(ModelError, match="use 5"):
        CouplingConv(4, kernel_size=4)


@pytest.mark.parametrize("slope", [0.0, -0.1, 1.5])
def test_slope_without_inverse(slope: float) -> None:
    with pytest.raises(ModelError, match="0 < slope <= 1"):
        InvertibleLeakyReLU(slope)
