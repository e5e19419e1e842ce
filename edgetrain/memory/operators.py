"""What operators allocate for themselves, inside, and free before they return.

On the CPU:

- convolutions of oneDNN copy input, weights and output to a blocked layout. Which of them, with how many channels of
  padding, and what scratch memory comes on top depends on the shape, the element type and the instructions of the
  processor. So each distinct convolution of a step is run for real on two small batches under the profiler, and each
  of its allocations that grows with the batch is continued to the whole of it.
- matrix products in bfloat16 pack their factors; small ones are run, large ones count with the most that was seen.
- the mean in half precision is that of a copy in float32.
- interpolation to at most 64 x 64 is computed channels last, on copies (``UpSampleKernel.cpp``); the backward pass of
  a pooling or an interpolation copies a gradient that is not dense.
- the backward pass of a batch norm with batch statistics takes a second tensor of the size of its input
  (``aten/src/ATen/native/Normalization.cpp``).
- a pointwise operator on two element types first converts one of its operands (``TensorIterator``).
- layer and group norm copy what is not contiguous.
- attention takes a tile of scores per thread (``aten/src/ATen/native/cpu/FlashAttentionKernel.cpp``).
- 8 bit optimisers decode the state of a parameter, see :mod:`edgetrain.memory.eight_bit`.

On CUDA, kernels convert and index as they go; what cuDNN and cuBLAS take is a workspace of the library, see
:mod:`edgetrain.memory.estimate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from edgetrain.memory.convolution_bound import convolution_bound, is_pointwise
from edgetrain.memory.eight_bit import update_temporaries
from edgetrain.memory.measure import record_allocations
from edgetrain.memory.trace import Call, TensorMeta

DeviceKind = Literal["cpu", "cuda"]

_CONVOLUTION = "aten.convolution.default"
_CONVOLUTION_BACKWARD = "aten.convolution_backward.default"
_FEW = 2, 3  # a single sample may go to another kernel
_PROBE_BYTES, _PROBE_WORK = 2**22, 2**30  # of the larger batch; multiplications
_FEW_PER_THREAD = 4  # fewer are not spread over all threads, each of which has its scratch
_CONSTANT_PART = 0.01  # what a copy has besides, such as a bias
_ONEDNN_SAMPLES = 16  # see convolution_bound.is_pointwise
_COPYING = (
    "aten.native_layer_norm.default",
    "aten.native_layer_norm_backward.default",
    "aten.native_group_norm.default",
    "aten.native_group_norm_backward.default",
)
_POOLING = frozenset(
    f"{name}_backward"
    for name in (
        "avg_pool2d",
        "max_pool2d_with_indices",
        "_adaptive_avg_pool2d",
        "adaptive_max_pool2d",
        "upsample_nearest2d",
        "upsample_bilinear2d",
        "upsample_bicubic2d",
    )
)
_PRODUCTS = frozenset(("mm", "addmm", "bmm", "baddbmm"))
_SMALL_PRODUCT_BYTES = 2**24
_PACKED_BYTES, _PACKED_TRANSPOSED_BYTES = 160 * 2**10, 2**21
_VECTOR_SIDES = 128
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
        measured: whether convolutions may be run here to find out; without it they count as much as they take at
            most, see :mod:`edgetrain.memory.convolution_bound`.
    """

    def __init__(self, calls: Iterable[Call], device: DeviceKind = "cpu", *, measured: bool = True) -> None:
        self._device = device
        self._known: dict[Any, Steps] = {}
        if device == "cpu":
            distinct = {_key(call): call for call in calls if _is_convolution(call)}
            if measured:
                distinct |= {_key(call): call for call in calls if _is_small_product(call)}
                self._known = _measured(distinct)
            else:
                self._known = {key: _around(convolution_bound(call), before=True) for key, call in distinct.items()}

    def of(self, call: Call) -> Steps:
        """What ``call`` does, its results included."""
        if self._device != "cpu":
            return _around(_copies(call), before=True)
        if self._known and (_is_convolution(call) or _is_product(call)) and (known := self._known.get(_key(call))):
            return known
        name = call.operator.removeprefix("aten.").partition(".")[0].rstrip("_")
        if name in _POINTWISE:
            return _around(_converted(call), before=False)
        if call.operator in _COPYING:
            return _around(_copies(call), before=True)
        if name in _POOLING:
            return _around(_gradient_copy(call), before=True)
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


def _mean(call: Call) -> list[int]:
    """In half precision the sum is taken of a copy in float32."""
    x = call.arguments[0]
    return [math.prod(x.shape) * 4] if x.dtype.itemsize == 2 else []


def _upsample(call: Call) -> list[int]:
    """``_use_vectorized_kernel_cond_2d`` of UpSampleKernel.cpp: a small output is computed channels last."""
    x, sides = call.arguments[:2]
    if not sides or sum(sides) > _VECTOR_SIDES or x.is_channels_last:
        return []
    return [x.nbytes, math.prod((*x.shape[:2], *sides)) * x.dtype.itemsize]


def _gradient_copy(call: Call) -> list[int]:
    dy = call.arguments[0]
    return [] if dy.is_contiguous or dy.is_channels_last else [dy.nbytes]


def _product(call: Call) -> list[int]:
    """Each thread packs tiles of the factors; of a transposed left one, more. Seen up to 1.3 MiB."""
    left, right = _tensors(call)[-2:]
    if left.dtype != torch.bfloat16:
        return []
    packed = _PACKED_BYTES + (min(left.nbytes, _PACKED_TRANSPOSED_BYTES) if left.strides[-1] != 1 else 0)
    copies = [t.nbytes for t in (left, right) if len(t.shape) == 3 and t.strides[0] == 0]
    return [*copies, torch.get_num_threads() * packed]


_RULES: dict[str, Callable[[Call], list[int]]] = {
    "native_batch_norm": _batch_norm,
    "native_batch_norm_backward": _batch_norm_backward,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "mean": _mean,
    "upsample_bilinear2d": _upsample,
    "upsample_nearest2d": _upsample,
    **dict.fromkeys(_PRODUCTS, _product),
    "bitsandbytes": update_temporaries,
}


def _is_convolution(call: Call) -> bool:
    return call.operator in (_CONVOLUTION, _CONVOLUTION_BACKWARD)


def _is_product(call: Call) -> bool:
    return call.operator.removeprefix("aten.").partition(".")[0] in _PRODUCTS


def _is_small_product(call: Call) -> bool:
    """A matrix product in bf16 that is worth running: oneDNN packs its factors, the more the larger they are."""
    if not (_is_product(call) and call.operator.endswith(".default")):
        return False
    factors = _tensors(call)[-2:]
    return factors[0].dtype == torch.bfloat16 and sum(t.nbytes for t in factors) <= _SMALL_PRODUCT_BYTES


def _key(call: Call) -> Any:
    return call.operator, call.arguments


def _batch_size(call: Call) -> int:
    return int(call.arguments[0].shape[0])


def _measured(distinct: dict[Any, Call]) -> dict[Any, Steps]:
    wanted = [run for key, call in distinct.items() for run in _runs(key, call)]
    # steps of two batch sizes of one model have their small ones in common
    missing = list(dict.fromkeys(run for run in wanted if run not in _histories))
    if missing:
        recorded = record_allocations(_call, map(_arguments, missing))
        _histories.update(zip(missing, recorded, strict=True))
    found = {}
    for key, call in distinct.items():
        small, *larger = (_histories[run] for run in _runs(key, call))
        n = _batch_size(call)
        found[key] = _sequence(small, larger[0], _few(call), n) if larger else _sequence(small, small, (n, n), n)
    return found


def _runs(key: Any, call: Call) -> list[Any]:
    """The operators to run in order to know this one: itself, or the same convolution on a few samples."""
    n = _batch_size(call)
    few = _few(call) if _is_convolution(call) else (n, n)
    if n <= few[1]:
        return [(*key, torch.get_num_threads())]
    if n >= _ONEDNN_SAMPLES:
        key = _for_onednn(key)
    return [_shrunk(key, k) for k in few]


def _few(call: Call) -> tuple[int, int]:
    """Samples in the two batches to run: enough for all threads, as long as that is quick."""
    threads = torch.get_num_threads()
    batched = [a for a in call.arguments[:2] if isinstance(a, TensorMeta) and a.shape[:1] == (_batch_size(call),)]
    sample_bytes = max(1, *(a.nbytes // max(a.shape[0], 1) for a in batched))
    work, n = _sample_work(call), _batch_size(call)
    if n * sample_bytes <= 4 * _PROBE_BYTES and n * work <= _PROBE_WORK:
        return n, n  # the whole batch is quick
    large = min(2 * _FEW_PER_THREAD * threads * (threads > 1), _PROBE_BYTES // sample_bytes, _PROBE_WORK // work)
    return (large // 2, large // 2 * 2) if large > 2 * _FEW[0] else _FEW


def _sample_work(call: Call) -> int:
    """Multiplications for one sample, roughly: all weights at every pixel that the stride leaves."""
    first = 0 if call.operator == _CONVOLUTION else 1
    x, weight = call.arguments[first : first + 2]
    pixels = math.prod(x.shape[2:]) // math.prod(call.arguments[first + 3])
    return max(1, (1 + first) * math.prod(weight.shape) * pixels)


def _for_onednn(key: Any) -> Any:
    """``key``, where few samples would go another way than many: a window of one pixel may as well be dilated."""
    operator, arguments = key
    weight_at, stride_at = (1, 3) if operator == _CONVOLUTION else (2, 4)
    dilation_at = stride_at + 2
    weight, stride, dilation = arguments[weight_at], arguments[stride_at], arguments[dilation_at]
    if weight.dtype != torch.float32 or not is_pointwise(weight, stride, dilation):
        return key
    return operator, (*arguments[:dilation_at], (2,) * len(dilation), *arguments[dilation_at + 1 :])


_histories: dict[Any, list[tuple[int, int]]] = {}


def _shrunk(key: Any, n: int) -> Any:
    """The key of the same convolution on ``n`` samples."""
    operator, arguments = key
    batched = 1 if operator == _CONVOLUTION else 2
    small = [TensorMeta((n, *a.shape[1:]), a.strides, a.dtype) for a in arguments[:batched]]
    return operator, (*small, *arguments[batched:]), torch.get_num_threads()


def _arguments(key: Any) -> list[Any]:
    operator, arguments, _ = key
    return [operator, *(_zeros(a) if isinstance(a, TensorMeta) else a for a in arguments)]


def _zeros(meta: TensorMeta) -> Tensor:
    """A tensor of that form, an expanded one included: several elements may share one place."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(meta.shape, meta.strides, strict=True))
    return torch.zeros(extent, dtype=meta.dtype).as_strided(meta.shape, meta.strides)


@torch.no_grad()
def _call(operator: str, *arguments: Any) -> object:
    name, overload = operator.removeprefix("aten.").split(".")
    return getattr(getattr(torch.ops.aten, name), overload)(*arguments)


def _sequence(small: list[tuple[int, int]], large: list[tuple[int, int]], few: tuple[int, int], n: int) -> Steps:
    """The allocations of a call on ``n`` samples, by continuing from those of the two of ``few``.

    Where the larger has some more in one place, a loop over the samples makes them, and one round of it is enough: it
    frees what it takes. Where the two do not correspond otherwise, the library took another way for one of them, and
    the larger is scaled as a whole.
    """
    counterparts = _counterparts(small, large)
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
        if counterparts is None:
            nbytes = -(-nbytes * n // few[1])
        elif counterparts[position] is not None:
            nbytes = _continued(small[counterparts[position]][1], nbytes, few, n)
        steps.append(Inner(None if position in results else position, max(nbytes, 1)))
    return (*steps, RESULTS)


def _continued(small: int, large: int, few: tuple[int, int], n: int) -> int:
    """Bytes for ``n`` samples: copies of the batch grow with it, scratch has steps and does not."""
    grows = small != large and abs(small * few[1] - large * few[0]) <= _CONSTANT_PART * large * few[0]
    return large + (large - small) * (n - few[1]) // (few[1] - few[0]) if grows else max(small, large)


def _counterparts(small: list[tuple[int, int]], large: list[tuple[int, int]]) -> list[Any] | None:
    """For each event of ``large`` the position of its like in ``small``; None in it for one of another round."""
    signs = [[nbytes > 0 for _, nbytes in history] for history in (small, large)]
    more = len(large) - len(small)
    same = next((k for k, (a, b) in enumerate(zip(*signs, strict=False)) if a != b), min(map(len, signs)))
    if more < 0 or signs[0][same:] != signs[1][same + more :]:
        return None
    live: set[int] = set()
    for address, nbytes in large[same : same + more]:
        if nbytes < 0 and address not in live:
            return None
        (live.add if nbytes > 0 else live.remove)(address)
    return None if live else [*range(same), *[None] * more, *range(same, len(small))]
