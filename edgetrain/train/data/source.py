"""The role of a data source, and the checks that every source passes before it is used.

A source gives single images. It holds paths, or open files read at a position; never the decoded data
set, because the memory is what the training needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from edgetrain.errors import DataError

Split = Literal["train", "test"]
Labels = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]


class Source(Protocol):
    """Labelled images of one split.

    A source whose images mean something else in a mirror (digits) also has ``mirror_invariant = False``.

    Attributes:
        name: for people.
        classes: their names; the label is the position.
        channels: 1 (grey) or 3 (RGB): the last axis of every decoded image.
        labels: of all images, (n,), each within ``range(len(classes))``.
    """

    @property
    def name(self) -> str: ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def channels(self) -> int: ...

    @property
    def labels(self) -> Labels: ...

    def __len__(self) -> int: ...

    def decode(self, index: int) -> Pixels:
        """Image ``index``, (h, w, c).

        Raises:
            BrokenImage: it cannot be decoded.
        """
        ...


class BrokenImage(DataError):  # noqa: N818 - a state of the data, which the loader counts and steps over
    """One image that cannot be decoded.

    Attributes:
        path: the file, or the file and the row.
        reason: what is wrong with it.
    """

    def __init__(self, path: str, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(
            found=f"{path} cannot be decoded ({reason})",
            expected="a readable image",
            action="replace it or take it out of the data set",
        )


def check_labels(labels: Labels, classes: Sequence[str], where: str | Path) -> None:
    """Makes sure that there are images, at least two classes, and that every label names one of them.

    Raises:
        DataError: one of these does not hold.
    """
    if len(classes) < 2:
        raise DataError(
            found=f"{where} has {len(classes)} class ({', '.join(classes) or 'none'})",
            expected="at least 2 classes",
            action="add images of a second class: there is nothing to tell apart",
        )
    if not len(labels):
        raise DataError(found=f"{where} holds no image", expected="at least one", action="add images")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(classes):
        row = int(np.flatnonzero((labels < 0) | (labels >= len(classes)))[0])
        raise DataError(
            found=f"{where}: label {int(labels[row])} at image {row}",
            expected=f"labels from 0 to {len(classes) - 1} ({len(classes)} classes)",
            action="correct the label, take the image out, or (a hidden test label is often -1) use another split",
        )


def no_split(where: str | Path, split: Split, looked_for: str) -> DataError:
    """The error for a data set that lacks ``split``."""
    return DataError(
        found=f"{where} has no {split} split",
        expected=looked_for,
        action=f"add the {split} data, or name a folder that holds both splits",
    )
