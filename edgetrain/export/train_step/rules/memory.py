"""Making, copying and joining tensors; most of it is bookkeeping and leaves no node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgetrain.export.train_step.graph import Value
from edgetrain.export.train_step.recorder import Recorder, dtype_of, rule


@rule("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
def _empty(r: Recorder, out: Tensor, *_: Any, **__: Any) -> None:
    r.fill(out, None)


@rule("zeros", "new_zeros", "zeros_like")
def _zeros(r: Recorder, out: Tensor, *_: Any, **__: Any) -> None:
    r.fill(out, 0)


@rule("ones", "new_ones", "ones_like")
def _ones(r: Recorder, out: Tensor, *_: Any, **__: Any) -> None:
    r.fill(out, 1)


@rule("full", "new_full", "full_like")
def _full(r: Recorder, out: Tensor, _: Any, number: Any, *__: Any, **___: Any) -> None:
    r.fill(out, number)


@rule("scalar_tensor")
def _scalar_tensor(r: Recorder, out: Tensor, number: Any, **_: Any) -> None:
    r.fill(out, number)


@rule("fill")
def _fill(r: Recorder, out: Tensor, a: Tensor, number: Any) -> Value:
    return r.number(number, dtype_of(out))


@rule("zero")
def _zero(r: Recorder, out: Tensor, a: Tensor) -> Value:
    return r.number(0, dtype_of(out))


@rule("arange")
def _arange(r: Recorder, out: Tensor, *args: Any, **_: Any) -> Value:
    return r.graph.constant(np.arange(*args), dtype_of(out))


@rule("clone", "to", "_to_copy", "lift_fresh", "lift", "contiguous", "detach", "alias")
def _clone(r: Recorder, out: Tensor, a: Tensor, *_: Any, **__: Any) -> Value:
    return r.value(a)


@rule("copy")
def _copy(r: Recorder, out: Tensor, a: Tensor, source: Tensor, non_blocking: bool = False) -> Value:
    return r.value(source)


@rule("_unsafe_view", "_reshape_copy", "view_copy")
def _view(r: Recorder, out: Tensor, a: Tensor, shape: Sequence[int]) -> Value:
    return r.graph.reshape(r.value(a), out.shape)


@rule("cat")
def _cat(r: Recorder, out: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> Value:
    dtype = dtype_of(out)
    some = [r.graph.cast(r.value(t), dtype) for t in tensors if t.shape != (0,)]
    return r.graph.concat(some, dim % out.dim())


@rule("constant_pad_nd")
def _pad(r: Recorder, out: Tensor, a: Tensor, pad: Sequence[int], value: Any = 0) -> Value:
    value_in = r.value(a)
    count, rank = len(pad) // 2, a.dim()
    edges = [0] * (2 * rank)
    for k in range(count):
        edges[rank - 1 - k], edges[2 * rank - 1 - k] = pad[2 * k], pad[2 * k + 1]
    for k in range(rank):  # what is cut off
        lower, upper = max(0, -edges[k]), a.shape[k] + min(0, edges[rank + k])
        value_in = r.graph.slice(value_in, k, lower, upper)
    edges = [max(0, edge) for edge in edges]
    inputs = [value_in, r.graph.constant(edges, np.int64), r.graph.constant(value, value_in.dtype)]
    return r.graph.node("Pad", inputs, out.shape)


@rule("slice_backward")
def _slice_backward(
    r: Recorder, out: Tensor, dy: Tensor, sizes: Sequence[int], dim: int, start: int, end: int, step: int
) -> None:
    r.fill(out, 0)
    part = torch.ops.aten.slice.Tensor(out, dim, start, end, step)
    r.bind(part, r.value(dy))


@rule("select_backward")
def _select_backward(r: Recorder, out: Tensor, dy: Tensor, sizes: Sequence[int], dim: int, index: int) -> None:
    r.fill(out, 0)
    r.bind(torch.ops.aten.select.int(out, dim, index), r.value(dy))


@rule("index_put", "_index_put_impl_", "_unsafe_index_put")
def _index_put(
    r: Recorder,
    out: Tensor,
    a: Tensor,
    indices: Sequence[Tensor | None],
    values: Tensor,
    accumulate: bool = False,
    *_: Any,
) -> Value:
    graph = r.graph
    if any(index is None for index in indices):
        raise NotImplementedError("index_put along some dimensions only")
    given = [r.number(index, np.int64) for index in indices]
    shape = tuple(np.broadcast_shapes(*(index.shape for index in given)))
    columns = [graph.reshape(graph.expand(index, shape), (*shape, 1)) for index in given]
    places = graph.concat(columns, len(shape))
    updates = graph.expand(r.value(values), (*shape, *a.shape[len(given) :]))
    reduction = {"reduction": "add"} if accumulate else {}
    return graph.node("ScatterND", [r.value(a), places, updates], a.shape, **reduction)


@rule("gather")
def _gather(r: Recorder, out: Tensor, a: Tensor, dim: int, index: Tensor, **_: Any) -> Value:
    return r.graph.node("GatherElements", [r.value(a), r.value(index)], out.shape, axis=dim % max(1, a.dim()))
