"""Reversible residual block (Gomez et al. 2017), the hybrid block included.

    y1 = x1 + f(x2),  y2 = x2 + g(y1)        x2 = y2 - g(y1),  x1 = y1 - f(x2)

f and g are any modules that preserve the shape of a channel half. Where both are invertible themselves this is
the hybrid block (section 3.4.2 of the source): the block's own inverse gives the input back with little noise,
and the hidden activations of f and g are inverted layer by layer instead of being held all at once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgetrain.nn.coupling import CouplingStack, check_halves
from edgetrain.nn.invertible import Invertible, Rerun
from edgetrain.nn.replay import Replay


class ReversibleBlock(Invertible):
    """Additive coupling of two arbitrary modules.

    Args:
        f: module on (n, c/2, h, w) that preserves the shape, as ``g``. Batch norm, dropout and other stateful
            layers in them are handled: a second run repeats the first.

    Attributes:
        saved: what the modules need to be run again, by name; none for invertible ones, which keep their own.
    """

    saved: dict[str, Replay] | None

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        self.f = f
        self.g = g
        self.saved = None

    @property
    def layerwise(self) -> bool:
        """Whether hidden activations can be inverted one by one: both modules are invertible."""
        return isinstance(self.f, Invertible) and isinstance(self.g, Invertible)

    def forward(self, x: Tensor) -> Tensor:
        check_halves(x.shape[1])
        x1, x2 = x.chunk(2, 1)
        y1 = x1 + self.f(x2)
        y2 = x2 + self.g(y1)
        return torch.cat([y1, y2], 1)

    @torch.no_grad()
    def forward_(self, x: Tensor, *, replay: bool = False) -> Tensor:
        check_halves(x.shape[1])
        if not replay:
            self.saved = {}
        x1, x2 = x.chunk(2, 1)
        x1.add_(self._run("f", x2, replay=replay))
        x2.add_(self._run("g", x1, replay=replay))
        return x

    @torch.no_grad()
    def inverse_(self, y: Tensor) -> Tensor:
        y1, y2 = y.chunk(2, 1)
        y2.sub_(self._run("g", y1, replay=True))
        y1.sub_(self._run("f", y2, replay=True))
        return y

    def backward_from_output(self, y: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        return self._backward(y, dy, layerwise=True)

    def backward_holding(self, y: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        return self._backward(y, dy, layerwise=False)

    @torch.no_grad()
    def _backward(self, y: Tensor, dy: Tensor, *, layerwise: bool) -> tuple[Tensor, Tensor]:
        (y1, y2), (d1, d2) = y.chunk(2, 1), dy.chunk(2, 1)
        self._residual_backward("g", x=y1, dy=d2, minuend=y2, dx=d1, layerwise=layerwise)
        self._residual_backward("f", x=y2, dy=d1, minuend=y1, dx=d2, layerwise=layerwise)
        return y, dy

    def _residual_backward(
        self, name: str, *, x: Tensor, dy: Tensor, minuend: Tensor, dx: Tensor, layerwise: bool
    ) -> None:
        module = self.get_submodule(name)
        if layerwise and isinstance(module, Invertible):
            module.backward_as_residual(x, dy, minuend, dx)
            return
        # the other half of x's memory is written while autograd holds x: .data keeps their versions apart
        rerun = Rerun(module, x.data, replay=self._records().get(name))
        minuend.sub_(rerun.take_output())
        gradient = rerun.backward(dy)
        assert gradient is not None
        dx.add_(gradient)

    def _run(self, name: str, x: Tensor, *, replay: bool) -> Tensor:
        module = self.get_submodule(name)
        if isinstance(module, Invertible):
            return module.forward_(x.clone(memory_format=torch.contiguous_format), replay=replay)
        records = self._records()
        if not replay:
            records[name] = Replay(module, x.device)
            return records[name].first(lambda: module(x))
        with records[name].again():
            return module(x)

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
    """

    def __init__(self, channels: int, *, depth: int = 2, slope: float = 0.1, eps_i: float = 0.1) -> None:
        check_halves(channels)
        half = channels // 2
        super().__init__(
            CouplingStack(half, depth=depth, slope=slope, eps_i=eps_i),
            CouplingStack(half, depth=depth, slope=slope, eps_i=eps_i),
        )
