"""Real data sets, where this checkout has them."""

from pathlib import Path

import numpy as np
import pytest

from edgetrain.train.data import Loader, channel_statistics, open_source

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data"


def real(name: str) -> Path:
    if not (DATA / name).is_dir():
        pytest.skip(f"the data set {name} is not in ../shared/data")
    return DATA / name


def test_cifar10_jpeg():
    train, test = (open_source(real("cifar10-jpeg"), split=split) for split in ("train", "test"))
    assert np.bincount(train.labels).tolist() == [5000] * 10
    assert np.bincount(test.labels).tolist() == [1000] * 10
    assert train.decode(49_999).shape == (32, 32, 3)
    mean, std = channel_statistics(train, (3, 32, 32))
    # published with the data, of all images; a mean over 2,000 images strays by about 0.12 / sqrt(2000) = 0.003
    np.testing.assert_allclose(mean, [0.4913, 0.4821, 0.4465], atol=0.012)
    np.testing.assert_allclose(std, [0.2452, 0.2428, 0.2606], atol=0.012)


def test_magnetic_tile():
    train, test = (open_source(real("magnetic-tile"), split=split) for split in ("train", "test"))
    counts = {"blowhole": 115, "break": 85, "crack": 57, "fray": 32, "free": 952, "uneven": 103}
    assert (len(train), len(test), train.channels) == (1063, 281, 1)
    both = np.bincount(train.labels) + np.bincount(test.labels)
    assert dict(zip(train.classes, both.tolist(), strict=True)) == counts
    loader = Loader(train, batch_size=16, image_size=(1, 64, 64), augment=True, shuffle=True, seed=0, drop_last=False)
    assert next(iter(loader))[0].shape == (16, 1, 64, 64)


def test_fashion_mnist():
    train, test = (open_source(real("fashion-mnist"), split=split) for split in ("train", "test"))
    assert np.bincount(train.labels).tolist() == [6000] * 10
    assert np.bincount(test.labels).tolist() == [1000] * 10
    mean, std = channel_statistics(train, (1, 28, 28))
    np.testing.assert_allclose([mean[0], std[0]], [0.2860, 0.3530], atol=0.012)  # published with the data
