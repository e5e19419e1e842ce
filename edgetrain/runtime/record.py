"""What the first pass of a block leaves for every later one: recomputing, recomputing under autograd, inverting."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from edgetrain.chain import restore_state, saved_state
from edgetrain.nn import liveness
from edgetrain.nn.invertible import Invertible
from edgetrain.nn.liveness import Course, Skipping
from edgetrain.nn.replay import Replay, recording, replaying
from edgetrain.nn.selective import Products


def _nothing() -> None:
    return None


class Record:
    """The first pass of ``module`` in one step, and the context in which later ones repeat it.

    Invertible layers leave what they need in their ``saved``, in place or not; any other module is recorded from
    outside, the invertible layers inside it besides.

    Attributes:
        course: of an ordinary module's pass.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._replay: Replay | None = None
        self.course = Course()

    @torch.no_grad()
    def first(self, x: Tensor, *, within: contextlib.AbstractContextManager[object]) -> Tensor:
        """The output for ``x``, which is left alone; the module is called inside ``within``."""
        y: Tensor
        if isinstance(self._module, Invertible):
            with recording(), within:
                y = self._module(x)
        else:
            self._replay = Replay(self._module, x.device)

            def run() -> Tensor:
                with within:
                    y, self.course = liveness.run(self._module, x)
                return y

            y = self._replay.first(run)
        self._state = saved_state(self._module)
        return y

    def first_in_place(self, x: Tensor, *, products: bool) -> Tensor:
        """The output of an invertible module in the memory of ``x``; ``products``: it keeps their results."""
        assert isinstance(self._module, Invertible)
        y = self._module.forward_keeping_products_(x) if products else self._module.forward_(x)
        self._state = saved_state(self._module)
        return y

    def skipping(self, products: Products | None) -> Skipping | None:
        """For a pass under autograd inside :meth:`again`: what is dead is not computed; None if nothing is.

        Args:
            products: what was kept for it.
        """
        if self._replay is None:
            return None
        output, pass_over = (None, _nothing) if products is None else (products.take_output(), products.pass_over)
        return self.course.skipping(output, self._replay.next_statistics, pass_over)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Inside, any pass of the module, forward or inverse, goes by the first one and leaves no trace."""
        restore_state(self._state)
        with replaying() if self._replay is None else self._replay.again():
            yield
