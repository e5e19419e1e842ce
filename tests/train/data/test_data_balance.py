"""Balanced sampling: every class as often as any other, every epoch another order, resumed in its middle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edgetrain.train.data import BrokenImage, Loader
from edgetrain.train.data.balance import balanced_draws, balancing_weights

LABELS = np.repeat([0, 1, 2], [50, 9, 2])


class Numbered:
    """Image k is grey k everywhere."""

    name, classes, channels = "numbered", ("a", "b", "c"), 1

    def __init__(self, broken: int = -1) -> None:
        self.labels, self.broken = LABELS, broken

    def __len__(self) -> int:
        return len(self.labels)

    def decode(self, index: int) -> np.ndarray:
        if index == self.broken:
            raise BrokenImage(f"{index}.png", "cut off")
        ramp = np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8, 1)
        return np.roll(ramp, index, axis=0)


def loader(source: Numbered | None = None, **options: Any) -> Loader:
    return Loader(
        source or Numbered(),
        batch_size=10,
        image_size=(1, 8, 8),
        shuffle=True,
        seed=3,
        drop_last=False,
        **{"augment": True, "balanced": "equal", **options},
    )


def test_every_class_is_drawn_as_often() -> None:
    draws = balanced_draws(LABELS, rng=np.random.default_rng(0))
    images, times = draws % len(LABELS), draws // len(LABELS)
    assert len(draws) == len(LABELS)
    assert sorted(np.bincount(LABELS[images])) == [20, 20, 21]
    assert len(set(draws.tolist())) == len(draws)
    for label in range(3):
        counts = np.bincount(images, minlength=len(LABELS))[label == LABELS]
        assert counts.max() - counts.min() <= 1
    assert [times[images == k].max() for k in np.unique(images)] == [(images == k).sum() - 1 for k in np.unique(images)]


def test_classes_of_one_size_are_drawn_once_each() -> None:
    labels = np.repeat([0, 1], 20)
    assert sorted(balanced_draws(labels, rng=np.random.default_rng(0)).tolist()) == list(range(40))


def test_by_the_root_of_their_number() -> None:
    labels = np.repeat([0, 1, 2], [64, 16, 4])  # roots 8, 4, 2: 84 draws are 48, 24 and 12
    draws = balanced_draws(labels, rng=np.random.default_rng(0), balance="root")
    images, times = draws % 84, draws // 84
    assert np.bincount(labels[images]).tolist() == [48, 24, 12]
    assert len(set(draws.tolist())) == 84
    assert np.bincount(images, minlength=84)[:64].max() == 1  # of a common class, no image twice
    assert np.bincount(images)[80:].tolist() == [3, 3, 3, 3]
    assert times[images >= 80].max() == 2


def test_shares_that_are_not_whole_go_to_the_largest_remainders() -> None:
    labels = np.repeat([0, 1], [7, 3])  # 10 sqrt(7) / (sqrt(7) + sqrt(3)) = 6.04
    drawn = labels[balanced_draws(labels, rng=np.random.default_rng(0), balance="root") % 10]
    assert np.bincount(drawn).tolist() == [6, 4]


def test_a_pass_is_repeated_and_entered_in_its_middle() -> None:
    whole, again, other = loader(), loader(), loader()
    for each, epoch in ((whole, 4), (again, 4), (other, 5)):
        each.set_epoch(epoch)
    first, rest = list(whole), list(again.iterate(3))
    assert [len(labels) for _, labels in first] == [10] * 6 + [1]
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first[3:], rest, strict=True))
    assert not torch.equal(first[0][0], next(iter(other))[0])
    counts = torch.bincount(torch.cat([labels for _, labels in first]))
    assert sorted(counts.tolist()) == [20, 20, 21]


def test_an_image_drawn_again_is_augmented_otherwise() -> None:
    rare = [image for images, labels in loader() for image, label in zip(images, labels, strict=True) if label == 2]
    assert len({image.numpy().tobytes() for image in rare}) > 2


def test_without_balancing_nothing_changes() -> None:
    plain = torch.cat([labels for _, labels in loader(balanced=None)])
    assert torch.bincount(plain).tolist() == [50, 9, 2]


def test_a_broken_image_counts_once_however_often_it_is_drawn() -> None:
    one = loader(Numbered(broken=60))
    list(one)
    assert [path for path, _ in one.broken] == ["60.png"]


def test_weights_are_one_on_average() -> None:
    weights = balancing_weights(LABELS, 3)
    assert weights == pytest.approx((61 / 150, 61 / 27, 61 / 6))
    assert np.mean([weights[label] for label in LABELS]) == pytest.approx(1)
    assert balancing_weights(np.array([0, 0, 2]), 3) == pytest.approx((0.75, 0, 1.5))
