"""Brings a decoded image to the size and channels of the model's input.

Resized by Pillow's bilinear filter, whose support grows with the reduction (antialiased); the image is stretched,
not cut, where its aspect ratio differs. Grey from colour is ITU-R 601 luma; colour from grey repeats the plane.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from edgetrain.errors import UsageError
from edgetrain.train.data.source import Pixels

ImageSize = tuple[int, int, int]


def check_image_size(size: ImageSize) -> None:
    """Raises UsageError unless ``size`` is (1 or 3, height, width), all above zero."""
    if len(size) != 3 or size[0] not in (1, 3) or min(size) < 1:
        raise UsageError(
            found=f"an image size of {'x'.join(map(str, size))}",
            expected="channels (1 or 3), height and width",
            action="write it like 3x32x32",
        )


def fit_image(image: Pixels, size: ImageSize) -> Pixels:
    """``image`` (h, w, 1 or 3) as (height, width, channels) for ``size`` = (channels, height, width)."""
    channels, height, width = size
    if image.shape[2] == 3 and channels == 1:
        image = np.asarray(Image.fromarray(image).convert("L"))[:, :, None]  # (h, w, 1)
    if image.shape[:2] != (height, width):
        plane = np.ascontiguousarray(image if image.shape[2] == 3 else image[:, :, 0])
        resized = np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR))
        image = resized if resized.ndim == 3 else resized[:, :, None]  # (height, width, c)
    return np.repeat(image, 3, axis=2) if image.shape[2] < channels else image
