"""Random numbers that depend only on (seed, epoch, image, field), so that no generator has a state to save.

The finaliser of SplitMix64 (G. Steele, D. Lea, C. Flood, "Fast Splittable Pseudorandom Number Generators", 2014,
with the constants of S. Vigna's reference code) mixes the four one after the other, for a whole batch at once.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

Draws = npt.NDArray[np.float64]


def uniform_draws(*, seed: int, epoch: int, indices: npt.NDArray[np.int64], fields: int) -> Draws:
    """Numbers in [0, 1), (n, fields): row k belongs to image ``indices[k]``, whatever batch it is in."""
    key = _mix(_mix(np.array([seed], np.uint64)) ^ np.array([epoch], np.uint64))  # (1,)
    key = _mix(key ^ indices.astype(np.uint64))  # (n,)
    mixed = _mix(key[:, None] ^ np.arange(fields, dtype=np.uint64))  # (n, fields)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = values + _GAMMA
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))
