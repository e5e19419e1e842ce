"""Parquet files of encoded images in the layout of the Hugging Face hub.

A column ``image`` (or ``img``) of {bytes, path}, or of plain bytes, and a column ``label`` (or ``fine_label``) of
integers. The names of the classes are in the file's ``huggingface`` metadata, else the numbers serve. Parquet
unpacks whole pages, which random access cannot use, so the encoded images (of the rows chosen) are copied once, a few
at a time, to a temporary file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from edgetrain.errors import DataError
from edgetrain.train.data.decode import decode_image, decoding_bytes, header_channels
from edgetrain.train.data.source import BrokenImage, Labels, Pixels, check_labels
from edgetrain.train.data.stored import spooled
from edgetrain.train.data.subset import Indices, stratified_indices
from edgetrain.units import MIB

_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "fine_label")
_ROWS_AT_ONCE = 64
_BYTES_AT_ONCE = 64 * MIB
_MOST_EXPANSION = 100  # of encoded images, which are compressed already
_SNIFFED = 16


class ParquetSource:
    """Encoded images in a temporary file.

    Args:
        files: in the order of their rows.
        train_files: those that say which classes there are, where the metadata do not.
        limit: how many images to take, stratified by class; None takes all.

    Raises:
        DataError: damaged file, missing column, label out of range.
        StorageError: no space for the temporary file.
    """

    def __init__(
        self, files: Sequence[Path], *, name: str, train_files: Sequence[Path], limit: int | None = None, seed: int = 0
    ) -> None:
        parts = [_labels(path) for path in files]
        labels = np.concatenate(parts)
        self.name = name
        self.classes = _classes(files[0], train_files, labels)
        for path, part in zip(files, parts, strict=True):
            check_labels(part, self.classes, path)
        self._rows: Indices = stratified_indices(labels, len(labels) if limit is None else limit, seed=seed)
        self.labels: Labels = labels[self._rows]
        self._files = list(files)
        self._starts = np.cumsum([0] + [len(part) for part in parts])
        sizes: list[int] = []
        self._stored = spooled(_encoded(files, self._rows, sizes))
        self._offsets = np.cumsum([0, *sizes])
        sniffed = range(0, len(self), max(1, len(self) // _SNIFFED))
        found = {header_channels(BytesIO(self._bytes(k))) for k in sniffed} - {None}
        self.channels = 1 if found == {1} else 3

    def __len__(self) -> int:
        return len(self.labels)

    def decode(self, index: int) -> Pixels:
        """Image ``index``, (h, w, c); raises BrokenImage."""
        return self._decoded(index, None)

    def decode_reduced(self, index: int, size: tuple[int, int]) -> Pixels:
        """Image ``index`` in ``size``, (height, width, c); raises BrokenImage."""
        return self._decoded(index, size)

    def decoding_bytes(self, index: int, size: tuple[int, int]) -> int:
        """Most bytes that :meth:`decode_reduced` takes, the encoded image included."""
        data = self._bytes(index)
        return len(data) + decoding_bytes(BytesIO(data), channels=self.channels, size=size)

    def _decoded(self, index: int, size: tuple[int, int] | None) -> Pixels:
        row = int(self._rows[index])
        k = int(np.searchsorted(self._starts, row, side="right")) - 1
        path = f"{self._files[k]} row {row - int(self._starts[k])}"
        data = self._bytes(index)
        if not data:
            raise BrokenImage(path, "the row holds no bytes")
        return decode_image(BytesIO(data), path=path, channels=self.channels, size=size)

    def _bytes(self, index: int) -> bytes:
        start, end = int(self._offsets[index]), int(self._offsets[index + 1])
        return self._stored.read(start, end - start)


def _encoded(files: Sequence[Path], rows: Indices, sizes: list[int]) -> Iterator[bytes]:
    """The bytes of the chosen (ascending) rows, some rows at a time; their sizes are appended to ``sizes``."""
    import pyarrow

    first = 0
    for path in files:
        file, column = _opened(path), _column(path, _IMAGE_COLUMNS, "images")
        is_struct = pyarrow.types.is_struct(file.schema_arrow.field(column).type)
        rows_at_once, most_bytes = _limits(path, file, column)
        try:
            for batch in file.iter_batches(
                rows_at_once, columns=[f"{column}.bytes" if is_struct else column], use_threads=False
            ):
                values = batch.column(0).field("bytes") if is_struct else batch.column(0)
                low, high = np.searchsorted(rows, (first, first + len(values)))
                chosen = [values[int(row) - first].as_py() or b"" for row in rows[low:high]]
                first += len(values)
                sizes.extend(len(data) for data in chosen)
                most_bytes -= sum(map(len, chosen))
                if most_bytes < 0:
                    raise _bomb(path, "its images unpack to more than eight times the size that its metadata say")
                yield b"".join(chosen)
        except (pyarrow.ArrowException, OSError) as error:
            raise _damaged(path, error) from error
    pyarrow.default_memory_pool().release_unused()


def _limits(path: Path, file: Any, column: str) -> tuple[int, int]:
    """How many rows to read at once, so that even a file that holds one image once and names it in every row unpacks
    little at a time; and the bytes beyond which it holds nothing but that.

    Raises:
        DataError: the images are packed as no images can be.
    """
    groups = [file.metadata.row_group(k) for k in range(file.metadata.num_row_groups)]
    chunks = [group.column(k) for group in groups for k in range(group.num_columns)]
    chunks = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] == column]
    for chunk in chunks:
        if chunk.total_uncompressed_size > _BYTES_AT_ONCE + _MOST_EXPANSION * chunk.total_compressed_size:
            raise _bomb(path, f"it unpacks {chunk.total_compressed_size} bytes to {chunk.total_uncompressed_size}")
    largest = max((chunk.total_uncompressed_size for chunk in chunks), default=0)
    rows = max(1, min(_ROWS_AT_ONCE, _BYTES_AT_ONCE // max(1, largest)))
    return rows, _BYTES_AT_ONCE + 8 * sum(chunk.total_uncompressed_size for chunk in chunks)


def _bomb(path: Path, reason: str) -> DataError:
    return DataError(
        found=f"{path}: {reason}", expected="encoded images", action="write the file again from the images"
    )


def _labels(path: Path) -> Labels:
    """All labels of a file, (n,); -1 for a missing one."""
    import pyarrow

    rows, size = _opened(path).metadata.num_rows, path.stat().st_size
    if rows > size:  # an image takes a byte at least
        raise _bomb(path, f"it declares {rows} rows in {size} bytes")
    column = _column(path, _LABEL_COLUMNS, "labels")
    kind = _opened(path).schema_arrow.field(column).type
    if not pyarrow.types.is_integer(kind):
        raise DataError(
            found=f"column {column} of {path} holds {kind}",
            expected="integers from 0 to the number of classes less 1",
            action="number the classes",
        )
    try:
        values = _opened(path).read(columns=[column], use_threads=False).column(0).cast(pyarrow.int64())
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from error
    return np.asarray(values.fill_null(-1).to_numpy(), dtype=np.int64)


def _classes(file: Path, train_files: Sequence[Path], labels: Labels) -> tuple[str, ...]:
    metadata = (_opened(file).schema_arrow.metadata or {}).get(b"huggingface", b"")
    try:
        features = json.loads(metadata)["info"]["features"]
        return tuple(str(name) for name in features[_column(file, _LABEL_COLUMNS, "labels")]["names"])
    except (TypeError, KeyError, ValueError):  # no metadata, or they name no classes
        known = np.concatenate([_labels(path) for path in train_files]) if train_files else labels
        return tuple(str(k) for k in range(int(known.max(initial=-1)) + 1))


def _column(path: Path, names: Sequence[str], what: str) -> str:
    schema = _opened(path).schema_arrow
    for name in names:
        if name in schema.names:
            return name
    raise DataError(
        found=f"{path} has the columns {', '.join(schema.names)}",
        expected=f"a column of {what} called {' or '.join(names)}",
        action="rename the column",
    )


def _opened(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(
        found=f"{path} cannot be read ({error})",
        expected="a whole Parquet file",
        action="copy or download the file again",
    )
