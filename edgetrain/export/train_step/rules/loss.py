"""Softmax and the negative log-likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from edgetrain.export.train_step.graph import Value
from edgetrain.export.train_step.recorder import Recorder, rule
from edgetrain.export.train_step.rules.elementwise import binary, unary

_NONE, _MEAN = 0, 1  # of torch's reductions; 2 is the sum


@rule("_log_softmax")
def _log_softmax(r: Recorder, out: Tensor, x: Tensor, dim: int, half_to_float: bool) -> Value:
    return unary(r, "LogSoftmax", r.value(x), axis=dim % x.dim())


@rule("_log_softmax_backward_data")
def _log_softmax_backward(r: Recorder, out: Tensor, dy: Tensor, y: Tensor, dim: int, dtype: Any) -> Value:
    gradient, value = r.value(dy), r.value(y)
    total = r.graph.sum(gradient, [dim % y.dim()], keepdims=True)
    return binary(r, "Sub", gradient, binary(r, "Mul", unary(r, "Exp", value), total))


@rule("_softmax")
def _softmax(r: Recorder, out: Tensor, x: Tensor, dim: int, half_to_float: bool) -> Value:
    return unary(r, "Softmax", r.value(x), axis=dim % x.dim())


@rule("nll_loss_forward")
def _nll_loss(
    r: Recorder, out: Sequence[Tensor], x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore: int
) -> tuple[Value, Value]:
    graph, (n, _) = r.graph, x.shape
    labels, value = r.value(target), r.value(x)
    picked = graph.node("GatherElements", [value, graph.reshape(labels, (n, 1))], (n, 1), axis=1)
    losses = unary(r, "Neg", graph.reshape(picked, (n,)))
    total = graph.constant(n, value.dtype)
    if weight is not None:
        weights = graph.node("Gather", [r.value(weight), labels], (n,), axis=0)
        losses, total = binary(r, "Mul", losses, weights), graph.sum(weights, [0], keepdims=False)
    if reduction == _NONE:
        return losses, total
    added = graph.sum(losses, [0], keepdims=False)
    return (binary(r, "Div", added, total) if reduction == _MEAN else added), total


@rule("nll_loss_backward")
def _nll_loss_backward(
    r: Recorder,
    out: Tensor,
    dy: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore: int,
    total_weight: Tensor,
) -> Value:
    graph, (n, classes) = r.graph, x.shape
    labels, gradient = r.value(target), r.number(dy, r.value(x).dtype)
    if reduction == _MEAN:
        gradient = binary(r, "Div", gradient, r.value(total_weight))
    if reduction == _NONE:
        gradient = graph.reshape(gradient, (n, 1))
    ends = graph.constant([0, -1], gradient.dtype)
    depth = graph.constant(classes, np.int64)
    picked = graph.node("OneHot", [labels, depth, ends], (n, classes), gradient.dtype, axis=1)
    if weight is not None:
        weights = graph.node("Gather", [r.value(weight), labels], (n,), axis=0)
        picked = binary(r, "Mul", picked, graph.reshape(weights, (n, 1)))
    return binary(r, "Mul", picked, gradient)
