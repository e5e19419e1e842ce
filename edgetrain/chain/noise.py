"""The noise of inversion as a value: what every block adds, and what is left of the signal after a run of them.

A run of inverted blocks starts from an exact z[last + 1] and gives back z[last], ..., z[first], each noisier. With
NSR = 1/SNR = |noise|^2 / |signal|^2, block by block and as long as noise is small against the signal,

    NSR of z[i] = gain * NSR of z[i+1] + rounding                  gain = 1/alpha of (3.16)
    NSR of z[last] = own
    NSR of the worst hidden activation = hidden_gain * NSR of z[i+1] + hidden_own.

The first inversion of a run repeats the operations of the forward pass bit by bit, so that part of their rounding
cancels: own is up to ten times smaller than rounding. Hidden activations are noisy where they are inverted
one by one (way ``"invert_layerwise"``); the other ways compute them again from z[i]. Above NSR 1 the model is
too dark: noise larger than the signal grows less. :func:`edgetrain.chain.measure_noise` gives the numbers.

A run may also start from a z[last + 1] that was kept in bfloat16. Its NSR is then :data:`BFLOAT16_NSR`. The prediction
errs to the safe side there: small values are rounded by little, and it is their noise that a leaky ReLU amplifies.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from edgetrain.chain.chain import Mode

Way = Literal["invert", "invert_selective", "invert_layerwise"]
"""The modes that invert."""

BFLOAT16_NSR = torch.finfo(torch.bfloat16).eps ** 2 / 12
"""NSR of a tensor rounded to bfloat16, 1 / (3 * 2^16): the most, if rounding errors are spread evenly.

Between 2^e and 2^(e+1) bfloat16 has the spacing eps 2^e with eps = 2^-7, so the mean square of the error is
(eps 2^e)^2 / 12, and that of the values at least (2^e)^2. It is four times smaller where all values are just below a
power of two. Values that are all equal have up to the square of the largest error, (eps / 2)^2 = 2^-16.
"""


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

    def run_snrs(self, last: int, *, way: Way, output_nsr: float = 0.0) -> tuple[float, ...]:
        """Smallest SNR met when blocks ``last`` ... i are inverted.

        Args:
            output_nsr: of z[last + 1]; 0: it is exact.

        Returns:
            for i = last, last - 1, ... down to the first block that has an inverse; empty if ``last`` has none.
            Never rising.
        """
        found, nsr, worst = [], output_nsr, output_nsr
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

    def longest_runs(self, limit: float, *, way: Way, output_nsr: float = 0.0) -> tuple[int, ...]:
        """For every ``last`` the smallest ``first`` whose run keeps its SNR at ``limit`` or above.

        ``last + 1`` where not even the block itself can be inverted within the limit.

        Args:
            output_nsr: of z[last + 1]; 0: it is exact.
        """
        runs = (self.run_snrs(last, way=way, output_nsr=output_nsr) for last in range(len(self.blocks)))
        return tuple(last + 1 - sum(ratio >= limit for ratio in run) for last, run in enumerate(runs))

    def forbidden(self, limit: float) -> tuple[dict[Way, float], ...]:
        """For each block the ways that fall below ``limit`` even from an exact output, and the SNR that they leave."""
        return tuple(
            {
                way: self.run_snr(i, i, way=way)
                for way in get_args(Way)
                if block is not None and self.run_snr(i, i, way=way) < limit
            }
            for i, block in enumerate(self.blocks)
        )

    def without_hidden(self, computed: Sequence[bool]) -> Noise:
        """The same chain where the hidden activations of the blocks that are ``computed`` again are not inverted."""
        return replace(
            self,
            blocks=tuple(
                block and (replace(block, hidden_gain=0.0, hidden_own=0.0) if again else block)
                for block, again in zip(self.blocks, computed, strict=True)
            ),
        )

    def snrs(self, modes: Sequence[Mode], *, rounded: Collection[int] = ()) -> tuple[float, ...]:
        """Smallest SNR met in every block under one mode per block; infinite where nothing is inverted or rounded.

        A block that is stored or recomputed, all of it or in part, ends a run.

        Args:
            rounded: blocks whose backward pass starts from a z that was kept in bfloat16: their input, or the output
                of an inverted one. Blocks that are computed again from the output of such a block are not counted:
                how noise grows on its way forward is not known.
        """
        found, nsr = [], 0.0
        for i, (mode, block) in reversed(list(enumerate(zip(modes, self.blocks, strict=True)))):
            start = BFLOAT16_NSR if i in rounded else 0.0
            if mode == "selective" and block is not None:  # its hidden activations come back from its output
                nsr, met = 0.0, max(start, block.backward(0.0, way="invert_layerwise")[1])
            elif mode == "store" or mode == "selective" or mode == "selective_all" or mode == "recompute":
                nsr, met = 0.0, start
            elif block is None:
                nsr = met = float("inf")
            else:
                nsr, met = block.backward(nsr + start, way=mode)
                met = max(met, start)
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
