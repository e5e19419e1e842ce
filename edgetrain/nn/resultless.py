"""Operators whose gradient can do without their result: what it needs instead, and the call under autograd without it.

The gradient formulas are torch's own operators for them; those of convolutions, matrix products and batch norm are in
:mod:`edgetrain.nn.products` and :mod:`edgetrain.nn.normalisation`. Used by :mod:`edgetrain.nn.liveness`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edgetrain.nn.interception import BatchNormCall
from edgetrain.nn.normalisation import Statistics
from edgetrain.nn.products import product_of


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a tensor along one of its dimensions."""

    dim: int
    start: int
    length: int

    def of(self, x: Tensor) -> Tensor:
        """A view of it."""
        return x.narrow(self.dim, self.start, self.length)


@dataclass(frozen=True, slots=True)
class Operator:
    """A call of an operator whose result its gradient can do without.

    Attributes:
        operands: the tensors that it reads.
        needed: for each whether the gradient needs its values, if the result is not there.
        without_result: the call under autograd: (result without values, statistics of a batch norm) -> result.
        with_result: likewise where the result is known and nothing else is; None where it is no help.
        parts: what of the result the operands are, where they are no more than that.
        keeps_result: whether torch would save its result, in the place of what is ``needed``.
        is_product: as of :func:`edgetrain.nn.products.product_of`.
    """

    operands: tuple[Tensor, ...]
    needed: tuple[bool, ...]
    without_result: Callable[[Tensor, Callable[[], Statistics]], Tensor]
    with_result: Callable[[Tensor], Tensor] | None = None
    parts: tuple[Part, ...] = ()
    keeps_result: bool = False
    in_place: bool = False
    is_product: bool = False

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """Of the operands."""
        return tuple(operand.shape for operand in self.operands)


def operator_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operator | None:
    """The call as one whose result its gradient can do without; None if it is none, or of an unusual form."""
    rule = _RULES.get(func)
    if rule is not None:
        try:
            return rule(*args, **kwargs)
        except TypeError:  # arguments that a rule does not know
            return None
    product = product_of(func, args, kwargs)
    if product is None:
        return None
    factors = [(factor, k < 2) for k, factor in enumerate(product.factors) if factor is not None]
    return Operator(
        tuple(factor for factor, _ in factors),
        tuple(needed for _, needed in factors),
        lambda y, _: product.under_autograd(y),
        is_product=True,
    )


def _batch_norm(*args: Any, **kwargs: Any) -> Operator | None:
    call = BatchNormCall(*args, **kwargs)
    if not call.reusable:
        return None
    given = [(call.input, True), (call.weight, True), (call.bias, False)]
    return Operator(
        tuple(t for t, _ in given if t is not None),
        tuple(needed for t, needed in given if t is not None),
        lambda y, statistics: call.with_statistics(statistics(), result=y),
    )


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, result: list[Tensor]) -> Tensor:
        return result.pop()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        return dy, dy, None


def _sum(a: Any, b: Any, *, in_place: bool) -> Operator | None:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return None
    if a.shape != b.shape or a.dtype != b.dtype or not a.is_floating_point():
        return None
    return Operator((a, b), (False, False), lambda y, _: _Sum.apply(a, b, [y]), in_place=in_place)


class _Concatenation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: tuple[Part, ...], result: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.parts = parts
        return result.pop()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:]
        return (
            None,
            None,
            *(part.of(dy) if is_wanted else None for part, is_wanted in zip(ctx.parts, wanted, strict=True)),
        )


def _concatenation(tensors: Any, dim: int = 0) -> Operator | None:
    if not isinstance(tensors, list | tuple) or not tensors or not isinstance(dim, int):
        return None
    first = tensors[0]
    if not all(isinstance(t, Tensor) and t.dim() == first.dim() and t.dtype == first.dtype for t in tensors):
        return None
    if not first.is_floating_point() or not -first.dim() <= dim < first.dim():
        return None
    dim %= first.dim()
    parts, start = [], 0
    for t in tensors:
        parts.append(Part(dim, start, t.shape[dim]))
        start += t.shape[dim]
    return Operator(
        tuple(tensors),
        (False,) * len(tensors),
        lambda y, _: _Concatenation.apply(tuple(parts), [y], *tensors),
        parts=tuple(parts),
    )


class _Activation(torch.autograd.Function):
    """An activation whose gradient is ``gradient(dy, known)``: from its input, or from its output."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, known: Tensor, result: list[Tensor], gradient: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        ctx.save_for_backward(known)
        ctx.gradient = gradient
        return result.pop()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (known,) = ctx.saved_tensors
        return ctx.gradient(dy, known), None, None, None


def _activation(
    x: Any, gradient: Callable[[Tensor, Tensor], Tensor], *, in_place: bool, from_result: bool
) -> Operator | None:
    """``from_result``: whether the same formula takes the output for the input."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return None

    def with_result(y: Tensor) -> Tensor:
        result: Tensor = _Activation.apply(x, y, [y.detach()], gradient)
        return result

    return Operator(
        (x,),
        (True,),
        lambda y, _: _Activation.apply(x, x.detach(), [y], gradient),
        with_result=with_result if from_result else None,
        keeps_result=from_result,
        in_place=in_place,
    )


_aten = torch.ops.aten


def _relu(input: Tensor, inplace: bool = False) -> Operator | None:
    return _activation(input, lambda dy, x: _aten.threshold_backward(dy, x, 0), in_place=inplace, from_result=True)


def _hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Operator | None:
    def gradient(dy: Tensor, x: Tensor) -> Tensor:
        dx: Tensor = _aten.hardtanh_backward(dy, x, min_val, max_val)
        return dx

    # a narrower type may round the limits, so that what was clamped seems to lie between them
    exact = isinstance(input, Tensor) and input.dtype in (torch.float32, torch.float64)
    return _activation(input, gradient, in_place=inplace, from_result=exact)


def _relu6(input: Tensor, inplace: bool = False) -> Operator | None:
    return _hardtanh(input, 0.0, 6.0, inplace)


def _leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Operator | None:
    def gradient(dy: Tensor, x: Tensor) -> Tensor:
        dx: Tensor = _aten.leaky_relu_backward(dy, x, negative_slope, False)
        return dx

    return _activation(input, gradient, in_place=inplace, from_result=negative_slope > 0)


def _silu(input: Tensor, inplace: bool = False) -> Operator | None:
    return _activation(input, _aten.silu_backward, in_place=inplace, from_result=False)


def _hardswish(input: Tensor, inplace: bool = False) -> Operator | None:
    return _activation(input, _aten.hardswish_backward, in_place=inplace, from_result=False)


def _gelu(input: Tensor, approximate: str = "none") -> Operator | None:
    def gradient(dy: Tensor, x: Tensor) -> Tensor:
        dx: Tensor = _aten.gelu_backward(dy, x, approximate=approximate)
        return dx

    return _activation(input, gradient, in_place=False, from_result=False)


_Rule = Callable[..., Operator | None]
_RULES: dict[Any, _Rule] = {
    F.batch_norm: _batch_norm,
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__), lambda a, b: _sum(a, b, in_place=False)),
    **dict.fromkeys((Tensor.add_, Tensor.__iadd__), lambda a, b: _sum(a, b, in_place=True)),
    **dict.fromkeys((torch.cat, torch.concat), _concatenation),
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _relu),
    **dict.fromkeys((F.relu_, Tensor.relu_), lambda x: _relu(x, inplace=True)),
    F.hardtanh: _hardtanh,
    F.relu6: _relu6,
    F.leaky_relu: _leaky_relu,
    F.silu: _silu,
    F.hardswish: _hardswish,
    F.gelu: _gelu,
}
