"""Batches for training: read, decoded and augmented one ahead of the step that uses them.

Memory: while a step runs there are its own batch in float32 and at most one more in uint8. During ``next`` the
batch before is there too as long as the caller holds it. Order and augmentation depend only on (seed, epoch,
image), so a run is repeated exactly and resumed in the middle of an epoch without decoding what came before.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgetrain.errors import DataError, UsageError
from edgetrain.train.data.augment import augment_image, choose
from edgetrain.train.data.balance import Balance, balanced_draws
from edgetrain.train.data.fit import ImageSize, check_image_size
from edgetrain.train.data.groups import Order
from edgetrain.train.data.normalise import check_statistic, normalised, normalised_array
from edgetrain.train.data.prefetch import prefetched
from edgetrain.train.data.reduced import decode_fitted
from edgetrain.train.data.source import BrokenImage, Pixels, Source
from edgetrain.train.data.subset import Indices, is_mirror_invariant

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger(__name__)

_Raw = tuple[int, Pixels, Indices]


class ArrayLoader:
    """Gives batches of ``(images (n, c, h, w) float32, labels (n,) int64)`` as arrays.

    A broken image is logged once and left out, and all of its group with it: its batch is smaller, and a batch of none
    is left out.

    Args:
        image_size: (c, h, w) to which every image is brought.
        augment: crop, mirror and cutout, see ``augment.py``; ``cutout`` False leaves the last one out.
        drop_last: leave out a last batch that is smaller.
        mean, std: per channel on the scale 0..1, as ``channel_statistics`` gives them; None leaves 0..1.
        flip: whether augmentation mirrors; None asks the source (digits are not mirrored).
        order: of the images, in groups that stay together; None: each image once, as ``shuffle`` says.
        balanced: how rare classes are drawn more often, see ``balance.py``, where it is shuffled; None: they are not.

    Attributes:
        broken: (path, reason) of the broken images met in this pass, or in the last one.
        epoch: which order and augmentation comes next.
        done: batches of this pass handed out so far, those left out included.
        indices: of the images of the last batch handed out in the source, (n,); None before the first.

    Raises:
        UsageError: an argument out of range.
        DataError: fewer images than a batch, and ``drop_last``.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        image_size: ImageSize,
        augment: bool,
        shuffle: bool,
        seed: int,
        drop_last: bool,
        mean: npt.ArrayLike | None = None,
        std: npt.ArrayLike | None = None,
        flip: bool | None = None,
        order: Order | None = None,
        balanced: Balance | None = None,
        cutout: bool = True,
    ) -> None:
        check_image_size(image_size)
        _check_least("batch size", batch_size, 1)
        _check_least("seed", seed, 0)
        self._order, images = order, len(source) if order is None else len(order)
        if drop_last and images < batch_size:
            raise DataError(
                found=f"{source.name} has {images} images for a batch size of {batch_size}",
                expected="at least one whole batch",
                action=f"lower the batch size to {images} or keep the last batch",
            )
        if order is not None and batch_size % order.group:
            raise UsageError(
                found=f"a batch size of {batch_size} for groups of {order.group} images",
                expected="whole groups",
                action=f"choose a multiple of {order.group}",
            )
        self.source = source
        self.batch_size = batch_size
        self.image_size = image_size
        self.epoch = 0
        self.done = 0
        self.indices: Any = None
        self.broken: list[tuple[str, str]] = []
        self._augment = augment
        self._cutout = cutout
        self._shuffle = shuffle
        self._balanced = balanced
        self._seed = seed
        self._flip = is_mirror_invariant(source) if flip is None else flip
        self._mean = check_statistic(mean, image_size[0], "mean", default=0.0)
        self._std = check_statistic(std, image_size[0], "std", default=1.0)
        grey = self._mean if mean is not None else np.full(image_size[0], 0.5)
        self._fill: Pixels = np.clip(np.rint(grey * 255), 0, 255).astype(np.uint8)  # (c,)
        self._images = images - (images % batch_size if drop_last else 0)
        self._logged: set[str] = set()

    def __len__(self) -> int:
        """Batches in an epoch, those left out because all their images are broken included."""
        return -(-self._images // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        return self.iterate()

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order and augmentation of the next pass; raises UsageError for a negative one."""
        _check_least("epoch", epoch, 0)
        self.epoch = epoch

    def iterate(self, start_batch: int = 0) -> Iterator[Any]:
        """The batches of the epoch from ``start_batch`` on; those before it are not decoded.

        Raises:
            UsageError: there is no such batch.
            DataError: more than 1 % of the epoch's images are broken (one always may be).
        """
        if not 0 <= start_batch <= len(self):
            raise UsageError(
                found=f"start at batch {start_batch}",
                expected=f"0 to {len(self)}, the number of batches",
                action="use the batch size with which the run was started",
            )
        return self._pass(self.epoch, start_batch)

    def _pass(self, epoch: int, start_batch: int) -> Iterator[Any]:
        self.broken = []
        order = self._draws(epoch)
        starts = range(start_batch * self.batch_size, self._images, self.batch_size)
        self.done = start_batch
        jobs = ((start, order[start : min(start + self.batch_size, self._images)]) for start in starts)
        yield from prefetched(jobs, build=partial(self._build, epoch), finish=self._finish)

    def _draws(self, epoch: int) -> Indices:
        """What is drawn in an epoch, (n,): image ``draw % n``, taken ``draw // n`` times before."""
        if self._order is not None:
            return self._order(seed=self._seed, epoch=epoch)
        if not self._shuffle:
            return np.arange(len(self.source), dtype=np.int64)
        rng = np.random.default_rng((self._seed, epoch))
        if self._balanced is not None:
            return balanced_draws(self.source.labels, rng=rng, balance=self._balanced)
        return rng.permutation(np.arange(len(self.source), dtype=np.int64))

    def _build(self, epoch: int, job: tuple[int, Indices], stop: threading.Event) -> _Raw | None:
        """``(batches done, images (n, c, h, w) uint8, indices)`` without the broken images; None if none is left.

        Args:
            job: place of the first image in the order, and the draws of all.
        """
        start, draws = job
        channels, height, width = self.image_size
        pixels = np.empty((len(draws), channels, height, width), np.uint8)
        kept: list[int] = []
        group = 1 if self._order is None else self._order.group
        resume_at = 0  # place of the first image after a group that lost one
        choice = None
        if self._augment:
            choice = choose(
                draws, size=(height, width), seed=self._seed, epoch=epoch, flip=self._flip, cutout=self._cutout
            )
        for k, index in enumerate((draws % len(self.source)).tolist()):
            if stop.is_set():
                return None
            if k < resume_at:
                continue
            try:
                image = decode_fitted(self.source, index, self.image_size)  # (h, w, c)
            except BrokenImage as error:
                self._note(error)
                del kept[len(kept) - k % group :]  # those of its group that came before
                resume_at = k - k % group + group
                continue
            if choice is not None:
                image = augment_image(image, choice, k, fill=self._fill)
            pixels[len(kept)] = image.transpose(2, 0, 1)  # (c, h, w)
            kept.append(index)
        return (start // self.batch_size + 1, pixels[: len(kept)], np.array(kept, np.int64)) if kept else None

    def _finish(self, raw: _Raw) -> tuple[Any, Any]:
        self.done, pixels, self.indices = raw
        return normalised_array(pixels, self._mean, self._std), self.source.labels[self.indices]

    def _note(self, error: BrokenImage) -> None:
        """Counts a broken image, and gives up when there are too many."""
        if error.path in (path for path, _ in self.broken):  # drawn before in this pass
            return
        self.broken.append((error.path, error.reason))
        if error.path not in self._logged:
            self._logged.add(error.path)
            _log.warning("left out %s: %s", error.path, error.reason)
        allowed = max(1, self._images // 100)
        if len(self.broken) > allowed:
            first = "; ".join(f"{path} ({reason})" for path, reason in self.broken[:3])
            raise DataError(
                found=f"{len(self.broken)} of {self._images} images are broken, the first are {first}",
                expected=f"at most 1 % ({allowed})",
                action="replace them or take them out; the log names every one",
            ) from error


class Loader(ArrayLoader):
    """:class:`ArrayLoader` whose batches are tensors."""

    def _finish(self, raw: _Raw) -> tuple[Tensor, Tensor]:
        import torch  # the arrays serve where there is none

        self.done, pixels, indices = raw
        self.indices = torch.from_numpy(indices)
        return normalised(pixels, self._mean, self._std), torch.from_numpy(self.source.labels[indices])


def _check_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UsageError(found=f"{name} {value}", expected=f"at least {least}", action=f"raise the {name}")
