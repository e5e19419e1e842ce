"""How a classifier does on each class, from its confusion matrix.

With ``n[t, p]`` images of class t that were taken for class p:

    recall_c = n[c, c] / sum_p n[c, p]        precision_c = n[c, c] / sum_t n[t, c]
    F1_c = 2 n[c, c] / (sum_p n[c, p] + sum_t n[t, c])        macro-F1 = mean of F1_c

A precision of a class that was never predicted is 0 / 0 and counts as 0, as does its F1. A class of which there is no
image has no recall and no F1, and is left out of macro-F1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgetrain.train.evaluation import predictions


@dataclass(frozen=True)
class ClassResult:
    """One class.

    Attributes:
        images: of the class that were looked at.
        recall, f1: None where there were none.
    """

    name: str
    images: int
    precision: float
    recall: float | None
    f1: float | None


@dataclass(frozen=True)
class Confusion:
    """A confusion matrix.

    Attributes:
        classes: names, (k,).
        counts: ``counts[t][p]`` images of class t taken for class p, (k, k).
    """

    classes: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, classes: Sequence[str], pairs: Iterable[tuple[Tensor, Tensor]]) -> Confusion:
        """From batches of (predicted classes, labels), (n,) each."""
        k = len(classes)
        counts = torch.zeros(k * k, dtype=torch.long)
        for predicted, labels in pairs:
            counts += torch.bincount(labels.cpu() * k + predicted.cpu(), minlength=k * k)
        return cls(tuple(classes), tuple(tuple(row) for row in counts.view(k, k).tolist()))

    @property
    def accuracy(self) -> float:
        """Part of the images that were classified rightly, 0..1."""
        images = sum(map(sum, self.counts))
        return sum(self.counts[c][c] for c in range(len(self.classes))) / max(images, 1)

    @property
    def macro_f1(self) -> float:
        """Mean F1 over the classes that have images, 0..1."""
        found = [result.f1 for result in self.results() if result.f1 is not None]
        return sum(found) / max(len(found), 1)

    def results(self) -> tuple[ClassResult, ...]:
        """A result per class."""
        return tuple(self._result(c) for c in range(len(self.classes)))

    def _result(self, c: int) -> ClassResult:
        hits, images, predicted = self.counts[c][c], sum(self.counts[c]), sum(row[c] for row in self.counts)
        return ClassResult(
            self.classes[c],
            images,
            precision=hits / predicted if predicted else 0.0,
            recall=hits / images if images else None,
            f1=2 * hits / (images + predicted) if images else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """What goes to JSON."""
        return {
            "accuracy": self.accuracy,
            "macro_f1": self.macro_f1,
            "per_class": [vars(result) for result in self.results()],
            "confusion": [list(row) for row in self.counts],
        }


def confusion(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    classes: Sequence[str],
    *,
    device: str | torch.device = "cpu",
) -> Confusion:
    """The confusion matrix of ``model`` in evaluation mode over ``batches``; its mode is put back afterwards."""
    return Confusion.of(classes, predictions(model, batches, device=device))
