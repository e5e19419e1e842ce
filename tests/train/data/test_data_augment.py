"""Augmentation against a plain padded implementation; resizing; statistics."""

import numpy as np
import pytest
from PIL import Image

from edgetrain.errors import UsageError
from edgetrain.train.data import channel_statistics, open_source
from edgetrain.train.data.augment import augment_image, choose
from edgetrain.train.data.draws import uniform_draws
from edgetrain.train.data.fit import fit_image
from edgetrain.train.data.normalise import normalised

FILL = np.array([1, 2, 3], np.uint8)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("size", [(32, 32), (28, 28), (20, 44), (8, 8)])
@pytest.mark.parametrize("flip", [True, False])
def test_crops_and_mirrors_equal_those_of_a_padded_copy(size, flip):
    """numpy's own reflecting pad is the oracle: each result must be one of its windows, mirrored or not."""
    image, (height, width) = noise(*size, 3), size
    pad_y, pad_x = round(height / 8), round(width / 8)
    padded = np.pad(image, ((pad_y, pad_y), (pad_x, pad_x), (0, 0)), mode="reflect")
    choice = choose(np.arange(300), size=size, seed=1, epoch=2, flip=flip, cutout=False)
    windows = {}
    for y in range(2 * pad_y + 1):
        for x in range(2 * pad_x + 1):
            window = padded[y : y + height, x : x + width]
            windows[window.tobytes()] = (y, x, False)
            windows[window[:, ::-1].tobytes()] = (y, x, True)
    found = [windows[augment_image(image, choice, k, fill=FILL).tobytes()] for k in range(300)]
    assert {y for y, _, _ in found} == set(range(2 * pad_y + 1))
    assert {x for _, x, _ in found} == set(range(2 * pad_x + 1))
    mirrored = sum(m for _, _, m in found)
    assert 100 < mirrored < 200 if flip else mirrored == 0  # 150 +- 5.8 deviations


def test_cutout_is_a_filled_square_of_a_quarter():
    image = np.full((32, 32, 3), 200, np.uint8)
    choice = choose(np.arange(200), size=(32, 32), seed=0, epoch=0, flip=False)
    areas = []
    for k in range(200):
        hole = (augment_image(image, choice, k, fill=FILL) == FILL).all(axis=2)
        rows, columns = np.flatnonzero(hole.any(axis=1)), np.flatnonzero(hole.any(axis=0))
        assert hole.sum() == len(rows) * len(columns)  # one rectangle
        assert 4 <= len(rows) <= 8  # it sticks out by at most half
        assert 4 <= len(columns) <= 8
        areas.append(int(hole.sum()))
    assert max(areas) == 64
    assert (image == 200).all()


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 1)])
def test_tiny_images_do_not_break_it(size):
    choice = choose(np.arange(20), size=size, seed=0, epoch=0, flip=True)
    assert augment_image(noise(*size, 1), choice, 0, fill=FILL[:1]).shape == (*size, 1)


def test_draws_belong_to_the_image_not_to_the_batch():
    indices = np.arange(1000)
    whole = uniform_draws(seed=5, epoch=3, indices=indices, fields=5)
    assert np.array_equal(uniform_draws(seed=5, epoch=3, indices=indices[::-1][:7], fields=5), whole[::-1][:7])
    for seed, epoch in ((5, 4), (6, 3), (3, 5)):
        assert not np.isin(uniform_draws(seed=seed, epoch=epoch, indices=indices, fields=5), whole).any()
    # uniform: mean 1/2 +- 6 deviations of 1 / sqrt(12 * 5000), fields uncorrelated
    assert abs(whole.mean() - 0.5) < 6 / np.sqrt(12 * whole.size)
    assert np.abs(np.corrcoef(whole.T) - np.eye(5)).max() < 0.2


def test_fit():
    colour = noise(40, 30, 3)
    assert fit_image(colour, (3, 40, 30)) is colour
    small = fit_image(colour, (3, 10, 20))
    expected = Image.fromarray(colour).resize((20, 10), Image.Resampling.BILINEAR)
    assert np.array_equal(small, np.asarray(expected))
    luma = colour.astype(float) @ [0.299, 0.587, 0.114]  # ITU-R 601
    grey = fit_image(colour, (1, 40, 30))
    assert grey.shape == (40, 30, 1)
    assert np.abs(grey[:, :, 0] - luma).max() <= 1
    assert fit_image(grey, (3, 8, 8)).shape == (8, 8, 3)
    assert np.ptp(fit_image(grey, (3, 40, 30)), axis=2).max() == 0


def test_statistics_are_those_of_all_pixels():
    source = open_source("digits", split="train")
    mean, std = channel_statistics(source, (1, 8, 8))
    values = np.stack([source.decode(k) for k in range(len(source))]) / 255
    np.testing.assert_allclose(mean, [values.mean()], rtol=1e-9)
    np.testing.assert_allclose(std, [values.std()], rtol=1e-9)
    images = normalised(np.moveaxis((values * 255).round().astype(np.uint8), 3, 1), mean, std)
    assert abs(float(images.mean())) < 1e-4
    assert abs(float(images.std()) - 1) < 1e-3
    sampled = channel_statistics(source, (3, 8, 8), sample=50, seed=1)
    assert sampled[0].shape == sampled[1].shape == (3,)
    with pytest.raises(UsageError, match="sample of 0"):
        channel_statistics(source, (1, 8, 8), sample=0)
