"""What a step makes smaller: the loss of a batch, and the roles of objectives that need more than outputs and labels.

See :mod:`edgetrain.train.distillation` for teachers and :mod:`edgetrain.train.embeddings` for triplets and pairs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgetrain.memory.step import Loss, classification_loss


class Objective(Protocol):
    """The mean loss of some samples, from what the network makes of them.

    It is called on each part of a batch that is split, and the parts are added up in proportion to their samples: what
    is a mean over samples is then that of the whole batch.
    """

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The mean loss, a scalar, of ``outputs`` (n, k) for ``labels`` (n)."""
        ...


@runtime_checkable
class Preparing(Protocol):
    """An objective that looks at the images before the network runs on them, when its activations are not there yet."""

    def prepare(self, images: Tensor, indices: Tensor | None, model: nn.Module) -> None:
        """Before each part of a batch.

        Args:
            images: (n, c, h, w), as the network gets them.
            indices: of the images in their source, (n,); None where nobody knows.
            model: what is trained.
        """
        ...


@runtime_checkable
class Grouping(Protocol):
    """An objective over groups of samples that follow each other in a batch.

    Attributes:
        group: samples in one; a batch is split between groups only.
    """

    group: int

    def correct(self, outputs: Tensor, labels: Tensor) -> int:
        """How many of the samples are as they should be."""
        ...

    def accuracy(
        self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, device: str | torch.device
    ) -> float | None:
        """Of ``model`` on ``batches``, 0..1; None where it cannot be told."""
        ...


def group_of(objective: Objective | None) -> int:
    """Samples that must stay together when a batch is split."""
    return objective.group if isinstance(objective, Grouping) else 1


def rehearsal_of(objective: Objective | None) -> Loss:
    """The loss of outputs alone: what it takes, not what it is."""
    found: Loss = getattr(objective, "rehearsal", classification_loss)
    return found


@dataclass(frozen=True)
class CrossEntropy:
    """Softmax cross-entropy.

    Attributes:
        label_smoothing: the part of each target that is spread evenly over all classes (Szegedy et al. 2016), 0..1.
        class_weights: one per class, by which the losses of its samples are multiplied; None: all 1. The mean is still
            taken over samples, so weights that average to 1 over the data leave the size of a step as it is.
    """

    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The mean loss, a scalar, of logits (n, classes) for ``labels`` (n)."""
        if self.class_weights is None:
            return F.cross_entropy(outputs, labels, label_smoothing=self.label_smoothing)
        weights = torch.tensor(self.class_weights, dtype=outputs.dtype, device=outputs.device)
        loss = F.cross_entropy(outputs, labels, weights, label_smoothing=self.label_smoothing, reduction="sum")
        return loss / len(labels)
