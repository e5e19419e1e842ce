"""What a network makes of data that it does not train on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


def predictions(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, device: str | torch.device = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """(predicted classes, labels) of each batch, (n,) each, of ``model`` in evaluation mode.

    The mode is put back at the end.
    """
    was_training = model.training
    model.eval()
    try:
        for images, labels in batches:
            with torch.no_grad():
                predicted = model(images.to(device)).argmax(1).cpu()
            yield predicted, labels
    finally:
        model.train(was_training)


def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, device: str | torch.device = "cpu"
) -> float:
    """Accuracy of ``model`` in evaluation mode over ``batches``, 0..1; its mode is put back afterwards."""
    seen = correct = 0
    for predicted, labels in predictions(model, batches, device=device):
        correct += int((predicted == labels).sum())
        seen += len(labels)
    return correct / max(seen, 1)
