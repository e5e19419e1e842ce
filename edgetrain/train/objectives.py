"""What a step makes smaller: the loss of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Objective(Protocol):
    """The mean loss of some samples, from what the network makes of them.

    It is called on each part of a batch that is split, and the parts are added up in proportion to their samples: what
    is a mean over samples is then that of the whole batch.
    """

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The mean loss, a scalar, of ``outputs`` (n, k) for ``labels`` (n)."""
        ...


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
