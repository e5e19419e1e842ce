"""Batch norm as torch's kernels compute it, and its gradient.

y = w (x - mean) invstd + b;   sums over all but the channels:  db = sum dy,  dw = sum dy xhat,
dx = w invstd (dy - db / m - xhat dw / m) with the batch's statistics, w invstd dy with given ones
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from edgetrain.export.train_step.graph import Value
from edgetrain.export.train_step.recorder import Recorder, rule
from edgetrain.export.train_step.rules.elementwise import binary, unary


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training")
def _batch_norm(
    r: Recorder, out: Sequence[Tensor], x: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any
) -> Any:
    *running, momentum, eps = rest
    training = bool(running.pop()) if len(running) in (1, 3) else False
    value = r.value(x)
    if training:
        mean, var = _moments(r, value)
        for tensor, new in zip(running, (mean, _unbiased(r, var, value)), strict=False):
            if tensor is not None:
                _move(r, tensor, new, momentum)
    else:
        mean, var = r.value(running[0]), r.value(running[1])
    invstd = unary(r, "Reciprocal", unary(r, "Sqrt", binary(r, "Add", var, r.number(eps, var.dtype))))
    factor = invstd if weight is None else binary(r, "Mul", r.value(weight), invstd)
    offset = unary(r, "Neg", binary(r, "Mul", factor, mean))
    if bias is not None:
        offset = binary(r, "Add", offset, r.value(bias))
    scaled = binary(r, "Mul", value, _per_channel(r, factor, x.dim()))
    y = binary(r, "Add", scaled, _per_channel(r, offset, x.dim()))
    return (y, mean, invstd) if training else (y, None, None)


@rule("native_batch_norm_backward")
def _batch_norm_backward(
    r: Recorder,
    out: Sequence[Tensor | None],
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    save_mean: Tensor | None,
    save_invstd: Tensor | None,
    train: bool,
    eps: float,
    mask: Sequence[bool],
) -> tuple[Value | None, ...]:
    gradient, value, rank = r.value(dy), r.value(x), x.dim()
    if train:
        assert save_mean is not None
        assert save_invstd is not None
        mean, invstd = r.value(save_mean), r.value(save_invstd)
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, var = r.value(running_mean), r.value(running_var)
        invstd = unary(r, "Reciprocal", unary(r, "Sqrt", binary(r, "Add", var, r.number(eps, var.dtype))))
    scale = None if weight is None else r.value(weight)
    total = weighted = dx = None
    if mask[1] or mask[2] or (train and mask[0]):
        total, weighted = _sums(r, value, gradient, mean, invstd)
    if mask[0]:
        factor = invstd if scale is None else binary(r, "Mul", scale, invstd)
        dx = binary(r, "Mul", gradient, _per_channel(r, factor, rank))
        if train:
            assert total is not None
            assert weighted is not None
            count = r.number(value.size // value.shape[1], value.dtype)
            slope = unary(
                r, "Neg", binary(r, "Div", binary(r, "Mul", binary(r, "Mul", factor, invstd), weighted), count)
            )
            offset = binary(r, "Div", binary(r, "Mul", factor, total), count)
            offset = unary(r, "Neg", binary(r, "Add", offset, binary(r, "Mul", slope, mean)))
            correction = binary(r, "Mul", value, _per_channel(r, slope, rank))
            dx = binary(r, "Add", binary(r, "Add", dx, correction), _per_channel(r, offset, rank))
    return dx, weighted, total


def _sums(r: Recorder, x: Value, dy: Value, mean: Value, invstd: Value) -> tuple[Value, Value]:
    """``(sum dy, sum dy (x - mean) invstd)``, each (c,)."""
    axes = _axes(x)
    centred = binary(r, "Sub", x, _per_channel(r, mean, len(x.shape)))
    weighted = r.graph.sum(binary(r, "Mul", centred, dy), axes, keepdims=False)
    return r.graph.sum(dy, axes, keepdims=False), binary(r, "Mul", weighted, invstd)


def _moments(r: Recorder, x: Value) -> tuple[Value, Value]:
    """Mean and biased variance of (n, c, ...), each (c,)."""
    axes, channels = _axes(x), (x.shape[1],)
    mean = r.graph.node("ReduceMean", [x], channels, axes=axes, keepdims=0)
    centred = binary(r, "Sub", x, _per_channel(r, mean, len(x.shape)))
    squares = r.graph.node("ReduceSumSquare", [centred], channels, axes=axes, keepdims=0)
    return mean, binary(r, "Div", squares, r.number(x.size // x.shape[1], x.dtype))


def _unbiased(r: Recorder, var: Value, x: Value) -> Value:
    count = x.size // x.shape[1]
    return binary(r, "Mul", var, r.number(count / max(count - 1, 1), var.dtype))


def _move(r: Recorder, running: Tensor, newest: Value, momentum: float) -> None:
    old = r.value(running)
    step = binary(r, "Mul", binary(r, "Sub", newest, old), r.number(momentum, old.dtype))
    r.bind(running, binary(r, "Add", old, step))


def _axes(x: Value) -> list[int]:
    return [0, *range(2, len(x.shape))]


def _per_channel(r: Recorder, value: Value, rank: int) -> Value:
    return r.graph.reshape(value, (1, value.size, *[1] * (rank - 2)))
