"""What operators allocate for themselves, inside, and free before they return.

On the CPU:

- convolutions of oneDNN copy input, weights and output to a blocked layout. Which of them, with how many channels of
  padding, and what scratch memory comes on top depends on the shape, the element type and the instructions of the
  processor. So each distinct convolution of a step is run for real on a small batch or two under the profiler
  (:mod:`edgetrain.memory.small_runs`), and each of its allocations that grows with the batch is continued to the whole.
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
from typing import Any, Literal

import torch

from edgetrain.memory.convolution_bound import convolution_bound
from edgetrain.memory.eight_bit import update_temporaries
from edgetrain.memory.inner import RESULTS, Inner, Steps
from edgetrain.memory.small_runs import is_convolution, key_of_call, run_small
from edgetrain.memory.trace import Call, TensorMeta

DeviceKind = Literal["cpu", "cuda"]

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
            distinct = {key_of_call(call): call for call in calls if is_convolution(call)}
            if measured:
                self._known = run_small([*distinct.values(), *filter(_is_small_product, calls)])
            else:
                self._known = {key: _around(convolution_bound(call), before=True) for key, call in distinct.items()}

    def of(self, call: Call) -> Steps:
        """What ``call`` does, its results included."""
        if self._device != "cpu":
            return _around(_copies(call), before=True)
        if (is_convolution(call) or _is_product(call)) and (known := self._known.get(key_of_call(call))):
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
    """Of a gradient that is not dense; if it is, but laid out otherwise than the input, all is done in two layouts."""
    dy, *others = _tensors(call)
    if not (dy.is_contiguous or dy.is_channels_last):
        return [dy.nbytes]
    if not others:
        return []
    x = others[0]
    alike = (dy.is_contiguous and x.is_contiguous) or (dy.is_channels_last and x.is_channels_last)
    return [] if alike else [t.nbytes for t in others]


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


def _is_product(call: Call) -> bool:
    return call.operator.removeprefix("aten.").partition(".")[0] in _PRODUCTS


def _is_small_product(call: Call) -> bool:
    """A matrix product in bf16 that is worth running: oneDNN packs its factors, the more the larger they are."""
    if not (_is_product(call) and call.operator.endswith(".default")):
        return False
    factors = _tensors(call)[-2:]
    return factors[0].dtype == torch.bfloat16 and sum(t.nbytes for t in factors) <= _SMALL_PRODUCT_BYTES
