"""The training recipe's augmentation: shifted crop, mirror, cutout; on uint8, one image at a time.

1. Pad by reflection and cut the image's own size at random (K. He et al. 2015, section 4.2, who pad with zeros).
2. Mirror every second image, if a mirrored one keeps its class.
3. Cutout (T. DeVries, G. Taylor 2017): a square around a random pixel is set to the mean; it may stick out.

At 32x32 the padding is 4 and the square 8; both grow with the image (an eighth, a quarter of each side). No padded
copy is made: the crop gathers from the reflected coordinates, so one image is all the memory it takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from edgetrain.train.data.draws import Draws, uniform_draws
from edgetrain.train.data.source import Pixels

Coordinates = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Choice:
    """What is done to the images of a batch.

    Attributes:
        size: (height, width).
        y, x: of the crop in the padded image, (n,) each.
        mirrored: (n,) bool.
        top, bottom, left, right: of the cutout, (n,) each.
    """

    size: tuple[int, int]
    y: Coordinates
    x: Coordinates
    mirrored: npt.NDArray[np.bool_]
    top: Coordinates
    bottom: Coordinates
    left: Coordinates
    right: Coordinates


def choose(
    indices: npt.NDArray[np.int64], *, size: tuple[int, int], seed: int, epoch: int, flip: bool, cutout: bool = True
) -> Choice:
    """Draws the augmentation of the images ``indices`` (n,) of (height, width) ``size``."""
    draws = uniform_draws(seed=seed, epoch=epoch, indices=indices, fields=5)  # (n, 5)
    y, x = _crop(draws[:, 0], size[0]), _crop(draws[:, 1], size[1])
    mirrored = draws[:, 2] < (0.5 if flip else 0.0)
    top, bottom = _square(draws[:, 3], size[0], cutout=cutout)
    left, right = _square(draws[:, 4], size[1], cutout=cutout)
    return Choice(size, y, x, mirrored, top, bottom, left, right)


def augment_image(image: Pixels, choice: Choice, k: int, *, fill: Pixels) -> Pixels:
    """``image`` (h, w, c) changed as the ``k``-th of ``choice`` says, as a new array; ``fill`` (c,) is the cutout."""
    height, width = choice.size
    rows = _reflected(height)[choice.y[k] : choice.y[k] + height]
    columns = _reflected(width)[choice.x[k] : choice.x[k] + width]
    augmented = image.take(rows, axis=0).take(columns[::-1] if choice.mirrored[k] else columns, axis=1)
    augmented[choice.top[k] : choice.bottom[k], choice.left[k] : choice.right[k]] = fill
    return augmented


def _crop(draw: Draws, length: int) -> Coordinates:
    """First coordinate of a crop of ``length`` in the padded image, (n,)."""
    return (draw * (2 * _padding(length) + 1)).astype(np.int64)


@cache
def _reflected(length: int) -> Coordinates:
    """Source coordinate of every coordinate of the padded image, (length + 2 * padding,)."""
    inside = np.abs(np.arange(-_padding(length), length + _padding(length)))  # reflected at the first pixel
    reflected = length - 1 - np.abs(length - 1 - inside)  # and at the last
    return np.clip(reflected, 0, length - 1)  # a side of one pixel has nothing to reflect


def _padding(length: int) -> int:
    return max(1, round(length / 8))


def _square(draw: Draws, length: int, *, cutout: bool) -> tuple[Coordinates, Coordinates]:
    """First coordinate and the one after the last of the cutout, (n,) each."""
    side = round(length / 4) if cutout else 0
    first = (draw * length).astype(np.int64) - side // 2
    return np.clip(first, 0, length), np.clip(first + side, 0, length)
