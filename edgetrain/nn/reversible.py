"""Reversible residual block (Gomez et al. 2017), the hybrid block included.

    y1 = x1 + f(x2),  y2 = x2 + g(y1)        x2 = y2 - g(y1),  x1 = y1 - f(x2)

f and g are any modules that preserve the shape of a channel half. Where both are invertible themselves this is
the hybrid block (section 3.4.2 of the source): the block's own inverse gives the input back with little noise,
and the hidden activations of f and g are inverted layer by layer instead of being held all at once.

Exact blocks give it back without any. With r(.) rounding to the fixed-point grid of :mod:`edgetrain.nn.grid`,

    y1 = r(x1) + r(f(r(x2))),  y2 = r(x2) + r(g(y1))

are sums and differences that no float rounds. What comes in off the grid is rounded on entry, in both directions: the
first exact block gives back r(x), and noise below half a step that a later layer's inversion has left is gone. f and g
must be deterministic, and then give the same bits each time because they get the same kernels on the same shapes:
contiguous inputs and the same slices of the batch (a convolution's bits depend on both). Where f is invertible, its
value is that of its pass in place, which ``forward`` computes besides the one that autograd sees.

Cost of exactness: a rounding of each residual, contiguous inputs, and where f is invertible a second pass for its value
in ``forward`` and in ``backward_holding``. On a GPU the check of the range waits for the device once per block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from edgetrain.nn.coupling import CouplingStack, check_halves
from edgetrain.nn.grid import grid_of, with_value
from edgetrain.nn.invertible import Invertible, Rerun
from edgetrain.nn.layouts import copied
from edgetrain.nn.replay import Replay, as_recorded, is_recording, is_replaying, replaying
from edgetrain.nn.selective import Products
from edgetrain.nn.slices import batch_slices


class ReversibleBlock(Invertible):
    """Additive coupling of two arbitrary modules.

    Args:
        f: module on (n, c/2, h, w) that preserves the shape, as ``g``. Batch norm, dropout and other stateful
            layers in them are handled: a second run repeats the first.
        exact: keep the streams on a fixed-point grid, so that inverting leaves no noise at all, through any number of
            exact blocks. float32 or float64.

    Attributes:
        saved: what the modules need to be run again, by name; invertible ones keep their own. None: nothing was
            recorded, or it is part of the record of a module around this one.
    """

    saved: dict[str, Replay] | None

    def __init__(self, f: nn.Module, g: nn.Module, *, exact: bool = False) -> None:
        super().__init__()
        self.f = f
        self.g = g
        self.exact = exact
        self.saved = None

    @property
    def layerwise(self) -> bool:
        """Whether hidden activations can be inverted one by one: both modules are invertible."""
        return isinstance(self.f, Invertible) and isinstance(self.g, Invertible)

    @property
    def noiseless(self) -> bool:
        return self.exact

    @property
    def keeps_layout(self) -> bool:
        """False if it is exact, or has an invertible module inside that does not."""
        inside = [module for module in (self.f, self.g) if isinstance(module, Invertible)]
        return not self.exact and all(module.keeps_layout for module in inside)

    @property
    def selective(self) -> bool:
        """Whether the results of f's and g's products can be kept: both are ordinary modules and one has weights."""
        if any(isinstance(layer, Invertible) for branch in (self.f, self.g) for layer in branch.modules()):
            return False
        return any(is_lazy(p) or p.dim() > 1 for p in self.parameters())

    @property
    def branch_ends(self) -> tuple[str, ...]:
        """Paths of the last layers with parameters in f and in g, on whose scale that of the residuals depends."""
        inside = [
            [f"{name}.{path}".rstrip(".") for path, layer in module.named_modules() if layer._parameters]
            for name, module in (("f", self.f), ("g", self.g))
        ]
        return tuple(paths[-1] for paths in inside if paths)

    def forward(self, x: Tensor) -> Tensor:
        check_halves(x.shape[1])
        if not is_replaying():
            self.saved = {} if is_recording() else None
        if self.exact:
            x = grid_of(x.dtype).round(x)
        x1, x2 = x.chunk(2, 1)
        y1 = x1 + self._residual("f", x2)
        y2 = x2 + self._residual("g", y1)
        y = torch.cat([y1, y2], 1)
        if is_recording():
            self._check_range(y)
        return y

    def forward_(self, x: Tensor, *, replay: bool = False) -> Tensor:
        return self._forward_(x, replay=replay, keeping=False)

    def forward_keeping_products_(self, x: Tensor, *, replay: bool = False) -> Tensor:
        return self._forward_(x, replay=replay, keeping=True)

    @torch.no_grad()
    def inverse_(self, y: Tensor) -> Tensor:
        y1, y2 = self.rounded_(y).chunk(2, 1)
        self._subtract(y2, self._run("g", y1, replay=True))
        self._subtract(y1, self._run("f", y2, replay=True))
        return y

    def backward_from_output(self, y: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        return self._backward(y, dy, layerwise=True)

    def backward_holding(self, y: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        return self._backward(y, dy, layerwise=False)

    def rounded_(self, x: Tensor) -> Tensor:
        """``x``, moved to the grid in its own memory if the block is exact."""
        return grid_of(x.dtype).round_(x) if self.exact else x

    @torch.no_grad()
    def _forward_(self, x: Tensor, *, replay: bool, keeping: bool) -> Tensor:
        check_halves(x.shape[1])
        if not replay:
            self.saved = {}
        x1, x2 = self.rounded_(x).chunk(2, 1)
        self._add(x1, self._run("f", x2, replay=replay, keeping=keeping))
        self._add(x2, self._run("g", x1, replay=replay, keeping=keeping))
        if not replay:
            self._check_range(x)
        return x

    @torch.no_grad()
    def _backward(self, y: Tensor, dy: Tensor, *, layerwise: bool) -> tuple[Tensor, Tensor]:
        (y1, y2), (d1, d2) = self.rounded_(y).chunk(2, 1), dy.chunk(2, 1)
        self._residual_backward("g", x=y1, dy=d2, minuend=y2, dx=d1, layerwise=layerwise)
        self._residual_backward("f", x=y2, dy=d1, minuend=y1, dx=d2, layerwise=layerwise)
        return y, dy

    def _residual_backward(
        self, name: str, *, x: Tensor, dy: Tensor, minuend: Tensor, dx: Tensor, layerwise: bool
    ) -> None:
        module = self.get_submodule(name)
        if isinstance(module, Invertible) and layerwise:
            module.backward_as_residual(x, dy, minuend, dx, grid=grid_of(x.dtype) if self.exact else None)
            return
        in_place = isinstance(module, Invertible) and self.exact
        if in_place:
            self._subtract(minuend, self._run(name, x, replay=True))
        # the other half of x's memory is written while autograd holds x: .data keeps their versions apart
        rerun = Rerun(module, self._argument(x.data), replay=self._records().get(name))
        if not in_place:
            self._subtract(minuend, rerun.take_output())
        gradient = rerun.backward(dy)
        assert gradient is not None
        dx.add_(gradient)

    def _run(self, name: str, x: Tensor, *, replay: bool, keeping: bool = False) -> Tensor:
        """The residual of a pass in place, not rounded; ``keeping`` the results of its products for the next."""
        module = self.get_submodule(name)
        if isinstance(module, Invertible):
            return module.forward_(copied(x), replay=replay)
        records, x = self._records(), self._argument(x)
        products = Products() if keeping else None

        def run() -> Tensor:
            with contextlib.nullcontext() if products is None else products.keeping():
                y: Tensor = module(x)
            if products is not None:
                products.choose()
            return y

        if replay:
            with records[name].again():
                residual = run()
        else:
            records[name] = Replay(module, x.device)
            residual = records[name].first(run)
        records[name].products = products
        return residual

    def _residual(self, name: str, x: Tensor) -> Tensor:
        """The residual of ``forward``."""
        if self.exact:
            return grid_of(x.dtype).round(self._unrounded(name, self._argument(x)))
        module = self.get_submodule(name)
        if is_recording() and not isinstance(module, Invertible):
            return self._run(name, x, replay=False)
        with self._repeating(name):
            return module(x)

    def _unrounded(self, name: str, x: Tensor) -> Tensor:
        """The residual of ``forward`` in an exact block, with the bits of :meth:`_run`."""
        module, replay = self.get_submodule(name), is_replaying()
        if is_recording():
            return self._run(name, x, replay=False)
        if not (torch.is_grad_enabled() or replay) or (replay and self.saved is None):
            return module(x)  # from such a pass nothing is inverted
        if not isinstance(module, Invertible):
            with self._repeating(name) if replay else as_recorded():
                return module(x)
        value = module.forward_(x.detach().clone(), replay=replay)
        with replaying():
            return with_value(value, module(x)) if torch.is_grad_enabled() else value

    def _repeating(self, name: str) -> contextlib.AbstractContextManager[None]:
        """A repetition goes by this block's record; where there is none, by that of a module around."""
        record = (self.saved or {}).get(name)
        return record.again() if record is not None and is_replaying() else contextlib.nullcontext()

    def _add(self, stream: Tensor, residual: Tensor) -> None:
        for s in self._slices(stream):
            stream[s].add_(self._rounded(residual[s]))

    def _subtract(self, stream: Tensor, residual: Tensor) -> None:
        for s in self._slices(stream):
            stream[s].sub_(self._rounded(residual[s]))

    def _slices(self, x: Tensor) -> Iterable[slice]:
        return batch_slices(x) if self.exact else (slice(None),)

    def _rounded(self, x: Tensor) -> Tensor:
        return grid_of(x.dtype).round(x) if self.exact else x

    def _argument(self, x: Tensor) -> Tensor:
        return x.contiguous() if self.exact else x

    def _check_range(self, y: Tensor) -> None:
        if self.exact:
            grid_of(y.dtype).check_range(y)

    def _records(self) -> dict[str, Replay]:
        if self.saved is None:
            raise RuntimeError("ReversibleBlock: an inverse was asked for before any forward pass")
        return self.saved


class HybridBlock(ReversibleBlock):
    """Reversible block whose modules are stacks of coupling layers (Hascoet et al. 2023, Figure 8).

    Args:
        channels: c, divisible by 4: halves for the block, quarters for the coupling layers inside.
        depth: coupling layers per module; the source's networks have 2.
        slope: of the leaky ReLU.
        eps_i: of the batch norm.
        exact: as for :class:`ReversibleBlock`.
        dirac: as for :class:`CouplingLayer`.
    """

    def __init__(
        self,
        channels: int,
        *,
        depth: int = 2,
        slope: float = 0.1,
        eps_i: float = 0.1,
        exact: bool = False,
        dirac: bool = False,
    ) -> None:
        check_halves(channels)
        half = channels // 2
        super().__init__(
            CouplingStack(half, depth=depth, slope=slope, eps_i=eps_i, dirac=dirac),
            CouplingStack(half, depth=depth, slope=slope, eps_i=eps_i, dirac=dirac),
            exact=exact,
        )
