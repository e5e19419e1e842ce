"""What operators allocate for themselves, inside, and free before they return.

On the CPU:

- convolutions of oneDNN copy input, weights and output to a blocked layout. Which of them, with how many channels of
  padding, and what scratch memory comes on top depends on the shape, the element type and the instructions of the
  processor. So each distinct convolution of a step is run for real on batches of two and of three samples, under the
  profiler, and each of its allocations is continued to the whole batch: they are affine in it.
- the backward pass of a batch norm with batch statistics takes a second tensor of the size of its input
  (``aten/src/ATen/native/Normalization.cpp``).
- a pointwise operator on two element types first converts one of its operands (``TensorIterator``).
- layer and group norm copy what is not contiguous.
- attention takes a tile of scores per thread (``aten/src/ATen/native/cpu/FlashAttentionKernel.cpp``).

On CUDA, kernels convert and index as they go; what cuDNN and cuBLAS take is a workspace of the library, see
:mod:`edgetrain.memory.estimate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from edgetrain.memory.measure import record_allocations
from edgetrain.memory.trace import Call, TensorMeta

DeviceKind = Literal["cpu", "cuda"]

_CONVOLUTION = "aten.convolution.default"
_CONVOLUTION_BACKWARD = "aten.convolution_backward.default"
_SMALL, _LARGE = 2, 3  # a single sample may go to another kernel
_COPYING = (
    "aten.native_layer_norm.default",
    "aten.native_layer_norm_backward.default",
    "aten.native_group_norm.default",
    "aten.native_group_norm_backward.default",
)
_POINTWISE = frozenset(("add", "sub", "mul", "div", "addcmul", "addcdiv", "lerp", "where", "maximum", "minimum", "pow"))


@dataclass(frozen=True)
class Inner:
    """One thing that an operator does with memory.

    Attributes:
        name: of a temporary, in its operator; None for a result.
        nbytes: above zero for an allocation, zero for a free.
    """

    name: int | None
    nbytes: int


RESULTS = Inner(None, 0)
"""All results that have not been allocated yet, in order."""

Steps = tuple[Inner, ...]


class InnerAllocations:
    """Sequences of :class:`Inner` for the operators of ``calls`` on a device.

    Args:
        calls: those whose convolutions are to be known.
        measured: whether convolutions may be run here to find out; without it they count as if input, weights and
            output were copied to blocks of 16 channels.
    """

    def __init__(self, calls: Iterable[Call], device: DeviceKind = "cpu", *, measured: bool = True) -> None:
        self._device = device
        self._convolutions: dict[Any, Steps] = {}
        if device == "cpu":
            distinct = {_key(call): call for call in calls if _is_convolution(call)}
            if measured:
                self._convolutions = _measured(distinct)
            else:
                self._convolutions = {key: _blocked(call) for key, call in distinct.items()}

    def of(self, call: Call) -> Steps:
        """What ``call`` does, its results included."""
        if self._device != "cpu":
            return _around(_copies(call), before=True)
        if _is_convolution(call):
            return self._convolutions[_key(call)]
        name = call.operator.removeprefix("aten.").partition(".")[0].rstrip("_")
        if name in _POINTWISE:
            return _around(_converted(call), before=False)
        if call.operator in _COPYING:
            return _around(_copies(call), before=True)
        rule = _RULES.get(name)
        return (RESULTS,) if rule is None else _around(rule(call), before=False)


def _around(sizes: Sequence[int], *, before: bool) -> Steps:
    temporaries = [Inner(k, nbytes) for k, nbytes in enumerate(sizes)]
    freed = [Inner(t.name, 0) for t in temporaries]
    return (*temporaries, RESULTS, *freed) if before else (RESULTS, *temporaries, *freed)


def _tensors(call: Call) -> list[TensorMeta]:
    return [a for a in call.arguments if isinstance(a, TensorMeta)]


def _copies(call: Call) -> list[int]:
    """Contiguous copies of the large arguments of a normalisation."""
    if call.operator not in _COPYING:
        return []
    large = [a for a in _tensors(call)[:2] if len(a.shape) > 1 and not a.is_contiguous]
    return [a.nbytes for a in large]


def _converted(call: Call) -> list[int]:
    tensors = [t for t in _tensors(call) if t.shape]
    if len({t.dtype for t in tensors}) < 2:
        return []
    common = tensors[0].dtype
    for tensor in tensors[1:]:
        common = torch.promote_types(common, tensor.dtype)
    if call.operator.startswith("aten.where"):
        tensors = tensors[1:]  # the condition stays as it is
    return [math.prod(t.shape) * common.itemsize for t in tensors if t.dtype != common]


def _batch_norm(call: Call) -> list[int]:
    x = call.arguments[0]
    return [2 * x.shape[1] * x.dtype.itemsize]


def _batch_norm_backward(call: Call) -> list[int]:
    x, training, mask = call.arguments[1], call.arguments[7], call.arguments[9]
    return [x.nbytes] if training and mask[0] else []


def _attention(call: Call) -> list[int]:
    query, key = call.arguments[0], call.arguments[1]
    tile, keys = _tile(query.shape[-2], key.shape[-2])
    return [torch.get_num_threads() * tile * (keys + 2 + query.shape[-1]) * 4]


def _attention_backward(call: Call) -> list[int]:
    query, key = call.arguments[1], call.arguments[2]
    tile, keys = _tile(query.shape[-2], key.shape[-2])
    return [torch.get_num_threads() * tile * keys * 2 * 4]


def _tile(queries: int, keys: int) -> tuple[int, int]:
    tile = 256 if queries >= 768 else 64 if queries >= 192 else 32
    return min(tile, queries), min(512, keys)


_RULES: dict[str, Callable[[Call], list[int]]] = {
    "native_batch_norm": _batch_norm,
    "native_batch_norm_backward": _batch_norm_backward,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
}


def _is_convolution(call: Call) -> bool:
    return call.operator in (_CONVOLUTION, _CONVOLUTION_BACKWARD)


def _key(call: Call) -> Any:
    return call.operator, call.arguments


def _batch_size(call: Call) -> int:
    return int(call.arguments[0].shape[0])


def _measured(distinct: dict[Any, Call]) -> dict[Any, Steps]:
    wanted = [run for key, call in distinct.items() for run in _runs(key, call)]
    # steps of two batch sizes of one model have their small ones in common
    missing = list(dict.fromkeys(run for run in wanted if run not in _histories))
    if missing:
        recorded = record_allocations(_convolve, map(_arguments, missing))
        _histories.update(zip(missing, recorded, strict=True))
    found = {}
    for key, call in distinct.items():
        small, *larger = (_histories[run] for run in _runs(key, call))
        n = _batch_size(call)
        found[key] = _sequence(small, larger[0], n) if larger else _sequence(small, small, n)
    return found


def _runs(key: Any, call: Call) -> list[Any]:
    """The convolutions to run in order to know this one: itself, or the same on a few samples."""
    n = _batch_size(call)
    return [_shrunk(key, k) for k in ([n] if n <= _LARGE else [_SMALL, _LARGE])]


_histories: dict[Any, list[tuple[int, int]]] = {}


def _shrunk(key: Any, n: int) -> Any:
    """The key of the same convolution on ``n`` samples."""
    operator, arguments = key
    batched = 1 if operator == _CONVOLUTION else 2
    small = [TensorMeta((n, *a.shape[1:]), a.strides, a.dtype) for a in arguments[:batched]]
    return operator, (*small, *arguments[batched:]), torch.get_num_threads()


def _arguments(key: Any) -> list[Any]:
    operator, arguments, _ = key
    tensors = [
        torch.empty_strided(a.shape, a.strides, dtype=a.dtype).zero_() if isinstance(a, TensorMeta) else a
        for a in arguments
    ]
    return [operator, *tensors]


@torch.no_grad()
def _convolve(operator: str, *arguments: Any) -> object:
    if operator == _CONVOLUTION:
        return torch.ops.aten.convolution.default(*arguments)
    return torch.ops.aten.convolution_backward.default(*arguments)


def _sequence(small: list[tuple[int, int]], large: list[tuple[int, int]], n: int) -> Steps:
    """The allocations of a call on ``n`` samples, by continuing from those of two batch sizes.

    Where the two do not correspond, the library took another way for one of them: the larger is scaled as a whole.
    """
    corresponding = [_sign(nbytes) for _, nbytes in small] == [_sign(nbytes) for _, nbytes in large]
    alive: dict[int, int] = {}
    names: list[int] = []
    for position, (address, nbytes) in enumerate(large):
        if nbytes > 0:
            alive[address] = position
        names.append(alive[address] if nbytes > 0 else alive.pop(address))
    results = set(alive.values())
    steps = []
    for position, (_, nbytes) in enumerate(large):
        if nbytes < 0:
            steps.append(Inner(names[position], 0))
            continue
        if corresponding:
            nbytes += (nbytes - small[position][1]) * (n - _LARGE) // (_LARGE - _SMALL)
        else:
            nbytes = nbytes * n // _LARGE
        steps.append(Inner(None if position in results else position, max(nbytes, 1)))
    return (*steps, RESULTS)


def _sign(value: int) -> int:
    return 1 if value > 0 else -1


def _blocked(call: Call) -> Steps:
    """A convolution that copies everything to blocks of 16 channels."""
    backward = call.operator == _CONVOLUTION_BACKWARD
    if backward:
        dy, x, weight = call.arguments[:3]
    else:
        (x, weight), dy = call.arguments[:2], None
    sizes = [x, weight] if dy is None else [dy, x, weight]
    copies = [_padded(meta) for meta in sizes]
    if dy is None:
        n, spatial = x.shape[0], _output_extent(call)
        copies.append(n * -(-weight.shape[0] // 16) * 16 * spatial * x.dtype.itemsize)
    return _around(copies, before=True)


def _padded(meta: TensorMeta) -> int:
    channels = meta.shape[1]
    return meta.nbytes * (-(-channels // 16) * 16) // max(channels, 1)


def _output_extent(call: Call) -> int:
    x, weight, _, stride, padding, dilation, *_ = call.arguments
    extent = 1
    for k in range(2, len(x.shape)):
        window = dilation[k - 2] * (weight.shape[k] - 1) + 1
        extent *= (x.shape[k] + 2 * padding[k - 2] - window) // stride[k - 2] + 1
    return extent
