"""Maximum pooling that keeps a byte for each output.

For the backward pass torch's own keeps its input and, of each output, the position of the maximum in 8 bytes: in
float32 twice what the output takes. Here a byte for each output is kept, row and column of the maximum inside its
window, of which positions are made a slice of the batch at a time. Values and gradients are those of torch, bit for bit
but for the sign of a zero: among equal elements of a window the first counts, row by row.

On a CPU torch's kernel goes through each window element by element unless channels come last. Here windows are shifted
images, whose maximum is taken over columns first, then over rows, in k - 1 vector operations each. Measured on a core
of an AMD EPYC (Zen 4), forward and backward: 3x3 with stride 1 from 16 images of 192 x 28 x 28 takes 11 + 4 ms instead
of 54 + 2; 2x2 with stride 2 from 8 of 64 x 224 x 224 takes 27 + 62 instead of 151 + 58. Where channels come last, and
on CUDA, positions are torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from edgetrain.nn.layouts import laid_out_as, memory_format, new_like
from edgetrain.nn.slices import FINE_SLICE_BYTES, batch_slices, is_on_cuda, is_whole_batch

Extent = int | tuple[int, ...] | list[int]

_POSITIONAL = 6  # arguments of torch.max_pool2d, and of the one here
_ROW_SHIFT = 4
_ROW = 1 << _ROW_SHIFT  # what a row counts in a position; a column counts 1


def max_pool2d(
    x: Tensor,
    kernel_size: Extent,
    stride: Extent | None = None,
    padding: Extent = 0,
    dilation: Extent = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """As ``torch.nn.functional.max_pool2d`` on x (n, c, h, w), and its errors.

    Torch's operator runs where a byte does not do (windows of more than 16 rows or columns, or dilated ones), and
    inside :func:`edgetrain.nn.slices.whole_batch`. Of a window with a NaN the output is NaN; which of its elements gets
    the gradient is not defined.
    """
    moved = kernel_size if stride in (None, [], ()) else stride
    windows = _Windows(_pair(kernel_size), _pair(moved), _pair(padding), ceil_mode)
    fit = max(windows.kernel) <= _ROW and _pair(dilation) == [1, 1]
    if not fit or x.dim() != 4 or not x.is_floating_point() or is_whole_batch():
        return F.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode)
    if torch.is_grad_enabled() and x.requires_grad:
        y: Tensor = _MaxPool.apply(x, windows)
        return y
    return _pooled(x, windows, None)


def with_lean_pooling(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func(*args, **kwargs)``, by :func:`max_pool2d` if that is what it asks for."""
    if func is F.max_pool2d or func is torch.max_pool2d:
        known = {name: value for name, value in kwargs.items() if name != "return_indices"}
        if len(args) <= _POSITIONAL and not kwargs.get("return_indices"):
            x = known.pop("input") if not args else args[0]
            return max_pool2d(x, *args[1:], **known)
    return func(*args, **kwargs)


class _Windows(NamedTuple):
    """Rows and columns of a window, how far it moves, what surrounds the image."""

    kernel: list[int]
    stride: list[int]
    padding: list[int]
    ceil_mode: bool

    @property
    def arguments(self) -> tuple[list[int], list[int], list[int], list[int], bool]:
        """As torch's operators take them."""
        return self.kernel, self.stride, self.padding, [1, 1], self.ceil_mode


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, windows: _Windows) -> Tensor:
        positions = _new_outputs(x, windows, torch.uint8)
        ctx.save_for_backward(positions)
        ctx.shape, ctx.windows = x.shape, windows
        return _pooled(x, windows, positions)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (positions,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # this gradient is to be differentiated too
            index = _index(positions, *_firsts(positions, ctx.windows, ctx.shape[3])).flatten(2)
            planes = dy.new_zeros((*ctx.shape[:2], ctx.shape[2] * ctx.shape[3]))
            return planes.scatter_add(2, index, dy.flatten(2)).view(ctx.shape), None
        dx, dy = new_like(positions, ctx.shape, dtype=dy.dtype), laid_out_as(dy, positions)
        firsts = _firsts(positions, ctx.windows, ctx.shape[3])
        for s in batch_slices(dx, FINE_SLICE_BYTES):
            index = _index(positions[s], *firsts)
            torch.ops.aten.max_pool2d_with_indices_backward.grad_input(
                dy[s], dx[s], *ctx.windows.arguments, index, grad_input=dx[s]
            )
        return dx, None


def _pooled(x: Tensor, windows: _Windows, positions: Tensor | None) -> Tensor:
    """The maxima (n, c, oh, ow) of ``x``; where they stand goes into ``positions`` (uint8) of the same shape."""
    y = _new_outputs(x, windows, x.dtype)
    by_shifts = not is_on_cuda(x) and memory_format(x) == torch.contiguous_format
    for s in batch_slices(x, FINE_SLICE_BYTES):
        pool = _pool_by_shifts if by_shifts else _pool_by_index
        pool(x[s], windows, y[s], None if positions is None else positions[s])
    return y


def _pool_by_shifts(x: Tensor, windows: _Windows, y: Tensor, positions: Tensor | None) -> None:
    """Later columns, then later rows, take the place of what was found before where they are larger.

    While they do, positions only grow: the largest is that of the last one.
    """
    (rows, columns), (down, right) = y.shape[2:], windows.stride
    shifted = _shifts(_padded(x, windows, y), 3, windows.kernel[1], right, columns)
    found = shifted[0]
    places = None if positions is None else torch.zeros_like(found, dtype=torch.uint8)
    for k, candidate in enumerate(shifted[1:], 1):
        if places is not None:
            torch.maximum(places, (candidate > found).view(torch.uint8).mul_(k), out=places)
        found = torch.maximum(found, candidate) if k == 1 else torch.maximum(found, candidate, out=found)
    shifted = _shifts(found, 2, windows.kernel[0], down, rows)
    found = shifted[0]
    if positions is not None and places is not None:
        placed = _shifts(places, 2, windows.kernel[0], down, rows)
        positions.copy_(placed[0])
    for k, candidate in enumerate(shifted[1:], 1):
        if positions is not None:
            torch.maximum(positions, (candidate > found).view(torch.uint8).mul_(placed[k] + k * _ROW), out=positions)
        found = torch.maximum(found, candidate, out=y)
    if len(shifted) == 1:
        y.copy_(found)
    if positions is not None:  # windows of nothing but -inf: their first element inside the image
        for k in range(min(rows, -(-windows.padding[0] // down))):
            positions[:, :, k].clamp_(min=_ROW * (windows.padding[0] - k * down))
        for k in range(min(columns, -(-windows.padding[1] // right))):
            column, least = positions[..., k], windows.padding[1] - k * right
            column.add_((least - (column & (_ROW - 1)).to(torch.int8)).clamp_(min=0).to(torch.uint8))


def _pool_by_index(x: Tensor, windows: _Windows, y: Tensor, positions: Tensor | None) -> None:
    """From torch's own positions, each row * width + column."""
    values, index = torch.ops.aten.max_pool2d_with_indices.default(x, *windows.arguments)
    y.copy_(values)
    if positions is not None:
        tops, lefts, width = *_corners(y, windows), x.shape[3]
        index = index.to(torch.int32).sub_((tops * width).to(torch.int32))  # row in the window * width + column
        places = index - lefts.to(torch.int32)
        for k in range(1, windows.kernel[0]):
            places.add_((index >= k * width).to(torch.int32), alpha=_ROW - width)
        positions.copy_(places)


def _new_outputs(x: Tensor, windows: _Windows, dtype: torch.dtype) -> Tensor:
    """(n, c, oh, ow), laid out as ``x``: torch says how large, and what is wrong with the windows."""
    nothing = torch.ops.aten.max_pool2d_with_indices.default(x.detach()[:0], *windows.arguments)[0]
    return new_like(x, (x.shape[0], *nothing.shape[1:]), dtype=dtype)


def _padded(x: Tensor, windows: _Windows, y: Tensor) -> Tensor:
    """``x`` with -inf around it, as far as the windows of ``y`` reach."""
    sides: list[int] = []
    for dim in (3, 2):
        before, stride, kernel = windows.padding[dim - 2], windows.stride[dim - 2], windows.kernel[dim - 2]
        sides += [before, max(0, (y.shape[dim] - 1) * stride + kernel - before - x.shape[dim])]
    return torch.constant_pad_nd(x, sides, -torch.inf) if any(sides) else x


def _shifts(x: Tensor, dim: int, kernel: int, stride: int, count: int) -> list[Tensor]:
    """The k-th element of each of ``count`` windows along ``dim``, for each k; views of ``x``."""
    before = (slice(None),) * dim
    return [x[(*before, slice(k, k + (count - 1) * stride + 1, stride))] for k in range(kernel)]


def _firsts(y: Tensor, windows: _Windows, width: int) -> tuple[Tensor, int]:
    """Position of each window's first element in an image, row * width + column, (oh, ow); and the width."""
    tops, lefts = _corners(y, windows)
    return (tops * width + lefts).to(torch.int32), width


def _index(positions: Tensor, firsts: Tensor, width: int) -> Tensor:
    """Positions in images that are ``width`` wide, as torch counts them, from those in the windows."""
    rows = (positions >> _ROW_SHIFT).to(torch.int32)
    return rows.mul_(width - _ROW).add_(positions.to(torch.int32)).add_(firsts).to(torch.int64)


def _corners(y: Tensor, windows: _Windows) -> tuple[Tensor, Tensor]:
    """Row (oh, 1) and column (ow,) of each window's first element."""
    (tops, lefts) = (
        torch.arange(y.shape[2 + k], device=y.device) * windows.stride[k] - windows.padding[k] for k in range(2)
    )
    return tops.view(-1, 1), lefts


def _pair(value: Extent) -> list[int]:
    if isinstance(value, int):
        return [value, value]
    return [value[0], value[-1]]
