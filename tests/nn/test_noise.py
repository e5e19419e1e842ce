"""The source's formulas for the noise of an inversion against measurement, and its growth with depth."""

from __future__ import annotations

import pytest
import torch

from edgetrain.nn import CouplingLayer, HybridBlock, InvertibleBatchNorm, InvertibleLeakyReLU, InvertibleSequential
from edgetrain.nn.noise import alpha_batch_norm, alpha_leaky_relu, alpha_two_channels, snr

NOISE = 1e-4


def measured_alpha(layer: torch.nn.Module, x: torch.Tensor) -> float:
    """SNR of the input over SNR of the output, for white noise added to the output."""
    y = layer.forward_(x.clone())  # type: ignore[operator]
    noisy = y + NOISE * torch.randn_like(y)
    return snr(x, layer.inverse(noisy)) / snr(y, noisy)  # type: ignore[operator]


@pytest.mark.parametrize("rho", [0.05, 0.2, 0.5, 1.0, 2.0, 8.0])
def test_two_channels(rho: float) -> None:
    torch.manual_seed(0)
    layer = InvertibleBatchNorm(2, eps=0.0, eps_i=0.0).double()
    layer.weight.data = torch.tensor([1.0, rho], dtype=torch.double)
    x = torch.randn(64, 2, 32, 32, dtype=torch.double)
    assert measured_alpha(layer, x) == pytest.approx(alpha_two_channels(rho), rel=0.05)


@pytest.mark.parametrize("seed", range(5))
def test_any_batch_norm(seed: int) -> None:
    torch.manual_seed(seed)
    layer = InvertibleBatchNorm(16, eps=0.0, eps_i=0.1).double()
    layer.weight.data.uniform_(0.2, 2.0)
    layer.bias.data.normal_()
    mean, std = torch.randn(16).double(), torch.rand(16).double() + 0.3
    x = mean.view(1, -1, 1, 1) + std.view(1, -1, 1, 1) * torch.randn(64, 16, 32, 32, dtype=torch.double)
    predicted = alpha_batch_norm(mean, std, layer.scale().detach(), layer.bias.detach())
    assert measured_alpha(layer, x) == pytest.approx(predicted, rel=0.05)


@pytest.mark.parametrize("slope", [0.05, 0.1, 0.2, 0.4, 1.0])
def test_leaky_relu(slope: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 16, 32, 32, dtype=torch.double)
    # the formula holds where noise flips no signs: keep values away from zero, symmetric as before
    x = x.sign() * (x.abs() + 0.1)
    assert measured_alpha(InvertibleLeakyReLU(slope), x) == pytest.approx(alpha_leaky_relu(slope), rel=0.05)


def input_snr(layers: dict[str, InvertibleSequential | CouplingLayer | HybridBlock]) -> float:
    """SNR in float32 of the input that inverting all ``layers`` gives back."""
    torch.manual_seed(0)
    network = InvertibleSequential(**layers)
    x = torch.randn(16, 32, 16, 16)
    return snr(x, network.inverse(network.forward_(x.clone())))


def test_layerwise_noise_grows_with_depth_and_falling_slope() -> None:
    torch.manual_seed(0)
    ratios = {
        (slope, depth): input_snr({f"l{k}": CouplingLayer(32, slope=slope) for k in range(depth)})
        for slope in (0.1, 0.4)
        for depth in (3, 6, 9)
    }
    for slope in (0.1, 0.4):
        assert ratios[slope, 3] > 10 * ratios[slope, 6] > 100 * ratios[slope, 9]
    assert all(ratios[0.4, depth] > 10 * ratios[0.1, depth] for depth in (3, 6, 9))


@pytest.mark.parametrize("depth", [3, 12])
def test_hybrid_noise_does_not(depth: int) -> None:
    torch.manual_seed(0)
    assert input_snr({f"b{k}": HybridBlock(32) for k in range(depth)}) > 1e8
