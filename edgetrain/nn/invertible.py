"""The role of an invertible layer: a map whose input can be had back from its output.

A layer on a reversible path never needs its input stored. During the backward pass it is handed its
output ``y`` and the gradient ``dy`` and gives back the input ``x`` and the gradient ``dx``, so that one
activation and one gradient travel through the network (Gomez et al. 2017; Hascoet et al. 2023, section 3.4).

Names follow torch: a trailing underscore means *in place*. ``forward_``, ``inverse_`` and
``backward_from_output`` own the tensors they are given and overwrite them; ``forward`` and ``inverse``
leave theirs alone. All tensors are (n, c, h, w). What is overwritten is without holes, channels first; or channels
last, in all tensors of a call alike, for a layer that says :attr:`keeps_layout <Invertible.keeps_layout>`.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from edgetrain.errors import ModelError
from edgetrain.nn.entry import entered
from edgetrain.nn.grid import Grid
from edgetrain.nn.layouts import copied, memory_format
from edgetrain.nn.liveness import Skipping
from edgetrain.nn.replay import Replay, replaying
from edgetrain.nn.slices import batch_slices


class Invertible(nn.Module):
    """Base of every invertible layer.

    Attributes:
        saved: what a first pass leaves for its inverse, its backward and every repetition (batch statistics, random
            states), a few numbers per channel. A first pass is :meth:`forward_`, or ``forward`` inside
            :func:`edgetrain.nn.replay.recording`. The runtime takes it out and puts it back when several forward
            passes precede their backward passes.
    """

    saved: object | None = None

    @property
    def layerwise(self) -> bool:
        """Whether :meth:`backward_from_output` inverts hidden activations one by one, holding none of them."""
        return True

    @property
    def noiseless(self) -> bool:
        """Whether the inverse gives back every bit of an input that a layer of the same kind has made."""
        return False

    @property
    def keeps_layout(self) -> bool:
        """Whether every pass takes images with channels last as well, and its results are laid out as what it took.

        A layer of yours says so with a class attribute, ``keeps_layout = True``.
        """
        return False

    @property
    def selective(self) -> bool:
        """Whether :meth:`forward_keeping_products_` can be asked for."""
        return False

    @property
    def between(self) -> bool:
        """Whether :meth:`backward_between` can be asked for."""
        return False

    @abstractmethod
    def forward_(self, x: Tensor, *, replay: bool = False) -> Tensor:
        """``y`` computed without autograd in the memory of ``x`` (n, c, h, w).

        Args:
            replay: repeat the last forward pass: reuse its statistics, update nothing.
        """

    def forward_keeping_products_(self, x: Tensor, *, replay: bool = False) -> Tensor:
        """As :meth:`forward_`; what :mod:`edgetrain.nn.selective` keeps of the modules inside stays in :attr:`saved`.

        The next inverse or backward pass takes it from there and computes these products no second time.
        """
        raise NotImplementedError(f"{type(self).__name__} keeps no products")

    @abstractmethod
    def inverse_(self, y: Tensor) -> Tensor:
        """``x`` computed without autograd in the memory of ``y``, with the statistics of the last forward."""

    @abstractmethod
    def backward_from_output(self, y: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """``(x, dx)`` from the output and the gradient with respect to it; both arguments are overwritten.

        Gradients of the parameters are added to their ``.grad`` in place. Hidden activations are inverted
        one by one wherever the layer can do so.
        """

    def backward_between(self, x: Tensor, y: Tensor, dy: Tensor) -> Tensor:
        """``dx``, in the memory of ``dy``, from input and output: no convolution is computed a second time.

        Hidden activations come back from ``y`` element by element, with the noise of that and no more.

        Args:
            x: (n, c, h, w), as ``y``; both are left alone.
        """
        raise NotImplementedError(f"{type(self).__name__} goes back from its output alone")

    @torch.no_grad()
    def inverse(self, y: Tensor) -> Tensor:
        """``x`` from ``y``, both of their own; see :meth:`inverse_`."""
        return self.inverse_(copied(y))

    def backward_holding(self, y: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`backward_from_output`, with the hidden activations recomputed once from ``x`` and held.

        Costs the memory of one block under plain autograd and leaves no noise in the hidden activations.
        """
        with torch.no_grad():
            x = self.inverse_(y)
        dx = Rerun(self, x, replay=None).backward(dy)
        assert dx is not None
        return x, dx

    @torch.no_grad()
    def backward_as_residual(
        self, x: Tensor, dy: Tensor, minuend: Tensor, dx: Tensor, *, grid: Grid | None = None
    ) -> None:
        """Backward of this layer used as ``minuend = rest + self(x)`` with ``x`` known.

        Subtracts ``self(x)`` from ``minuend`` and adds the gradient with respect to ``x`` to ``dx``, both in
        place; ``x`` and ``dy`` are left as they are.

        Args:
            grid: ``self(x)`` is what :meth:`forward_` gives for the whole batch, bit for bit, rounded to it.
        """
        y = self.forward_(copied(x), replay=True)
        for s in batch_slices(y):
            minuend[s].sub_(y[s] if grid is None else grid.round(y[s]))
        _, gradient = self.backward_from_output(y, copied(dy))
        dx.add_(gradient)


def keeps_layout(module: nn.Module) -> bool:
    """Whether ``module`` is invertible and :attr:`keeps_layout <Invertible.keeps_layout>`."""
    return isinstance(module, Invertible) and module.keeps_layout


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=memory_format(x))


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


@dataclass(slots=True)
class _Caught:
    gradient: Tensor | None = None


class Rerun:
    """One more run of ``module`` under autograd, ready for its backward pass.

    Args:
        x: input, left alone.
        replay: what was recorded when ``module`` ran before; None for layers that keep their own statistics.
        input_gradient: whether :meth:`backward` shall give one.
        skipping: runs ``module`` instead of calling it.

    Raises:
        ModelError: the module overwrites its input.
        OtherCallsError: the pass is not the one that ``skipping`` was prepared for.
    """

    def __init__(
        self,
        module: nn.Module,
        x: Tensor,
        *,
        replay: Replay | None,
        input_gradient: bool = True,
        skipping: Skipping | None = None,
    ) -> None:
        self._caught = _Caught()
        self._like = (x.shape, x.dtype, x.device) if input_gradient else None
        version = x._version
        with torch.enable_grad(), replaying() if replay is None else replay.again():
            argument = entered(x, self._caught) if input_gradient else x.detach()
            output = module(argument) if skipping is None else skipping.run(module, argument)
            del argument
        if x._version != version:
            raise ModelError(
                found=f"a module {type(module).__name__} that overwrites its input",
                expected="a module that leaves alone what its gradient is computed from",
                action="let its first operation work out of place",
            )
        self._edge = get_gradient_edge(output) if output.requires_grad else None
        self._output: Tensor | None = output.detach()

    def take_output(self) -> Tensor:
        """The output (n, c, h, w), once: the caller decides how long it stays in memory."""
        output, self._output = self._output, None
        if output is None:
            raise RuntimeError("Rerun: the output was taken already")
        return output

    def backward(self, dy: Tensor) -> Tensor | None:
        """Gradient with respect to ``x``, without holes and in memory of its own; None if none was asked for.

        Those of the parameters go to their ``.grad``.

        Args:
            dy: gradient with respect to the output, left alone.
        """
        self._output = None
        if self._edge is not None:
            torch.autograd.backward([self._edge], [dy])
        gradient, self._caught.gradient = self._caught.gradient, None
        if gradient is not None and (not _is_dense(gradient) or _share_memory(gradient, dy)):
            return copied(gradient)  # whoever gets it may overwrite it
        if gradient is None and self._like is not None:
            shape, dtype, device = self._like
            return torch.zeros(shape, dtype=dtype, device=device)
        return gradient
