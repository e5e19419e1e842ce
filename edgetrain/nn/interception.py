"""What a repeated pass replaces in a module: batch norm by recorded statistics, convolutions, max pooling.

Both passes of :class:`edgetrain.nn.replay.Replay` run inside a mode that sees every torch function called, the first
one recording and the later ones reusing. The same kernels on the same shapes give the same bits, so that a repetition
is exact.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from edgetrain.nn.lean import with_lean_operators
from edgetrain.nn.normalisation import Statistics, batch_moments, normalise, update_running
from edgetrain.nn.sliced import conv2d

unseen = torch._C.DisableTorchFunction
"""Inside, no mode sees what a mode calls for itself: with several of them each call would go through all."""


class _Intercept(TorchFunctionMode):
    """Sees every torch function that a module calls.

    Batch norm goes by recorded statistics, convolutions as in :mod:`edgetrain.nn.sliced`, max pooling keeps a byte for
    each output.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d:
            return conv2d(*args, **kwargs)
        if func is F.batch_norm:
            call = BatchNormCall(*args, **kwargs)
            if call.reusable:
                return call.with_statistics(self.statistics_of(call))
        return with_lean_operators(func, args, kwargs)

    def statistics_of(self, call: BatchNormCall) -> Statistics:
        raise NotImplementedError


class RecordStatistics(_Intercept):
    """Computes batch statistics, moves the running ones, and appends them to ``recorded``; autograd may be on."""

    def __init__(self, recorded: list[Statistics]) -> None:
        super().__init__()
        self._recorded = recorded

    def statistics_of(self, call: BatchNormCall) -> Statistics:
        with torch.no_grad():
            mean, var = batch_moments(call.input)
        # as in torch's own kernel, autograd does not notice: a stored block may use the same batch norm
        running = [None if values is None else values.data for values in (call.running_mean, call.running_var)]
        update_running(call.input.detach(), mean, var, running[0], running[1], call.momentum)
        self._recorded.append(Statistics(mean, (var + call.eps).rsqrt_()))
        return self._recorded[-1]


class ReuseStatistics(_Intercept):
    """Takes the statistics of ``recorded`` in order and moves nothing."""

    def __init__(self, recorded: list[Statistics]) -> None:
        super().__init__()
        self._recorded = iter(recorded)

    def next_statistics(self) -> Statistics:
        """Those of the next batch norm."""
        return next(self._recorded)

    def statistics_of(self, call: BatchNormCall) -> Statistics:
        return self.next_statistics()


class BatchNormCall:
    """The arguments of one call of ``torch.nn.functional.batch_norm``, by the names it gives them."""

    def __init__(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> None:
        self.input, self.weight, self.bias = input, weight, bias
        self.running_mean, self.running_var = running_mean, running_var
        self.momentum, self.eps = momentum, eps
        # a single value per channel has no variance: torch's own call says so
        self.reusable = training and input.numel() > input.shape[1]

    def with_statistics(self, statistics: Statistics, *, result: Tensor | None = None) -> Tensor:
        """The normalisation by ``statistics``; of ``result`` where that is to stand for its values."""
        scale = torch.ones_like(statistics.mean) if self.weight is None else self.weight
        bias = torch.zeros_like(statistics.mean) if self.bias is None else self.bias
        return normalise(self.input, scale, bias, statistics, result=result)
