"""What a network makes of data that it does not train on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


def predictions(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    device: str | torch.device = "cpu",
    part_size: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(predicted classes, labels) of each batch, (n,) each, of ``model`` in evaluation mode.

    The mode is put back at the end.

    Args:
        part_size: as for :func:`evaluate`.
    """
    was_training = model.training
    model.eval()
    try:
        for images, labels in batches:
            size = len(images) if part_size is None else part_size
            for some_images, some_labels in zip(images.split(size), labels.split(size), strict=True):
                with torch.no_grad():
                    predicted = model(some_images.to(device)).argmax(1).cpu()
                yield predicted, some_labels
    finally:
        model.train(was_training)


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    device: str | torch.device = "cpu",
    part_size: int | None = None,
) -> float:
    """Accuracy of ``model`` in evaluation mode over ``batches``, 0..1; its mode is put back afterwards.

    Args:
        part_size: most samples that go through the model at once; None: a batch. There samples do not meet.
    """
    seen = correct = 0
    for predicted, labels in predictions(model, batches, device=device, part_size=part_size):
        correct += int((predicted == labels).sum())
        seen += len(labels)
    return correct / max(seen, 1)
