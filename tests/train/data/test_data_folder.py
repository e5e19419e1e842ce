"""Images in a folder per class."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgetrain.errors import DataError
from edgetrain.train.data import BrokenImage, open_source


def write_images(folder: Path, count: int, *, grey: bool = False, size: tuple[int, int] = (12, 10)) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng([count, *folder.name.encode()])
    for k in range(count):
        pixels = rng.integers(0, 256, size if grey else (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{folder.name}{k:03d}.png")


def test_train_and_test_folders(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        for name in ("dog", "cat"):
            write_images(tmp_path / split / name, count)
    (tmp_path / "train" / ".cache").mkdir()
    train, test = open_source(tmp_path, split="train"), open_source(tmp_path, split="test")
    assert train.classes == test.classes == ("cat", "dog")
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert test.labels.tolist() == [0, 0, 1, 1]
    assert train.labels.dtype == np.int64
    assert train.channels == 3
    expected = np.asarray(Image.open(tmp_path / "train" / "dog" / "dog001.png"))
    assert np.array_equal(train.decode(4), expected)


def test_split_by_hash_of_the_name_is_a_partition(tmp_path):
    for name in ("a", "b"):
        write_images(tmp_path / name, 60, grey=True, size=(4, 4))
    train, test = open_source(tmp_path, split="train"), open_source(tmp_path, split="test")
    assert train.channels == 1
    images = [source.decode(k).tobytes() for source in (train, test) for k in range(len(source))]
    assert len(images) == len(set(images)) == 120
    # binomial with n = 120 and p = 1/5: mean 24, deviation 4.4; four deviations either way
    assert 7 <= len(test) <= 41
    before = {train.decode(k).tobytes() for k in range(len(train))}
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "a" / "later.png")
    again = open_source(tmp_path, split="train")
    assert before <= {again.decode(k).tobytes() for k in range(len(again))}


def test_empty_class_is_named(tmp_path):
    write_images(tmp_path / "train" / "cat", 2)
    (tmp_path / "train" / "unicorn").mkdir()
    with pytest.raises(DataError, match="unicorn holds no image"):
        open_source(tmp_path, split="train")


def test_single_class(tmp_path):
    write_images(tmp_path / "train" / "cat", 2)
    with pytest.raises(DataError, match="at least 2 classes"):
        open_source(tmp_path, split="train")


def test_train_without_test(tmp_path):
    for name in ("cat", "dog"):
        write_images(tmp_path / "train" / name, 2)
    with pytest.raises(DataError, match="no test split"):
        open_source(tmp_path, split="test")


def test_test_class_that_training_does_not_know(tmp_path):
    for name in ("cat", "dog"):
        write_images(tmp_path / "train" / name, 2)
    write_images(tmp_path / "test" / "cow", 1)
    with pytest.raises(DataError, match="cow has no counterpart"):
        open_source(tmp_path, split="test")


def test_truncated_jpeg_is_broken_with_its_path(tmp_path):
    for name in ("cat", "dog"):
        write_images(tmp_path / "train" / name, 1)
    path = tmp_path / "train" / "cat" / "cut.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:900])
    source = open_source(tmp_path, split="train")
    with pytest.raises(BrokenImage, match="truncated") as caught:
        source.decode(1)
    assert caught.value.path == str(path)
