"""Which format a path holds, what is said when it holds none, and the embedded digits."""

import numpy as np
import pytest

from edgetrain.errors import DataError, UsageError
from edgetrain.train.data import open_source
from edgetrain.train.data.subset import Subset, stratified_indices


def test_missing_path_suggests_a_name():
    with pytest.raises(DataError, match=r"digist does not exist.*did you mean digits"):
        open_source("digist", split="train")


@pytest.mark.parametrize("as_file", [True, False])
def test_unknown_format_says_what_was_looked_for(tmp_path, as_file):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "docs").mkdir()
    with pytest.raises(DataError, match=r"train\*\.parquet.*idx3-ubyte.*data_batch_1\.bin.*CLASS/"):
        open_source(tmp_path / "notes.txt" if as_file else tmp_path, split="train")


def test_digits_are_split_by_class_and_scaled():
    train, test = open_source("digits", split="train"), open_source("digits", split="test")
    assert len(train) + len(test) == 1797
    total = np.bincount(train.labels) + np.bincount(test.labels)
    assert np.bincount(test.labels).tolist() == (total // 5).tolist()
    values = np.stack([train.decode(k) for k in range(len(train))])
    assert values.shape[1:] == (8, 8, 1)
    assert (values.dtype, values.min(), values.max()) == (np.uint8, 0, 255)
    assert len(np.unique(values)) == 17  # 0..16 on the new scale
    assert not train.mirror_invariant


def test_limit_is_stratified_and_repeatable():
    whole = open_source("digits", split="train")
    one, two = (open_source("digits", split="train", limit=100, seed=3) for _ in range(2))
    other = open_source("digits", split="train", limit=100, seed=4)
    assert np.bincount(one.labels).tolist() == [10] * 10
    assert all(np.array_equal(one.decode(k), two.decode(k)) for k in range(100))
    assert any(not np.array_equal(one.decode(k), other.decode(k)) for k in range(100))
    assert not one.mirror_invariant
    assert len(open_source("digits", split="train", limit=10**6)) == len(whole)
    with pytest.raises(UsageError, match="limit of 0"):
        open_source("digits", split="train", limit=0)


def test_every_class_survives_a_small_limit():
    labels = np.repeat([0, 1, 2], [1000, 10, 2])
    assert np.bincount(labels[stratified_indices(labels, 3, seed=0)]).tolist() == [1, 1, 1]
    # shares of 101.2 of 1012: 100, 1, 0.2, each within one
    assert np.abs(np.bincount(labels[stratified_indices(labels, 101, seed=0)]) - [100, 1, 0.2]).max() <= 1
    small, large = (set(stratified_indices(labels, limit, seed=0)) for limit in (50, 300))
    assert small < large


def test_subset_of_a_subset():
    source = open_source("digits", split="test")
    subset = Subset(Subset(source, np.array([5, 7, 9])), np.array([2, 0]))
    assert subset.labels.tolist() == source.labels[[9, 5]].tolist()
    assert np.array_equal(subset.decode(0), source.decode(9))
