"""Images held out where a data set has no test split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgetrain.errors import DataError, UsageError
from edgetrain.train.data import open_divided, open_source
from edgetrain.train.data.source import Source


def photographs(root: Path, **counts: int) -> Path:
    for value, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for k in range(count):
            Image.fromarray(np.full((8, 8), 100 * value + k, np.uint8)).save(root / name / f"{k}.png")
    return root


def values(source: Source) -> set[int]:
    return {int(source.decode(k)[0, 0, 0]) for k in range(len(source))}


@pytest.mark.parametrize("folder", ["", "train"])
def test_a_part_of_every_class(tmp_path: Path, folder: str) -> None:
    photographs(tmp_path / folder, common=20, rare=5)
    one, same, other = (open_divided(str(tmp_path), holdout=0.2, seed=seed) for seed in (0, 0, 1))
    assert one.held_out
    assert np.bincount(one.test.labels).tolist() == [4, 1]
    assert np.bincount(one.train.labels).tolist() == [16, 4]
    assert values(one.train) | values(one.test) == {*range(20), *range(100, 105)}
    assert not values(one.train) & values(one.test)
    assert values(same.test) == values(one.test) != values(other.test)


def test_rare_classes_are_on_both_sides(tmp_path: Path) -> None:
    photographs(tmp_path, common=30, pair=2)
    for holdout in (0.01, 0.2, 0.9):
        divided = open_divided(str(tmp_path), holdout=holdout, seed=0)
        assert np.bincount(divided.test.labels, minlength=2).min() >= 1
        assert np.bincount(divided.train.labels, minlength=2).min() >= 1


def test_a_test_split_is_used(tmp_path: Path) -> None:
    photographs(tmp_path / "train", a=4, b=4)
    photographs(tmp_path / "test", a=1, b=2)
    divided = open_divided(str(tmp_path), holdout=0.2, seed=0)
    assert (len(divided.train), len(divided.test), divided.held_out) == (8, 3, False)
    digits = open_divided("digits", holdout=0.2, seed=0)
    assert len(digits.test) == len(open_source("digits", split="test"))


def test_a_single_image(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 image\(s\) of the class only"):
        open_divided(str(photographs(tmp_path, common=5, only=1)), holdout=0.2, seed=0)


@pytest.mark.parametrize("part", [0.0, 1.0, -0.1])
def test_no_part(tmp_path: Path, part: float) -> None:
    with pytest.raises(UsageError, match="--holdout"):
        open_divided("digits", holdout=part, seed=0)
