"""Invertible leaky ReLU, (3.24):  y = x if x > 0 else slope x;  x = y if y > 0 else y / slope.

The inverse multiplies the noise on negative values by n = 1/slope. With the signal on both sides alike the
signal-to-noise ratio falls by alpha = 4 / ((1 + 1/n^2)(1 + n^2)), (3.28c): slope 1 keeps it and makes the
network linear; the authors use 0.1 to 0.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgetrain.errors import ModelError
from edgetrain.nn.invertible import Invertible


class InvertibleLeakyReLU(Invertible):
    """Leaky ReLU with an inverse.

    Args:
        slope: factor for negative values, 0 < slope <= 1.

    Raises:
        ModelError: the slope has no inverse.
    """

    def __init__(self, slope: float = 0.1) -> None:
        super().__init__()
        if not 0.0 < slope <= 1.0:
            raise ModelError(
                found=f"a negative slope of {slope}",
                expected="0 < slope <= 1, so that the activation has an inverse that amplifies noise boundedly",
                action="use 0.1 (the default) to 0.2",
            )
        self.slope = slope

    @property
    def keeps_layout(self) -> bool:
        return True

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.slope)

    def forward_(self, x: Tensor, *, replay: bool = False) -> Tensor:
        return F.leaky_relu_(x, self.slope)

    def inverse_(self, y: Tensor) -> Tensor:
        return F.leaky_relu_(y, 1.0 / self.slope)

    @torch.no_grad()
    def backward_from_output(self, y: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        self.derivative_(y, dy)
        return self.inverse_(y), dy

    def derivative_(self, y: Tensor, dy: Tensor) -> Tensor:
        """``dx`` in the memory of ``dy``, from the output or the input: their signs are the same."""
        torch.ops.aten.leaky_relu_backward.grad_input(dy, y, self.slope, True, grad_input=dy)
        return dy

    def extra_repr(self) -> str:
        return f"slope={self.slope}"
