"""A file of arrays and JSON that is whole or absent and proves it: safetensors with a digest over everything.

The format is eight bytes with the length of a JSON header, the header (dtype, shape and place of every array, and
metadata), then the arrays' bytes. The metadata hold ``format``, ``state`` (JSON as a text) and ``sha256``: the SHA-256
of the file as it would be with 64 zeros in the place of the digest. Nothing is pickled.

Written and read here, array by array; any safetensors library can read it too. The library's writer makes two copies
of the whole state, its reader maps the whole file as writable memory: inside a memory cap both count. Only bytes are
known here, so that it serves with and without PyTorch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from edgetrain.errors import StorageError
from edgetrain.files import write_atomically
from edgetrain.units import MIB

FORMAT_VERSION = "2"
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Bytes of an element, by the format's names of types."""
_NO_DIGEST = "0" * 64
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class Stored:
    """An array on its way into a file.

    Attributes:
        dtype: one of :data:`ITEM_BYTES`.
        content: its bytes, in order.
    """

    dtype: str
    shape: tuple[int, ...]
    content: memoryview


def write_array_file(
    path: Path, arrays: Mapping[str, Stored], state: Mapping[str, Any], *, previous: Path | None = None
) -> None:
    """Writes ``arrays`` and ``state``, which JSON can hold, to ``path``.

    Args:
        previous: see :func:`write_atomically`.

    Raises:
        StorageError: see :func:`write_atomically`.
    """
    header: dict[str, Any] = {
        "__metadata__": {"sha256": _NO_DIGEST, "format": FORMAT_VERSION, "state": json.dumps(state, allow_nan=False)}
    }
    place = 0
    for name, array in arrays.items():
        size = array.content.nbytes
        header[name] = {"dtype": array.dtype, "shape": list(array.shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(begin)
    for array in arrays.values():
        digest.update(array.content)
    proven = begin.replace(_NO_DIGEST.encode(), digest.hexdigest().encode(), 1)  # the metadata come first

    def content() -> Iterator[bytes | memoryview]:
        yield proven
        yield from (array.content for array in arrays.values())

    write_atomically(path, content(), previous=previous)


class ArrayFile:
    """A file of :func:`write_array_file`, verified when it is opened; arrays are read when they are asked for.

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
        """Shape of the array ``name``."""
        return tuple(self._header[name]["shape"])

    def type_name(self, name: str) -> str:
        """Type of the array ``name``, one of :data:`ITEM_BYTES`."""
        return str(self._header[name]["dtype"])

    def read_into(self, name: str, rest: memoryview, *, first: int = 0) -> None:
        """Fills ``rest`` with the bytes of the array ``name`` from the byte ``first`` on; there must be enough.

        Raises:
            StorageError: the file was cut since it was opened.
        """
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


def _read_header(file: BufferedReader, size: int) -> tuple[dict[str, Any], int]:
    """The header as a value, and where the tensors' bytes start."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
        raise ValueError("it is cut off, or no safetensors file")
    header: dict[str, Any] = json.loads(file.read(length))
    return header, 8 + length


def _digest(file: BufferedReader, start: int, stored: str) -> str:
    """What the digest should be; read in pieces of 1 MiB."""
    file.seek(0)
    found = hashlib.sha256(file.read(start).replace(stored.encode(), _NO_DIGEST.encode(), 1))
    buffer = bytearray(MIB)
    while count := file.readinto(buffer):
        found.update(memoryview(buffer)[:count])
    return found.hexdigest()


def _check_entry(name: str, entry: dict[str, Any], available: int) -> None:
    first, end = entry["data_offsets"]
    numbers = [first, end, *entry["shape"]]
    if not all(type(number) is int and number >= 0 for number in numbers) or entry["dtype"] not in ITEM_BYTES:
        raise ValueError(f"{name} is no array of a known type")
    if end > available or end - first != math.prod(entry["shape"]) * ITEM_BYTES[entry["dtype"]]:
        raise ValueError(f"{name} has another size than its shape says")
