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
from typing import Literal

import torch
from torch import Tensor, nn

from edgetrain.nn.interception import RecordStatistics, ReuseStatistics
from edgetrain.nn.normalisation import Statistics
from edgetrain.nn.selective import Products

_Pass = Literal["plain", "first", "again"]
_pass: ContextVar[_Pass] = ContextVar("edgetrain_pass", default="plain")


def is_recording() -> bool:
    """True during a first pass that will be repeated; layers of this package then save what a repetition needs."""
    return _pass.get() == "first"


def is_replaying() -> bool:
    """True while a module is being run again; layers of this package then reuse what they saved."""
    return _pass.get() == "again"


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Makes :func:`is_recording` true inside, without autograd."""
    with torch.no_grad(), _in_pass("first"):
        yield


@contextlib.contextmanager
def replaying() -> Iterator[None]:
    """Makes :func:`is_replaying` true inside."""
    with _in_pass("again"):
        yield


@contextlib.contextmanager
def as_recorded() -> Iterator[None]:
    """Inside, a module under autograd gives bit for bit what the first pass of a :class:`Replay` gives."""
    with RecordStatistics([]):
        yield


@contextlib.contextmanager
def _in_pass(which: _Pass) -> Iterator[None]:
    token = _pass.set(which)
    try:
        yield
    finally:
        _pass.reset(token)


class Replay:
    """The record of one forward pass of ``module``, from which :meth:`again` repeats it.

    Args:
        module: any module; it must not change anything but its buffers and the random state.
        device: where it runs; the random state of a CUDA device is recorded besides the CPU's.

    Attributes:
        products: results that the last pass kept for the next, which takes them.
    """

    products: Products | None

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
        self._reusing = ReuseStatistics([])
        self.products = None

    def first(self, run: Callable[[], Tensor]) -> Tensor:
        """The result of ``run``, which calls the module, without autograd; its statistics are recorded."""
        # reversible blocks inside need no records of their own: this one covers them
        with torch.no_grad(), _in_pass("plain"), RecordStatistics(self._statistics):
            return run()

    def next_statistics(self) -> Statistics:
        """Those of the next batch norm, inside :meth:`again`."""
        return self._reusing.next_statistics()

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Inside, a call of the module gives what the first pass gave and leaves no trace."""
        products, self.products = self.products, None
        self._reusing = ReuseStatistics(self._statistics)
        after_random = _random_state(self._device)
        after = [owner._buffers[name] for owner, name, _ in self._owners]
        for (owner, name, _), before in zip(self._owners, self._before, strict=True):
            owner._buffers[name] = before.clone()
        _set_random_state(self._device, self._random)
        try:
            with (
                replaying(),
                self._reusing,
                contextlib.nullcontext() if products is None else products.taking(),
            ):
                yield
        finally:
            for (owner, name, _), buffer in zip(self._owners, after, strict=True):
                owner._buffers[name] = buffer
            _set_random_state(self._device, after_random)


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _set_random_state(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
