"""What an export is compared on: named images, and the normalisation that stands in the graph.

A graph that embeds the normalisation takes pixels on the scale 0..1 and computes ``(x - mean) / std`` per channel
first, as the training's loader does (``edgetrain.train.data.normalise``). Whoever feeds the engine then cannot forget
it, and the graph says which numbers they are.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgetrain.errors import UsageError

RANDOM = "random numbers"
NORMALISE, NETWORK = "normalise.", "network."
"""Prefixes of the two parts of a network with its normalisation in front."""


@dataclass(frozen=True)
class ImageSet:
    """Images to compare or calibrate on.

    Attributes:
        pixels: (n, c, h, w) float32, as the exported graph takes them.
        names: one per image, as a person finds them again.
        source: where they are from, for a person.
        labels: (n,) int64; None where nobody knows them.
    """

    pixels: Tensor
    names: tuple[str, ...]
    source: str
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        counts = {len(self.pixels), len(self.names)} | (set() if self.labels is None else {len(self.labels)})
        if counts != {len(self.pixels)} or self.pixels.ndim != 4 or not len(self.pixels):
            raise UsageError(
                found=f"images {tuple(self.pixels.shape)} with {len(self.names)} names",
                expected="images (n, c, h, w), at least one, each with a name and, where given, a label",
                action="pass as many names and labels as images",
            )

    def __len__(self) -> int:
        return len(self.pixels)

    def first(self, count: int) -> ImageSet:
        """The first ``count`` of them."""
        labels = None if self.labels is None else self.labels[:count]
        return ImageSet(self.pixels[:count], self.names[:count], self.source, labels)

    def digests(self) -> tuple[str, ...]:
        """SHA-256 of the float32 pixels of each image."""
        return tuple(hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest() for image in self.pixels)


def as_image_set(images: Tensor | ImageSet | None, input_shape: tuple[int, int, int]) -> ImageSet:
    """``images`` with names; four of random numbers where there are none.

    Raises:
        UsageError: they are not of ``input_shape`` (c, h, w).
    """
    if images is None:
        pixels = torch.rand((4, *input_shape), generator=torch.Generator().manual_seed(0))
        images = ImageSet(pixels, tuple(f"random {k}" for k in range(4)), RANDOM)
    elif isinstance(images, Tensor):
        pixels = images.detach().float().cpu()
        images = ImageSet(pixels, tuple(f"image {k}" for k in range(len(pixels))), "the caller's tensor")
    if tuple(images.pixels.shape[1:]) != tuple(input_shape):
        raise UsageError(
            found=f"images of {'x'.join(map(str, images.pixels.shape[1:]))}",
            expected="x".join(map(str, input_shape)) + ", the input shape",
            action="bring them to one size",
        )
    return images


@dataclass(frozen=True)
class Normalisation:
    """``(x - mean) / std`` per channel, for pixels x on the scale 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Normalise(nn.Module):
    """x (n, c, h, w) on the scale 0..1 -> ``(x - mean) / std``."""

    mean: Tensor
    factor: Tensor

    def __init__(self, normalisation: Normalisation) -> None:
        super().__init__()
        std = torch.tensor(normalisation.std, dtype=torch.float64)
        self.register_buffer("mean", torch.tensor(normalisation.mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("factor", (1 / std).float().view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) * self.factor


def with_normalisation(model: nn.Module, normalisation: Normalisation | None) -> nn.Module:
    """``model`` behind its normalisation; ``model`` itself where there is none."""
    if normalisation is None:
        return model
    return nn.Sequential(OrderedDict(normalise=Normalise(normalisation), network=model)).train(model.training)
