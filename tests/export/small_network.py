"""A network of a few thousand weights with everything that an export has to carry."""

from __future__ import annotations

import torch
from torch import nn


def small_network(classes: int = 4, channels: int = 3) -> nn.Sequential:
    """Two convolutions with batch norms whose statistics are not those of a fresh network, and a classifier."""
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential()
    model.add_module("stem", nn.Conv2d(channels, 8, 3, padding=1, bias=False))
    model.add_module("norm", nn.BatchNorm2d(8))
    model.add_module("act", nn.ReLU())
    model.add_module("body", nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()))
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flatten", nn.Flatten())
    model.add_module("classifier", nn.Linear(8, classes))
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator) - 0.4 * (value.ndim > 1))
                if value.ndim == 1:
                    value.add_(0.2)
    return model
