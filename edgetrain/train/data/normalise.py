"""Mean and deviation of each channel, and the step from uint8 pixels to the float32 that the model sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgetrain.errors import DataError, UsageError
from edgetrain.train.data.fit import ImageSize, check_image_size
from edgetrain.train.data.reduced import decode_fitted
from edgetrain.train.data.source import BrokenImage, Pixels, Source

if TYPE_CHECKING:
    from torch import Tensor

Statistic = npt.NDArray[np.float64]
SMALLEST_STD = 1e-3


def channel_statistics(
    source: Source, image_size: ImageSize, sample: int = 2000, seed: int = 0
) -> tuple[Statistic, Statistic]:
    """Mean and standard deviation of the pixels, (c,) each, on the scale 0..1.

    Args:
        image_size: (c, h, w) to which the images are brought first.
        sample: how many images to look at, chosen by ``seed``; all of a smaller source.

    Raises:
        DataError: all of them are broken.
        UsageError: an impossible size or sample.
    """
    check_image_size(image_size)
    if sample < 1:
        raise UsageError(found=f"a sample of {sample} images", expected="at least 1", action="raise it")
    chosen = np.random.default_rng(seed).permutation(len(source))[:sample]
    total, squares = np.zeros(image_size[0], np.int64), np.zeros(image_size[0], np.int64)
    pixels, broken = 0, []
    for index in np.sort(chosen):
        try:
            image = decode_fitted(source, int(index), image_size)  # (h, w, c)
        except BrokenImage as error:
            broken.append(error.path)
            continue
        values = image.reshape(-1, image_size[0]).astype(np.int64)  # (h * w, c)
        total += values.sum(axis=0)
        squares += (values * values).sum(axis=0)
        pixels += len(values)
    if not pixels:
        raise DataError(
            found=f"all {len(broken)} images looked at are broken, the first is {', '.join(broken[:1]) or 'missing'}",
            expected="readable images",
            action="check the data set",
        )
    mean = total / pixels
    variance = np.maximum(squares / pixels - mean * mean, 0.0)
    return mean / 255, np.maximum(np.sqrt(variance) / 255, SMALLEST_STD)


def sample_images(
    source: Source, image_size: ImageSize, mean: npt.ArrayLike, std: npt.ArrayLike, *, count: int = 32, seed: int = 0
) -> Tensor:
    """Some images (n, c, h, w) as the model sees them, chosen by ``seed``; broken ones are left out."""
    images = []
    for index in np.random.default_rng(seed).permutation(len(source)):
        try:
            images.append(decode_fitted(source, int(index), image_size).transpose(2, 0, 1))  # (c, h, w)
        except BrokenImage:
            continue
        if len(images) == count:
            break
    return normalised(np.stack(images), np.asarray(mean), np.asarray(std))


def check_statistic(values: npt.ArrayLike | None, channels: int, name: str, *, default: float) -> Statistic:
    """``values`` as (c,), or ``default`` repeated.

    Raises:
        UsageError: not one value per channel, or one that is not finite.
    """
    if values is None:
        return np.full(channels, default)
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    if len(array) != channels or not np.isfinite(array).all() or (name == "std" and (array <= 0).any()):
        raise UsageError(
            found=f"{name} {array.tolist()} for {channels} channel(s)",
            expected="one finite value per channel" + (" above zero" if name == "std" else ""),
            action="take both from channel_statistics",
        )
    return array


def normalised(pixels: Pixels, mean: Sequence[float] | Statistic, std: Sequence[float] | Statistic) -> Tensor:
    """(pixels / 255 - mean) / std as float32, (n, c, h, w); takes no memory besides the result."""
    import torch  # the other form serves where there is none

    images = torch.empty(pixels.shape, dtype=torch.float32)
    images.copy_(torch.from_numpy(pixels))
    shift, scale = (torch.from_numpy(numbers) for numbers in _shift_and_scale(mean, std))
    return images.sub_(shift).mul_(scale)


def normalised_array(
    pixels: Pixels, mean: Sequence[float] | Statistic, std: Sequence[float] | Statistic
) -> npt.NDArray[np.float32]:
    """As :func:`normalised`, without PyTorch."""
    images = pixels.astype(np.float32)
    shift, scale = _shift_and_scale(mean, std)
    images -= shift
    images *= scale
    return images


def _shift_and_scale(
    mean: Sequence[float] | Statistic, std: Sequence[float] | Statistic
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """What is subtracted from a pixel 0..255, and what it is multiplied by then, (c, 1, 1) each."""
    shift, scale = np.asarray(mean) * 255, 1 / (np.asarray(std) * 255)
    return shift.astype(np.float32).reshape(-1, 1, 1), scale.astype(np.float32).reshape(-1, 1, 1)
