"""Files that are whole or absent: written under another name, synced, then renamed; and the digest of one."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from edgetrain.errors import StorageError


def write_atomically(path: Path, content: bytes | Iterable[bytes | memoryview]) -> None:
    """Writes ``content``, in one piece or several, to ``path``: a reader sees the old file or the new one.

    Raises:
        StorageError: the disk is full or refuses; what was there before is still there.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            for piece in [content] if isinstance(content, bytes) else content:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise StorageError(
            found=f"{path} could not be written: {error.strerror or error}",
            expected="free, writable disk",
            action="free some space or choose another --out; what was saved before is intact",
        ) from error
    finally:  # whatever happened, Ctrl-C included; after the rename there is nothing to remove
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
