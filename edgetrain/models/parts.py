"""What the families of the source's Table 3.1 share: stem, pooling sequence, head."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from edgetrain.errors import ModelError, UsageError
from edgetrain.nn import BatchPool, ChannelPool

HEAD_SCALE = 0.125
"""Factor on the logits in the authors' recipe."""


class Head(nn.Module):
    """Maximum over everything that remains, linear without bias, times 0.125.

    Args:
        channels: of the last stage.
        num_classes: width of the output.
        parts: samples of the batch that belong to one image: 4 for every batch pooling before.
    """

    def __init__(self, channels: int, num_classes: int, *, parts: int = 1) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(channels, num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # two steps, because the gradient of the first writes into one tensor of the size of x and nothing else
        x = F.adaptive_max_pool2d(x, 1).flatten(1)  # (parts * n, c)
        x = x.view(-1, self.parts, x.shape[1]).amax(1)  # (n, c)
        return self.linear(x) * HEAD_SCALE

    def extra_repr(self) -> str:
        return f"parts={self.parts}"


class MaxPoolPad(nn.Module):
    """2x2 max pooling, then zero channels up to ``out_channels``: how ResNet and RevNet widen between stages.

    Each half of the channels gets half of the zeros: a reversible block works on halves, and a half of zeros alone
    would give its batch norm nothing to normalise.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        if h % 2 or w % 2:
            raise ModelError(
                found=f"a pooling of {h}x{w} pixels",
                expected="even height and width",
                action="choose an image size divisible by 2 for every pooling of the model (8 for three of them)",
            )
        y = x.new_zeros(n, 2, self.out_channels // 2, h // 2, w // 2)
        y[:, :, : c // 2] = F.max_pool2d(x, 2).view(n, 2, c // 2, h // 2, w // 2)
        return y.view(n, self.out_channels, h // 2, w // 2)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}"


def stem(in_channels: int, channels: int) -> nn.Conv2d:
    """The first convolution, 3x3 without bias; it is not inverted."""
    return nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)


def pool(name: str) -> tuple[nn.Module, int, int]:
    """``(layer, factor on the channels, factor on the batch)`` of the pooling ``"channel"`` or ``"batch"``.

    Raises:
        UsageError: another name.
    """
    if name == "channel":
        return ChannelPool(), 4, 1
    if name == "batch":
        return BatchPool(), 1, 4
    raise UsageError(
        found=f"a pooling called {name!r}",
        expected="'channel' or 'batch', the two that can be inverted",
        action="give a sequence like ('channel', 'channel', 'batch')",
    )


def check_stages(blocks: Sequence[int], transitions: int) -> None:
    """Raises UsageError where there is not one stage more than transitions between stages, or an empty stage."""
    if len(blocks) != transitions + 1 or min(blocks) < 1:
        raise UsageError(
            found=f"blocks {tuple(blocks)} for {transitions} transitions between stages",
            expected="one stage more than transitions, each with a block at least",
            action=f"give {transitions + 1} block counts above zero",
        )
