"""A teacher's answers on disk: it runs once over the data, and takes no memory in training.

One file for each question: its name holds a digest of the teacher's weights, the data (labels, and the pixels of 64
images spread over them) and all that is done to an image, so another teacher or other data never meet an old file.
The file proves itself (:mod:`edgetrain.train.tensor_file`); rows are read where they are, it is not mapped.

The answers are for whole images: a crop or a mirror would need others, so a run that reads them does not augment.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgetrain.errors import DataError, StorageError, UsageError
from edgetrain.memory import Guest
from edgetrain.train.data import BrokenImage, Loader, Source
from edgetrain.train.distillation import Answering, Answers
from edgetrain.train.tensor_file import TensorFile, write_tensor_file

_LOG = logging.getLogger(__name__)
_LOOKED_AT = 64


class StoredAnswers:
    """The answers in ``path`` by the index of an image; see :func:`store_answers`.

    Raises:
        StorageError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = TensorFile(path)
        self._targets = sorted(self._file.names("target."), key=int)

    def __call__(self, images: Tensor, indices: Tensor | None) -> Answers:
        """The answers for the images ``indices`` (n,) of the source."""
        if indices is None:
            raise UsageError(
                found="batches that do not say which images are in them",
                expected="an edgetrain Loader, whose batches have indices",
                action="use edgetrain.train.data.Loader, or a teacher that runs",
            )
        rows = [self._file.rows(name, indices) for name in ("logits", *(f"target.{name}" for name in self._targets))]
        logits, *targets = (some.to(images.device, images.dtype) for some in rows)
        return Answers(logits, tuple(targets))

    def guest(self, batch_size: int) -> Guest:
        """What the answers for a batch take."""
        names = ["logits", *(f"target.{name}" for name in self._targets)]
        row_bytes = sum(4 * int(np.prod(self._file.shape(name)[1:])) for name in names)
        return Guest(standing_bytes=2 * batch_size * row_bytes)  # as they were read, and as the device has them


def question_digest(model: nn.Module, source: Source, preprocessing: dict[str, Any]) -> str:
    """Of all that the answers of ``model`` for the images of ``source`` depend on, 64 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(preprocessing, sort_keys=True, default=list).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    digest.update(str(len(source)).encode() + source.labels.tobytes())
    for index in np.unique(np.linspace(0, len(source) - 1, _LOOKED_AT).astype(np.int64)).tolist():
        try:
            pixels = source.decode(index)
            digest.update(str(pixels.shape).encode() + pixels.tobytes())
        except BrokenImage:
            digest.update(b"broken")
    return digest.hexdigest()


def stored_answers(
    teacher: Answering, loader: Callable[[], Loader], *, digest: str, folder: Path, device: str = "cpu"
) -> StoredAnswers:
    """Those in ``folder`` for the question ``digest``; where there are none the teacher is asked once.

    Args:
        loader: makes batches of every image, in order, without augmentation.

    Raises:
        StorageError: the folder cannot be written.
    """
    path = folder / f"answers-{digest[:16]}.safetensors"
    if path.exists():
        try:
            found = StoredAnswers(path)
            if found._file.state.get("question") == digest:
                return found
        except StorageError as error:
            _LOG.warning("asking the teacher again: %s", error)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            found=f"{folder} cannot be made: {error.strerror or error}",
            expected="a folder for the teacher's outputs",
            action="name another with --teacher-outputs",
        ) from error
    store_answers(teacher, loader(), path=path, digest=digest, device=device)
    return StoredAnswers(path)


def store_answers(teacher: Answering, loader: Loader, *, path: Path, digest: str, device: str = "cpu") -> None:
    """Writes the answers of ``teacher`` for every image of ``loader`` to ``path``; rows of broken images are zeros.

    Rows are gathered in files beside it, so that no more than a batch of them is in memory.
    """
    rows = _Rows(path, len(loader.source))
    try:
        for images, _ in loader:
            answers = teacher(images.to(device), loader.indices)
            assert loader.indices is not None
            rows.put(loader.indices, [answers.logits, *answers.targets])
        tensors = rows.tensors()
        if not tensors:
            raise DataError(
                found=f"{loader.source.name} without a readable image", expected="one", action="check the data set"
            )
        names = ["logits", *(f"target.{k}" for k in range(len(tensors) - 1))]
        write_tensor_file(path, dict(zip(names, tensors, strict=True)), {"question": digest})
    except OSError as error:
        raise StorageError(
            found=f"{path} cannot be written: {error.strerror or error}",
            expected="space for the teacher's outputs",
            action="free some, or name another folder with --teacher-outputs",
        ) from error
    finally:
        rows.remove()


class _Rows:
    """Float32 rows on disk, some of every image, that are put in any order."""

    def __init__(self, path: Path, count: int) -> None:
        self._path, self._count = path, count
        self._maps: list[np.memmap[Any, Any]] = []

    def put(self, indices: Tensor, values: Iterable[Tensor]) -> None:
        for k, value in enumerate(values):
            array = value.detach().float().cpu().numpy()
            if k == len(self._maps):
                shape = (self._count, *array.shape[1:])
                self._maps.append(np.memmap(self._file(k), dtype=np.float32, mode="w+", shape=shape))
            self._maps[k][indices.numpy()] = array

    def tensors(self) -> list[Tensor]:
        return [torch.from_numpy(np.asarray(rows)) for rows in self._maps]

    def remove(self) -> None:
        count = len(self._maps)
        self._maps.clear()
        for k in range(count):
            self._file(k).unlink(missing_ok=True)

    def _file(self, k: int) -> Path:
        return self._path.with_name(f"{self._path.stem}.{k}.rows")
