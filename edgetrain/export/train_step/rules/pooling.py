"""Pooling and its gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from edgetrain.export.train_step.graph import Value
from edgetrain.export.train_step.recorder import Recorder, rule

_Numbers = Sequence[int]


@rule("max_pool2d_with_indices")
def _max_pool(
    r: Recorder,
    out: Sequence[Tensor],
    x: Tensor,
    kernel: _Numbers,
    stride: _Numbers = (),
    padding: _Numbers = (0, 0),
    dilation: _Numbers = (1, 1),
    ceil_mode: bool = False,
) -> tuple[Value, Value]:
    shape = out[0].shape
    value, places = r.graph.nodes(
        "MaxPool",
        [r.value(x)],
        [(shape, r.value(x).dtype), (shape, np.int64)],
        kernel_shape=_pair(kernel),
        strides=_pair(stride) or _pair(kernel),
        pads=[*_pair(padding), *_pair(padding)],
        dilations=_pair(dilation),
        ceil_mode=int(ceil_mode),
    )
    # ONNX counts through the whole tensor, torch through each image
    plane = r.graph.constant(math.prod(x.shape[-2:]), np.int64)
    return value, r.graph.node("Mod", [places, plane], shape)


@rule("max_pool2d_with_indices_backward")
def _max_pool_backward(
    r: Recorder,
    out: Tensor,
    dy: Tensor,
    x: Tensor,
    kernel: _Numbers,
    stride: _Numbers,
    padding: _Numbers,
    dilation: _Numbers,
    ceil_mode: bool,
    indices: Tensor,
) -> Value:
    graph, gradient = r.graph, r.value(dy)
    planes, pixels = math.prod(x.shape[:-2]), math.prod(x.shape[-2:])
    zeros = graph.expand(graph.constant(np.zeros((1, 1)), gradient.dtype), (planes, pixels))
    places = graph.reshape(r.value(indices), (planes, math.prod(dy.shape[-2:])))
    flat = graph.reshape(gradient, places.shape)
    apart = all(s >= k for s, k in zip(_pair(stride) or _pair(kernel), _pair(kernel), strict=True))
    if not apart and graph.opset < 16:
        raise NotImplementedError(f"overlapping windows, whose gradients are added up, in opset {graph.opset}")
    reduction = {} if apart else {"reduction": "add"}
    return graph.reshape(
        graph.node("ScatterElements", [zeros, places, flat], (planes, pixels), axis=1, **reduction), x.shape
    )


@rule("avg_pool2d")
def _avg_pool(
    r: Recorder,
    out: Tensor,
    x: Tensor,
    kernel: _Numbers,
    stride: _Numbers = (),
    padding: _Numbers = (0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Value:
    _check_plain_average(ceil_mode, count_include_pad, divisor_override, padding)
    return r.graph.node(
        "AveragePool",
        [r.value(x)],
        out.shape,
        kernel_shape=_pair(kernel),
        strides=_pair(stride) or _pair(kernel),
        pads=[*_pair(padding), *_pair(padding)],
        count_include_pad=1,
    )


@rule("avg_pool2d_backward")
def _avg_pool_backward(
    r: Recorder,
    out: Tensor,
    dy: Tensor,
    x: Tensor,
    kernel: _Numbers,
    stride: _Numbers,
    padding: _Numbers,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Value:
    """The transposed convolution of each channel with a window of equal weights."""
    _check_plain_average(ceil_mode, count_include_pad, divisor_override, padding)
    graph, gradient = r.graph, r.value(dy)
    window, step, around = _pair(kernel), _pair(stride) or _pair(kernel), _pair(padding)
    planes = math.prod(x.shape[:-2])
    weights = graph.constant(np.full((1, 1, *window), 1 / math.prod(window)), gradient.dtype)
    rest = [
        n - ((m - 1) * s - 2 * p + k)
        for n, m, s, p, k in zip(x.shape[-2:], dy.shape[-2:], step, around, window, strict=True)
    ]
    flat = graph.reshape(gradient, (planes, 1, *dy.shape[-2:]))
    spread = graph.node(
        "ConvTranspose",
        [flat, weights],
        (planes, 1, *x.shape[-2:]),
        kernel_shape=window,
        strides=step,
        pads=[*around, *around],
        output_padding=rest,
    )
    return graph.reshape(spread, x.shape)


@rule("_adaptive_avg_pool2d")
def _adaptive_avg_pool(r: Recorder, out: Tensor, x: Tensor, size: _Numbers) -> Value:
    window = _even_window(x, out)
    return _avg_pool(r, out, x, window)


@rule("_adaptive_avg_pool2d_backward")
def _adaptive_avg_pool_backward(r: Recorder, out: Tensor, dy: Tensor, x: Tensor) -> Value:
    window = _even_window(x, dy)
    return _avg_pool_backward(r, out, dy, x, window, window, (0, 0), False, True, None)


def _even_window(x: Tensor, y: Tensor) -> list[int]:
    if any(a % b for a, b in zip(x.shape[-2:], y.shape[-2:], strict=True)):
        raise NotImplementedError(f"adaptive pooling of {tuple(x.shape[-2:])} to {tuple(y.shape[-2:])}, uneven windows")
    return [a // b for a, b in zip(x.shape[-2:], y.shape[-2:], strict=True)]


def _check_plain_average(ceil_mode: bool, count_include_pad: bool, divisor: int | None, padding: _Numbers) -> None:
    if ceil_mode or divisor is not None or (not count_include_pad and any(padding)):
        raise NotImplementedError("an average with ceil_mode, another divisor, or a padding that does not count")


def _pair(values: Any) -> list[int]:
    numbers = [values] if isinstance(values, int) else list(values)
    return numbers * 2 if len(numbers) == 1 else numbers
