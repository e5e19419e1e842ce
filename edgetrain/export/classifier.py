"""Linear layers in the form that the graph writer and the device take.

    y (n, k) = x (n, c) W^T + b                      Gemm, the weight as it is where there is a bias
    y (n, k, 1, 1) = conv(x (n, c, 1, 1), W (k, c, 1, 1)) + b      the same sums as a convolution over one pixel

Without a bias the writer keeps a transposed copy of the weight that has no name, so a bias of zeros is added. TensorRT
for RTX has no float32 matrix product for compute capability 7.5 and takes the convolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WITHOUT_PRODUCT = (7, 5)
"""Compute capability for which linear layers become convolutions."""


def with_bias(layer: nn.Linear) -> nn.Linear:
    """``layer`` with a bias of zeros where it has none; shares its weight."""
    if layer.bias is not None:
        return layer
    linear = nn.Linear(layer.in_features, layer.out_features, device="meta")
    linear.weight = layer.weight
    linear.bias = nn.Parameter(torch.zeros_like(layer.weight[:, 0]), requires_grad=False)
    return linear


class PixelLinear(nn.Module):
    """``layer`` as a 1x1 convolution over one pixel, x (n, c) -> (n, k); as it was on other shapes."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        bias = with_bias(layer).bias
        self.weight = nn.Parameter(layer.weight.detach()[:, :, None, None], requires_grad=False)  # (k, c, 1, 1)
        self.bias = nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 2:
            return F.linear(x, self.weight.flatten(1), self.bias)
        return F.conv2d(x[:, :, None, None], self.weight, self.bias).flatten(1)  # (n, k)
