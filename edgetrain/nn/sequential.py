"""A chain of invertible layers is an invertible layer."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from edgetrain.nn.invertible import Invertible


class InvertibleSequential(Invertible):
    """Invertible layers one after the other; the backward pass inverts them one by one.

    Args:
        layers: by the names they shall have.
    """

    def __init__(self, **layers: Invertible) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    @property
    def noiseless(self) -> bool:
        return all(layer.noiseless for layer in self.layers())

    @property
    def keeps_layout(self) -> bool:
        return all(layer.keeps_layout for layer in self.layers())

    def layers(self) -> list[Invertible]:
        """The layers, first to last."""
        return [cast(Invertible, layer) for layer in self.children()]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers():
            x = layer(x)
        return x

    def forward_(self, x: Tensor, *, replay: bool = False) -> Tensor:
        for layer in self.layers():
            x = layer.forward_(x, replay=replay)
        return x

    def inverse_(self, y: Tensor) -> Tensor:
        for layer in reversed(self.layers()):
            y = layer.inverse_(y)
        return y

    def backward_from_output(self, y: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        for layer in reversed(self.layers()):
            y, dy = layer.backward_from_output(y, dy)
        return y, dy
