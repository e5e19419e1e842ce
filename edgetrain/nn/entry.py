"""Where a graph of autograd's begins: the gradient of its input is caught there.

A leaf would do the same, but it holds the input until the backward pass, whether anything in the graph saved it or not,
and the gradient of a part of a larger tensor would be copied so that it is laid out row by row.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Catcher(Protocol):
    """Whoever wants the gradient.

    Attributes:
        gradient: where it is put.
    """

    gradient: Tensor | None


def entered(x: Tensor, catcher: Catcher) -> Tensor:
    """``x`` in a graph that begins with it; floating point numbers.

    Nobody tells an operator that works in place that ``x`` is still needed: compare its version.
    """
    # the anchor requires a gradient, so that the output does
    y: Tensor = _Entry.apply(torch.empty(0, requires_grad=True), x, catcher)
    return y


class _Entry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor, catcher: Catcher) -> Tensor:
        ctx.catcher = catcher
        return x.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[None, None, None]:
        ctx.catcher.gradient = dx
        return None, None, None
