"""Training and test images of one data set, of which some are held out where it has no test split.

Those held out are a part of every class (:mod:`edgetrain.train.data.subset`), chosen by a seed. Image folders without
``train`` and ``test`` are divided in the same way, not by the hash of the file name: among a few hundred images that
would leave rare classes without a test image, or without any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgetrain.errors import DataError, UsageError
from edgetrain.train.data.folder import is_undivided, open_undivided
from edgetrain.train.data.opening import open_source
from edgetrain.train.data.source import Source
from edgetrain.train.data.subset import Subset, stratified_indices


@dataclass(frozen=True)
class Divided:
    """Images to train on and images to test on.

    Attributes:
        held_out: whether the test images were taken from the training data.
    """

    train: Source
    test: Source
    held_out: bool


def open_divided(spec: str, *, holdout: float, seed: int) -> Divided:
    """The data set ``spec`` with its own test split, or with ``holdout`` of its images in place of one.

    Args:
        holdout: part of the images of each class, between 0 and 1.

    Raises:
        UsageError: the part is no such number.
        DataError: as :func:`open_source`, or a class has a single image.
    """
    if not 0 < holdout < 1:
        raise UsageError(found=f"--holdout {holdout}", expected="a part between 0 and 1", action="write it like 0.2")
    if spec != "digits" and is_undivided(Path(spec)):
        whole: Source = open_undivided(Path(spec))
    else:
        whole = open_source(spec, split="train", seed=seed)
        try:
            return Divided(whole, open_source(spec, split="test", seed=seed), held_out=False)
        except DataError as error:
            if not error.found.endswith("has no test split"):
                raise
    counts = np.bincount(whole.labels, minlength=len(whole.classes))
    if counts.min() < 2:
        raise DataError(
            found=f"{counts.min()} image(s) of the class {whole.classes[int(counts.argmin())]}",
            expected="at least 2: one to train on and one that is held out to test on",
            action="add images, or give the data a test split of its own",
        )
    kept = stratified_indices(whole.labels, len(whole.classes), seed=seed)  # one of each class, to train on
    others = np.setdiff1d(np.arange(len(whole)), kept)
    limit = max(round(holdout * len(whole)), len(whole.classes))
    tested = others[stratified_indices(whole.labels[others], limit, seed=seed)]
    return Divided(Subset(whole, np.setdiff1d(np.arange(len(whole)), tested)), Subset(whole, tested), held_out=True)
