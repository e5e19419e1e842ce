"""Measures the noise of inversion on a small batch: each block inverted from its exact output, and from noisy ones.

What a block does to noise depends on the shape of the noise that comes in, not on its power alone. Noise that has
passed an inversion lies where inversions amplify; white noise, on which the closed formulas (3.19c) to (3.28c) rest,
comes out too small: ninefold after twelve layers, a hundredfold after twelve hybrid blocks. So the noise put in is
the one that arrives when the whole stretch of invertible blocks is inverted from its end: what the block above
passed on plus its own, scaled to a power of eps, halfway between the signal and its rounding (eps^2), where it
neither drowns nor bends the activation. A run that starts further down meets the same noise without its oldest
part, which has grown most: its prediction errs to the safe side. What a block adds itself is measured from the
exact output, and again from one that is off by a rounding, because from then on nothing cancels.

Cost: one forward pass, and four inversions of every block with as many passes through its hidden activations. There
is no closed prediction beside it: the formulas need mean and variance of every batch norm's input, which only a
forward pass gives, and there is none for a coupling.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf, isfinite, sqrt

import torch
from torch import Tensor, nn

from edgetrain.chain.chain import chain_of, restore_state, saved_state
from edgetrain.chain.noise import BlockNoise, Noise
from edgetrain.errors import UsageError
from edgetrain.nn import Invertible
from edgetrain.nn.noise import nsr, retrace


@torch.no_grad()
def measure_noise(model: nn.Module, sample: Tensor | Sequence[int]) -> Noise:
    """The noise of every block of ``model``, with its weights, in its mode and type.

    Running statistics, random state and what blocks saved are as before afterwards; gradients are not touched.

    Args:
        model: any module.
        sample: a batch (n, c, h, w), 8 images are enough; or its shape alone. It is then drawn from a normal
            distribution, an assumption: on real data gains differ with the statistics of the activations.

    Raises:
        UsageError: an activation is not finite.
    """
    parameter = next(model.parameters(), torch.empty(0))
    generator = torch.Generator(parameter.device).manual_seed(0)
    if isinstance(sample, Tensor):
        x = sample.to(parameter.device, parameter.dtype if sample.is_floating_point() else sample.dtype)
        source = f"measured on a batch of {sample.shape[0]}"
    else:
        x = torch.randn(tuple(sample), generator=generator, device=parameter.device, dtype=parameter.dtype)
        source = f"measured on {sample[0]} random normal samples"
    blocks = [block.module for block in chain_of(model).blocks]
    with _as_before(model, blocks, x.device):
        activations = _forward(blocks, x)
        found: list[BlockNoise | None] = []
        arriving: Tensor | None = None
        for i, module in reversed(list(enumerate(blocks))):
            if not isinstance(module, Invertible):
                arriving = None
                found.append(None)
                continue
            block, arriving = _measure(module, activations[i], activations.pop(i + 1), arriving, generator)
            found.append(block)
    return Noise(tuple(reversed(found)), parameter.dtype, source)


_LEAST_NSR = 1e-40
"""Of a block that computes: one whose residual is zero, as at the start of a run, will not stay without noise."""


@dataclass(frozen=True)
class _Inversion:
    """One inversion of a noisy output.

    Attributes:
        noise: on the output.
        output: its noise-to-signal ratio.
        ratios: of the input, then of every hidden activation.
        error: of the input.
    """

    noise: Tensor
    output: float
    ratios: list[float]
    error: Tensor

    def gains(self, own: list[float]) -> list[float]:
        return [max(noisy - exact, 0.0) / self.output for noisy, exact in zip(self.ratios, own, strict=True)]


def _invert(module: Invertible, x: Tensor, y: Tensor, noise: Tensor, *, power: float) -> _Inversion:
    """Inverts ``y`` with ``noise`` on it, scaled to ``power`` times that of ``y``."""
    noisy = y + sqrt(power * _power(y) / _power(noise)) * noise if power > 0 else y.clone()
    added, output = noisy - y, nsr(y, noisy)
    back, hidden = retrace(module, x, noisy)
    return _Inversion(added, output, [nsr(x, back), *hidden], back - x)


def _measure(
    module: Invertible, x: Tensor, y: Tensor, arriving: Tensor | None, generator: torch.Generator
) -> tuple[BlockNoise, Tensor | None]:
    """The noise of one block, and what it passes on to the block below: in true size, at most that of the signal.

    Args:
        x: exact input, as ``y`` the output.
        arriving: noise on ``y``; None at the end of a stretch.
    """
    eps = torch.finfo(y.dtype).eps
    white = torch.randn(y.shape, generator=generator, device=y.device, dtype=y.dtype)
    exact = _invert(module, x, y, white, power=0.0)
    if not isfinite(sum(exact.ratios)) or not bool(x.any() and y.any()):
        return BlockNoise(gain=1.0, own=inf, rounding=inf, hidden_gain=1.0, hidden_own=inf), None
    rounded = _invert(module, x, y, white, power=eps**2 / 12)
    small = _invert(module, x, y, rounded.noise, power=eps)
    rounding, *hidden_own = (
        max(a, b - gain * rounded.output) if a > 0 else 0.0
        for a, b, gain in zip(exact.ratios, rounded.ratios, small.gains(exact.ratios), strict=True)
    )
    passed_on = exact.error
    if arriving is not None and bool(arriving.any()):
        small = _invert(module, x, y, arriving, power=eps)
        passed_on = (small.error - exact.error) * sqrt(_power(arriving) / (small.output * _power(y))) + exact.error
    gain, *hidden_gains = small.gains([rounding, *hidden_own])
    size = _power(passed_on) / _power(x)
    if size > 1:
        passed_on = passed_on / sqrt(size)
    worst_gain, worst_own = max(hidden_gains, default=0.0), max(hidden_own, default=0.0)
    least = 0.0 if module.noiseless else _LEAST_NSR
    return BlockNoise(gain, max(exact.ratios[0], least), max(rounding, least), worst_gain, worst_own), passed_on


def _power(x: Tensor) -> float:
    return float(x.double().square().sum())


def _forward(blocks: Sequence[nn.Module], x: Tensor) -> dict[int, Tensor]:
    """z[i] and z[i+1] of every block i that has an inverse."""
    kept: dict[int, Tensor] = {}
    for i, module in enumerate(blocks):
        if isinstance(module, Invertible):
            kept[i] = x
            x = kept[i + 1] = module.forward_(x.clone(memory_format=torch.contiguous_format))
            if not bool(x.isfinite().all()):
                raise UsageError(
                    found=f"activations behind block {i} that are not finite",
                    expected="finite numbers, whose noise can be measured",
                    action="check the sample and the weights",
                )
        else:
            x = module(x.clone())
    return kept


@contextlib.contextmanager
def _as_before(model: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Puts back buffers, what the last forward pass left in the blocks, and the random state."""
    states = [saved_state(module) for module in blocks]
    buffers = [
        (owner, name, buffer, buffer.clone())
        for owner in model.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None
    ]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for state in states:
            restore_state(state)
        for owner, name, buffer, before in buffers:
            buffer.copy_(before)
            owner._buffers[name] = buffer
