"""Convolutions and matrix products whose result is known: what autograd notes of them, without computing them.

A product is linear in each of its two factors, so its gradient needs the factors and never the result:

    y = x * w + b:    dx = dy * w transposed,   dw = x transposed * dy,   db = sum of dy

Whoever has kept ``y`` can therefore hand it out again and go back as if it had just been computed. The gradients come
from the kernels that autograd itself would call; those of convolutions as in :mod:`edgetrain.nn.sliced`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edgetrain.nn.sliced import ConvolutionSettings, convolution_gradients

Numbers = int | list[int] | tuple[int, ...]


@dataclass(frozen=True)
class Product:
    """One call of a convolution or a matrix product.

    Attributes:
        length: multiplications for each element of the result.
        factors: the two tensors that are multiplied, and the one that is added, if any.
        under_autograd: the call with its result given: (result,) -> the result with a history.
    """

    length: float
    factors: tuple[Tensor | None, ...]
    under_autograd: Callable[[Tensor], Tensor]

    @property
    def shapes(self) -> tuple[tuple[int, ...] | None, ...]:
        """Of the factors."""
        return tuple(None if factor is None else tuple(factor.shape) for factor in self.factors)


def product_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Product | None:
    """The call ``func(*args, **kwargs)`` as a product; None if it is none, or one of an unusual form."""
    rule = _RULES.get(func)
    if rule is None or kwargs.get("out") is not None:
        return None
    found = rule(*args, **{name: value for name, value in kwargs.items() if name != "out"})
    real = found is not None and all(factor is None or factor.is_floating_point() for factor in found.factors)
    return found if real else None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, settings: ConvolutionSettings, result: list[Tensor]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings, ctx.bias_sizes = settings, None if bias is None else list(bias.shape)
        return result.pop().detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[:3])
        return *convolution_gradients(dy, x, weight, ctx.bias_sizes, ctx.settings, mask), None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, result: list[Tensor]) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return result.pop().detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        dw = rows.T @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        return dx, dw, rows.sum(0) if ctx.needs_input_grad[2] else None, None


class _MatrixProduct(torch.autograd.Function):
    """``beta c + alpha a b`` for a (..., n, k) and b (..., k, m); leading dimensions are broadcast."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float, result: list[Tensor]
    ) -> Tensor:
        ctx.save_for_backward(a if ctx.needs_input_grad[1] else None, b if ctx.needs_input_grad[0] else None)
        ctx.shapes, ctx.alpha, ctx.beta = (a.shape, b.shape, None if c is None else c.shape), alpha, beta
        return result.pop().detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        shapes, wanted = ctx.shapes, ctx.needs_input_grad
        da = db = dc = None
        scaled = dy if ctx.alpha == 1 else ctx.alpha * dy
        if wanted[0]:
            da = (scaled @ b.mT).sum_to_size(shapes[0])
        if wanted[1] and len(shapes[1]) == 2:
            db = a.reshape(-1, a.shape[-1]).T @ scaled.reshape(-1, scaled.shape[-1])
        elif wanted[1]:
            db = (a.mT @ scaled).sum_to_size(shapes[1])
        if wanted[2]:
            dc = (dy if ctx.beta == 1 else ctx.beta * dy).sum_to_size(shapes[2])
        return da, db, dc, None, None, None


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
) -> Product | None:
    count, margins = weight.dim() - 2, [0] * 2 * (weight.dim() - 2)
    if input.dim() != weight.dim():  # a sample without a batch
        return None
    steps = _each(dilation, count)
    if padding == "same":  # what an odd total lacks on the right is added before, as torch does
        totals = [step * (size - 1) for step, size in zip(steps, weight.shape[2:], strict=True)]
        around = [total // 2 for total in totals]
        margins = [side for total in reversed(totals) for side in (0, total % 2)]
    else:
        around = _each(0 if isinstance(padding, str) else padding, count)
    settings = ConvolutionSettings(_each(stride, count), around, steps, False, [0] * count, groups)

    def under_autograd(y: Tensor) -> Tensor:
        x = F.pad(input, margins) if any(margins) else input
        return _Convolution.apply(x, weight, bias, settings, [y])

    return Product(weight[0].numel(), (input, weight, bias), under_autograd)


def _transposed_convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers = 0,
    output_padding: Numbers = 0,
    groups: int = 1,
    dilation: Numbers = 1,
) -> Product | None:
    count = weight.dim() - 2
    if input.dim() != weight.dim():
        return None
    steps = _each(stride, count)
    length = weight.shape[0] / groups * weight[0, 0].numel() / math.prod(steps)
    around, more = _each(padding, count), _each(output_padding, count)
    settings = ConvolutionSettings(steps, around, _each(dilation, count), True, more, groups)
    return Product(length, (input, weight, bias), lambda y: _Convolution.apply(input, weight, bias, settings, [y]))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Product | None:
    if weight.dim() != 2 or input.dim() < 2:
        return None
    return Product(weight.shape[1], (input, weight, bias), lambda y: _Linear.apply(input, weight, bias, [y]))


def _matrix_product(a: Tensor, b: Tensor) -> Product | None:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or min(a.dim(), b.dim()) < 2:
        return None
    return Product(a.shape[-1], (a, b), lambda y: _MatrixProduct.apply(a, b, None, 1, 1, [y]))


def _sum_and_product(input: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Product:
    return Product(a.shape[-1], (a, b, input), lambda y: _MatrixProduct.apply(a, b, input, alpha, beta, [y]))


def _each(value: Numbers, count: int) -> list[int]:
    """A number per dimension, from one for all or one for each."""
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


_RULES: dict[Any, Callable[..., Product | None]] = {
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _convolution),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _transposed_convolution),
    F.linear: _linear,
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm), _matrix_product),
    **dict.fromkeys((Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm), _matrix_product),
    **dict.fromkeys((torch.addmm, torch.baddbmm, Tensor.addmm, Tensor.baddbmm), _sum_and_product),
}
