"""Triplets and pairs: losses against their definitions, orders, whole groups in parts, runs that go on bit for bit."""

from __future__ import annotations

import collections
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import edgetrain
from edgetrain.errors import DataError, UsageError
from edgetrain.train import (
    Callback,
    Contrastive,
    InterruptedRunError,
    Recipe,
    StepRecord,
    Trainer,
    Triplet,
    nearest_centroid,
)
from edgetrain.train.data import Groups, Loader, open_source
from edgetrain.train.data.source import BrokenImage

LABELS = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 3], np.int64)


def test_triplet_loss_by_its_definition() -> None:
    outputs = torch.randn(12, 5, dtype=torch.double)
    e = F.normalize(outputs, dim=1)
    each = [
        max(0.0, float((a - p).pow(2).sum() - (a - n).pow(2).sum()) + 0.3)
        for a, p, n in zip(e[::3], e[1::3], e[2::3], strict=True)
    ]
    found = Triplet(0.3)(outputs, torch.zeros(12, dtype=torch.long))
    assert float(found) == pytest.approx(sum(each) / 4, rel=1e-12)


def test_contrastive_loss_by_its_definition() -> None:
    outputs, labels = torch.randn(8, 5, dtype=torch.double), torch.tensor([0, 0, 0, 1, 2, 2, 1, 0])
    e = F.normalize(outputs, dim=1)
    each = [
        0.5 * d**2 if same else 0.5 * max(0.0, 0.8 - d) ** 2
        for d, same in zip(((e[::2] - e[1::2]).norm(dim=1)).tolist(), [True, False, True, False], strict=True)
    ]
    assert float(Contrastive(0.8)(outputs, labels)) == pytest.approx(sum(each) / 4, rel=1e-12)


def test_embeddings_that_meet_have_finite_gradients() -> None:
    outputs = torch.ones(4, 3, requires_grad=True)
    Contrastive()(outputs, torch.tensor([0, 1, 0, 0])).backward()
    assert outputs.grad is not None
    assert torch.isfinite(outputs.grad).all()


@pytest.mark.parametrize("group", [2, 3])
def test_groups_are_what_they_should_be(group: int) -> None:
    order = Groups(LABELS, group=group)
    for epoch in range(20):
        found = order(seed=3, epoch=epoch).reshape(-1, group)
        assert len(order) == found.size == group * 9
        assert sorted(found[:, 0].tolist()) == list(range(9)), "each image once, but the one alone in its class"
        labels = LABELS[found]
        if group == 3:
            assert (labels[:, 0] == labels[:, 1]).all()
            assert (found[:, 0] != found[:, 1]).all()
            assert (labels[:, 0] != labels[:, 2]).all()
        else:
            same = labels[:, 0] == labels[:, 1]
            assert same.tolist() == [k % 2 == 0 for k in range(9)]
            assert (found[:, 0] != found[:, 1]).all()


def test_positives_and_negatives_are_drawn_evenly() -> None:
    order = Groups(LABELS, group=3)
    drawn = [order(seed=0, epoch=epoch).reshape(-1, 3) for epoch in range(600)]
    positives = collections.Counter(int(g[1]) for groups in drawn for g in groups if g[0] == 5)
    negatives = collections.Counter(int(g[2]) for groups in drawn for g in groups if g[0] == 5)
    assert set(positives) == {6, 7, 8}
    assert set(negatives) == {0, 1, 2, 3, 4, 9}
    for counts in (positives, negatives):  # four standard deviations of a binomial count
        share = 600 / len(counts)
        assert all(abs(count - share) < 4 * share**0.5 for count in counts.values())


def test_an_order_depends_on_seed_and_epoch_alone() -> None:
    one, other = Groups(LABELS, group=3), Groups(LABELS, group=3)
    other(seed=9, epoch=9)
    assert np.array_equal(one(seed=1, epoch=2), other(seed=1, epoch=2))
    assert not np.array_equal(one(seed=1, epoch=2), one(seed=1, epoch=3))


def test_data_without_anything_to_compare_are_refused() -> None:
    for labels in ([0, 0, 0], [0, 1, 2]):
        with pytest.raises(DataError, match="nothing to compare"):
            Groups(np.array(labels, np.int64), group=3)


def loader(group: int, *, batch_size: int, source: Any = None) -> Loader:
    source = open_source("digits", split="train", limit=40) if source is None else source
    return Loader(
        source,
        batch_size=batch_size,
        image_size=(1, 16, 16),
        augment=True,
        shuffle=True,
        seed=0,
        drop_last=True,
        order=Groups(source.labels, group=group),
    )


def test_a_broken_image_takes_its_group_along() -> None:
    whole = open_source("digits", split="train", limit=40)

    class Broken:
        name, classes, channels, labels = whole.name, whole.classes, whole.channels, whole.labels

        def __len__(self) -> int:
            return len(whole)

        def decode(self, index: int) -> Any:
            if index == 7:
                raise BrokenImage("seven.png", "torn")
            return whole.decode(index)

    batches = loader(3, batch_size=30, source=Broken())
    batches._images *= 100  # so that seven broken ones are few
    expected = Groups(whole.labels, group=3)(seed=0, epoch=0).reshape(-1, 3)
    intact = [g.tolist() for g in expected if 7 not in g]
    seen: list[list[int]] = []
    for _, labels in batches:
        assert batches.indices is not None
        assert torch.equal(labels, torch.from_numpy(whole.labels)[batches.indices])
        seen += batches.indices.view(-1, 3).tolist()
    assert seen == intact
    assert len(intact) < len(expected)


def test_a_batch_is_whole_groups() -> None:
    with pytest.raises(UsageError, match="multiple of 3"):
        loader(3, batch_size=32)


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return edgetrain.create_model("resnet8", 8, in_channels=1, width=8)


class StopAt(Callback):
    """Ends a run after some steps as a signal would."""

    def __init__(self, step: int) -> None:
        self.left = step

    def on_step(self, record: StepRecord) -> None:
        self.left -= 1
        if self.left == 0:
            import signal

            signal.raise_signal(signal.SIGTERM)

    def on_epoch(self, record: Any) -> None: ...

    def on_checkpoint(self, path: Any) -> None: ...

    def on_wait(self, reason: str | None) -> None: ...


def trainer(run_dir: Path, objective: Any, group: int, *, callbacks: Any = (), epochs: int = 2) -> Trainer:
    model = network()
    plan = edgetrain.uniform_plan(model, "recompute", input_shape=(1, 16, 16), batch_size=10 * group)
    recipe = Recipe(epochs=epochs, batch_size=10 * group, peak_rate=0.02)
    return Trainer(model, plan, run_dir=run_dir, recipe=recipe, objective=objective, callbacks=callbacks)


@pytest.mark.parametrize(("objective", "group"), [(Triplet(), 3), (Contrastive(), 2)])
def test_a_run_goes_on_bit_for_bit(tmp_path: Path, objective: Any, group: int) -> None:
    whole = trainer(tmp_path / "whole", objective, group)
    whole.fit(loader(group, batch_size=10 * group))
    with pytest.raises(InterruptedRunError):
        trainer(tmp_path / "cut", objective, group, callbacks=[StopAt(5)]).fit(loader(group, batch_size=10 * group))
    again = trainer(tmp_path / "cut", objective, group)
    again.resume(loader(group, batch_size=10 * group))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    assert [record.loss for record in again.history] == [record.loss for record in whole.history]


@pytest.mark.parametrize(("objective", "group"), [(Triplet(), 3), (Contrastive(), 2)])
def test_parts_of_whole_groups_add_up_to_the_batch(objective: Any, group: int) -> None:
    outputs, labels = torch.randn(6 * group, 4, dtype=torch.double), torch.randint(0, 3, (6 * group,))
    whole = objective(outputs, labels)
    part = 2 * group
    split = [objective(outputs[k : k + part], labels[k : k + part]) / 3 for k in range(0, 6 * group, part)]
    torch.testing.assert_close(sum(split), whole)


def test_nearest_centroid_of_clusters() -> None:
    centres = F.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    labels = torch.arange(4).repeat(10)

    def batch(seed: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(40, 8, generator=torch.Generator().manual_seed(seed))
        return centres[labels] + 0.02 * noise, labels

    model = torch.nn.Identity().train()
    assert nearest_centroid(model, [batch(1)], [batch(2)]) == 1.0
    assert nearest_centroid(model, [batch(1)], [(batch(2)[0], (labels + 1) % 4)]) == 0.0
    assert model.training


def test_embeddings_of_digits_find_their_class() -> None:
    """Chance is 0.1."""
    source, test = (open_source("digits", split=split) for split in ("train", "test"))  # type: ignore[arg-type]
    shared: dict[str, Any] = {"image_size": (1, 16, 16), "seed": 0, "augment": False, "shuffle": False}
    plain = functools.partial(Loader, batch_size=128, drop_last=False, **shared)
    objective = Triplet(references=lambda: plain(source))
    batches = Loader(source, batch_size=96, drop_last=True, order=Groups(source.labels, group=3), **shared)
    torch.manual_seed(0)
    model = edgetrain.create_model("resnet8", 16, in_channels=1, width=8)
    before = nearest_centroid(model, plain(source), plain(test))
    net = edgetrain.wrap(model, edgetrain.uniform_plan(model, "recompute", input_shape=(1, 16, 16), batch_size=96))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for epoch in range(3):
        batches.set_epoch(epoch)
        for images, labels in batches:
            objective(net(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    after = objective.accuracy(model, plain(test), device="cpu")
    assert after is not None
    assert before < 0.7 < 0.9 < after
