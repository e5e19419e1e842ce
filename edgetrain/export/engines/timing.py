"""The file in which a builder keeps the times it measured, so that the next build need not measure them again."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from edgetrain.files import write_atomically


class TimingCache:
    """A timing cache that is read before a build and written after it.

    Attributes:
        path: of the file; None: nothing is kept.
        notes: why it was not used, where it was not.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.notes: tuple[str, ...] = ()
        self._loaded = False

    def load(self, config: Any) -> None:
        """Gives the file's content to the builder's configuration; another release's or chip's is not used."""
        if self.path is None:
            return
        kept = self.path.read_bytes() if self.path.exists() else b""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", DeprecationWarning)
            cache = config.create_timing_cache(kept)
            taken = cache is not None and config.set_timing_cache(cache, False)
        if any("no-op" in str(warning.message) for warning in said):  # TensorRT for RTX has the calls alone
            self.notes = (f"{self.path.name} is not used: this builder times nothing, the device chooses its kernels",)
            return
        if not taken:
            self.notes = (f"{self.path.name} is of another release or chip: timed afresh",)
            config.set_timing_cache(config.create_timing_cache(b""), False)
        self._loaded = True

    def save(self, config: Any) -> None:
        """Writes what the builder measured, what was read included.

        Raises:
            StorageError: the disk is full or refuses.
        """
        if self.path is not None and self._loaded:
            write_atomically(self.path, bytes(config.get_timing_cache().serialize()))
