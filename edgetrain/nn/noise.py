"""How much signal-to-noise ratio an inversion costs, (3.15) to (3.28) of the source.

SNR = |signal|^2 / |noise|^2. Going backward through a layer, from output to input, multiplies it by

    alpha = SNR of the input / SNR of the output,

for noise that is white over the channels and small against the signal. alpha = 1 keeps the ratio.
"""

from __future__ import annotations

from torch import Tensor


def snr(signal: Tensor, noisy: Tensor) -> float:
    """``|signal|^2 / |noisy - signal|^2`` over all elements; infinite where they are equal."""
    noise = float((noisy.double() - signal.double()).square().sum())
    return float(signal.double().square().sum()) / noise if noise > 0 else float("inf")


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
