"""Batches: contents, repeatability, resuming, broken images, memory."""

import logging
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from edgetrain.errors import DataError, UsageError
from edgetrain.train.data import BrokenImage, Loader, open_source

DEFAULTS = {"batch_size": 64, "image_size": (1, 8, 8), "augment": True, "shuffle": True, "seed": 7, "drop_last": False}


class Noise:
    """Colour images made from their number; those in ``broken`` cannot be decoded."""

    name = "noise"
    classes = ("even", "odd")
    channels = 3

    def __init__(self, count: int, *, side: int = 8, broken: tuple[int, ...] = ()) -> None:
        self.labels = np.arange(count) % 2
        self.decoded: list[int] = []
        self._side = side
        self._broken = broken

    def __len__(self) -> int:
        return len(self.labels)

    def decode(self, index: int) -> np.ndarray:
        self.decoded.append(index)
        if index in self._broken:
            raise BrokenImage(f"image{index}.jpg", "cut off")
        return np.full((self._side, self._side, 3), index % 256, np.uint8)


def loader(source=None, **options) -> Loader:
    return Loader(source or open_source("digits", split="train"), **{**DEFAULTS, **options})


def same(left, right) -> bool:
    left, right = list(left), list(right)
    return len(left) == len(right) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(left, right, strict=True)
    )


def test_batches_hold_the_images_normalised():
    source = open_source("digits", split="test")
    mean, std = [0.3], [0.4]
    batches = list(loader(source, augment=False, shuffle=False, mean=mean, std=std))
    images, labels = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert labels.tolist() == source.labels.tolist()
    expected = (np.stack([source.decode(k) for k in range(len(source))]).transpose(0, 3, 1, 2) / 255 - 0.3) / 0.4
    np.testing.assert_allclose(images.numpy(), expected, atol=1e-6)
    assert len(batches) == -(-len(source) // 64)


def test_size_and_channels_are_converted():
    images, _ = next(iter(loader(image_size=(3, 12, 10))))
    assert images.shape == (64, 3, 12, 10)
    assert torch.equal(images[:, 0], images[:, 2])


def test_every_image_once_in_an_order_of_its_own():
    source = Noise(100)
    one = loader(source, image_size=(3, 8, 8), augment=False, batch_size=7)
    first = torch.cat([images[:, 0, 0, 0] for images, _ in one])
    one.set_epoch(1)
    second = torch.cat([images[:, 0, 0, 0] for images, _ in one])
    assert not torch.equal(first, second)
    for values in (first, second):
        assert sorted((values * 255).round().int().tolist()) == list(range(100))


def test_two_loaders_agree_and_epochs_and_seeds_differ():
    one, two = loader(), loader()
    assert same(one, two)
    assert same(one, one)
    before = list(one)
    one.set_epoch(3)
    two.set_epoch(3)
    assert same(one, two)
    assert not same(one, before)
    assert not same(loader(seed=8), before)


def test_augmentation_does_not_depend_on_the_batch():
    whole = torch.cat([images for images, _ in loader(batch_size=64)])
    assert torch.equal(torch.cat([images for images, _ in loader(batch_size=50)]), whole)


@pytest.mark.parametrize("start", [0, 1, 5, 6, 7])
def test_resume_gives_the_same_batches_without_decoding(start):
    source = Noise(100)
    options = {"image_size": (3, 8, 8), "batch_size": 16}
    whole = loader(source, **options)
    whole.set_epoch(2)
    expected = list(whole)[start:]
    source.decoded.clear()
    resumed = loader(source, **options)
    resumed.set_epoch(2)
    assert same(resumed.iterate(start_batch=start), expected)
    assert len(source.decoded) == max(0, 100 - 16 * start)
    with pytest.raises(UsageError, match="start at batch 8"):
        resumed.iterate(start_batch=8)


def test_digits_are_not_mirrored_but_photographs_are():
    assert same(loader(), loader(flip=False))
    assert not same(loader(), loader(flip=True))
    ramp = Noise(100)
    ramp.decode = lambda index: np.tile(np.arange(8, dtype=np.uint8)[None, :, None] * 30, (8, 1, 3))
    assert not same(loader(ramp, image_size=(3, 8, 8)), loader(ramp, image_size=(3, 8, 8), flip=False))


def test_cutout_is_filled_with_the_mean():
    source = Noise(8)
    source.decode = lambda index: np.full((8, 8, 3), 250, np.uint8)
    images, _ = next(iter(loader(source, image_size=(3, 8, 8), mean=[0.2, 0.4, 0.6], std=[1, 1, 1])))
    lowest = images.amin(dim=(0, 2, 3))  # zero after normalising
    assert float(lowest.abs().max()) < 1e-6


def test_drop_last():
    batches = list(loader(Noise(20), image_size=(3, 8, 8), batch_size=8, drop_last=True))
    assert [len(labels) for _, labels in batches] == [8, 8]
    with pytest.raises(DataError, match="20 images for a batch size of 21"):
        loader(Noise(20), image_size=(3, 8, 8), batch_size=21, drop_last=True)


def test_broken_images_are_left_out_and_logged_once(caplog):
    source = Noise(300, broken=(3, 200))
    one = loader(source, image_size=(3, 8, 8), shuffle=False, batch_size=100)
    with caplog.at_level(logging.WARNING):
        assert [len(labels) for _, labels in one] == [99, 100, 99]
        assert [len(labels) for _, labels in one] == [99, 100, 99]
    assert one.broken == [("image3.jpg", "cut off"), ("image200.jpg", "cut off")]
    assert [record.getMessage() for record in caplog.records] == [
        "left out image3.jpg: cut off",
        "left out image200.jpg: cut off",
    ]
    values = torch.cat([labels for _, labels in one])
    assert values.tolist() == [k % 2 for k in range(300) if k not in (3, 200)]


def test_batch_of_only_broken_images_is_left_out():
    one = loader(Noise(10, broken=(4,)), image_size=(3, 8, 8), shuffle=False, batch_size=1)
    assert len(list(one)) == 9


def test_batches_that_are_left_out_count_as_done():
    one = loader(Noise(10, broken=(4,)), image_size=(3, 8, 8), shuffle=False, batch_size=1)
    passing = one.iterate(2)
    assert [one.done for _ in passing] == [3, 4, 6, 7, 8, 9, 10]


@pytest.mark.parametrize(("count", "broken"), [(300, 4), (50, 2), (1000, 11)])
def test_too_many_broken_images(count, broken):
    one = loader(Noise(count, broken=tuple(range(broken))), image_size=(3, 8, 8), shuffle=False, batch_size=10)
    with pytest.raises(DataError, match=r"image0\.jpg .*image1\.jpg"):
        list(one)
    within = loader(Noise(count, broken=tuple(range(broken - 1))), image_size=(3, 8, 8), batch_size=10)
    assert sum(len(labels) for _, labels in within) == count - broken + 1


def test_other_errors_surface():
    source = Noise(100)
    source.decode = lambda index: 1 // 0
    with pytest.raises(ZeroDivisionError):
        list(loader(source))


def test_early_stop_leaves_no_thread():
    before = threading.active_count()
    for _ in loader(batch_size=8):
        break
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch size 0"),
        ({"seed": -1}, "seed -1"),
        ({"image_size": (2, 8, 8)}, "2x8x8"),
        ({"image_size": (1, 0, 8)}, "1x0x8"),
        ({"mean": [0.1, 0.2]}, "mean"),
        ({"std": [0.0]}, "std"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(UsageError, match=message):
        loader(**options)


def test_numpy_memory_is_one_uint8_batch():
    """256 images of 3x64x64: 3 MiB in uint8, and single images. Torch's float32 batch is not traced."""
    source = Noise(256 * 6, side=64)
    one = loader(source, image_size=(3, 64, 64), batch_size=256, mean=[0.5] * 3, std=[0.5] * 3)
    batch_bytes = 256 * 3 * 64 * 64
    list(one.iterate(start_batch=5))  # what is imported and cached at the first batch does not count
    tracemalloc.start()
    try:
        for _ in one:
            pass
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    print(f"numpy peak {peak_bytes} bytes, {peak_bytes / batch_bytes:.2f} uint8 batches")
    assert peak_bytes < 1.2 * batch_bytes


def test_reading_a_file_does_not_grow_the_process(tmp_path: Path):
    """20,000 CIFAR records are 61 MB; read at their positions they are never resident together."""
    records = np.random.default_rng(0).integers(0, 10, (20_000, 3073), dtype=np.uint8)
    records.tofile(tmp_path / "data_batch_1.bin")
    file_bytes = records.nbytes
    del records
    one = loader(open_source(tmp_path, split="train"), image_size=(3, 32, 32), batch_size=100, augment=False)
    batches = iter(one)
    next(batches)
    before = _file_backed_bytes()
    for _ in batches:
        pass
    growth_bytes = _file_backed_bytes() - before
    print(f"file-backed resident size grew by {growth_bytes} bytes over a file of {file_bytes}")
    assert growth_bytes < file_bytes / 10


def _file_backed_bytes() -> int:
    """Resident pages that belong to files: a mapped file shows here, the heap's ups and downs do not."""
    info = psutil.Process().memory_info()
    if not hasattr(info, "shared"):
        pytest.skip("this system does not tell file-backed memory from the rest")
    return info.shared


def test_without_cutout_an_image_of_one_grey_stays_as_it_is():
    class Grey:
        name, classes, channels, labels = "grey", ("a", "b"), 1, np.arange(20) % 2

        def __len__(self) -> int:
            return 20

        def decode(self, index: int) -> np.ndarray:
            return np.full((16, 16, 1), 200, np.uint8)

    given = {"image_size": (1, 16, 16), "mean": [0.1], "std": [1.0]}
    whole = torch.cat([images for images, _ in loader(Grey(), cutout=False, **given)])
    assert whole.unique().numel() == 1
    holes = torch.cat([images for images, _ in loader(Grey(), **given)])
    assert holes.unique().numel() == 2  # the grey, and the mean that fills the square
