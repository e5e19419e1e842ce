"""The idx format of MNIST and Fashion-MNIST: images and labels of a split in two files, usually gzipped.

Header (Y. LeCun, C. Cortes, C. Burges, "The MNIST database"): two zero bytes, the type (8 is uint8), the number of
axes, then each axis as a big-endian uint32; the values follow.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edgetrain.errors import DataError
from edgetrain.train.data.source import BrokenImage, Labels, Pixels, Split, check_labels, no_split
from edgetrain.train.data.stored import StoredBytes, spooled, stored_file

_PREFIX = {"train": "train", "test": "t10k"}
_CHUNK_BYTES = 2**20


class IdxSource:
    """Images read from the (unpacked) file one by one; classes are numbers, as the format has no names."""

    channels = 1
    mirror_invariant = False

    def __init__(self, images: Path, labels: Labels, *, name: str, classes: tuple[str, ...]) -> None:
        check_labels(labels, classes, images.parent)
        self._stored, (count, self._height, self._width) = _open_array(images, axes=3)
        if count != len(labels):
            raise DataError(
                found=f"{images} holds {count} images and its label file {len(labels)} labels",
                expected="as many of one as of the other",
                action="copy the two files again",
            )
        self.name = name
        self.classes = classes
        self.labels = labels
        self._path = images

    def __len__(self) -> int:
        return len(self.labels)

    def decode(self, index: int) -> Pixels:
        """Image ``index``, (h, w, 1); raises BrokenImage where the file was cut since it was opened."""
        size = self._height * self._width
        data = self._stored.read(_header_bytes(3) + index * size, size)
        if len(data) < size:
            raise BrokenImage(f"{self._path} image {index}", "the file ends before it")
        return np.frombuffer(data, np.uint8).reshape(self._height, self._width, 1)


def is_idx_folder(root: Path) -> bool:
    """Whether an idx file of images of some split is there."""
    return any(_find(root, split, "images") is not None for split in _PREFIX)


def open_idx(root: Path, split: Split) -> IdxSource:
    """The images of ``split``; the number of classes is that of the train split where there is one.

    Raises:
        DataError: a file is missing, cut off, damaged, or its labels are out of range.
    """
    images, labels_path = _find(root, split, "images"), _find(root, split, "labels")
    if images is None or labels_path is None:
        raise no_split(root, split, f"{_PREFIX[split]}-images-idx3-ubyte.gz and {_PREFIX[split]}-labels-idx1-ubyte.gz")
    labels = _labels(labels_path)
    reference = _find(root, "train", "labels")
    known = labels if reference is None or split == "train" else _labels(reference)
    classes = tuple(str(k) for k in range(int(known.max(initial=-1)) + 1))
    return IdxSource(images, labels, name=root.name, classes=classes)


def _find(root: Path, split: str, kind: str) -> Path | None:
    found = sorted(p for p in root.glob(f"{_PREFIX[split]}-{kind}*") if "ubyte" in p.name and p.is_file())
    return found[0] if found else None


def _labels(path: Path) -> Labels:
    stored, (count,) = _open_array(path, axes=1)
    return np.frombuffer(stored.read(_header_bytes(1), count), np.uint8).astype(np.int64)


def _open_array(path: Path, *, axes: int) -> tuple[StoredBytes, tuple[int, ...]]:
    """The file unpacked, and its shape; its size is compared with what the header says."""
    try:
        stored = spooled(_gunzipped(path, axes)) if path.suffix == ".gz" else stored_file(path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(path, f"cannot be unpacked ({error})", "a whole gzip file") from error
    shape = _shape(path, stored.read(0, _header_bytes(axes)), axes)
    expected = _header_bytes(axes) + math.prod(shape)
    if stored.size_bytes != expected:
        size = f"more than {expected}" if stored.size_bytes > expected else str(stored.size_bytes)
        raise _damaged(path, f"unpacks to {size} bytes", f"{expected}, as its header says")
    return stored, shape


def _gunzipped(path: Path, axes: int) -> Iterator[bytes]:
    """Pieces of the unpacked file; stops soon after the size in the header, so a bomb does not fill the disk."""
    with gzip.open(path) as file:
        header = file.read(_header_bytes(axes))
        yield header
        left = math.prod(_shape(path, header, axes))
        while left >= 0 and (chunk := file.read(_CHUNK_BYTES)):
            left -= len(chunk)
            yield chunk


def _shape(path: Path, header: bytes, axes: int) -> tuple[int, ...]:
    if len(header) < _header_bytes(axes) or header[:4] != bytes((0, 0, 8, axes)):
        raise _damaged(path, f"begins with {header[:4].hex(' ') or 'nothing'}", f"00 00 08 {axes:02d} and {axes} sizes")
    return struct.unpack(f">{axes}I", header[4:])


def _header_bytes(axes: int) -> int:
    return 4 + 4 * axes


def _damaged(path: Path, found: str, expected: str) -> DataError:
    return DataError(found=f"{path} {found}", expected=expected, action="copy or download the file again")
