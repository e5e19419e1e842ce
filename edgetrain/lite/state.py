"""The state of a run in NumPy arrays, and checkpoints of it in the format of ``edgetrain train``."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetrain.array_file import ArrayFile, Stored, write_array_file
from edgetrain.errors import StorageError
from edgetrain.train.records import EpochRecord, Position

Array = npt.NDArray[Any]
LAST, PREVIOUS = "last.safetensors", "previous.safetensors"
GRADIENT = "gradient."
_NAMES: dict[np.dtype[Any], str] = {np.dtype(np.float32): "F32", np.dtype(np.float64): "F64", np.dtype(np.int64): "I64"}
_TYPES: dict[str, np.dtype[Any]] = {name: dtype for dtype, name in _NAMES.items()}
_LOG = logging.getLogger(__name__)


def read_arrays(file: ArrayFile, names: list[str]) -> dict[str, Array]:
    """The arrays ``names`` of ``file``, in memory of their own."""
    arrays = {}
    for name in names:
        array = np.empty(file.shape(name), _TYPES[file.type_name(name)])
        file.read_into(name, _bytes_of(array))
        arrays[name] = array
    return arrays


def save(path: Path, state: Mapping[str, Array], position: Position, history: list[EpochRecord]) -> None:
    """Writes a checkpoint; what was there becomes the one before.

    Raises:
        StorageError: see :func:`edgetrain.files.write_atomically`.
    """
    arrays = {
        name: Stored(_NAMES[array.dtype], array.shape, _bytes_of(array))
        for name, array in state.items()
        if not name.startswith(GRADIENT)
    }
    about = {"position": asdict(position), "history": [asdict(record) for record in history], "optimizer": {}}
    write_array_file(path, arrays, about, previous=path.with_name(PREVIOUS))


def restore(folder: Path, state: Mapping[str, Array]) -> tuple[Position, list[EpochRecord]]:
    """Puts the newest good checkpoint in ``folder`` into ``state``, in place.

    Raises:
        StorageError: there is none, or it is of another network.
    """
    file = _newest(folder)
    wanted = [name for name in state if not name.startswith(GRADIENT)]
    for name in wanted:
        if (
            name not in file
            or file.shape(name) != state[name].shape
            or file.type_name(name) != _NAMES[state[name].dtype]
        ):
            raise StorageError(
                found=f"{file.path} cannot be loaded: {name} is missing or of another shape",
                expected="a checkpoint of this network and this optimiser",
                action="name the directory of a run of the same export",
            )
    for name in wanted:
        file.read_into(name, _bytes_of(state[name]))
    try:
        return Position(**file.state["position"]), [EpochRecord(**record) for record in file.state["history"]]
    except (KeyError, TypeError) as error:
        raise StorageError(
            found=f"{file.path} holds no position of a run",
            expected="a checkpoint of a run",
            action="start the run again",
        ) from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the exported step in ``folder`` says of itself.

    Raises:
        StorageError: there is none, or it is of another version.
    """
    path = folder / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        if manifest["version"] != 1:
            raise ValueError(f"version {manifest['version']}")
        return manifest
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise StorageError(
            found=f"{path} cannot be read: {reason}",
            expected="the directory that edgetrain export --format train-step wrote",
            action="name that directory, or export the run again",
        ) from error


def _bytes_of(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _newest(folder: Path) -> ArrayFile:
    try:
        return ArrayFile(folder / LAST)
    except StorageError as error:
        if not (folder / PREVIOUS).exists():
            raise
        _LOG.warning("%s; the one before it is used", error.found)
        return ArrayFile(folder / PREVIOUS)
