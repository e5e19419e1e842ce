"""Results per class, against cases worked out by hand and against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import precision_recall_fscore_support
from torch import nn

from edgetrain.train.metrics import Confusion, confusion

LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 2])
PREDICTED = torch.tensor([0, 0, 1, 2, 1, 0, 0])


def test_by_hand() -> None:
    found = Confusion.of(["a", "b", "c"], [(PREDICTED[:3], LABELS[:3]), (PREDICTED[3:], LABELS[3:])])
    assert found.counts == ((2, 1, 1), (1, 1, 0), (1, 0, 0))
    assert found.accuracy == 3 / 7
    a, b, c = found.results()
    assert (a.images, a.precision, a.recall, a.f1) == (4, 2 / 4, 2 / 4, 0.5)
    assert (b.images, b.precision, b.recall, b.f1) == (2, 1 / 2, 1 / 2, 0.5)
    assert (c.images, c.precision, c.recall, c.f1) == (1, 0.0, 0.0, 0.0)
    assert found.macro_f1 == pytest.approx(1 / 3)
    assert found.to_dict()["per_class"][2] == {"name": "c", "images": 1, "precision": 0.0, "recall": 0.0, "f1": 0.0}


def test_a_class_without_images_is_left_out_of_the_mean() -> None:
    found = Confusion.of(["a", "b", "c"], [(torch.tensor([0, 2, 1]), torch.tensor([0, 1, 1]))])
    assert found.results()[2].recall is None
    assert found.results()[2].f1 is None
    assert found.macro_f1 == pytest.approx((1 + 2 / 3) / 2)


def test_as_scikit_learn_has_it() -> None:
    generator = torch.Generator().manual_seed(0)
    labels, predicted = (torch.randint(0, 5, (200,), generator=generator) for _ in range(2))
    found = Confusion.of([str(k) for k in range(5)], [(predicted, labels)])
    expected = precision_recall_fscore_support(labels, predicted)
    values = [(r.precision, r.recall, r.f1, r.images) for r in found.results()]
    np.testing.assert_allclose(np.array(values).T, np.array(expected))


def test_of_a_network_in_evaluation_mode() -> None:
    model = nn.Sequential(nn.Dropout(0.99), nn.Flatten()).train()
    x = torch.eye(3).view(3, 3, 1, 1)
    found = confusion(model, [(x, torch.tensor([0, 1, 0]))], ["a", "b", "c"])
    assert found.counts == ((1, 0, 1), (0, 1, 0), (0, 0, 0))
    assert model.training
