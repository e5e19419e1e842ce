"""A file of tensors and JSON that is whole or absent and proves it: safetensors with a digest over everything.

The format is eight bytes with the length of a JSON header, the header (dtype, shape and place of every tensor, and
metadata), then the tensors' bytes. The metadata hold ``format``, ``state`` (JSON as a text) and ``sha256``: the SHA-256
of the file as it would be with 64 zeros in the place of the digest. Nothing is pickled.

Written and read here, tensor by tensor; any safetensors library can read it too. The library's writer makes two copies
of the whole state, its reader maps the whole file as writable memory: inside a memory cap both count.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from edgetrain.errors import StorageError
from edgetrain.files import write_atomically
from edgetrain.units import MIB

FORMAT_VERSION = "2"
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
_NO_DIGEST = "0" * 64
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


def write_tensor_file(
    path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, previous: Path | None = None
) -> None:
    """Writes ``tensors``, contiguous and on the CPU, and ``state``, which JSON can hold, to ``path``.

    Args:
        previous: see :func:`write_atomically`.

    Raises:
        StorageError: see :func:`write_atomically`.
    """
    header: dict[str, Any] = {
        "__metadata__": {"sha256": _NO_DIGEST, "format": FORMAT_VERSION, "state": json.dumps(state, allow_nan=False)}
    }
    place = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, place + size],
        }
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(begin)
    for piece in _pieces(tensors):
        digest.update(piece)
    proven = begin.replace(_NO_DIGEST.encode(), digest.hexdigest().encode(), 1)  # the metadata come first

    def content() -> Iterator[bytes | memoryview]:
        yield proven
        yield from _pieces(tensors)

    write_atomically(path, content(), previous=previous)


class TensorFile:
    """A file of :func:`write_tensor_file`, verified when it is opened; tensors are read when they are asked for.

    Attributes:
        path: of the file.
        state: what was given as ``state``.

    Raises:
        StorageError: it is missing, damaged, or something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                self._header, self._start = _read_header(file, size)
                metadata = self._header.pop("__metadata__")
                if metadata["format"] != FORMAT_VERSION:
                    raise ValueError(f"it has format {metadata['format']}, not {FORMAT_VERSION}")
                if _digest(file, self._start, metadata["sha256"]) != metadata["sha256"]:
                    raise ValueError("its digest does not match its content")
                self.state: dict[str, Any] = json.loads(metadata["state"])
            for name, entry in self._header.items():
                _check_entry(name, entry, size - self._start)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else getattr(error, "strerror", None) or error
            raise StorageError(
                found=f"{path} cannot be read: {reason}",
                expected="a whole checkpoint of edgetrain",
                action="name another checkpoint, or train again",
            ) from error

    def __contains__(self, name: str) -> bool:
        return name in self._header

    def names(self, prefix: str) -> list[str]:
        """The names that begin with ``prefix``, without it."""
        return [name[len(prefix) :] for name in self._header if name.startswith(prefix)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor ``name``."""
        return tuple(self._header[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        """Type of the tensor ``name``."""
        return _DTYPES[self._header[name]["dtype"]]

    def tensor(self, name: str) -> Tensor:
        """The tensor ``name``, on the CPU.

        Raises:
            StorageError: the file was cut since it was opened.
        """
        tensor = torch.empty(self.shape(name), dtype=self.dtype(name))
        self._read(name, _bytes_of(tensor))
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
            self._read(name, _bytes_of(tensor[k]), first=index * row_bytes)
        return tensor

    def copy_to(self, name: str, place: Tensor) -> None:
        """Puts the tensor ``name`` into ``place``, of its shape and type; without a copy where that is possible.

        Raises:
            StorageError: as :meth:`tensor`.
        """
        if place.is_cpu and place.is_contiguous():
            self._read(name, _bytes_of(place.detach()))
        else:
            place.copy_(self.tensor(name))

    def _read(self, name: str, rest: memoryview, *, first: int = 0) -> None:
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._start + self._header[name]["data_offsets"][0] + first)
            while len(rest):
                count = file.readinto(rest)
                if not count:
                    raise StorageError(
                        found=f"{self.path} ends inside {name}",
                        expected="a file that nobody writes to",
                        action="name another checkpoint",
                    )
                rest = rest[count:]


def _pieces(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    for tensor in tensors.values():
        yield _bytes_of(tensor)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _read_header(file: IO[bytes], size: int) -> tuple[dict[str, Any], int]:
    """The header as a value, and where the tensors' bytes start."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
        raise ValueError("it is cut off, or no safetensors file")
    header: dict[str, Any] = json.loads(file.read(length))
    return header, 8 + length


def _digest(file: IO[bytes], start: int, stored: str) -> str:
    """What the digest should be; read in pieces of 1 MiB."""
    file.seek(0)
    found = hashlib.sha256(file.read(start).replace(stored.encode(), _NO_DIGEST.encode(), 1))
    buffer = bytearray(MIB)
    while count := file.readinto(buffer):  # type: ignore[attr-defined]
        found.update(memoryview(buffer)[:count])
    return found.hexdigest()


def _check_entry(name: str, entry: dict[str, Any], available: int) -> None:
    first, end = entry["data_offsets"]
    numbers = [first, end, *entry["shape"]]
    if not all(type(number) is int and number >= 0 for number in numbers) or entry["dtype"] not in _DTYPES:
        raise ValueError(f"{name} is no tensor of a known type")
    if end > available or end - first != math.prod(entry["shape"]) * _DTYPES[entry["dtype"]].itemsize:
        raise ValueError(f"{name} has another size than its shape says")
