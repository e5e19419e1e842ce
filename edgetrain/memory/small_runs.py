"""Operators run here for real, on few samples, to see what they allocate inside.

Most of what a convolution of oneDNN allocates is its operands once more: input, weights, output and gradients, their
channels padded to a block. Where each of its allocations is one of these, a single run says all: copies of the batch
grow with it, those of the weights do not. Where one is something else, such as scratch, a second run on fewer samples
tells whether it grows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from edgetrain.memory.convolution_bound import convolution_output, is_pointwise
from edgetrain.memory.inner import RESULTS, Inner, Steps
from edgetrain.memory.measure import record_allocations
from edgetrain.memory.trace import Call, TensorMeta

CONVOLUTION = "aten.convolution.default"
CONVOLUTION_BACKWARD = "aten.convolution_backward.default"

_FEW = 2, 3  # a single sample may go to another kernel
_PROBE_BYTES, _PROBE_WORK = 2**22, 2**30  # of the larger batch; multiplications
_FEW_PER_THREAD = 4  # fewer are not spread over all threads, each of which has its scratch
_CONSTANT_PART = 0.01  # what a copy has besides, such as a bias
_ONEDNN_SAMPLES = 16  # see convolution_bound.is_pointwise
_BLOCKS = 1, 8, 16  # channels

_History = list[tuple[int, int]]
_histories: dict[Any, _History] = {}


def is_convolution(call: Call) -> bool:
    """Whether ``call`` is one, forward or backward."""
    return call.operator in (CONVOLUTION, CONVOLUTION_BACKWARD)


def key_of_call(call: Call) -> Any:
    """Equal for calls that do the same with memory."""
    return call.operator, call.arguments


def run_small(calls: Iterable[Call]) -> dict[Any, Steps]:
    """What each of ``calls``, convolutions and small matrix products, does with memory; by :func:`key_of_call`."""
    distinct = {key_of_call(call): call for call in calls}
    runs = {key: _runs(key, call) for key, call in distinct.items()}
    _record(larger for _, larger in runs.values())
    _record(small for small, larger in runs.values() if _copies_only(larger) is None)
    return {key: _steps(call, *runs[key]) for key, call in distinct.items()}


def _record(runs: Iterable[Any]) -> None:
    # steps of two batch sizes of one model have their small ones in common
    missing = list(dict.fromkeys(run for run in runs if run not in _histories))
    if missing:
        zeros = torch.zeros(max(map(_operand_bytes, missing)), dtype=torch.uint8)
        recorded = record_allocations(_call, (_arguments(run, zeros) for run in missing))
        _histories.update(zip(missing, recorded, strict=True))


def _steps(call: Call, small: Any, larger: Any) -> Steps:
    history, n = _histories[larger], _batch_size(call)
    if small == larger:
        return _sequence(history, history, (n, n), n)
    few, copies = _few(call), _copies_only(larger)
    if copies is None:
        return _sequence(_histories[small], history, few, n)
    grown = [(at, nbytes * few[0] // few[1] if copies.get(abs(nbytes), False) else nbytes) for at, nbytes in history]
    return _sequence(grown, history, few, n)


def _runs(key: Any, call: Call) -> tuple[Any, Any]:
    """The operators to run in order to know this one: the same convolution on a few samples, or twice itself."""
    itself = (*key, torch.get_num_threads())
    if not is_convolution(call):
        return itself, itself
    n, few = _batch_size(call), _few(call)
    if n <= few[1]:
        return itself, itself
    if n >= _ONEDNN_SAMPLES:
        key = _for_onednn(key)
    return _shrunk(key, few[0]), _shrunk(key, few[1])


def _copies_only(run: Any) -> dict[int, bool] | None:
    """Whether allocations of that many bytes grow with the batch; None where one is no copy of an operand."""
    operator, arguments, _ = run
    if operator not in (CONVOLUTION, CONVOLUTION_BACKWARD):
        return None
    if operator == CONVOLUTION:
        x, weight, _, stride, padding, dilation, transposed, output_padding, groups = arguments
        y = convolution_output(x, weight, stride, padding, dilation, transposed, output_padding, groups)
    else:
        y, x, weight = arguments[:3]
    constant = _padded_bytes(weight, 0, 1)
    growing = _padded_bytes(x, 1) | _padded_bytes(y, 1)
    seen = {nbytes for _, nbytes in _histories[run] if nbytes > 0}
    if not seen <= growing ^ constant:  # what could be either is not known
        return None
    return {nbytes: nbytes in growing for nbytes in seen}


def _padded_bytes(meta: TensorMeta, *dimensions: int) -> set[int]:
    """Bytes of a dense tensor of that shape, ``dimensions`` rounded up to blocks of any kind."""
    found = set()
    for blocks in itertools.product(_BLOCKS, repeat=len(dimensions)):
        shape = list(meta.shape)
        for k, block in zip(dimensions, blocks, strict=True):
            shape[k] = -(-shape[k] // block) * block
        found.add(math.prod(shape) * meta.dtype.itemsize)
    return found


def _batch_size(call: Call) -> int:
    return int(call.arguments[0].shape[0])


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
    first = 0 if call.operator == CONVOLUTION else 1
    x, weight = call.arguments[first : first + 2]
    pixels = math.prod(x.shape[2:]) // math.prod(call.arguments[first + 3])
    return max(1, (1 + first) * math.prod(weight.shape) * pixels)


def _for_onednn(key: Any) -> Any:
    """``key``, where few samples would go another way than many: a window of one pixel may as well be dilated."""
    operator, arguments = key
    weight_at, stride_at = (1, 3) if operator == CONVOLUTION else (2, 4)
    dilation_at = stride_at + 2
    weight, stride, dilation = arguments[weight_at], arguments[stride_at], arguments[dilation_at]
    if weight.dtype != torch.float32 or not is_pointwise(weight, stride, dilation):
        return key
    return operator, (*arguments[:dilation_at], (2,) * len(dilation), *arguments[dilation_at + 1 :])


def _shrunk(key: Any, n: int) -> Any:
    """The key of the same convolution on ``n`` samples."""
    operator, arguments = key
    batched = 1 if operator == CONVOLUTION else 2
    small = [TensorMeta((n, *a.shape[1:]), a.strides, a.dtype) for a in arguments[:batched]]
    return operator, (*small, *arguments[batched:]), torch.get_num_threads()


def _operand_bytes(run: Any) -> int:
    return max(_extent(a) * a.dtype.itemsize for a in run[1] if isinstance(a, TensorMeta))


def _arguments(run: Any, zeros: Tensor) -> list[Any]:
    """Those of the operator; every tensor lies in the memory of ``zeros``, which nothing writes to."""
    operator, arguments, _ = run
    return [operator, *(_view(a, zeros) if isinstance(a, TensorMeta) else a for a in arguments)]


def _view(meta: TensorMeta, zeros: Tensor) -> Tensor:
    nbytes = _extent(meta) * meta.dtype.itemsize
    return zeros[:nbytes].view(meta.dtype).as_strided(meta.shape, meta.strides)


def _extent(meta: TensorMeta) -> int:
    """Elements from the first to the last one; several of an expanded tensor share one place."""
    return 1 + sum((size - 1) * stride for size, stride in zip(meta.shape, meta.strides, strict=True))


@torch.no_grad()
def _call(operator: str, *arguments: Any) -> object:
    name, overload = operator.removeprefix("aten.").split(".")
    return getattr(getattr(torch.ops.aten, name), overload)(*arguments)


def _sequence(small: _History, large: _History, few: tuple[int, int], n: int) -> Steps:
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


def _counterparts(small: _History, large: _History) -> list[Any] | None:
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
