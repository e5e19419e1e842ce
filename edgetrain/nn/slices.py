"""Walking through a batch in slices, so that what is temporary stays small.

Convolutions, activations and normalisation with given statistics act on each sample alone. Doing them on a
few samples at a time bounds their temporaries (outputs, layout copies inside oneDNN or cuDNN) by a constant,
whatever the batch. Slices that are too small cost speed: measured on two cores of an AMD EPYC (Zen 4) with
3x3 convolutions of 8 to 256 channels, slices of 1 MiB run within 10 % of the whole batch, of 2 MiB within 5 %.

Who follows a step on tensors without data need not walk through all slices (:func:`abridged_slices`). Slices of equal
size do the same to memory from the same state, and a body leaves what it made last and what it adds up: after the
first slice these may be one tensor, after the second they are two, and from then on nothing changes. So the third
slice, which begins as every later one does, stands for all that are full, and the rest of the batch comes after it as
it would after the last of them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from edgetrain.units import MIB

SLICE_BYTES = 2 * MIB
"""Size of one slice of one tensor, for work with few temporaries."""

FINE_SLICE_BYTES = MIB
"""The same for work that has many at once."""

CUDA_FACTOR = 8
"""A CUDA device keeps busy only with larger slices."""

_ABRIDGED = 3  # full slices that an abridged walk shows


@dataclass
class _Walk:
    on_cuda: bool
    weight: int = 1


_abridged: ContextVar[_Walk | None] = ContextVar("edgetrain_abridged_slices", default=None)
_whole: ContextVar[bool] = ContextVar("edgetrain_whole_batch", default=False)


@contextlib.contextmanager
def whole_batch() -> Iterator[None]:
    """Inside, :func:`batch_slices` gives the whole batch as one slice: a graph is written of it, not of its slices."""
    token = _whole.set(True)
    try:
        yield
    finally:
        _whole.reset(token)


def is_whole_batch() -> bool:
    """True inside of :func:`whole_batch`."""
    return _whole.get()


@contextlib.contextmanager
def abridged_slices(device: Literal["cpu", "cuda"] = "cpu") -> Iterator[None]:
    """Inside, :func:`batch_slices` shows three full slices at most, and the rest: for tensors without data only.

    Args:
        device: kind of the one whose tensors those without data stand for, :func:`is_on_cuda`.
    """
    token = _abridged.set(_Walk(device == "cuda"))
    try:
        yield
    finally:
        _abridged.reset(token)


def is_on_cuda(x: Tensor) -> bool:
    """Whether ``x`` is on a CUDA device, or stands for one that is."""
    walk = _abridged.get()
    return x.is_cuda or (walk is not None and walk.on_cuda)


def slice_weight() -> int:
    """How many times what runs now would run if all slices were shown; 1 outside of :func:`abridged_slices`."""
    walk = _abridged.get()
    return 1 if walk is None else walk.weight


def batch_slices(x: Tensor, slice_bytes: int = SLICE_BYTES) -> Iterator[slice]:
    """Slices of the first dimension of ``x`` that hold at most ``slice_bytes``, and at least one sample, each."""
    n = x.shape[0]
    if n == 0:
        return
    if _whole.get():
        yield slice(0, n)
        return
    sample_bytes = max(1, math.prod(x.shape[1:]) * x.element_size())
    step = max(1, (CUDA_FACTOR if is_on_cuda(x) else 1) * slice_bytes // sample_bytes)
    walk = _abridged.get()
    if walk is None:
        for start in range(0, n, step):
            yield slice(start, min(start + step, n))
        return
    full, outside = n // step, walk.weight
    for k in range(min(full, _ABRIDGED)):
        walk.weight = outside * (full - k if k + 1 == _ABRIDGED else 1)
        yield slice(k * step, (k + 1) * step)
        walk.weight = outside
    if n % step:
        yield slice(full * step, n)
