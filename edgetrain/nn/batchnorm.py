"""Invertible batch norm, (3.23):  y = |gamma + eps_i| (x - mean) / sqrt(var + eps) + beta.

The inverse uses the statistics of the forward pass, two numbers per channel:
x = (y - beta) sqrt(var + eps) / |gamma + eps_i| + mean. (The text prints sqrt(var) + eps in the inverse; the
same denominator is used here in both directions.) eps_i keeps the factor away from zero, where the inverse
would amplify noise without bound.

Backward from the output: with z = y the normalised values are xhat = (z - beta)/scale, and

    dx = scale invstd (dz - sum dz / m - xhat sum(dz xhat) / m).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgetrain.nn.invertible import Invertible
from edgetrain.nn.normalisation import (
    Statistics,
    affine_of,
    batch_moments,
    channel_sums,
    normalise,
    update_running,
)
from edgetrain.nn.replay import is_replaying


class InvertibleBatchNorm(Invertible):
    """Batch norm over (n, h, w) with an inverse; frozen and affine in evaluation mode.

    Args:
        channels: c.
        eps: added to the variance.
        momentum: weight of the newest statistics in the running ones.
        eps_i: added to gamma, (3.23).
    """

    saved: Statistics | None

    def __init__(self, channels: int, *, eps: float = 1e-5, momentum: float = 0.1, eps_i: float = 0.1) -> None:
        super().__init__()
        self.channels, self.eps, self.momentum, self.eps_i = channels, eps, momentum, eps_i
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.num_batches_tracked: Tensor
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))
        self.saved = None

    @property
    def keeps_layout(self) -> bool:
        return True

    def scale(self) -> Tensor:
        """``|gamma + eps_i|``, (c,)."""
        return (self.weight + self.eps_i).abs()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            statistics = self._statistics(x, replay=is_replaying())
        if statistics.from_batch:
            return normalise(x, self.scale(), self.bias, statistics)
        return F.batch_norm(x, self.running_mean, self.running_var, self.scale(), self.bias, False, 0.0, self.eps)

    @torch.no_grad()
    def forward_(self, x: Tensor, *, replay: bool = False) -> Tensor:
        factor, offset = affine_of(self._statistics(x, replay=replay), self.scale(), self.bias)
        return x.mul_(_per_channel(factor)).add_(_per_channel(offset))

    @torch.no_grad()
    def inverse_(self, y: Tensor) -> Tensor:
        factor, offset = affine_of(self.statistics(), self.scale(), self.bias)
        return y.sub_(_per_channel(offset)).mul_(_per_channel(factor.reciprocal()))

    @torch.no_grad()
    def backward_from_output(self, y: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        sums = self.gradient_sums(y, dy)
        self.add_gradients(*sums)
        return self.backward_with_sums(y, dy, sums, count=y.numel() // y.shape[1])

    def gradient_sums(self, y: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """``(sum dy, sum dy xhat)``, each (c,), from (a slice of) the output and its gradient."""
        return channel_sums(y, dy, self.bias, self.scale().reciprocal_())

    @torch.no_grad()
    def add_gradients(self, sum_dy: Tensor, sum_dy_xhat: Tensor) -> None:
        """Adds the gradients of gamma and beta, given the sums over the whole batch, to their ``.grad``."""
        accumulate(self.weight, sum_dy_xhat * torch.sign(self.weight + self.eps_i))
        accumulate(self.bias, sum_dy)

    @torch.no_grad()
    def backward_with_sums(
        self, y: Tensor, dy: Tensor, sums: tuple[Tensor, Tensor], *, count: int
    ) -> tuple[Tensor, Tensor]:
        """``(x, dx)`` in place from (a slice of) the output, given the sums over the whole batch.

        Args:
            y: (n, c, h, w), as ``dy``.
            sums: ``(sum dy, sum dy xhat)``, each (c,).
            count: elements per channel in the whole batch.
        """
        statistics, scale = self.statistics(), self.scale()
        factor = scale * statistics.invstd
        dy.mul_(_per_channel(factor))
        if statistics.from_batch:
            # xhat = (y - bias)/scale, so the correction is affine in y: slope * y + offset
            slope = -factor * sums[1] / (scale * count)
            offset = -factor * sums[0] / count - slope * self.bias
            dy.addcmul_(y, _per_channel(slope)).add_(_per_channel(offset))
        return self.inverse_(y), dy

    def statistics(self) -> Statistics:
        """The statistics of the last forward pass.

        Raises:
            RuntimeError: there was none.
        """
        if self.saved is None:
            raise RuntimeError("InvertibleBatchNorm: an inverse was asked for before any forward pass")
        return self.saved

    def _statistics(self, x: Tensor, *, replay: bool) -> Statistics:
        if replay:
            return self.statistics()
        if self.training:
            mean, var = batch_moments(x)
            update_running(x, mean, var, self.running_mean, self.running_var, self.momentum)
            self.num_batches_tracked.add_(1)
            self.saved = Statistics(mean, (var + self.eps).rsqrt_())
        else:
            invstd = (self.running_var + self.eps).rsqrt_()
            self.saved = Statistics(self.running_mean.clone(), invstd, from_batch=False)
        return self.saved

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps}, momentum={self.momentum}, eps_i={self.eps_i}"


@torch.no_grad()
def accumulate(parameter: Tensor, gradient: Tensor) -> None:
    """Adds ``gradient`` to ``parameter.grad`` in place, as autograd would; frozen parameters are left alone.

    It is laid out as the parameter, as fused optimisers take for granted.
    """
    if not parameter.requires_grad:
        return
    if parameter.grad is None:
        parameter.grad = torch.empty_like(parameter).copy_(gradient)
    else:
        parameter.grad.add_(gradient)


def _per_channel(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)
