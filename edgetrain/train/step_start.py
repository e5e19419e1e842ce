"""The start of a training step, to go back to when it fails.

Before its update a step changes buffers (running statistics), random states, gradients, and what layers saved for
their inverses. Copies of the first two are a few ten KiB and take some 0.2 ms a step; gradients and what was saved are
dropped, as a step starts without. Weights and the optimiser's state are not copied: that would double them. Where an
update had begun the way back is the last checkpoint (:mod:`edgetrain.train.trainer`), from which the steps since are
repeated bit for bit.

A journal on disk of what each update overwrites was considered for that: it writes weights and momentum once per step,
30 MB for 3.7 million parameters, which wears the flash of a device out for an event that hardly ever comes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from edgetrain.chain import restore_state, saved_state
from edgetrain.train.random_state import RandomState


class StepStart:
    """The last marked start of a step of ``model``.

    Args:
        optimizers: all that update ``model``.

    Attributes:
        updated: whether an update has begun since :meth:`mark`; then :meth:`restore` is not enough.
    """

    def __init__(self, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self._model = model
        self._empty = saved_state(model)
        self._buffers: list[tuple[nn.Module, str, Tensor]] = []
        self._copies: list[Tensor] = []
        self._random = RandomState.capture()
        self.updated = True
        self._hooks = [optimizer.register_step_pre_hook(self._note_update) for optimizer in optimizers]

    def _note_update(self, *_: object) -> None:
        self.updated = True

    @torch.no_grad()
    def mark(self) -> None:
        """The next step starts here. Where this fails for want of memory, ``updated`` stays true."""
        self.updated = True  # until all of it is there
        found = [
            (owner, name, buffer)
            for owner in self._model.modules()
            for name, buffer in owner._buffers.items()
            if buffer is not None
        ]
        if len(found) != len(self._buffers) or any(a[2] is not b[2] for a, b in zip(found, self._buffers, strict=True)):
            self._buffers, self._copies = found, [torch.empty_like(buffer) for _, _, buffer in found]
        for copy, (_, _, buffer) in zip(self._copies, found, strict=True):
            copy.copy_(buffer)
        self._random = RandomState.capture()
        self.updated = False

    @torch.no_grad()
    def restore(self) -> RandomState:
        """Puts everything back to where it was marked, random states included, and gives these."""
        self.clear()
        for copy, (owner, name, buffer) in zip(self._copies, self._buffers, strict=True):
            buffer.copy_(copy)
            owner._buffers[name] = buffer  # a repetition that failed may have left another one
        self._random.restore()
        return self._random

    def clear(self) -> None:
        """Drops what a failed step left: gradients, and what layers saved."""
        for parameter in self._model.parameters():
            parameter.grad = None
        restore_state(self._empty)

    def release(self) -> None:
        """No longer watches the optimisers."""
        for hook in self._hooks:
            hook.remove()
