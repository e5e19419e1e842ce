"""Bytes that stay on disk and are read at a position.

Not memory-mapped on purpose: the pages of a map count in the resident size of the process, so an epoch
over a mapped CIFAR-10 (150 MB) would look like a budget broken by 150 MB. A read of one image costs about
two microseconds. What must be unpacked first (gzip, Parquet pages) is unpacked piece by piece into a
temporary file without a name; where the folder for temporary files is itself in memory, set ``TMPDIR``.
"""

from __future__ import annotations

import tempfile
import threading
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from edgetrain.errors import StorageError


class StoredBytes:
    """A read-only file that several threads may read.

    Attributes:
        size_bytes: of the whole file.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.size_bytes = file.seek(0, 2)
        self._file = file
        self._lock = threading.Lock()
        weakref.finalize(self, file.close)

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``; fewer where the file ends before."""
        with self._lock:
            self._file.seek(offset)
            return self._file.read(size)


def stored_file(path: Path) -> StoredBytes:
    """The bytes of an existing file."""
    return StoredBytes(path.open("rb", buffering=0))


def spooled(chunks: Iterable[bytes]) -> StoredBytes:
    """``chunks`` one after the other, in a temporary file that goes when the result does.

    Raises:
        StorageError: the file for them cannot be made or written.
    """
    try:
        file: IO[bytes] = tempfile.TemporaryFile(prefix="edgetrain-", buffering=0)  # noqa: SIM115 - StoredBytes closes it
    except OSError as error:
        raise _cannot_spool(error) from error
    stored = StoredBytes(file)
    for chunk in chunks:
        rest = memoryview(chunk)
        while len(rest):
            try:
                rest = rest[file.write(rest) :]
            except OSError as error:
                raise _cannot_spool(error) from error
    stored.size_bytes = file.tell()
    return stored


def _cannot_spool(error: OSError) -> StorageError:
    return StorageError(
        found=f"the unpacked data cannot be written to {tempfile.gettempdir()} ({error.strerror or error})",
        expected="space there for the encoded images",
        action="free some, or set TMPDIR to a folder on another disk",
    )
