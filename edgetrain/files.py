"""Files that are whole or absent: written under another name, synced, then renamed; and the digest of one."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from edgetrain.errors import StorageError


def write_atomically(
    path: Path, content: bytes | Iterable[bytes | memoryview], *, previous: Path | None = None
) -> None:
    """Writes ``content``, in one piece or several, to ``path``: a reader sees the old file or the new one.

    Args:
        previous: in the same folder; gets what was at ``path``, once the new file is whole on the disk.

    Raises:
        StorageError: the disk is full or refuses; what was there before is still there.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # a new file always: through a link of that name, in a folder from elsewhere, another file would be written
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as file:
            for piece in [content] if isinstance(content, bytes) else content:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None:
            _keep(path, previous)
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


def _keep(path: Path, previous: Path) -> None:
    """Gives ``path`` the further name ``previous``; a file system without links (FAT) moves it."""
    if not path.exists():
        return
    link = previous.with_name(f".{previous.name}.partial")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:
        os.replace(path, previous)
    else:
        os.replace(link, previous)
        link.unlink(missing_ok=True)  # a rename onto another name of the same file does nothing
