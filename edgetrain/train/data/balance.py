"""Balanced sampling: in every epoch each class is drawn as often as any other.

An epoch stays as long as there are images, n. Each of the k classes gets n / k draws. Its images are taken in a random
order, and in another one when all of them were drawn: no image is drawn twice before every other of its class was drawn
once. Where the classes are of one size every image is drawn once, as without balancing.
"""

from __future__ import annotations

import numpy as np

from edgetrain.train.data.source import Labels
from edgetrain.train.data.subset import Indices


def balanced_draws(labels: Labels, *, rng: np.random.Generator) -> Indices:
    """The draws of an epoch, (n,): draw ``d`` is image ``d % n``, taken for the ``d // n``-th time before.

    Args:
        labels: of all images, (n,).
    """
    n, classes = len(labels), rng.permutation(np.unique(labels))
    draws = []
    for place, label in enumerate(classes):
        members = np.flatnonzero(labels == label)
        quota = n // len(classes) + (place < n % len(classes))
        rounds = [rng.permutation(members) + n * k for k in range(-(-quota // len(members)))]
        draws.append(np.concatenate([np.empty(0, np.int64), *rounds])[:quota])
    return rng.permutation(np.concatenate(draws)).astype(np.int64)


def balancing_weights(labels: Labels, classes: int) -> tuple[float, ...]:
    """A weight per class in inverse proportion to its images, on average 1 over the data: n / (k n_c) for n_c images.

    Args:
        labels: (n,).
        classes: how many there are; one without an image gets 0.
    """
    counts = np.bincount(labels, minlength=classes)
    present = int((counts > 0).sum())
    return tuple(float(len(labels) / (present * count)) if count else 0.0 for count in counts)
