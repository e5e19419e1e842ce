"""What the operators of layers give: convolution, batch norm, pooling, matrix product, loss.

As :mod:`edgetrain.chain.fake_rules`, of which this is a part: a rule gives the form of the result, a list of forms
where there are several, or None for a case that it does not know, a wrong one included, for torch to complain of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Form = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Shape, strides and element type of a tensor."""

Forms = Form | list[Form | None] | None
Rule = Callable[..., Forms]

aten = torch.ops.aten

_FULL = torch.float32, torch.float64


def form_of(tensor: Tensor) -> Form:
    """The form of ``tensor``."""
    return tensor.shape, tensor.stride(), tensor.dtype


def rows(shape: Sequence[int], dtype: torch.dtype) -> Form:
    """Row by row."""
    return tuple(shape), tuple(math.prod(max(1, k) for k in shape[d + 1 :]) for d in range(len(shape))), dtype


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill a piece of memory, in whatever order."""
    filled = 1
    for stride, extent in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if extent != 1 and stride != filled:
            return False
        filled *= extent
    return True


def convolution_forms(func: Any, args: Sequence[Any], layout: torch.memory_format) -> Forms:
    """Of a convolution of images or its gradients, which come in ``layout``."""
    if func is aten.convolution_backward.default:
        dy, x, weight, bias_sizes, *_, mask = args
        made = [_laid_out(x.shape, layout, dy.dtype), _laid_out(weight.shape, layout, dy.dtype)]
        found: list[Form | None] = [*made, None if bias_sizes is None else rows(bias_sizes, dy.dtype)]
        return [form if wanted else None for form, wanted in zip(found, mask, strict=True)]
    x, weight, bias, *windows, transposed, _, groups = args
    tensors = [x, weight] if bias is None else [x, weight, bias]
    fitting = x.dim() == 4 and x.shape[1] == weight.shape[1] * groups and weight.shape[0] % groups == 0
    if transposed or not fitting or len({t.dtype for t in tensors}) > 1 or any(len(pair) != 2 for pair in windows):
        return None
    extents = _windows(x.shape[2:], weight.shape[2:], *windows)
    return None if min(extents) < 1 else _laid_out((x.shape[0], weight.shape[0], *extents), layout, x.dtype)


def _laid_out(shape: Sequence[int], layout: torch.memory_format, dtype: torch.dtype) -> Form:
    if layout == torch.contiguous_format:
        return rows(shape, dtype)
    _, c, h, w = shape
    return tuple(shape), (c * h * w, 1, c * w, c), dtype


def _windows(
    extents: Sequence[int],
    window: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """How many places a window has in each direction."""
    return [
        (extent + 2 * p - d * (k - 1) - 1) // s + 1
        for extent, k, s, p, d in zip(extents, window, stride, padding, dilation, strict=True)
    ]


def _batch_norm(x: Tensor, *arguments: Any) -> Forms:
    if x.dtype not in _FULL or not is_dense(x):
        return None
    saved = rows((x.shape[1] if arguments[4] else 0,), x.dtype)  # frozen statistics are not saved
    return [form_of(x), saved, saved]


def _batch_norm_backward(dy: Tensor, x: Tensor, *arguments: Any) -> Forms:
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    if x.dtype not in _FULL or form_of(dy) != form_of(x) or not x.is_contiguous():
        return None
    if any(t.dtype != x.dtype for t in tensors):
        return None
    of_channels = rows(x.shape[1:2], x.dtype)
    forms = form_of(x), of_channels, of_channels
    return [form if wanted else None for form, wanted in zip(forms, arguments[-1], strict=True)]


def _max_pool(
    x: Tensor,
    window: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
) -> Forms:
    pairs = window, stride or window, padding, dilation
    if x.dim() != 4 or not x.is_contiguous() or ceil_mode or any(len(pair) != 2 for pair in pairs):
        return None
    extents = _windows(x.shape[2:], *pairs)
    if min(extents) < 1 or any(2 * p > k for p, k in zip(padding, window, strict=True)):
        return None
    shape = *x.shape[:2], *extents
    return [rows(shape, x.dtype), rows(shape, torch.int64)]


def _max_pool_backward(dy: Tensor, x: Tensor, *_: Any) -> Forms:
    return form_of(x) if x.is_contiguous() and dy.is_contiguous() and dy.dtype == x.dtype else None


def _product(left: Tensor, right: Tensor) -> Forms:
    if left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[0] or left.dtype != right.dtype:
        return None
    return rows((left.shape[0], right.shape[1]), left.dtype)


def _product_and_bias(bias: Tensor, left: Tensor, right: Tensor) -> Forms:
    fitting = bias.dim() == 1 and bias.dtype == left.dtype and bias.shape[0] == right.shape[-1]
    return _product(left, right) if fitting else None


def _log_loss(y: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignored: int) -> Forms:
    if y.dim() != 2 or target.shape != y.shape[:1] or weight is not None or reduction == 0:
        return None
    return [rows((), y.dtype), rows((), y.dtype)]


def _log_loss_backward(dy: Tensor, y: Tensor, *_: Any) -> Forms:
    return form_of(y) if y.dim() == 2 and y.is_contiguous() and dy.dtype == y.dtype and dy.dim() == 0 else None


def _log_softmax(x: Tensor, dim: int, half_to_float: bool) -> Forms:
    return form_of(x) if x.is_contiguous() and x.dtype in _FULL and not half_to_float else None


def _log_softmax_backward(dy: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Forms:
    return form_of(y) if form_of(dy) == form_of(y) and y.is_contiguous() and dtype == y.dtype else None


LAYER_RULES: dict[Any, Rule] = {
    aten.native_batch_norm.default: _batch_norm,
    aten.native_batch_norm_backward.default: _batch_norm_backward,
    aten.max_pool2d_with_indices.default: _max_pool,
    aten.max_pool2d_with_indices_backward.default: _max_pool_backward,
    aten.mm.default: _product,
    aten.addmm.default: _product_and_bias,
    aten._log_softmax.default: _log_softmax,
    aten._log_softmax_backward_data.default: _log_softmax_backward,
    aten.nll_loss_forward.default: _log_loss,
    aten.nll_loss_backward.default: _log_loss_backward,
}
