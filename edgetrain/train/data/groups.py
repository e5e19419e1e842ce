"""Orders of images in triplets or pairs, a function of (seed, epoch): a run repeats, and resumes, bit for bit.

Every image comes once per epoch as the first of its group, in a random order. What follows it is drawn by
:func:`uniform_draws` for that image:

    triplet: anchor, another image of its class, one of another class
    pair:    an image, then for every second image another of its class, else one of another class

An image that is alone in its class has no positive: it comes as a negative only, and in no triplet as anchor.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from edgetrain.errors import DataError
from edgetrain.train.data.draws import uniform_draws
from edgetrain.train.data.source import Labels
from edgetrain.train.data.subset import Indices


class Order(Protocol):
    """In which order the images of an epoch come.

    Attributes:
        group: images that belong together.
    """

    @property
    def group(self) -> int: ...

    def __len__(self) -> int:
        """Images in an epoch."""
        ...

    def __call__(self, *, seed: int, epoch: int) -> Indices:
        """Their indices in the source, (len,)."""
        ...


class Groups:
    """Triplets (``group`` 3) or pairs (2) of images with ``labels`` (n,).

    Raises:
        DataError: one class only, or none with two images.
    """

    def __init__(self, labels: Labels, *, group: int) -> None:
        self.group = group
        counts = np.bincount(labels)
        if np.count_nonzero(counts) < 2 or counts.max() < 2:
            raise DataError(
                found=f"{np.count_nonzero(counts)} classes, the largest of {counts.max()} images",
                expected="two classes at least, one of them with two images",
                action="add images: there is nothing to compare",
            )
        self._labels = labels
        self._firsts: Indices = np.flatnonzero(counts[labels] > 1).astype(np.int64)
        self._sorted: Indices = np.argsort(labels, kind="stable").astype(np.int64)  # by class
        self._starts: Indices = np.concatenate(([0], np.cumsum(counts)))[:-1].astype(np.int64)
        self._counts: Indices = counts.astype(np.int64)
        self._rank: Indices = np.empty(len(labels), np.int64)
        self._rank[self._sorted] = np.arange(len(labels))

    def __len__(self) -> int:
        return self.group * len(self._firsts)

    def __call__(self, *, seed: int, epoch: int) -> Indices:
        """The images of the epoch group by group, (len,)."""
        first = np.random.default_rng((seed, epoch)).permutation(self._firsts)
        draws = uniform_draws(seed=seed, epoch=epoch, indices=first, fields=7)[:, 5:]  # augmentation draws the others
        same, other = self._same(first, draws[:, 0]), self._other(first, draws[:, 1])
        if self.group == 3:
            return np.stack([first, same, other], 1).reshape(-1)
        alike = np.arange(len(first)) % 2 == 0
        return np.stack([first, np.where(alike, same, other)], 1).reshape(-1)

    def _same(self, first: Indices, draw: npt.NDArray[np.float64]) -> Indices:
        """Another image of the class of each."""
        label = self._labels[first]
        step = 1 + (draw * (self._counts[label] - 1)).astype(np.int64)  # 1 to one less than there are
        place = (self._rank[first] - self._starts[label] + step) % self._counts[label]
        return self._sorted[self._starts[label] + place]

    def _other(self, first: Indices, draw: npt.NDArray[np.float64]) -> Indices:
        """An image of another class, each as likely."""
        label = self._labels[first]
        place = (draw * (len(self._labels) - self._counts[label])).astype(np.int64)  # among all but its class
        return self._sorted[np.where(place < self._starts[label], place, place + self._counts[label])]
