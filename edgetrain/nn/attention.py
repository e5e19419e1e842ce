"""Attention maps of activations, and the layer that compares one with a teacher's (Zagoruyko, thesis, section 6.3).

    F_sum^p(A) = sum_c |A_c|^p        F_max^p(A) = max_c |A_c|^p        A (n, c, h, w) -> (n, h, w)
    Q = vec(F(A)) (n, e)              term = 1/(2 e) mean_n || Q/|Q| - T ||_2,   T = Q_teacher/|Q_teacher|

The source adds beta/2 times the norm of each sample, beta "10^3 divided by number of elements in attention map and
batch size" (below (6.1)): with beta = 1e3 that is 1e3 times the term here, a mean over samples, which parts of a batch
leave exact. (6.1) prints the norm, not its square; so does this.

:class:`AttentionTap` is the identity on the activation, so it is inverted, recomputed and stored like any other block
of a chain. Where its backward pass comes the activation is at hand, whatever the plan, and the gradient of the term is
added to the gradient that passes: no map is kept in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from edgetrain.nn.invertible import Invertible
from edgetrain.nn.pooling import BatchPool
from edgetrain.nn.replay import is_replaying
from edgetrain.nn.slices import FINE_SLICE_BYTES, batch_slices

Mapping = Literal["sum", "max"]
"""Over the channels."""

_TINY = 1e-12  # a map of zeros stays one


def attention_map(x: Tensor, *, mapping: Mapping = "sum", power: int = 2, poolings: int = 0) -> Tensor:
    """F of ``x`` (n, c, h, w), without a temporary of its size.

    Args:
        poolings: batch poolings before it: the 4 samples that one of them made become one again.

    Returns:
        (n / 4^poolings, h * 2^poolings, w * 2^poolings).
    """
    order = float("inf") if mapping == "max" else float(power)
    spread = torch.linalg.vector_norm(x, order, dim=1, keepdim=True).pow_(power)  # (n, 1, h, w)
    for _ in range(poolings):
        spread = BatchPool().permute_back(spread)
    return spread.squeeze(1)


def normalised_maps(maps: Tensor, size: Sequence[int]) -> Tensor:
    """``maps`` (n, h, w) of a teacher as vectors of length 1, (n, e), interpolated to ``size`` where they differ."""
    if tuple(maps.shape[1:]) != tuple(size):
        maps = F.interpolate(maps[:, None], tuple(size), mode="bilinear", align_corners=False)[:, 0]
    return F.normalize(maps.flatten(1), eps=_TINY)


class AttentionTap(Invertible):
    """x (n, c, h, w) -> x; in training it takes a term of the loss on the way.

    Args:
        mapping, power: F.
        poolings: batch poolings before it.

    Attributes:
        target: T of the next forward pass, (n, e); None: its own, so that the term is zero and costs what it would.
        term: of the last first pass that had a target, a scalar; taken by whoever adds it to the loss.
        scale: gradient of the loss with respect to the term, where autograd does not bring it: set by the runtime.
    """

    def __init__(self, *, mapping: Mapping = "sum", power: int = 2, poolings: int = 0) -> None:
        super().__init__()
        self.mapping, self.power, self.poolings = mapping, power, poolings
        self.target: Tensor | None = None
        self.term: Tensor | None = None
        self.scale: Tensor | None = None

    @property
    def noiseless(self) -> bool:
        return True

    @property
    def keeps_layout(self) -> bool:
        return True

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x.view_as(x)
        y: Tensor
        y, term = _Identity.apply(x, self)
        self._note(term)
        return y

    @torch.no_grad()
    def forward_(self, x: Tensor, *, replay: bool = False) -> Tensor:
        if self.training and not replay:
            self._note(self._compare(x)[0])
        return x

    def inverse_(self, y: Tensor) -> Tensor:
        return y

    @torch.no_grad()
    def backward_from_output(self, y: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        if self.training:
            self._add_gradient(y, dy, self._scale_of(None, y))
        return y, dy

    def backward_holding(self, y: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        return self.backward_from_output(y, dy)

    def extra_repr(self) -> str:
        return f"{self.mapping}, power={self.power}, poolings={self.poolings}"

    def _note(self, term: Tensor) -> None:
        if not is_replaying():
            self.term = term if self.target is not None else None

    def _scale_of(self, gradient: Tensor | None, x: Tensor) -> Tensor:
        """With respect to the term: what autograd brings, or the runtime; with a target of its own it is zero."""
        if self.target is None:
            return x.new_zeros(())
        found = [value for value in (gradient, self.scale) if value is not None]
        return torch.stack(found).sum() if found else x.new_zeros(())

    def _compare(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The term for ``x``, and its gradient with respect to F(x), (n, h', w')."""
        maps = attention_map(x, mapping=self.mapping, power=self.power, poolings=self.poolings)
        vectors = maps.flatten(1)  # (n, e)
        length = torch.linalg.vector_norm(vectors, dim=1, keepdim=True).clamp_min_(_TINY)  # (n, 1)
        unit = vectors / length
        off = unit - (unit if self.target is None else self.target)  # (n, e)
        distance = torch.linalg.vector_norm(off, dim=1, keepdim=True)  # (n, 1)
        weight = 1 / (2 * vectors.shape[1])
        term = distance.mean() * weight
        # d distance / d unit = off / distance, and zero where there is none; d unit / d Q = (1 - unit unit^T) / |Q|
        slope = off.div_(torch.where(distance > 0, distance, 1))
        slope.addcmul_(unit, (unit * slope).sum(1, keepdim=True), value=-1)
        slope.mul_(weight / len(vectors)).div_(length)
        return term, slope.view_as(maps)

    def _add_gradient(self, x: Tensor, dx: Tensor, scale: Tensor) -> None:
        """Adds the gradient of ``scale`` times the term to ``dx`` (n, c, h, w), in place."""
        slope = (self._compare(x)[1] * scale)[:, None]
        for _ in range(self.poolings):
            slope = BatchPool()(slope)  # (n, 1, h, w)
        if self.mapping == "sum" and self.power == 2:
            dx.addcmul_(x, slope, value=2)
            return
        for s in batch_slices(x, FINE_SLICE_BYTES):
            size = x[s].abs()
            if self.mapping == "max":  # channels that tie share the gradient
                top = size == size.amax(1, keepdim=True)
                share = slope[s] / top.sum(1, keepdim=True)
                dx[s].addcmul_(size.pow_(self.power - 1).mul_(x[s].sign()).mul_(top), share, value=self.power)
            else:
                dx[s].addcmul_(size.pow_(self.power - 1).mul_(x[s].sign()), slope[s], value=self.power)


class _Identity(torch.autograd.Function):
    """The activation and the term; saves the activation, which the next block saves too wherever it is stored."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tap: AttentionTap) -> tuple[Tensor, Tensor]:
        ctx.tap = tap
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        return x.view_as(x), tap._compare(x)[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dterm: Tensor | None) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        dx = torch.zeros_like(x) if dy is None else dy.clone()
        ctx.tap._add_gradient(x, dx, ctx.tap._scale_of(dterm, x))
        return dx, None
