"""Images and labels in memory, or in a NumPy archive: ``NAME.npz`` with arrays ``images`` and ``labels``.

An archive may hold ``test_images`` and ``test_labels`` besides. Nothing in it is unpickled.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgetrain.errors import DataError
from edgetrain.train.data.source import Labels, Pixels, Split, check_labels, no_split


class ArraySource:
    """Images that somebody holds in memory.

    Args:
        images: (n, h, w, c) or (n, c, h, w) uint8, c being 1 or 3, or (n, h, w).
        labels: (n,).
        classes: their names; None: the numbers from 0 to the highest label.

    Raises:
        DataError: shapes or types are others.
    """

    def __init__(
        self,
        images: npt.ArrayLike,
        labels: npt.ArrayLike,
        *,
        classes: tuple[str, ...] | None = None,
        name: str = "arrays",
    ) -> None:
        pixels, numbers = np.asarray(images), np.asarray(labels)
        if pixels.ndim == 3:
            pixels = pixels[..., None]
        if pixels.ndim == 4 and pixels.shape[3] not in (1, 3) and pixels.shape[1] in (1, 3):
            pixels = pixels.transpose(0, 2, 3, 1)
        if pixels.ndim != 4 or pixels.shape[3] not in (1, 3) or pixels.dtype != np.uint8:
            raise DataError(
                found=f"images of shape {pixels.shape} and type {pixels.dtype}",
                expected="(n, h, w, c) or (n, c, h, w) with 1 or 3 channels, uint8",
                action="store pixels 0 to 255 as uint8",
            )
        if numbers.shape != (len(pixels),) or not np.issubdtype(numbers.dtype, np.integer):
            raise DataError(
                found=f"labels of shape {numbers.shape} and type {numbers.dtype} for {len(pixels)} images",
                expected="an integer for each image",
                action="store one label per image",
            )
        self.labels: Labels = numbers.astype(np.int64)
        highest = int(self.labels.max(initial=0))
        self.name = name
        self.classes = classes or tuple(str(k) for k in range(highest + 1))
        self.channels = int(pixels.shape[3])
        self._pixels: Pixels = pixels
        check_labels(self.labels, self.classes, name)

    def __len__(self) -> int:
        return len(self.labels)

    def decode(self, index: int) -> Pixels:
        """Image ``index``, (h, w, c)."""
        return self._pixels[index]


def open_archive(path: Path, split: Split) -> ArraySource:
    """The images of ``split`` in the archive ``path``.

    Raises:
        DataError: it is damaged, or has no such split.
    """
    prefix = "test_" if split == "test" else ""
    try:
        with np.load(path, allow_pickle=False) as archive:
            if split == "test" and "test_images" not in archive:
                raise no_split(path, split, "arrays test_images and test_labels")
            images, labels = archive[f"{prefix}images"], archive[f"{prefix}labels"]
            trained = archive["labels"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            found=f"{path} cannot be read: {error}",
            expected="an archive of numpy.savez with arrays images and labels",
            action="write it again with numpy.savez",
        ) from error
    classes = tuple(str(k) for k in range(int(trained.max(initial=0)) + 1))
    return ArraySource(images, labels, classes=classes, name=path.stem)
