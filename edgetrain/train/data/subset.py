"""A part of a source, and how a class-stratified part is chosen.

Each class's images are put in a random order and the image of rank r (0, 1, ...) in a class of m gets the
key (r + 1/2) / m; the smallest keys win. So every class gets its share within one image, and the subset of
a smaller limit lies within that of a larger one. The first of each class comes before all others, so
no class is lost while the limit is at least their number.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgetrain.errors import UsageError
from edgetrain.train.data.reduced import decode_reduced
from edgetrain.train.data.source import Labels, Pixels, Source

Indices = npt.NDArray[np.int64]


def stratified_indices(labels: Labels, limit: int, *, seed: int) -> Indices:
    """Ascending positions of ``min(limit, n)`` images, in each class in proportion.

    Args:
        labels: (n,).

    Raises:
        UsageError: the limit is not above zero.
    """
    if limit < 1:
        raise UsageError(found=f"a limit of {limit} images", expected="at least 1", action="raise the limit")
    if limit >= len(labels):
        return np.arange(len(labels), dtype=np.int64)
    rng = np.random.default_rng(seed)
    keys = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        ranked = (np.arange(len(members)) + 0.5) / len(members)
        ranked[0] = -len(members)  # first of its class: before all others, large classes ahead
        keys[rng.permutation(members)] = ranked
    return np.sort(np.argsort(keys, kind="stable")[:limit]).astype(np.int64)


class Subset:
    """The images of ``source`` at ``indices``, in that order."""

    def __init__(self, source: Source, indices: Indices) -> None:
        self.name = source.name
        self.classes = source.classes
        self.channels = source.channels
        self.labels: Labels = source.labels[indices]
        self.mirror_invariant = is_mirror_invariant(source)
        self._source = source
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def decode(self, index: int) -> Pixels:
        """Image ``index`` of the subset, (h, w, c); raises BrokenImage as the whole source does."""
        return self._source.decode(int(self._indices[index]))

    def decode_reduced(self, index: int, size: tuple[int, int]) -> Pixels:
        """Image ``index`` in (height, width) ``size`` where the whole source can; raises BrokenImage."""
        return decode_reduced(self._source, int(self._indices[index]), size)

    def decoding_bytes(self, index: int, size: tuple[int, int]) -> int:
        """As that of the whole source, 0 where it has none."""
        of_image = getattr(self._source, "decoding_bytes", None)
        return 0 if of_image is None else int(of_image(int(self._indices[index]), size))


def is_mirror_invariant(source: Source) -> bool:
    """Whether a mirrored image keeps its class; true unless the source says otherwise."""
    return bool(getattr(source, "mirror_invariant", True))


def limited(source: Source, limit: int | None, *, seed: int) -> Source:
    """``limit`` images of ``source``, each class in proportion; None: all of them."""
    return source if limit is None else Subset(source, stratified_indices(source.labels, limit, seed=seed))
