"""Running a module a second time as if it were the first: same statistics, same random numbers, no side effects.

Whoever drops an activation and computes it again must not notice a difference. Three things would tell:

1. batch norm would update its running statistics twice (every public checkpointing library does): the
   statistics of the first pass are recorded and reused, which also saves computing them again;
2. dropout would draw other numbers: the random state before the first pass is put back for the second;
3. any other buffer that a forward pass changes (spectral norm, counters) would change twice: the second pass
   runs on copies of the buffers as they were before the first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from edgetrain.nn.normalisation import Statistics, batch_moments, normalise, update_running
from edgetrain.nn.sliced import conv2d

_replaying: ContextVar[bool] = ContextVar("edgetrain_replaying", default=False)


def is_replaying() -> bool:
    """True while a module is being run again; layers of this package then reuse what they saved."""
    return _replaying.get()


@contextlib.contextmanager
def replaying() -> Iterator[None]:
    """Makes :func:`is_replaying` true inside."""
    token = _replaying.set(True)
    try:
        yield
    finally:
        _replaying.reset(token)


class Replay:
    """The record of one forward pass of ``module``, from which :meth:`again` repeats it.

    Args:
        module: any module; it must not change anything but its buffers and the random state.
        device: where it runs; the random state of a CUDA device is recorded besides the CPU's.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._owners = [
            (owner, name, buffer)
            for owner in module.modules()
            for name, buffer in owner._buffers.items()
            if buffer is not None
        ]
        self._before = [buffer.clone() for _, _, buffer in self._owners]
        self._device = device
        self._random = _random_state(device)
        self._statistics: list[Statistics] = []

    def first(self, run: Callable[[], Tensor]) -> Tensor:
        """The result of ``run``, which calls the module, without autograd; its statistics are recorded."""
        with torch.no_grad(), _RecordStatistics(self._statistics):
            return run()

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Inside, a call of the module gives what the first pass gave and leaves no trace."""
        after_random = _random_state(self._device)
        after = [owner._buffers[name] for owner, name, _ in self._owners]
        for (owner, name, _), before in zip(self._owners, self._before, strict=True):
            owner._buffers[name] = before.clone()
        _set_random_state(self._device, self._random)
        try:
            with replaying(), _ReuseStatistics(self._statistics):
                yield
        finally:
            for (owner, name, _), buffer in zip(self._owners, after, strict=True):
                owner._buffers[name] = buffer
            _set_random_state(self._device, after_random)


class _Intercept(TorchFunctionMode):
    """Sees every torch function that a module calls: batch norm goes by recorded statistics, convolutions by slices."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d:
            return conv2d(*args, **kwargs)
        if func is F.batch_norm:
            call = _BatchNormCall(*args, **kwargs)
            if call.reusable:
                return call.with_statistics(self.statistics_of(call))
        return func(*args, **kwargs)

    def statistics_of(self, call: _BatchNormCall) -> Statistics:
        raise NotImplementedError


class _RecordStatistics(_Intercept):
    def __init__(self, recorded: list[Statistics]) -> None:
        super().__init__()
        self._recorded = recorded

    def statistics_of(self, call: _BatchNormCall) -> Statistics:
        mean, var = batch_moments(call.input)
        # as in torch's own kernel, autograd does not notice: a stored block may use the same batch norm
        running = [None if values is None else values.data for values in (call.running_mean, call.running_var)]
        update_running(call.input, mean, var, running[0], running[1], call.momentum)
        self._recorded.append(Statistics(mean, (var + call.eps).rsqrt_()))
        return self._recorded[-1]


class _ReuseStatistics(_Intercept):
    def __init__(self, recorded: list[Statistics]) -> None:
        super().__init__()
        self._recorded = iter(recorded)

    def statistics_of(self, call: _BatchNormCall) -> Statistics:
        return next(self._recorded)


class _BatchNormCall:
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

    def with_statistics(self, statistics: Statistics) -> Tensor:
        scale = torch.ones_like(statistics.mean) if self.weight is None else self.weight
        bias = torch.zeros_like(statistics.mean) if self.bias is None else self.bias
        return normalise(self.input, scale, bias, statistics)


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _set_random_state(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
