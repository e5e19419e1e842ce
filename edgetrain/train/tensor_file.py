"""Tensors in a file of :mod:`edgetrain.array_file`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgetrain.array_file import ArrayFile, Stored, write_array_file
from edgetrain.errors import StorageError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def write_tensor_file(
    path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, previous: Path | None = None
) -> None:
    """Writes ``tensors``, contiguous and on the CPU, and ``state``, which JSON can hold, to ``path``.

    Args:
        previous: see :func:`edgetrain.files.write_atomically`.

    Raises:
        StorageError: see :func:`edgetrain.files.write_atomically`.
    """
    arrays = {
        name: Stored(_NAMES[tensor.dtype], tuple(tensor.shape), _bytes_of(tensor)) for name, tensor in tensors.items()
    }
    write_array_file(path, arrays, state, previous=previous)


class TensorFile(ArrayFile):
    """A file of :func:`write_tensor_file`, whose tensors are read when they are asked for."""

    def dtype(self, name: str) -> torch.dtype:
        """Type of the tensor ``name``."""
        return _DTYPES[self.type_name(name)]

    def tensor(self, name: str) -> Tensor:
        """The tensor ``name``, on the CPU.

        Raises:
            StorageError: the file was cut since it was opened.
        """
        tensor = torch.empty(self.shape(name), dtype=self.dtype(name))
        self.read_into(name, _bytes_of(tensor))
        return tensor

    def rows(self, name: str, indices: Tensor) -> Tensor:
        """Some of the tensor ``name``: those at ``indices`` (n,) of its first dimension, on the CPU.

        Raises:
            StorageError: as :meth:`tensor`, or there is no such row.
        """
        count, *shape = self.shape(name)
        tensor = torch.empty((len(indices), *shape), dtype=self.dtype(name))
        row_bytes = math.prod(shape) * tensor.element_size()
        for k, index in enumerate(indices.tolist()):
            if not 0 <= index < count:
                raise StorageError(
                    found=f"row {index} of {name} in {self.path}, which has {count}",
                    expected="a row that was written",
                    action="make the file again",
                )
            self.read_into(name, _bytes_of(tensor[k]), first=index * row_bytes)
        return tensor

    def copy_to(self, name: str, place: Tensor) -> None:
        """Puts the tensor ``name`` into ``place``, of its shape and type; without a copy where that is possible.

        Raises:
            StorageError: as :meth:`tensor`.
        """
        if place.is_cpu and place.is_contiguous():
            self.read_into(name, _bytes_of(place.detach()))
        else:
            place.copy_(self.tensor(name))


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
