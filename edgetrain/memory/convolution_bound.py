"""What a convolution takes on the CPU at most, where it may not be run to find out.

Which library computes it follows ``ConvParams::use_mkldnn`` of ``aten/src/ATen/native/Convolution.cpp``:

- oneDNN copies input, weights and output to blocks of 16 channels, and reduces weight gradients in float32 in a
  scratch memory of each thread. What that scratch holds is oneDNN's secret: 1.5 times the weights and an image of
  input and output, 3 times for a convolution in groups, is above all that was seen in fp32 and bf16
  (``tests/memory/test_operators.py``), not a bound that can be proved. Where the layout is not row by row, a matrix
  of windows comes on top.
- torch's own kernels unfold the input to such a matrix (``slow_conv2d``), of the whole batch, and work on contiguous
  copies of one group after the other. In half precision, which processors without instructions for it leave to them,
  the gradient of the bias is the sum of a copy of dy in float32, taken before the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from edgetrain.memory.trace import Call, TensorMeta

_BLOCK = 16  # channels
_FEW_PIXELS = 20480


def convolution_bound(call: Call) -> list[int]:
    """Bytes of temporaries that ``call``, forward or backward, holds at once besides its results."""
    backward = call.operator == "aten.convolution_backward.default"
    if backward:
        dy, x, weight, _, stride, padding, dilation, transposed, _, groups, mask = call.arguments
    else:
        mask = [False, False, False]
        x, weight, _, stride, padding, dilation, transposed, output_padding, groups = call.arguments
        dy = convolution_output(x, weight, stride, padding, dilation, transposed, output_padding, groups)
    strided, dilated = any(k != 1 for k in stride), any(k != 1 for k in dilation)
    window = math.prod(weight.shape[2:])
    small, pixels = (dy, x) if transposed else (x, dy)  # a transposed one unfolds its output for each of its inputs
    columns = small.shape[1] // groups * window * math.prod(pixels.shape[2:])
    pointwise = window == 1 and not strided and not any(padding) and not transposed
    if _uses_onednn(x, weight, groups, strided=strided, dilated=dilated):
        copies = [_blocked(x, 1), _blocked(weight, 0, 1), _blocked(dy, 1)]
        if transposed:
            copies.append(_blocked(dy, 1))
        if strided or transposed:
            copies.append(_blocked(x, 1))  # the gradient of the input is blocked beside the input itself
        images = (_blocked(x, 1) + _blocked(dy, 1)) / max(x.shape[0], 1)
        scratch = (1.5 if groups == 1 else 3.0) * (images + _blocked(weight, 0, 1) * 4 / weight.dtype.itemsize)
        if not (x.is_contiguous and dy.is_contiguous):
            scratch += columns * groups * 4
        return [*copies, torch.get_num_threads() * int(scratch)]
    held = [] if pointwise else [x.shape[0] * columns * x.dtype.itemsize]
    if groups > 1:
        held += [x.nbytes // groups, dy.nbytes // groups, (x if backward else dy).nbytes, weight.nbytes]
    held += [meta.nbytes for meta in (x, dy) if not meta.is_contiguous]
    if mask[2] and dy.dtype.itemsize == 2:
        held = max(held, [4 * (math.prod(dy.shape) + dy.shape[1])], key=sum)
    return held or [x.shape[2] * x.dtype.itemsize]


def is_pointwise(weight: TensorMeta, stride: Sequence[int], dilation: Sequence[int]) -> bool:
    """Whether a convolution has a window of one pixel and leaves none out.

    With one thread, torch computes it by itself in fp32, and leaves it to oneDNN from 16 samples on.
    """
    return math.prod(weight.shape[2:]) == 1 and all(k == 1 for k in (*stride, *dilation))


def _uses_onednn(x: TensorMeta, weight: TensorMeta, groups: int, *, strided: bool, dilated: bool) -> bool:
    if x.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if x.dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    if x.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return False
    window, n = weight.shape[2:], x.shape[0]
    more_than_a_product = strided or dilated or n >= 16 or math.prod(window) != 1 or torch.get_num_threads() > 1
    large = groups > 1 or all(k > 3 for k in window) or n > 1 or math.prod(x.shape) > _FEW_PIXELS
    return more_than_a_product and large


def _blocked(meta: TensorMeta, *dimensions: int) -> int:
    """Bytes with each of ``dimensions`` rounded up to blocks."""
    shape = list(meta.shape)
    for k in dimensions:
        shape[k] = -(-shape[k] // _BLOCK) * _BLOCK
    return math.prod(shape) * meta.dtype.itemsize


def convolution_output(
    x: TensorMeta,
    weight: TensorMeta,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> TensorMeta:
    """The form of what a convolution gives, contiguous."""
    extents = []
    for k, extent in enumerate(x.shape[2:]):
        window = dilation[k] * (weight.shape[2 + k] - 1) + 1
        if transposed:
            extents.append((extent - 1) * stride[k] - 2 * padding[k] + window + output_padding[k])
        else:
            extents.append((extent + 2 * padding[k] - window) // stride[k] + 1)
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    shape = (x.shape[0], channels, *extents)
    strides = tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))
    return TensorMeta(shape, strides, x.dtype)
