"""Images in one folder per class: ``root/train/CLASS/*`` and ``root/test/CLASS/*``, or ``root/CLASS/*``.

Without ``train`` and ``test`` an image belongs to the test split if the SHA-256 of its file name, taken modulo 5,
is 0: a fifth, and an image stays in its split whatever is added later.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from edgetrain.errors import DataError
from edgetrain.train.data.decode import IMAGE_SUFFIXES, decode_image, decoding_bytes, header_channels
from edgetrain.train.data.source import Labels, Pixels, Split, check_labels, no_split

_TEST_FOLDERS = ("test", "validation", "val")
_SNIFFED = 16


class FolderSource:
    """Image files; only their names are held.

    Args:
        files: (class folder, file name) of each image, below ``root``.
    """

    def __init__(
        self, root: Path, files: list[tuple[str, str]], labels: Labels, *, name: str, classes: tuple[str, ...]
    ) -> None:
        check_labels(labels, classes, root)
        self.name = name
        self.classes = classes
        self.labels = labels
        self._root = root
        self._files = files
        step = max(1, len(files) // _SNIFFED)
        found = {header_channels(str(self._path(k))) for k in range(0, len(files), step)} - {None}
        self.channels = 1 if found == {1} else 3

    def __len__(self) -> int:
        return len(self._files)

    def decode(self, index: int) -> Pixels:
        """Image ``index``, (h, w, c); raises BrokenImage."""
        path = str(self._path(index))
        return decode_image(path, path=path, channels=self.channels)

    def decode_reduced(self, index: int, size: tuple[int, int]) -> Pixels:
        """Image ``index`` in ``size``, (height, width, c); raises BrokenImage."""
        path = str(self._path(index))
        return decode_image(path, path=path, channels=self.channels, size=size)

    def decoding_bytes(self, index: int, size: tuple[int, int]) -> int:
        """Most bytes that :meth:`decode_reduced` takes."""
        return decoding_bytes(str(self._path(index)), channels=self.channels, size=size)

    def _path(self, index: int) -> Path:
        return self._root.joinpath(*self._files[index])


def is_image_folder(root: Path) -> bool:
    """Whether some folder below looks like a class, or ``train`` is there."""
    return (root / "train").is_dir() or any(_images(folder) for folder in _subfolders(root))


def is_undivided(root: Path) -> bool:
    """Whether ``root`` holds a folder per class, and no split."""
    return root.is_dir() and not (root / "train").is_dir() and is_image_folder(root)


def open_undivided(root: Path) -> FolderSource:
    """All images of a folder per class; raises DataError as :func:`open_folder`."""
    return _open(root, root, [folder.name for folder in _subfolders(root)], "train", hashed=False)


def open_folder(root: Path, split: Split) -> FolderSource:
    """The images of ``split``.

    Raises:
        DataError: there is no such split, fewer than two classes, or a class without an image.
    """
    if not (root / "train").is_dir():
        return _open(root, root, [folder.name for folder in _subfolders(root)], split, hashed=True)
    classes = [folder.name for folder in _subfolders(root / "train")]
    if split == "train":
        return _open(root / "train", root, classes, split, hashed=False)
    for name in _TEST_FOLDERS:
        if (root / name).is_dir():
            _check_known(root / name, classes)
            return _open(root / name, root, classes, split, hashed=False)
    raise no_split(root, split, f"a folder {root / 'test'} with a folder per class")


def _open(at: Path, root: Path, classes: list[str], split: Split, *, hashed: bool) -> FolderSource:
    files: list[tuple[str, str]] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        folder = at / name
        images = _images(folder)
        if not images and (folder.is_dir() or split == "train"):
            raise DataError(
                found=f"the class folder {folder} holds no image",
                expected=f"at least one file that ends in {', '.join(IMAGE_SUFFIXES)}",
                action="add images to it or delete the folder",
            )
        chosen = [image for image in images if not hashed or _in_test(image) == (split == "test")]
        if not chosen and split == "train":
            raise DataError(
                found=f"all {len(images)} images in {folder} fall into the test split",
                expected="at least one in the train split",
                action="add images to the class, or arrange the data as train/CLASS and test/CLASS",
            )
        files += [(name, image) for image in chosen]
        labels += [label] * len(chosen)
    if not files and split == "test":
        raise no_split(root, split, "image names of which some fall into the test split, or train/CLASS and test/CLASS")
    return FolderSource(at, files, np.array(labels, dtype=np.int64), name=root.name, classes=tuple(classes))


def _check_known(at: Path, classes: list[str]) -> None:
    for folder in _subfolders(at):
        if folder.name not in classes:
            raise DataError(
                found=f"the class folder {folder} has no counterpart in the train split",
                expected=f"one of {', '.join(classes)}",
                action="rename it, or add training images of this class",
            )


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))


def _images(folder: Path) -> list[str]:
    """Sorted names of the image files directly in ``folder``; none where it does not exist."""
    if not folder.is_dir():
        return []
    return sorted(p.name for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))


def _in_test(file_name: str) -> bool:
    return int(hashlib.sha256(file_name.encode()).hexdigest(), 16) % 5 == 0
