"""The MNIST format."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from edgetrain.errors import DataError
from edgetrain.train.data import BrokenImage, open_source


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write(root: Path, prefix: str, labels: list[int], *, packed: bool = True) -> np.ndarray:
    images = np.random.default_rng(len(labels)).integers(0, 256, (len(labels), 6, 5), dtype=np.uint8)
    root.mkdir(exist_ok=True)
    for kind, array in (("images-idx3", images), ("labels-idx1", np.array(labels, np.uint8))):
        path = root / f"{prefix}-{kind}-ubyte{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    return images


@pytest.mark.parametrize("packed", [True, False])
def test_both_splits(tmp_path, packed):
    images = write(tmp_path, "train", [0, 1, 2, 1], packed=packed)
    write(tmp_path, "t10k", [1, 0], packed=packed)
    train, test = open_source(tmp_path, split="train"), open_source(tmp_path, split="test")
    assert train.classes == test.classes == ("0", "1", "2")
    assert (train.channels, train.labels.tolist(), len(test)) == (1, [0, 1, 2, 1], 2)
    for k in range(4):
        assert np.array_equal(train.decode(k)[:, :, 0], images[k])


def test_single_file_stands_for_its_folder(tmp_path):
    write(tmp_path, "train", [0, 1])
    assert len(open_source(tmp_path / "train-images-idx3-ubyte.gz", split="train")) == 2
    with pytest.raises(DataError, match="no test split"):
        open_source(tmp_path, split="test")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: gzip.compress(data)[:-30], "cannot be unpacked"),
        (lambda data: gzip.compress(data[:-1]), "unpacks to 135 bytes; expected 136"),
        (lambda data: gzip.compress(data + b"x" * 5_000_000), "more than 136 bytes"),
        (lambda data: gzip.compress(b"\0\0\x0d\x03" + data[4:]), "begins with 00 00 0d 03"),
        (lambda data: gzip.compress(b""), "begins with nothing"),
        (lambda data: b"plain text", "cannot be unpacked"),
    ],
)
def test_size_and_header_are_checked(tmp_path, damage, message):
    images = write(tmp_path, "train", [0, 1, 0, 1])
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(damage(idx(images)))
    with pytest.raises(DataError, match=message):
        open_source(tmp_path, split="train")


def test_counts_that_differ(tmp_path):
    write(tmp_path, "train", [0, 1, 0, 1])
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.array([0, 1], np.uint8))))
    with pytest.raises(DataError, match="4 images and its label file 2 labels"):
        open_source(tmp_path, split="train")


def test_test_label_above_the_training_classes(tmp_path):
    write(tmp_path, "train", [0, 1])
    write(tmp_path, "t10k", [0, 7])
    with pytest.raises(DataError, match="label 7 at image 1"):
        open_source(tmp_path, split="test")


def test_file_cut_while_open(tmp_path):
    write(tmp_path, "train", [0, 1], packed=False)
    source = open_source(tmp_path, split="train")
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"\0" * 50)
    with pytest.raises(BrokenImage, match="image 1"):
        source.decode(1)
