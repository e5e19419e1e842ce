"""Sums, means, maxima and matrix products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from edgetrain.export.train_step.graph import Value
from edgetrain.export.train_step.recorder import Recorder, axes_of, dtype_of, rule
from edgetrain.export.train_step.rules.elementwise import binary


@rule("sum")
def _sum(r: Recorder, out: Tensor, a: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    value = r.graph.cast(r.value(a), dtype_of(out))
    return r.graph.sum(value, axes_of(dim, a.dim()), keepdims=keepdim) if a.dim() else value


@rule("mean")
def _mean(r: Recorder, out: Tensor, a: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    axes = axes_of(dim, a.dim())
    return r.graph.node("ReduceMean", [r.value(a)], out.shape, axes=axes, keepdims=int(keepdim))


@rule("amax")
def _amax(r: Recorder, out: Tensor, a: Tensor, dim: Any = (), keepdim: bool = False) -> Value:
    return _reduced_max(r, r.value(a), axes_of(dim, a.dim()), out, keepdim)


@rule("max")
def _max(r: Recorder, out: Any, a: Tensor, dim: Any = None, keepdim: bool = False) -> Any:
    if isinstance(out, Tensor):
        return _reduced_max(r, r.value(a), axes_of(None, a.dim()), out, False)
    value = r.value(a)
    axis = dim % a.dim()
    index = r.graph.node("ArgMax", [value], out[1].shape, np.int64, axis=axis, keepdims=int(keepdim))
    return _reduced_max(r, value, [axis], out[0], keepdim), index


def _reduced_max(r: Recorder, value: Value, axes: Sequence[int], out: Tensor, keepdim: bool) -> Value:
    if r.graph.opset >= 18:
        places = r.graph.constant(list(axes), np.int64)
        return r.graph.node("ReduceMax", [value, places], out.shape, keepdims=int(keepdim))
    return r.graph.node("ReduceMax", [value], out.shape, axes=list(axes), keepdims=int(keepdim))


@rule("argmax")
def _argmax(r: Recorder, out: Tensor, a: Tensor, dim: int, keepdim: bool = False) -> Value:
    return r.graph.node("ArgMax", [r.value(a)], out.shape, np.int64, axis=dim % a.dim(), keepdims=int(keepdim))


@rule("mm", "bmm")
def _product(r: Recorder, out: Tensor, a: Tensor, b: Tensor) -> Value:
    return r.graph.node("MatMul", [r.value(a), r.value(b)], out.shape)


@rule("addmm", "baddbmm")
def _sum_and_product(
    r: Recorder, out: Tensor, c: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1
) -> Value:
    dtype = dtype_of(out)
    product = r.graph.node("MatMul", [r.value(a), r.value(b)], out.shape)
    if alpha != 1:
        product = binary(r, "Mul", product, r.number(alpha, dtype))
    added = r.number(c, dtype)
    return binary(r, "Add", product, added if beta == 1 else binary(r, "Mul", added, r.number(beta, dtype)))


@rule("linalg_vector_norm")
def _norm(r: Recorder, out: Tensor, a: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, **_: Any) -> Value:
    if ord != 2:
        raise NotImplementedError(f"a norm of order {ord}")
    value = r.value(a)
    squares = r.graph.sum(binary(r, "Mul", value, value), axes_of(dim, a.dim()), keepdims=keepdim)
    return r.graph.node("Sqrt", [squares], squares.shape)


def elements(shape: Sequence[int], axes: Sequence[int]) -> int:
    """How many are added up over ``axes``."""
    return math.prod(shape[k] for k in axes)
