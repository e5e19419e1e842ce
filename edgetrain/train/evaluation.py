"""Accuracy of a network on data that it does not train on."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
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
    was_training = model.training
    model.eval()
    seen = correct = 0
    try:
        for images, labels in batches:
            size = len(images) if part_size is None else part_size
            for some_images, some_labels in zip(images.split(size), labels.split(size), strict=True):
                correct += int((model(some_images.to(device)).argmax(1).cpu() == some_labels).sum())
            seen += len(labels)
    finally:
        model.train(was_training)
    return correct / max(seen, 1)
