"""What happens between the samples of a batch: micro-batches, and the noise of inversions measured on a few."""

from __future__ import annotations

import contextlib

from torch import nn

from edgetrain.chain.measure_noise import measure_noise
from edgetrain.chain.noise import Noise
from edgetrain.errors import EdgetrainError, UsageError
from edgetrain.nn import InvertibleBatchNorm

_MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
_NOISE_SAMPLES, _NOISE_SIDE, _NOISE_FACTORS = 8, 16, (8, 7, 6, 5, 4, 3, 2)


def mixing_layer(model: nn.Module) -> str | None:
    """Name of a layer in which the samples of a batch meet; None where each is treated alone."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | InvertibleBatchNorm) and module.training:
            return name
    return None


def micro_batch_counts(
    model: nn.Module, batch_size: int, asked: int | None, *, allow_ghost_batchnorm: bool, group: int = 1
) -> tuple[int, ...]:
    """Numbers of micro-batches to try, in this order.

    Args:
        group: samples that stay together.

    Raises:
        UsageError: the number asked for does not divide the batch, parts a group, or changes what is computed.
    """
    mixing = mixing_layer(model)
    if batch_size % group:
        raise UsageError(
            found=f"a batch of {batch_size} for groups of {group}",
            expected="whole groups",
            action=f"choose a multiple of {group}",
        )
    if asked is not None:
        if asked < 1 or batch_size % (asked * group):
            together = "" if group == 1 else f" into groups of {group}"
            raise UsageError(
                found=f"{asked} micro-batches of a batch of {batch_size}",
                expected=f"a number that divides the batch{together}",
                action="choose another batch size or number",
            )
        if asked > 1 and mixing and not allow_ghost_batchnorm:
            raise UsageError(
                found=f"{asked} micro-batches with a live batch norm ({mixing})",
                expected="layers that treat every sample alone: otherwise the parts have other statistics",
                action="freeze it, use group norm, or pass allow_ghost_batchnorm (--allow-ghost-batchnorm)",
            )
        return (asked,)
    if mixing and not allow_ghost_batchnorm:
        return (1,)
    return possible_counts(batch_size, group)


def possible_counts(batch_size: int, group: int = 1) -> tuple[int, ...]:
    """Numbers of equal micro-batches of two samples at least, and of whole groups."""
    return tuple(n for n in _MICRO_BATCHES if n == 1 or (batch_size % (n * group) == 0 and batch_size // n >= 2))


def probed_noise(model: nn.Module, input_shape: tuple[int, int, int]) -> Noise:
    """From a few random samples, small ones where the model takes them: noise is a matter of channels."""
    channels, height, width = input_shape
    for factor in _NOISE_FACTORS:
        if height % factor == width % factor == 0 and min(height, width) // factor >= _NOISE_SIDE:
            with contextlib.suppress(EdgetrainError, RuntimeError):
                return measure_noise(model, (_NOISE_SAMPLES, channels, height // factor, width // factor))
    return measure_noise(model, (_NOISE_SAMPLES, *input_shape))


def reach_of(noise: Noise, snr_limit: float, *, output_nsr: float = 0.0) -> tuple[int, ...]:
    """For every block the first one of the longest run of inversions that ends at it, whatever the ways in the run.

    Blocks that are too noisy to be inverted layer by layer at all are taken not to be.

    Args:
        output_nsr: ratio of noise to signal from which a run starts.
    """
    noise = noise.without_hidden(["invert_layerwise" in ways for ways in noise.forbidden(snr_limit)])
    runs = [noise.longest_runs(snr_limit, way=way, output_nsr=output_nsr) for way in ("invert", "invert_layerwise")]
    return tuple(max(firsts) for firsts in zip(*runs, strict=True))
