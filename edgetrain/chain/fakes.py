"""Tensors that have a shape but no data, for running a model without computing anything.

The idea is that of torch's ``FakeTensorMode``: a tensor of the meta device that says it is on the CPU, so that modules
and autograd take it for one, and a mode that hands each operator to its meta kernel. torch's own also follows symbolic
shapes, for which it imports torch's compiler, half a second and 50 MB, and spends as much time again on each operator;
that matters to a command that is to answer at once.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table, decompositions, meta_table
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

_CPU, _META = torch.device("cpu"), torch.device("meta")
_FULL = torch.float32, torch.float64
_Meta = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]

# operators on floats of one kind whose result is as their first argument; torch's own description of them is slow
_ALIKE = (
    *("relu", "leaky_relu", "elu", "gelu", "silu", "mish", "hardswish", "hardtanh", "hardsigmoid", "sigmoid", "tanh"),
    *("leaky_relu_backward", "elu_backward", "gelu_backward", "silu_backward", "mish_backward", "hardswish_backward"),
    *("hardtanh_backward", "hardsigmoid_backward", "sigmoid_backward", "tanh_backward", "threshold_backward"),
    *("add", "sub", "mul", "maximum", "minimum"),
)


class NeedsDataError(RuntimeError):
    """An operator's result depends on the values of its arguments."""


class FakeTensor(Tensor):
    """A tensor without data in the place of one on the CPU; what operators give inside :func:`fake_mode`."""

    @staticmethod
    def __new__(cls, elements: Tensor) -> FakeTensor:
        fake: FakeTensor = Tensor._make_subclass(
            cls, elements, elements.requires_grad, dispatch_device=True, device_for_backend_keys=_CPU
        )
        return fake

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The CPU; for a meta kernel, which must not know, the meta device."""
        return _META if _kernel.running else _CPU

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(func, args, kwargs or {})  # outside of the mode

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"FakeTensor({tuple(self.shape)}, {self.dtype})"

    def tolist(self) -> Any:
        """Raises NeedsDataError."""
        raise NeedsDataError("tolist")


class _FakeMode(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled; it would cost a detour at every operator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def fake_mode() -> TorchDispatchMode:
    """A mode in which new tensors are fake ones of the CPU, and real ones that an operator meets count as such.

    Operators on single real numbers are computed. One that needs the values of others raises NeedsDataError; one that
    has no meta kernel raises NotImplementedError, because trying it out would take memory.
    """
    return _FakeMode()


def fake_like(tensor: Tensor, dtype: torch.dtype | None = None) -> FakeTensor:
    """A fake tensor of the shape and strides of ``tensor``, of its type or of ``dtype``."""
    return _new(tuple(tensor.shape), tensor.stride(), dtype or tensor.dtype)


def spare_the_compiler(function: Callable[..., object]) -> None:
    """Keeps ``function``, of torch, from importing torch's compiler only to tell it to keep away."""
    inner = inspect.unwrap(function)
    if inner is not function and not hasattr(inner, "__dynamo_disable"):
        inner.__dynamo_disable = inner  # where torch/_compile.py looks first


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func is torch.ops.prim.device.default:
        return _META if _kernel.running else _CPU
    if func is aten.copy_.default and isinstance(args[0], FakeTensor):
        return args[0]
    if func._opname.startswith("_fused_") and func._schema.is_mutable:
        return None  # an optimiser's update in place, which has no meta kernel
    tensors = _tensors_in((args, kwargs))
    known = not any(isinstance(tensor, FakeTensor) for tensor in tensors)
    if torch.Tag.data_dependent_output in func.tags or func is aten._local_scalar_dense.default:
        if not known:
            raise NeedsDataError(str(func))
        return func(*args, **kwargs)
    if tensors and known and "device" not in kwargs and all(tensor.numel() <= 1 for tensor in tensors):
        return func(*args, **kwargs)  # a number of the program
    if "device" in kwargs or (not tensors and _takes_a_device(func)):
        kwargs = {**kwargs, "device": _META}
    args, kwargs = _changed((args, kwargs), lambda t: t if isinstance(t, FakeTensor) else fake_like(t))
    if func is aten._to_copy.default:
        func, kwargs = aten.empty_like.default, {k: v for k, v in kwargs.items() if k != "non_blocking"}
        kwargs["device"] = _META
    if func is aten.native_batch_norm.default and args[0].dtype in _FULL and _is_dense(args[0]):
        return _batch_norm(*args)
    if _is_as_its_first(func, args):
        return args[0] if func._schema.is_mutable else fake_like(args[0])
    if _is_composite(func):
        with fake_mode():
            return func.decompose(*args, **kwargs)
    if _is_decomposed(func):
        return _decomposed(func, args, kwargs)
    layout = _convolution_layout(func, args)
    with _in_kernel():
        result = func(*args, **kwargs)
        if layout is not None:
            result = _changed(result, lambda t: t.contiguous(memory_format=layout) if t.dim() == 4 else t)
    return _changed(result, lambda t: t if isinstance(t, FakeTensor) else FakeTensor(t))


def _batch_norm(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    channels = x.shape[1] if arguments[4] else 0  # frozen statistics are not saved
    return fake_like(x), _new((channels,), (1,), x.dtype), _new((channels,), (1,), x.dtype)


def _is_as_its_first(func: Any, args: Any) -> bool:
    if torch.Tag.pointwise not in func.tags:
        return False
    if func._schema.is_mutable:
        return bool(func._opname.endswith("_"))
    if func._opname not in _ALIKE or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
        return False
    kinds = {(a.dtype, a.shape, a.stride()) for a in args if isinstance(a, Tensor)}
    return len(kinds) == 1 and _is_dense(args[0])


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill a piece of memory, in whatever order."""
    filled = 1
    for stride, extent in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if extent != 1 and stride != filled:
            return False
        filled *= extent
    return True


@functools.cache
def _takes_a_device(func: Any) -> bool:
    return any(argument.name == "device" for argument in func._schema.arguments)


@functools.cache
def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


@functools.cache
def _is_decomposed(func: Any) -> bool:
    """Whether torch describes ``func`` by other operators rather than by a meta kernel."""
    if func in meta_table or func not in decomposition_table:
        return False
    return inspect.unwrap(decomposition_table[func]).__module__ == decompositions.__name__


_fresh: dict[Any, list[_Meta | None]] = {}


def _decomposed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The result of the decomposition; one that shares no memory with the arguments is remembered."""
    key = func, _described((args, tuple(kwargs.items())))
    if key in _fresh:
        return tuple(None if meta is None else _new(*meta) for meta in _fresh[key])
    with fake_mode():
        result = decomposition_table[func](*args, **kwargs)
    theirs = {tensor.untyped_storage()._cdata for tensor in _tensors_in((args, kwargs))}
    if isinstance(result, tuple) and all(t is None or t.untyped_storage()._cdata not in theirs for t in result):
        _fresh[key] = [None if t is None else (tuple(t.shape), t.stride(), t.dtype) for t in result]
    return result


def _convolution_layout(func: Any, args: Any) -> torch.memory_format | None:
    """The layout that a convolution on the CPU gives its results, which its meta kernel does not know."""
    if func is aten.convolution.default:
        x, weight, bias, *geometry = args
        more: list[Any] = []
    elif func is aten.convolution_backward.default:
        _, x, weight, bias_sizes, *geometry, _ = args
        bias, more = None, [bias_sizes]
    else:
        return None
    if weight.dim() != 4:
        return None
    backend = torch._C._select_conv_backend(x, weight, bias, *geometry, *more)
    layout: torch.memory_format = torch._C._conv_determine_backend_memory_format(x, weight, backend)
    return layout


class _Kernel(threading.local):
    running = False


_kernel = _Kernel()


@contextlib.contextmanager
def _in_kernel() -> Iterator[None]:
    """Inside, operators on fake tensors go to their meta kernels."""
    before = _kernel.running
    with torch._C._DisableTorchDispatch(), torch._C._PreserveDispatchKeyGuard():
        torch._C._set_meta_in_tls_dispatch_include(True)
        _kernel.running = True
        try:
            yield
        finally:
            _kernel.running = before


def _new(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> FakeTensor:
    with torch._C._DisableTorchDispatch():
        return FakeTensor(torch.empty_strided(shape, strides, dtype=dtype, device=_META))


def _tensors_in(value: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _changed(value, note)
    return found


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        items = [_changed(item, change) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {key: _changed(item, change) for key, item in value.items()}
    return value


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    if isinstance(value, (tuple, list)):
        return tuple(_described(item) for item in value)
    return value
