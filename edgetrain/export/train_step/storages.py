"""What the storage of a tensor without data would hold: values of a graph, written and read through views.

torch works in place and through views; a graph knows neither. Each storage is followed as a flat row of elements in one
of three forms:

1. whole: one value, with the shape and strides in which it was written;
2. parts: it is seen as (outer, d, inner), and pieces of d one after the other are storages of their own;
3. filled: with one number, or with nothing yet.

A tensor is shape, strides and offset into the row. Sorted by stride its dimensions tell how the row is seen: the
quotient of two neighbouring strides is the extent that the inner one has there, of which it covers a range. A range of
one dimension is a part: halves of the channels, which a coupling works on, then stay values of their own and are joined
only where somebody reads the whole.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgetrain.export.train_step.graph import Graph, Value

_LEAST_PART = 0.2
"""Of a storage; what is read of it and smaller is cut out, and the storage stays whole."""


@dataclass(frozen=True)
class Place:
    """Shape, strides and offset of a tensor in its storage, in elements."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0


@dataclass(frozen=True)
class _Range:
    """``start`` to ``stop`` of an extent."""

    extent: int
    start: int
    stop: int

    @property
    def is_all(self) -> bool:
        return (self.start, self.stop) == (0, self.extent)


@dataclass(frozen=True)
class _Region:
    """A place as ranges of a dense row.

    Attributes:
        ranges: of the extents into which the row is seen, slowest first.
        order: for each dimension of the place that is neither 1 nor repeated, its position among the ranges.
    """

    ranges: tuple[_Range, ...]
    order: tuple[int, ...]


class UnknownPlaceError(Exception):
    """A view that is no ranges of dimensions."""


def region_of(place: Place, size: int) -> _Region:
    """``place`` in a row of ``size`` elements.

    Raises:
        UnknownPlaceError: it is no such thing.
    """
    real = [k for k, (n, s) in enumerate(zip(place.shape, place.strides, strict=True)) if n != 1 and s != 0]
    inner_last = sorted(real, key=lambda k: -place.strides[k])
    ranges, above, rest = [], size, place.offset
    for k in inner_last:
        stride, count = place.strides[k], place.shape[k]
        extent, start = above // stride, rest // stride
        if above % stride or start + count > extent:
            raise UnknownPlaceError(f"strides {place.strides} of shape {place.shape} in {size} elements")
        ranges.append(_Range(extent, start, start + count))
        above, rest = stride, rest % stride
    if above > 1:  # one element of what is left
        ranges.append(_Range(above, rest, rest + 1))
    return _Region(tuple(ranges), tuple(inner_last.index(k) for k in real))


@dataclass
class _Part:
    start: int
    stop: int
    storage: Storage


class Storage:
    """A row of ``size`` elements.

    Args:
        fill: the number that it is filled with; None: nothing yet.
    """

    def __init__(self, graph: Graph, size: int, dtype: np.dtype[Any], *, fill: float | None = None) -> None:
        self._graph, self.size, self.dtype = graph, size, dtype
        self._fill = fill
        self._whole: tuple[Value, Place] | None = None
        self._view: tuple[int, int, int] | None = None  # (outer, d, inner) that the parts divide
        self._parts: list[_Part] = []

    def read(self, place: Place, *, repeated: bool = True) -> Value:
        """The value at ``place``.

        Args:
            repeated: dimensions of stride 0 have their extent; else 1, for operators that repeat by themselves.
        """
        if self._whole is not None and self._whole[1] == place:
            return self._whole[0]
        region = region_of(place, self.size)
        value = self._ranges(region.ranges)
        covered = [r.stop - r.start for r in region.ranges]
        value = self._graph.reshape(value, [n for n, r in zip(covered, region.ranges, strict=True)])
        value = self._graph.transpose(value, [*region.order, *range(len(region.order), len(covered))])
        single = [1 if s == 0 else n for n, s in zip(place.shape, place.strides, strict=True)]
        value = self._graph.reshape(value, single)
        if self._whole is None and not self._parts and self._fill is not None:
            return value
        return self._graph.expand(value, place.shape) if repeated else value

    def write(self, place: Place, value: Value) -> None:
        """Puts ``value``, of the shape of ``place``, there."""
        region = region_of(place, self.size)
        if all(r.is_all for r in region.ranges):
            self._whole, self._view, self._parts, self._fill = (value, place), None, [], None
            return
        inverse = [region.order.index(k) for k in range(len(region.order))]
        dense = self._graph.reshape(value, [n for n in place.shape if n != 1])
        dense = self._graph.transpose(dense, inverse)
        self._write_ranges(region.ranges, dense)

    def flat(self) -> Value:
        """All of it, in the order of the row."""
        if self._parts:
            assert self._view is not None
            outer, _, inner = self._view
            pieces = [
                self._graph.reshape(part.storage.flat(), (outer, part.stop - part.start, inner)) for part in self._parts
            ]
            whole = self._graph.concat(pieces, 1)
            self._hold(whole)
            return whole
        if self._whole is None:
            if self._fill is None:
                raise UnknownPlaceError("memory is read that nothing was written to")
            return self._filled((self.size,))
        value, place = self._whole
        order = sorted(range(len(place.shape)), key=lambda k: (-place.strides[k], k))
        order = [k for k in order if place.shape[k] != 1]
        ones = [k for k in range(len(place.shape)) if place.shape[k] == 1]
        return self._graph.transpose(value, [*order, *ones])

    def _hold(self, value: Value) -> None:
        """``value`` is all of it, in the order of the row."""
        self._whole, self._view, self._parts, self._fill = (value, _dense(value.shape)), None, [], None

    def _filled(self, shape: Sequence[int]) -> Value:
        number = self._graph.constant(np.full((1,) * len(shape), self._fill), self.dtype)
        return self._graph.expand(number, shape)

    def _ranges(self, ranges: Sequence[_Range]) -> Value:
        """The elements in ``ranges``."""
        partial = [k for k, r in enumerate(ranges) if not r.is_all]
        if not partial:
            return self.flat()
        covered = math.prod(r.stop - r.start for r in ranges)
        if self._whole is None and not self._parts and self._fill is not None:
            return self._filled([r.stop - r.start for r in ranges])
        if self._parts or (len(partial) == 1 and partial[0] != 0 and covered >= _LEAST_PART * self.size):
            part = self._part(ranges, partial[0])
            if part is not None:
                k = partial[0]
                inside = [*ranges[:k], _Range(ranges[k].stop - ranges[k].start, 0, ranges[k].stop - ranges[k].start)]
                return part._ranges([*inside, *ranges[k + 1 :]])
        value = self._graph.reshape(self.flat(), [r.extent for r in ranges])
        for k in partial:
            value = self._graph.slice(value, k, ranges[k].start, ranges[k].stop)
        return value

    def _write_ranges(self, ranges: Sequence[_Range], value: Value) -> None:
        partial = [k for k, r in enumerate(ranges) if not r.is_all]
        if not partial:
            self._hold(value)
            return
        k = partial[0]
        part = self._part(ranges, k)
        if part is None:  # other parts stand in the way
            self.flat()
            part = self._part(ranges, k)
            assert part is not None
        length = ranges[k].stop - ranges[k].start
        part._write_ranges([*ranges[:k], _Range(length, 0, length), *ranges[k + 1 :]], value)

    def _part(self, ranges: Sequence[_Range], k: int) -> Storage | None:
        """The storage of range ``k`` of all others; None where the row is divided in another way."""
        outer = math.prod(r.extent for r in ranges[:k])
        inner = math.prod(r.extent for r in ranges[k + 1 :])
        view, wanted = (outer, ranges[k].extent, inner), ranges[k]
        if self._parts:
            if self._view != view:
                return None
            for part in self._parts:
                if (part.start, part.stop) == (wanted.start, wanted.stop):
                    return part.storage
            return None
        edges = sorted({0, wanted.start, wanted.stop, wanted.extent})
        pairs = list(itertools.pairwise(edges))
        parts = []
        empty = self._whole is None
        pieces: list[Value | None] = [None] * len(pairs) if empty else self._split(view, pairs)
        for (start, stop), piece in zip(pairs, pieces, strict=True):
            storage = Storage(self._graph, outer * (stop - start) * inner, self.dtype, fill=self._fill)
            if piece is not None:
                storage._hold(piece)
            parts.append(_Part(start, stop, storage))
        self._whole, self._view, self._parts, self._fill = None, view, parts, None
        return next(part.storage for part in parts if part.start == wanted.start and part.stop == wanted.stop)

    def _split(self, view: tuple[int, int, int], pairs: Sequence[tuple[int, int]]) -> list[Value | None]:
        value = self._graph.reshape(self.flat(), view)
        lengths = [stop - start for start, stop in pairs]
        shapes = [((view[0], length, view[2]), self.dtype) for length in lengths]
        places = self._graph.constant(lengths, np.int64)
        return [*self._graph.nodes("Split", [value, places], shapes, axis=1)]


def _dense(shape: Sequence[int]) -> Place:
    strides = [math.prod(shape[k + 1 :]) for k in range(len(shape))]
    return Place(tuple(shape), tuple(strides))
