"""Losses against their definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from edgetrain.train import CrossEntropy

LOGITS = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0], [2.0, 2.0, -1.0], [0.3, 0.1, 0.0]], dtype=torch.float64)
LABELS = torch.tensor([0, 2, 1, 2])


def test_class_weights_multiply_each_samples_loss_and_the_mean_is_over_samples() -> None:
    weights = (0.5, 2.0, 1.5)
    each = -LOGITS.log_softmax(1)[torch.arange(4), LABELS]
    expected = (each * torch.tensor(weights, dtype=torch.float64)[LABELS]).mean()
    assert float(CrossEntropy(class_weights=weights)(LOGITS, LABELS)) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("objective", [CrossEntropy(0.1), CrossEntropy(0.1, (0.5, 2.0, 1.5))])
def test_parts_of_a_batch_add_up_to_the_whole(objective: CrossEntropy) -> None:
    parts = [objective(LOGITS[some], LABELS[some]) * len(LABELS[some]) / 4 for some in (slice(0, 3), slice(3, 4))]
    assert float(sum(parts)) == pytest.approx(float(objective(LOGITS, LABELS)), rel=1e-12)


def test_smoothing_spreads_a_part_of_the_target_over_all_classes() -> None:
    target = 0.9 * F.one_hot(LABELS, 3).double() + 0.1 / 3
    expected = -(target * LOGITS.log_softmax(1)).sum(1).mean()
    assert float(CrossEntropy(0.1)(LOGITS, LABELS)) == pytest.approx(float(expected), rel=1e-12)
