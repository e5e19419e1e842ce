"""Losses over embeddings: triplets and pairs of images that follow each other in a batch.

    triplet (Schroff, Kalenichenko, Philbin 2015, (3)):  max(0, |a - p|^2 - |a - n|^2 + margin)
    contrastive (Hadsell, Chopra, LeCun 2006, (4)):      1/2 d^2 of the same class, 1/2 max(0, margin - d)^2 of others

Embeddings are brought to length 1 first, as in FaceNet (Hadsell et al. do not), so that a margin means the same for any
network: d lies in 0..2. A batch is one tensor of 3B images, anchor, positive, negative, anchor, ... or of 2B, so a
chain, its plan and its memory are those of any batch of that size. Losses are means over the triplets or pairs.

What is learnt is judged by nearest centroid: the mean embedding of every class over reference images, then the
class whose mean has the largest cosine with the embedding of a test image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgetrain.errors import ModelError, UsageError

Batches = Iterable[tuple[Tensor, Tensor]]
References = Callable[[], Batches]
"""Labelled images that are not augmented."""

TRIPLET_MARGIN, CONTRASTIVE_MARGIN = 0.2, 1.0


@dataclass
class Triplet:
    """Triplet loss of embeddings (3B, k).

    Attributes:
        margin: by which the negative shall be further away, of squared distances.
        references: for :meth:`accuracy`; None: it is not told.
    """

    margin: float = TRIPLET_MARGIN
    references: References | None = None
    group: ClassVar[int] = 3

    def __post_init__(self) -> None:
        _check_margin(self.margin)

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The mean over triplets of ``outputs`` (3B, k); ``labels`` have chosen them and are not asked again."""
        return F.relu(self._excess(outputs) + self.margin).mean()

    def rehearsal(self, outputs: Tensor) -> Tensor:
        """The loss of outputs (3B, k), for what it takes; of a batch that is no triplets, of what there is of them."""
        return self(outputs, outputs)

    def correct(self, outputs: Tensor, labels: Tensor) -> int:
        """Samples of triplets whose positive is nearer than their negative."""
        return self.group * int((self._excess(outputs) < 0).sum())

    def accuracy(self, model: nn.Module, batches: Batches, *, device: str | torch.device) -> float | None:
        """Nearest centroid; see above."""
        return None if self.references is None else nearest_centroid(model, self.references(), batches, device=device)

    def _excess(self, outputs: Tensor) -> Tensor:
        """Squared distance to the positive less that to the negative, (B,)."""
        anchor, positive, negative = _grouped(outputs, self.group).unbind(1)
        return (anchor - positive).square().sum(1) - (anchor - negative).square().sum(1)


@dataclass
class Contrastive:
    """Contrastive loss of embeddings (2B, k) of pairs, which are of the same class or not.

    Attributes:
        margin: distance that pairs of different classes shall have.
        references: as of :class:`Triplet`.
    """

    margin: float = CONTRASTIVE_MARGIN
    references: References | None = None
    group: ClassVar[int] = 2

    def __post_init__(self) -> None:
        _check_margin(self.margin)

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The mean over pairs of ``outputs`` (2B, k) with ``labels`` (2B,)."""
        distances, same = self._distances(outputs), _alike(labels)
        apart = F.relu(self.margin - distances)
        return 0.5 * torch.where(same, distances, apart).square().mean()

    def rehearsal(self, outputs: Tensor) -> Tensor:
        """The loss of outputs (2B, k), for what it takes."""
        return self(outputs, torch.zeros(len(outputs), dtype=torch.long, device=outputs.device))

    def correct(self, outputs: Tensor, labels: Tensor) -> int:
        """Samples of pairs that are nearer than half the margin just where they are of one class."""
        near = self._distances(outputs) < self.margin / 2
        return self.group * int((near == _alike(labels)).sum())

    def accuracy(self, model: nn.Module, batches: Batches, *, device: str | torch.device) -> float | None:
        """Nearest centroid; see above."""
        return None if self.references is None else nearest_centroid(model, self.references(), batches, device=device)

    def _distances(self, outputs: Tensor) -> Tensor:
        """Of every pair, (B,)."""
        one, other = _grouped(outputs, self.group).unbind(1)
        return torch.linalg.vector_norm(one - other, dim=1)


def nearest_centroid(
    model: nn.Module, references: Batches, batches: Batches, *, device: str | torch.device = "cpu"
) -> float:
    """Part of the images of ``batches`` whose class has the nearest centroid, 0..1; the mode is put back afterwards."""
    seen = correct = 0
    for predicted, labels in centroid_predictions(model, references, batches, device=device):
        correct += int((predicted == labels).sum())
        seen += len(labels)
    return correct / max(seen, 1)


def centroid_predictions(
    model: nn.Module, references: Batches, batches: Batches, *, device: str | torch.device = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """(classes of the nearest centroids, labels) of each batch, (n,) each; the mode is put back at the end."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            centroids = _centroids(model, references, device)
        for images, labels in batches:
            with torch.no_grad():
                found = (_unit(model(images.to(device))) @ centroids.T).argmax(1).cpu()
            yield found, labels
    finally:
        model.train(was_training)


def _centroids(model: nn.Module, references: Batches, device: str | torch.device) -> Tensor:
    """Of the classes, (classes, k) of length 1; a class without an image has zeros, to which nothing is near."""
    sums: dict[int, Tensor] = {}
    for images, labels in references:
        embedded = _unit(model(images.to(device)))
        for label in labels.unique().tolist():
            total = embedded[(labels == label).to(embedded.device)].sum(0)
            sums[label] = sums[label] + total if label in sums else total
    if not sums:
        raise ModelError(
            found="no reference images", expected="some of every class", action="give the objective references"
        )
    zeros = torch.zeros_like(next(iter(sums.values())))
    return _unit(torch.stack([sums.get(label, zeros) for label in range(max(sums) + 1)]))


def _unit(outputs: Tensor) -> Tensor:
    return F.normalize(outputs, dim=1)


def _grouped(outputs: Tensor, group: int) -> Tensor:
    """Embeddings of length 1, (B, group, k)."""
    whole = len(outputs) // group * group
    return _unit(outputs[:whole]).unflatten(0, (-1, group))


def _alike(labels: Tensor) -> Tensor:
    """Whether the two of each pair are of one class, (B,)."""
    one, other = labels[: len(labels) // 2 * 2].view(-1, 2).unbind(1)
    return one == other


def _check_margin(margin: float) -> None:
    if not 0 < margin < float("inf"):
        raise UsageError(found=f"a margin of {margin:g}", expected="a number above 0", action="correct the margin")
