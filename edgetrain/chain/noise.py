"""The noise of inversion as a value: what every block adds, and what is left of the signal after a run of them.

A run of inverted blocks starts from an exact z[last + 1] and gives back z[last], ..., z[first], each noisier. With
NSR = 1/SNR = |noise|^2 / |signal|^2, block by block and as long as noise is small against the signal,

    NSR of z[i] = gain * NSR of z[i+1] + rounding                  gain = 1/alpha of (3.16)
    NSR of z[last] = own
    NSR of the worst hidden activation = hidden_gain * NSR of z[i+1] + hidden_own.

The first inversion of a run repeats the operations of the forward pass bit by bit, so that part of their rounding
cancels: own is up to ten times smaller than rounding. Hidden activations are noisy where they are inverted
one by one (way ``"invert_layerwise"``); way ``"invert"`` computes them again from z[i]. Above NSR 1 the model is
too dark: noise larger than the signal grows less. :func:`edgetrain.chain.measure_noise` gives the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from edgetrain.chain.chain import Mode

Way = Literal["invert", "invert_layerwise"]
"""The modes that invert."""


@dataclass(frozen=True)
class BlockNoise:
    """What inverting one block does to the ratio of noise to signal (all are ratios of powers).

    Attributes:
        gain: NSR of the input over that of the output.
        own: NSR of the input from an exact output.
        rounding: what the block adds to a noise that arrives, at least ``own``.
        hidden_gain: NSR of the worst hidden activation over that of the output; 0 where none is inverted.
        hidden_own: what the block adds to that.
    """

    gain: float
    own: float
    rounding: float
    hidden_gain: float = 0.0
    hidden_own: float = 0.0

    def backward(self, output_nsr: float, *, way: Way) -> tuple[float, float]:
        """``(NSR of the input, largest NSR met)`` from the NSR of the output."""
        nsr = self.gain * output_nsr + self.rounding if output_nsr > 0 else self.own
        hidden = self.hidden_gain * output_nsr + self.hidden_own if way == "invert_layerwise" else 0.0
        return nsr, max(nsr, hidden)


@dataclass(frozen=True)
class Noise:
    """The noise of every block of a chain.

    Attributes:
        blocks: one per block; None for a block without an inverse.
        dtype: in which ``own``, ``rounding`` and ``hidden_own`` hold.
        source: where the numbers come from.
    """

    blocks: tuple[BlockNoise | None, ...]
    dtype: torch.dtype
    source: str

    def run_snrs(self, last: int, *, way: Way) -> tuple[float, ...]:
        """Smallest SNR met when blocks ``last`` ... i are inverted from an exact z[last + 1].

        Returns:
            for i = last, last - 1, ... down to the first block that has an inverse; empty if ``last`` has none.
            Never rising.
        """
        found, nsr, worst = [], 0.0, 0.0
        for block in self.blocks[last::-1]:
            if block is None:
                break
            nsr, met = block.backward(nsr, way=way)
            worst = max(worst, met)
            found.append(_snr(worst))
        return tuple(found)

    def run_snr(self, first: int, last: int, *, way: Way) -> float:
        """Smallest SNR met when blocks ``last`` ... ``first`` are inverted; 0 if one of them has no inverse."""
        found = self.run_snrs(last, way=way)
        return found[last - first] if last - first < len(found) else 0.0

    def longest_runs(self, limit: float, *, way: Way) -> tuple[int, ...]:
        """For every ``last`` the smallest ``first`` whose run keeps its SNR at ``limit`` or above.

        ``last + 1`` where not even the block itself can be inverted within the limit.
        """
        runs = (self.run_snrs(last, way=way) for last in range(len(self.blocks)))
        return tuple(last + 1 - sum(ratio >= limit for ratio in run) for last, run in enumerate(runs))

    def snrs(self, modes: Sequence[Mode]) -> tuple[float, ...]:
        """Smallest SNR met in every block under one mode per block; infinite where nothing is inverted.

        A block that is stored or recomputed, all of it or in part, starts from an exact input and ends a run.
        """
        found, nsr = [], 0.0
        for mode, block in zip(reversed(modes), reversed(self.blocks), strict=True):
            met = 0.0
            if mode == "store" or mode == "selective" or mode == "recompute":
                nsr = 0.0
            elif block is None:
                nsr = met = float("inf")
            else:
                nsr, met = block.backward(nsr, way=mode)
            found.append(_snr(met))
        return tuple(reversed(found))

    def in_dtype(self, dtype: torch.dtype) -> Noise:
        """The same chain in another type: rounding noise goes with the square of its machine epsilon."""
        factor = (torch.finfo(dtype).eps / torch.finfo(self.dtype).eps) ** 2
        blocks = tuple(
            block
            and replace(
                block,
                own=factor * block.own,
                rounding=factor * block.rounding,
                hidden_own=factor * block.hidden_own,
            )
            for block in self.blocks
        )
        return Noise(blocks, dtype, f"{self.source}, rounding scaled from {self.dtype}")


def _snr(nsr: float) -> float:
    return 1.0 / nsr if nsr > 0 else float("inf")
