"""Finds out in which format a data set is, and opens one split of it."""

from __future__ import annotations

from pathlib import Path

from edgetrain.errors import DataError, near_matches
from edgetrain.train.data.arrays import open_archive
from edgetrain.train.data.cifar import cifar_folder, cifar_split, open_cifar, pickled_file, refuse_pickle
from edgetrain.train.data.digits import DigitsSource
from edgetrain.train.data.folder import is_image_folder, open_folder
from edgetrain.train.data.idx import is_idx_folder, open_idx
from edgetrain.train.data.parquet import ParquetSource
from edgetrain.train.data.source import Source, Split, no_split
from edgetrain.train.data.subset import limited

_FORMATS = (
    "Parquet files (train*.parquet), MNIST files (train-images-idx3-ubyte.gz), "
    "binary CIFAR files (data_batch_1.bin or train.bin), NumPy archives (NAME.npz), "
    "or images in a folder per class (train/CLASS/*.jpg or CLASS/*.jpg)"
)
_NAMES_SHOWN = 20


def open_source(spec: str | Path, *, split: Split, limit: int | None = None, seed: int = 0) -> Source:
    """One split of a data set.

    Args:
        spec: ``"digits"``, or the path of a folder or a file.
        limit: take this many images only, each class in proportion; None takes all.
        seed: chooses which they are.

    Raises:
        DataError: the path is missing, its format unknown, the split missing, or the data are unusable.
        UsageError: the limit is below 1.
        StorageError: no space to unpack the data.
    """
    if spec == "digits":
        return limited(DigitsSource(split), limit, seed=seed)
    path = Path(spec)
    if not path.exists():
        beside = [p.name for p in sorted(path.parent.iterdir())] if path.parent.is_dir() else []
        raise DataError(
            found=f"{path} does not exist",
            expected="digits (embedded), or the path of a folder or file",
            action=near_matches(path.name, [*beside[:_NAMES_SHOWN], "digits"]),
        )
    parquet = _parquet_files(path)
    if parquet is not None:
        files, train_files = parquet.get(split, []), parquet.get("train", [])
        if not files:
            raise no_split(path, split, f"a file {'test' if split == 'test' else 'train'}*.parquet")
        name = path.name if path.is_dir() else path.stem
        return ParquetSource(files, name=name, train_files=train_files, limit=limit, seed=seed)
    return limited(_open_other(path, split), limit, seed=seed)


def _open_other(path: Path, split: Split) -> Source:
    if path.is_file():
        if path.suffix == ".npz":
            return open_archive(path, split)
        if "idx" in path.name and is_idx_folder(path.parent):
            return open_idx(path.parent, split)
        if cifar_split(path) is not None:
            return open_cifar(path, split)
    else:
        if is_idx_folder(path):
            return open_idx(path, split)
        cifar = cifar_folder(path)
        if cifar is not None:
            return open_cifar(cifar, split)
        if is_image_folder(path):
            return open_folder(path, split)
    pickled = pickled_file(path)
    if pickled is not None:
        raise refuse_pickle(pickled)
    raise DataError(
        found=f"{path} holds no data set in a known format",
        expected=_FORMATS,
        action="unpack the archive if it is one, or name the folder that holds the files",
    )


def _parquet_files(path: Path) -> dict[Split, list[Path]] | None:
    """The files of each split, in ``path`` or in the one folder below it that holds any; None if there is none."""
    if path.is_file():
        files = [path] if path.suffix == ".parquet" else []
    else:
        files = sorted(path.glob("*.parquet"))
        if not files:
            below = sorted(path.glob("*/*.parquet"))
            files = below if len({file.parent for file in below}) == 1 else []
    if not files:
        return None
    for test in ("test", "validation"):
        tests = [file for file in files if file.name.startswith(test)]
        if tests:
            break
    other = [file for file in files if not file.name.startswith(("test", "validation"))]
    train = [file for file in other if file.name.startswith("train")] or other
    return {"train": train, "test": tests}
