"""The binary version of CIFAR-10 and CIFAR-100 (A. Krizhevsky 2009).

A file is a row of records: one label byte (CIFAR-10) or a coarse and a fine one (CIFAR-100), then 3072 bytes, the
red, green and blue plane of 32x32. The version "for Python" is pickled; a pickle runs whatever code it holds when
it is opened, so it is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgetrain.errors import DataError
from edgetrain.train.data.source import BrokenImage, Labels, Pixels, Split, check_labels, no_split
from edgetrain.train.data.stored import stored_file

_PIXEL_BYTES = 3 * 32 * 32
_PATTERNS = {
    10: {"train": "data_batch_*.bin", "test": "test_batch.bin"},
    100: {"train": "train.bin", "test": "test.bin"},
}
_NAME_FILES = {10: "batches.meta.txt", 100: "fine_label_names.txt"}
_SUBFOLDERS = ("cifar-10-batches-bin", "cifar-100-binary")
_PICKLED_SUBFOLDERS = ("cifar-10-batches-py", "cifar-100-python")


class CifarSource:
    """Records read from the files one by one."""

    channels = 3

    def __init__(self, files: Sequence[Path], *, name: str, classes: tuple[str, ...]) -> None:
        self.name = name
        self.classes = classes
        self._label_bytes = 1 if len(classes) == 10 else 2
        self._files = list(files)
        parts = [_labels(path, self._label_bytes) for path in files]
        self.labels: Labels = np.concatenate(parts)
        self._starts = np.cumsum([0] + [len(part) for part in parts])
        for path, part in zip(files, parts, strict=True):
            check_labels(part, classes, path)
        self._stored = [stored_file(path) for path in files]

    def __len__(self) -> int:
        return len(self.labels)

    def decode(self, index: int) -> Pixels:
        """Image ``index``, (32, 32, 3); raises BrokenImage where the file was cut since it was opened."""
        k = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = index - int(self._starts[k])
        data = self._stored[k].read(row * (self._label_bytes + _PIXEL_BYTES) + self._label_bytes, _PIXEL_BYTES)
        if len(data) < _PIXEL_BYTES:
            raise BrokenImage(f"{self._files[k]} record {row}", "the file ends before it")
        return np.frombuffer(data, np.uint8).reshape(3, 32, 32).transpose(1, 2, 0)  # (32, 32, 3)


def cifar_folder(root: Path) -> Path | None:
    """``root``, or the folder of the unpacked archive in it, whichever holds binary files; None if neither does."""
    for folder in (root, *(root / name for name in _SUBFOLDERS)):
        if any(_split_files(folder, n, split) for n in _PATTERNS for split in ("train", "test")):
            return folder
    return None


def cifar_split(file: Path) -> Split | None:
    """The split that the name of a single file stands for; None where it is no CIFAR file's name."""
    for patterns in _PATTERNS.values():
        for split in ("train", "test"):
            if file.match(patterns[split]):
                return "train" if split == "train" else "test"
    return None


def open_cifar(path: Path, split: Split) -> CifarSource:
    """The images of ``split``.

    Args:
        path: a folder, or a single file of that split.

    Raises:
        DataError: no such split, a file cut off, a label out of range.
    """
    folder = path.parent if path.is_file() else path
    for n_classes in _PATTERNS:
        files = _split_files(folder, n_classes, split)
        if path.is_file():
            files = [file for file in files if file == path]
        if files:
            return CifarSource(files, name=folder.name, classes=_classes(folder, n_classes))
    raise no_split(path, split, " or ".join(patterns[split] for patterns in _PATTERNS.values()))


def pickled_file(path: Path) -> Path | None:
    """``path``, or a file in it, that is the pickled CIFAR version or another pickle; None if there is none."""
    folders = [path, *(path / name for name in _PICKLED_SUBFOLDERS)]
    candidates = [path] if path.is_file() else [p for f in folders if f.is_dir() for p in sorted(f.iterdir())]
    names = ("test_batch", "batches.meta", "train", "test", "meta")
    for file in filter(Path.is_file, candidates):
        named = file.name in names or (file.name.startswith("data_batch_") and not file.suffix)
        if file.suffix in (".pkl", ".pickle") or (named and stored_file(file).read(0, 1) == b"\x80"):
            return file
    return None


def refuse_pickle(path: Path) -> DataError:
    """The error for a pickled data set."""
    return DataError(
        found=f"{path} is a Python pickle, which can run any code when it is opened",
        expected="data that are only data",
        action="use the binary version of CIFAR (data_batch_1.bin or train.bin) or a Parquet version",
    )


def _split_files(folder: Path, n_classes: int, split: str) -> list[Path]:
    return sorted(folder.glob(_PATTERNS[n_classes][split]))


def _labels(path: Path, label_bytes: int) -> Labels:
    record = label_bytes + _PIXEL_BYTES
    size = path.stat().st_size
    if size == 0 or size % record:
        raise DataError(
            found=f"{path} has {size} bytes",
            expected=f"a multiple of {record}, the size of a record (the original file: {10_000 * record})",
            action="copy or download the file again",
        )
    rows = np.memmap(path, np.uint8, mode="r").reshape(-1, record)  # (n, record); unmapped on return
    return rows[:, label_bytes - 1].astype(np.int64)


def _classes(folder: Path, n_classes: int) -> tuple[str, ...]:
    path = folder / _NAME_FILES[n_classes]
    names = tuple(path.read_text().split()) if path.is_file() else ()
    return names if len(names) == n_classes else tuple(str(k) for k in range(n_classes))
