"""The binary CIFAR files, and the pickled ones refused."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from edgetrain.errors import DataError
from edgetrain.train.data import open_source


def write(path: Path, labels: list[list[int]]) -> np.ndarray:
    """Records with one or two label bytes; gives the pixels (n, 3, 32, 32)."""
    path.parent.mkdir(exist_ok=True, parents=True)
    pixels = np.random.default_rng(len(labels)).integers(0, 256, (len(labels), 3072), dtype=np.uint8)
    path.write_bytes(np.hstack([np.array(labels, np.uint8), pixels]).tobytes())
    return pixels.reshape(-1, 3, 32, 32)


def test_cifar10(tmp_path):
    root = tmp_path / "cifar-10-batches-bin"
    write(root / "data_batch_1.bin", [[0], [9]])
    pixels = write(root / "data_batch_2.bin", [[3], [4], [5]])
    write(root / "test_batch.bin", [[7]])
    (root / "batches.meta.txt").write_text("airplane automobile bird cat deer dog frog horse ship truck\n\n")
    for spec in (tmp_path, root):
        source = open_source(spec, split="train")
        assert source.labels.tolist() == [0, 9, 3, 4, 5]
        assert source.classes[3] == "cat"
        assert np.array_equal(source.decode(4), pixels[2].transpose(1, 2, 0))
        assert open_source(spec, split="test").labels.tolist() == [7]
    assert len(open_source(root / "data_batch_2.bin", split="train")) == 3
    with pytest.raises(DataError, match="no test split"):
        open_source(root / "data_batch_2.bin", split="test")


def test_cifar100_takes_the_fine_label(tmp_path):
    pixels = write(tmp_path / "train.bin", [[19, 99], [1, 50]])
    source = open_source(tmp_path, split="train")
    assert source.labels.tolist() == [99, 50]
    assert len(source.classes) == 100
    assert np.array_equal(source.decode(1), pixels[1].transpose(1, 2, 0))
    with pytest.raises(DataError, match="no test split"):
        open_source(tmp_path, split="test")


def test_truncated(tmp_path):
    path = tmp_path / "data_batch_1.bin"
    write(path, [[0], [1]])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="6145 bytes; expected a multiple of 3073"):
        open_source(tmp_path, split="train")


def test_label_out_of_range(tmp_path):
    write(tmp_path / "data_batch_1.bin", [[0], [10]])
    with pytest.raises(DataError, match="label 10 at image 1"):
        open_source(tmp_path, split="train")


class _Trap:
    """Says so when it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("the pickle was opened",))


@pytest.mark.parametrize("name", ["data_batch_1", "train", "anything.pkl", "cifar-10-batches-py/data_batch_1"])
def test_pickles_are_refused_unopened(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(_Trap()))
    for spec in (tmp_path, path):
        with pytest.raises(DataError, match=r"pickle.*binary version of CIFAR"):
            open_source(spec, split="train")
