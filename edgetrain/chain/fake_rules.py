"""What operators give, as shapes, strides and element types, by rules of our own.

torch describes its operators too, but some descriptions take a millisecond and import torch's compiler or sympy, each
half a second. The rules here give the same (``tests/chain/test_fakes.py``) for what training steps are made of; an
operator or a case that no rule knows is left to torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from edgetrain.chain.layer_rules import LAYER_RULES, Forms, Rule, form_of, is_dense, rows

aten = torch.ops.aten

# pointwise operators that give floats of the kind they take, in the shape of their first argument
_ALIKE = frozenset(
    (
        *("relu", "leaky_relu", "elu", "gelu", "silu", "mish", "hardswish", "hardtanh", "hardsigmoid", "sigmoid"),
        *("leaky_relu_backward", "elu_backward", "gelu_backward", "silu_backward", "mish_backward", "tanh_backward"),
        *("hardtanh_backward", "hardsigmoid_backward", "hardswish_backward", "sigmoid_backward", "threshold_backward"),
        *("add", "sub", "mul", "div", "maximum", "minimum", "pow", "tanh", "neg", "abs", "sgn", "exp", "log"),
        *("sqrt", "rsqrt", "reciprocal"),
    )
)


def rule_for(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Forms:
    """The form of what ``func`` gives, a list for a tuple; None: no rule says."""
    rule = _RULES.get(func)
    if rule is not None:
        return rule(*args, **kwargs)
    return _pointwise(func, args) if not kwargs else None


def in_given_memory(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """The argument in whose memory a pointwise ``func`` puts its result; None: no rule says."""
    if not func._schema.is_mutable:
        return None
    if torch.Tag.pointwise in func.tags and func._opname.endswith("_"):
        return cast(Tensor, args[0])
    given = kwargs.get("grad_input", kwargs.get("out"))
    fitting = func._opname in _ALIKE and isinstance(given, Tensor) and given.shape == args[0].shape
    return given if fitting else None


def _pointwise(func: Any, args: Sequence[Any]) -> Forms:
    if func._opname not in _ALIKE or func._schema.is_mutable:
        return None
    first, *others = args
    if not isinstance(first, Tensor) or not first.is_floating_point() or any(isinstance(a, complex) for a in others):
        return None
    tensors = [a for a in others if isinstance(a, Tensor)]
    if any(t.dtype != first.dtype for t in tensors):
        return None
    if all(form_of(t) == form_of(first) for t in tensors):
        return form_of(first) if is_dense(first) else rows(first.shape, first.dtype) if _is_in_order(first) else None
    # with strides in order, TensorIterator sees no reason to lay the result out in another one
    fitting = all(_is_in_order(t) and _spreads_over(t.shape, first.shape) for t in (first, *tensors))
    return rows(first.shape, first.dtype) if fitting else None


def _is_in_order(tensor: Tensor) -> bool:
    """Whether no dimension has a larger stride than one before it; expanded ones, of stride zero, do not count."""
    strides = [s for s, extent in zip(tensor.stride(), tensor.shape, strict=True) if s and extent > 1]
    return strides == sorted(strides, reverse=True)


def _spreads_over(shape: Sequence[int], whole: Sequence[int]) -> bool:
    """Whether broadcasting turns ``shape`` into ``whole``."""
    return len(shape) <= len(whole) and all(
        own in (1, extent) for own, extent in zip(reversed(shape), reversed(whole), strict=False)
    )


def _like(x: Tensor, *_: Any, **options: Any) -> Forms:
    dtype, layout = options.get("dtype") or x.dtype, options.get("memory_format") or torch.preserve_format
    if layout == torch.contiguous_format:
        return rows(x.shape, dtype)
    return (x.shape, x.stride(), dtype) if layout == torch.preserve_format and is_dense(x) else None


def _reduction(
    x: Tensor, dim: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Forms:
    if not (dtype or x.dtype).is_floating_point or x.dim() == 0:
        return None
    summed = {k % x.dim() for k in dim or range(x.dim())}
    extents = [1 if k in summed else extent for k, extent in enumerate(x.shape) if keepdim or k not in summed]
    return rows(extents, dtype or x.dtype)


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Forms:
    first = tensors[0]
    dim %= max(first.dim(), 1)
    if any(t.dtype != first.dtype or t.dim() != first.dim() or not t.is_contiguous() for t in tensors):
        return None
    if first.dim() < 2:  # an empty one of one dimension goes with any shape
        return None
    return rows([*first.shape[:dim], sum(t.shape[dim] for t in tensors), *first.shape[dim + 1 :]], first.dtype)


def _rounded_quotient(x: Tensor, divisor: Any, *, rounding_mode: str | None) -> Forms:
    return form_of(x) if rounding_mode is not None and type(divisor) is int and is_dense(x) else None


_RULES: dict[Any, Rule] = {
    **LAYER_RULES,
    **dict.fromkeys((aten.mean.dim, aten.sum.dim_IntList), _reduction),
    aten.cat.default: _cat,
    aten.div.Tensor_mode: _rounded_quotient,
    **dict.fromkeys((aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default), _like),
}
