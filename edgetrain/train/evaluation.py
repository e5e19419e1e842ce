"""Accuracy of a network on data that it does not train on."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, device: str | torch.device = "cpu"
) -> float:
    """Accuracy of ``model`` in evaluation mode over ``batches``, 0..1; its mode is put back afterwards."""
    was_training = model.training
    model.eval()
    seen = correct = 0
    try:
        for images, labels in batches:
            correct += int((model(images.to(device)).argmax(1).cpu() == labels).sum())
            seen += len(labels)
    finally:
        model.train(was_training)
    return correct / max(seen, 1)
