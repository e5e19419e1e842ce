"""How much signal-to-noise ratio an inversion costs, (3.15) to (3.28) of the source.

SNR = |signal|^2 / |noise|^2. Going backward through a layer, from output to input, multiplies it by

    alpha = SNR of the input / SNR of the output,

for noise that is white over the channels and small against the signal. alpha = 1 keeps the ratio.
"""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor

from edgetrain.nn.coupling import CouplingStack
from edgetrain.nn.invertible import Invertible
from edgetrain.nn.reversible import ReversibleBlock
from edgetrain.nn.sequential import InvertibleSequential


def snr(signal: Tensor, noisy: Tensor) -> float:
    """``|signal|^2 / |noisy - signal|^2`` over all elements; infinite where they are equal."""
    ratio = nsr(signal, noisy)
    return 1.0 / ratio if ratio > 0 else float("inf")


def nsr(signal: Tensor, noisy: Tensor) -> float:
    """1/:func:`snr`: 0 where they are equal, infinite where ``noisy`` is not finite."""
    noise = float((noisy.double() - signal.double()).square().sum())
    power = float(signal.double().square().sum())
    if noise == 0.0:
        return 0.0
    return noise / power if isfinite(noise) and power > 0 else float("inf")


def alpha_two_channels(rho: float) -> float:
    """alpha of a batch norm on two channels with gamma = (1, rho), beta = 0 and standardised input, (3.19c)."""
    return 4.0 / ((1.0 + 1.0 / rho**2) * (1.0 + rho**2))


def alpha_leaky_relu(slope: float) -> float:
    """alpha of a leaky ReLU on a signal that is symmetric around zero, (3.28c) with n = 1/slope."""
    return alpha_two_channels(1.0 / slope)


def alpha_batch_norm(mean: Tensor, std: Tensor, gamma: Tensor, beta: Tensor) -> float:
    """alpha of any batch norm, (3.22c), the sums running over the channels.

    The text's (3.21c) prints gamma/std for what an inversion multiplies the noise with; it is std/gamma.

    Args:
        mean: of the input per channel (c,), as ``std``.
        gamma: factor per channel (c,), as the shift ``beta``. With eps_i it is ``|gamma + eps_i|``.
    """
    signal = (mean.square() + std.square()).sum() / (gamma.square() + beta.square()).sum()
    noise = mean.numel() / (std.square() / gamma.square()).sum()
    return float(signal * noise)


@torch.no_grad()
def retrace(layer: Invertible, x: Tensor, y: Tensor) -> tuple[Tensor, list[float]]:
    """Inverts ``layer`` as its ``backward_from_output`` does and compares every hidden activation with the true one.

    Seen are the activations between the layers of an :class:`InvertibleSequential` and inside the invertible modules
    of a :class:`ReversibleBlock`; any other layer counts as having none. Exact are those that a backward pass
    computes again from what it knows: the lowest of a :class:`CouplingStack` used as a residual.

    Args:
        x: the true input of the last forward pass (n, c, h, w), left alone.
        y: its output, exact or noisy; overwritten.

    Returns:
        the input, and the noise-to-signal ratio of every hidden activation, in the order of inversion.
    """
    if isinstance(layer, InvertibleSequential):
        x, ratios = _retrace_layers(layer.layers(), x, y)
        return x, ratios[:-1]
    if isinstance(layer, ReversibleBlock) and layer.layerwise:
        return _retrace_reversible(layer, x, y)
    return layer.inverse_(y), []


def _retrace_reversible(block: ReversibleBlock, x: Tensor, y: Tensor) -> tuple[Tensor, list[float]]:
    f, g, hidden = block.f, block.g, list[float]()
    assert isinstance(f, Invertible)
    assert isinstance(g, Invertible)
    x1, x2 = block.rounded_(_copy(x)).chunk(2, 1)
    y1, y2 = block.rounded_(y).chunk(2, 1)
    true_y1 = x1 + block.rounded_(f.forward_(_copy(x2), replay=True))
    for module, true_input, known, minuend in ((g, true_y1, y1, y2), (f, x2, y2, y1)):
        output = module.forward_(_copy(known), replay=True)
        minuend.sub_(block.rounded_(output.clone()))
        hidden += _retrace_residual(module, true_input, output)
    return y, hidden


def _retrace_layers(layers: list[Invertible], x: Tensor, y: Tensor) -> tuple[Tensor, list[float]]:
    """As :func:`retrace` for layers one after the other; the last ratio is that of the input."""
    inputs = [x]
    for layer in layers[:-1]:
        inputs.append(layer.forward_(_copy(inputs[-1]), replay=True))
    ratios: list[float] = []
    for layer in reversed(layers):
        true_input = inputs.pop()
        y, inside = retrace(layer, true_input, y)
        ratios += [*inside, nsr(true_input, y)]
    return y, ratios


def _retrace_residual(module: Invertible, x: Tensor, y: Tensor) -> list[float]:
    """Ratios of what ``module.backward_as_residual`` inverts, from its output ``y``."""
    if not isinstance(module, CouplingStack):
        back, hidden = retrace(module, x, y)
        return [*hidden, nsr(x, back)]
    layers = [part for layer in module.layers() if isinstance(layer, InvertibleSequential) for part in layer.layers()]
    convolution, norm, *inverted = layers
    z = norm.forward_(convolution.forward_(_copy(x), replay=True), replay=True)
    return _retrace_layers(inverted, z, y)[1]


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)
