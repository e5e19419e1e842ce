"""Balanced sampling: in every epoch rare classes are drawn more often than they come.

An epoch stays as long as there are images, n. A class of n_c images gets a part of the draws in proportion to n_c^p:
p = 0 draws every class equally often, p = 1/2 by the root of its images (D. Mahajan et al. 2018, section 2.2), between
that and how often the classes come. Its images are taken in a random order, and in another one when all of them were
drawn: no image is drawn twice before every other of its class was drawn once. Where the classes are of one size every
image is drawn once, as without balancing.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from edgetrain.train.data.source import Labels
from edgetrain.train.data.subset import Indices

Balance = Literal["equal", "root"]
_POWERS: dict[Balance, float] = {"equal": 0.0, "root": 0.5}


def balanced_draws(labels: Labels, *, rng: np.random.Generator, balance: Balance = "equal") -> Indices:
    """The draws of an epoch, (n,): draw ``d`` is image ``d % n``, taken for the ``d // n``-th time before.

    Args:
        labels: of all images, (n,).
        balance: "equal" draws every class as often, "root" by the root of its number of images.
    """
    n, classes = len(labels), rng.permutation(np.unique(labels))
    weights = np.bincount(labels)[classes] ** _POWERS[balance]  # (k,)
    shares = n * weights / weights.sum()
    quotas = np.floor(shares).astype(np.int64)
    quotas[np.argsort(quotas - shares, kind="stable")[: n - quotas.sum()]] += 1  # the largest remainders
    draws = []
    for label, quota in zip(classes, quotas.tolist(), strict=True):
        members = np.flatnonzero(labels == label)
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
