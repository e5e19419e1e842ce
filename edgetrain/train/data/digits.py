"""The data set that is always there: 1,797 handwritten digits, 8x8 grey, embedded in scikit-learn.

E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits, UCI 1998. Its values 0..16 are scaled to 0..255.
The images are in the order of their writers, so every fifth of a class goes to the test split.
"""

from __future__ import annotations

import numpy as np

from edgetrain.train.data.source import Labels, Pixels, Split


class DigitsSource:
    """All images of one split in memory: 115 kB for both."""

    name = "digits"
    classes = tuple(str(digit) for digit in range(10))
    channels = 1
    mirror_invariant = False

    def __init__(self, split: Split) -> None:
        from sklearn.datasets import load_digits  # takes a second: imported where it is used

        images, labels = load_digits(return_X_y=True)
        chosen = _in_test(labels.astype(np.int64)) == (split == "test")
        self.labels: Labels = labels[chosen].astype(np.int64)
        scaled = np.rint(images[chosen] * (255 / 16)).astype(np.uint8)
        self._images: Pixels = scaled.reshape(-1, 8, 8, 1)  # (n, 8, 8, 1)
        self._images.flags.writeable = False

    def __len__(self) -> int:
        return len(self.labels)

    def decode(self, index: int) -> Pixels:
        """Image ``index``, (8, 8, 1)."""
        return self._images[index]


def _in_test(labels: Labels) -> np.ndarray:
    """Marks the 5th, 10th, ... image of each class, (n,) bool."""
    marked = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        marked[np.flatnonzero(labels == label)[4::5]] = True
    return marked
