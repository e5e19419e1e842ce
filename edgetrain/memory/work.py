"""What an operator has to do, read from its arguments: multiplications, additions, and bytes.

- convolution: 2 x samples x output pixels x elements of the kernel; each of its two gradients costs the same again
  (transposed: input pixels for output pixels);
- matrix products: 2 x rows x columns x what is summed over;
- attention: two products of queries and keys, keys and values; its backward pass has five;
- everything else counts as free arithmetic: on all devices here it waits for memory.

These are the figures of ``torch.utils.flop_counter``, except for weight gradients of grouped convolutions, which that
counts once per group too often. Bytes are those of the tensors that an operator reads and writes, each once, except
that a normalisation walks through its operands twice where it takes sums first. A view does nothing, and neither does
an allocation: the kernel's clearing of fresh pages is left out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from edgetrain.memory.trace import Call, TensorMeta

_ALLOCATING = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})
_OVERWRITING = frozenset({"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_"})
_CONTRACTIONS: dict[str, tuple[int, int]] = {  # positions of the two factors
    "mm": (0, 1),
    "addmm": (1, 2),
    "bmm": (0, 1),
    "baddbmm": (1, 2),
    "mv": (0, 1),
    "addmv": (1, 2),
    "dot": (0, 1),
}
_WALKED_TWICE: dict[str, int] = {  # how many of the first arguments
    "native_batch_norm": 1,
    "cudnn_batch_norm": 1,
    "native_layer_norm": 1,
    "native_group_norm": 1,
    "native_batch_norm_backward": 2,
    "cudnn_batch_norm_backward": 2,
    "native_layer_norm_backward": 2,
    "native_group_norm_backward": 2,
}
_ATTENTION_PRODUCTS, _ATTENTION_BACKWARD_PRODUCTS = 2, 5


@dataclass(frozen=True, slots=True)
class Work:
    """What one operator has to do.

    Attributes:
        flops: multiplications and additions of a convolution, a matrix product or attention; 0 for anything else.
        moved_bytes: read and written.
        channels: geometric mean of input and output channels of a group, on which the rate depends; 0 without flops.
        calls: how many operators of the same kind do this much, each.
    """

    flops: int
    moved_bytes: int
    channels: int
    calls: int


def work_of(calls: Iterable[Call]) -> tuple[Work, ...]:
    """The work of ``calls``, equal ones together; a slice that stands for many counts as many."""
    found = Counter[tuple[int, int, int]]()
    for call in calls:
        if call.written:
            found[_measure_of(call)] += call.weight
    return tuple(Work(*amounts, calls) for amounts, calls in found.items() if any(amounts))


def _measure_of(call: Call) -> tuple[int, int, int]:
    name = call.operator.split(".")[1] if call.operator.startswith("aten.") else call.operator
    if name in _ALLOCATING:
        return 0, 0, 0
    read = call.arguments[1:] if name in _OVERWRITING else call.arguments
    again = call.arguments[: _WALKED_TWICE.get(name, 0)] if _sums_first(name, call.arguments) else ()
    moved = sum(_touched_bytes(tensor) for tensor in (*_tensors(read), *_tensors(again), *call.written))
    flops, channels = _flops_of(name, call)
    return flops, moved, channels


def _sums_first(name: str, arguments: Sequence[Any]) -> bool:
    """False for a normalisation with given statistics, and where of its gradients the sums alone are asked for."""
    if name == "native_batch_norm":
        return bool(arguments[5])
    if name == "native_batch_norm_backward":
        return bool(arguments[7]) and bool(arguments[9][0])
    return True


def _flops_of(name: str, call: Call) -> tuple[int, int]:
    count = _COUNTERS.get(name)
    if count is not None:
        return count(call.arguments, call.written)
    if name in _CONTRACTIONS:
        left, right = (call.arguments[k].shape for k in _CONTRACTIONS[name])
        columns = right[-1] if len(right) > 1 else 1
        return 2 * math.prod(left) * columns, _mean(left[-1], columns)
    if name.startswith("_scaled_dot_product") and name.endswith("_backward"):
        return _attention(call.arguments[1:4], _ATTENTION_BACKWARD_PRODUCTS)
    if name.startswith("_scaled_dot_product"):
        return _attention(call.arguments[:3], _ATTENTION_PRODUCTS)
    return 0, 0


def _convolution(arguments: Sequence[Any], written: Sequence[TensorMeta]) -> tuple[int, int]:
    x, weight = arguments[0], arguments[1]
    transposed, groups = arguments[6], arguments[8]
    return _one_convolution(x, weight, x if transposed else written[0], transposed, groups)


def _convolution_backward(arguments: Sequence[Any], _: Sequence[TensorMeta]) -> tuple[int, int]:
    dy, x, weight = arguments[:3]
    transposed, groups, mask = arguments[7], arguments[9], arguments[10]
    flops, channels = _one_convolution(x, weight, x if transposed else dy, transposed, groups)
    return flops * (bool(mask[0]) + bool(mask[1])), channels


def _one_convolution(
    x: TensorMeta, weight: TensorMeta, walked: TensorMeta, transposed: bool, groups: int
) -> tuple[int, int]:
    samples = x.shape[0] if len(x.shape) == len(weight.shape) else 1
    flops = 2 * samples * math.prod(walked.shape[2 - len(weight.shape) :]) * math.prod(weight.shape)
    inner, outer = weight.shape[1], weight.shape[0] // groups
    return flops, _mean(inner, outer)


def _linear(arguments: Sequence[Any], _: Sequence[TensorMeta]) -> tuple[int, int]:
    x, weight = arguments[:2]
    return 2 * math.prod(x.shape) * weight.shape[0], _mean(*weight.shape)


def _attention(factors: Sequence[TensorMeta], products: int) -> tuple[int, int]:
    queries, keys, values = (factor.shape for factor in factors)
    scores = math.prod(queries[:-1]) * keys[-2]
    # every other product sums over, or ends in, the channels of the values; the first of five is done again
    of_keys = (products + 1) // 2
    return 2 * scores * (of_keys * queries[-1] + (products - of_keys) * values[-1]), queries[-1]


_COUNTERS: dict[str, Callable[[Sequence[Any], Sequence[TensorMeta]], tuple[int, int]]] = {
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "linear": _linear,
}


def _mean(first: int, second: int) -> int:
    return round(math.sqrt(first * second))


def _touched_bytes(tensor: TensorMeta) -> int:
    """Bytes of ``tensor`` in memory: what is broadcast is there once."""
    extents = (extent for extent, stride in zip(tensor.shape, tensor.strides, strict=True) if stride or not extent)
    return math.prod(extents) * tensor.dtype.itemsize


def _tensors(value: Any) -> Iterable[TensorMeta]:
    if isinstance(value, TensorMeta):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
