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

from edgetrain.chain.fake_rules import in_given_memory, rule_for
from edgetrain.chain.layer_rules import Form, convolution_forms, form_of

aten = torch.ops.aten

_CPU, _META = torch.device("cpu"), torch.device("meta")
_CONVOLUTIONS = aten.convolution.default, aten.convolution_backward.default


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
    return _new((tensor.shape, tensor.stride(), dtype or tensor.dtype))


def spare_the_compiler(function: Callable[..., object]) -> None:
    """Keeps ``function``, of torch, from importing torch's compiler only to tell it to keep away."""
    inner = inspect.unwrap(function)
    if inner is not function and not hasattr(inner, "__dynamo_disable"):
        inner.__dynamo_disable = inner  # where torch/_compile.py looks first


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func is torch.ops.prim.device.default:
        return _META if _kernel.running else _CPU
    if not _gives_new_memory(func):
        return _result(func, args, kwargs)
    fakes: list[Tensor] = []
    key: Any = func, _described(args, fakes), _described(tuple(kwargs.items()), fakes)
    if not fakes:
        return _result(func, args, kwargs)
    if func in _CONVOLUTIONS:
        key = *key, torch.get_num_threads(), torch.backends.mkldnn.enabled
    known = _remembered.get(key)
    if known is not None:
        return _made(known)
    result = _result(func, args, kwargs)
    if _is_new(result, fakes):
        _remembered[key] = _forms(result)
    return result


_remembered: dict[Any, Any] = {}
"""The forms that operators give, by operator and forms of the arguments: to ask torch may take a millisecond."""


def _result(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
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
    if func is aten._to_copy.default:
        func = aten.empty_like.default
        kwargs = {"device": _META, **{k: v for k, v in kwargs.items() if k not in ("device", "non_blocking")}}
    elif "device" in kwargs or (not tensors and _takes_a_device(func)):
        kwargs = {**kwargs, "device": _META}
    args, kwargs = _changed((args, kwargs), lambda t: t if isinstance(t, FakeTensor) else fake_like(t))
    if (given := in_given_memory(func, args, kwargs)) is not None:
        return given
    if (forms := rule_for(func, args, kwargs)) is not None:
        return _made(forms)
    if _is_composite(func):
        with fake_mode():
            return func.decompose(*args, **kwargs)
    if _is_decomposed(func):
        with fake_mode():
            return decomposition_table[func](*args, **kwargs)
    layout = _convolution_layout(func, args)
    if layout is not None and (forms := convolution_forms(func, args, layout)) is not None:
        return _made(forms)
    with _in_kernel():
        result = func(*args, **kwargs)
        if layout is not None:
            result = _changed(result, lambda t: t.contiguous(memory_format=layout) if t.dim() == 4 else t)
        return _changed(result, lambda t: t if isinstance(t, FakeTensor) else FakeTensor(t))


def _is_new(result: Any, arguments: list[Tensor]) -> bool:
    """Whether each tensor of ``result`` fills memory of its own."""
    tensors = [result] if isinstance(result, Tensor) else result if isinstance(result, (tuple, list)) else []
    if not tensors or not all(isinstance(tensor, FakeTensor | None) for tensor in tensors):
        return False
    owned = [tensor for tensor in tensors if tensor is not None]
    owners = {tensor.untyped_storage()._cdata for tensor in [*owned, *arguments]}
    filled = all(t.untyped_storage().nbytes() == _new(form_of(t)).untyped_storage().nbytes() for t in owned)
    return filled and len(owners) == len(owned) + len({t.untyped_storage()._cdata for t in arguments})


def _forms(result: Any) -> Any:
    """The form of a tensor, or of each of several."""
    if isinstance(result, Tensor):
        return form_of(result)
    return [None if tensor is None else form_of(tensor) for tensor in result]


def _made(forms: Any) -> Any:
    """The reverse of :func:`_forms`."""
    if isinstance(forms, list):
        return tuple(None if form is None else _new(form) for form in forms)
    return _new(forms)


@functools.cache
def _gives_new_memory(func: Any) -> bool:
    """Whether ``func`` says that it neither changes its arguments nor gives views of them."""
    schema = func._schema
    return (
        bool(schema.returns)
        and not any(one.alias_info for one in (*schema.arguments, *schema.returns))
        and not _is_composite(func)
    )


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
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeExplicitAutograd"):
        return False  # it runs on the meta device as on any: slices and other views
    return inspect.unwrap(decomposition_table[func]).__module__ == decompositions.__name__


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
    with fake_mode():  # without one, torch asks whether a tensor is distributed, and imports all of that
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


def _new(form: Form) -> FakeTensor:
    shape, strides, dtype = form
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


def _described(value: Any, fakes: list[Tensor]) -> Any:
    """Equal for values that no operator tells apart by the form of what it gives; notes fake tensors in ``fakes``."""
    if isinstance(value, Tensor):
        if isinstance(value, FakeTensor):
            fakes.append(value)
        return form_of(value)
    if isinstance(value, (tuple, list)):
        return tuple([_described(item, fakes) for item in value])
    return type(value), value  # 1, 1.0 and True are equal
