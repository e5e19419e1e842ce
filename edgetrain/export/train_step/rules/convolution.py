"""Convolutions and their gradients, which are convolutions themselves.

dx = convolution of dy with the filters turned round and their two sorts of channels exchanged (stride 1), else
     the transposed convolution of dy with the filters
dw = convolution of x with dy as filters, stride and dilation exchanged: samples are its channels, and the channels of
     x one more dimension, along which the filters have length 1. So all of dw is one row of sums for each filter, which
     a runtime multiplies as one matrix; with the channels of x as samples it would be as many of 9 columns for 3x3.
db = sum of dy

ONNX Runtime multiplies a matrix for each sample, and gathers its columns in one thread, where a convolution has more
filters than pixels. Such a one is written with the samples as one more dimension: one matrix for the batch, and two
transpositions. Measured with 2 threads it takes half of the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from edgetrain.export.train_step.graph import Graph, Value
from edgetrain.export.train_step.recorder import Recorder, rule

_Numbers = Sequence[int]


@rule("convolution")
def _convolution(
    r: Recorder,
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: _Numbers,
    padding: _Numbers,
    dilation: _Numbers,
    transposed: bool,
    output_padding: _Numbers,
    groups: int,
) -> Value:
    count = weight.dim() - 2
    inputs = [r.value(x), r.value(weight), *([] if bias is None else [r.value(bias)])]
    geometry = _each(stride, count), _each(padding, count), _each(dilation, count), groups
    if not transposed:
        return _convolved(r.graph, inputs, tuple(out.shape), *geometry)
    rest = _each(output_padding, count)
    return r.graph.node("ConvTranspose", inputs, out.shape, output_padding=rest, **_attributes(weight, *geometry))


def _convolved(
    graph: Graph,
    inputs: Sequence[Value],
    shape: tuple[int, ...],
    stride: _Numbers,
    padding: _Numbers,
    dilation: _Numbers,
    groups: int,
) -> Value:
    """The convolution of ``inputs`` (x, filters, perhaps a bias), of ``shape``."""
    x, weight, *bias = inputs
    (n, out, *pixels), kernel = shape, weight.shape[2:]
    if n == 1 or len(pixels) > 2 or out // groups <= math.prod(pixels) or math.prod(kernel) == 1:
        return graph.node("Conv", inputs, shape, **_attributes(weight, stride, padding, dilation, groups))
    exchanged = [1, 0, *range(2, len(shape))]
    together = graph.reshape(graph.transpose(x, exchanged), (1, x.shape[1], n, *x.shape[2:]))
    filters = graph.reshape(weight, (*weight.shape[:2], 1, *kernel))
    attributes = _attributes(filters, [1, *stride], [0, *padding], [1, *dilation], groups)
    found = graph.node("Conv", [together, filters, *bias], (1, out, n, *pixels), **attributes)
    return graph.transpose(graph.reshape(found, (out, n, *pixels)), exchanged)


@rule("convolution_backward")
def _convolution_backward(
    r: Recorder,
    out: Sequence[Tensor | None],
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Any,
    stride: _Numbers,
    padding: _Numbers,
    dilation: _Numbers,
    transposed: bool,
    output_padding: _Numbers,
    groups: int,
    mask: Sequence[bool],
) -> tuple[Value | None, ...]:
    if transposed:
        raise NotImplementedError("the gradient of a transposed convolution")
    count = weight.dim() - 2
    geometry = _each(stride, count), _each(padding, count), _each(dilation, count), groups
    gradient = r.value(dy)
    dx = _input_gradient(r, gradient, x, weight, *geometry) if mask[0] else None
    dw = _weight_gradient(r, gradient, x, weight, *geometry) if mask[1] else None
    db = r.graph.sum(gradient, [0, *range(2, dy.dim())], keepdims=False) if mask[2] else None
    return dx, dw, db


def _input_gradient(
    r: Recorder,
    dy: Value,
    x: Tensor,
    weight: Tensor,
    stride: _Numbers,
    padding: _Numbers,
    dilation: _Numbers,
    groups: int,
) -> Value:
    kernel = weight.shape[2:]
    back = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    if all(s == 1 for s in stride) and min(back) >= 0:
        turned = _turned(r, r.value(weight), groups)
        return _convolved(r.graph, [dy, turned], tuple(x.shape), stride, back, dilation, groups)
    rest = [
        n - ((m - 1) * s - 2 * p + d * (k - 1) + 1)
        for n, m, s, p, d, k in zip(x.shape[2:], dy.shape[2:], stride, padding, dilation, kernel, strict=True)
    ]
    attributes = _attributes(weight, stride, padding, dilation, groups)
    return r.graph.node("ConvTranspose", [dy, r.value(weight)], x.shape, output_padding=rest, **attributes)


def _turned(r: Recorder, weight: Value, groups: int) -> Value:
    """Filters (groups o, i, ...) turned by half a circle, as (groups i, o, ...)."""
    graph, (out, inside, *kernel) = r.graph, weight.shape
    rank = len(kernel)
    if any(k > 1 for k in kernel):
        axes = list(range(2, 2 + rank))
        edges = [[-1] * rank, [-(2**31)] * rank, axes, [-1] * rank]
        weight = graph.node("Slice", [weight, *(graph.constant(e, np.int64) for e in edges)], weight.shape)
    if groups == 1:
        return graph.transpose(weight, [1, 0, *range(2, 2 + rank)])
    weight = graph.reshape(weight, (groups, out // groups, inside, *kernel))
    weight = graph.transpose(weight, [0, 2, 1, *range(3, 3 + rank)])
    return graph.reshape(weight, (groups * inside, out // groups, *kernel))


def _weight_gradient(
    r: Recorder,
    dy: Value,
    x: Tensor,
    weight: Tensor,
    stride: _Numbers,
    padding: _Numbers,
    dilation: _Numbers,
    groups: int,
) -> Value:
    graph, (out, inside, *kernel) = r.graph, tuple(weight.shape)
    n, rest, rank = x.shape[0], tuple(x.shape[2:]), len(kernel)
    filters = graph.transpose(dy, [1, 0, *range(2, 2 + rank)])
    filters = graph.reshape(filters, (out, n, 1, *dy.shape[2:]))
    images = graph.reshape(r.value(x), (n, groups, inside, *rest))
    images = graph.transpose(images, [1, 0, *range(2, 3 + rank)])
    images = graph.reshape(images, (1, groups * n, inside, *rest))
    spans = [  # a stride that does not divide leaves pixels over, which give further offsets
        (size + 2 * p - s * (m - 1) - 1) // d + 1
        for size, p, s, m, d in zip(rest, padding, stride, dy.shape[2:], dilation, strict=True)
    ]
    gradient = graph.node(
        "Conv",
        [images, filters],
        (1, out, inside, *spans),
        kernel_shape=[1, *dy.shape[2:]],
        strides=[1, *dilation],
        pads=[0, *padding, 0, *padding],
        dilations=[1, *stride],
        group=groups,
    )
    for k, size in enumerate(kernel):
        gradient = graph.slice(gradient, 3 + k, 0, size)
    return graph.reshape(gradient, weight.shape)


def _attributes(
    weight: Tensor | Value, stride: _Numbers, padding: _Numbers, dilation: _Numbers, groups: int
) -> dict[str, Any]:
    return {
        "kernel_shape": list(weight.shape[2:]),
        "strides": list(stride),
        "pads": [*padding, *padding],
        "dilations": list(dilation),
        "group": groups,
    }


def _each(values: _Numbers, count: int) -> list[int]:
    return list(values) * count if len(values) == 1 else list(values)
