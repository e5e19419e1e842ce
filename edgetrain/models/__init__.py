"""The zoo: :func:`create_model` makes a network by name, each a ``torch.nn.Sequential`` of blocks."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from torch import nn

from edgetrain.errors import UsageError, near_matches
from edgetrain.models.cifar_resnet import cifar_resnet
from edgetrain.models.residual import resnet, revnet
from edgetrain.models.reversible import hybrid, irevnet, layerwise

__all__ = ["cifar_resnet", "create_model", "hybrid", "irevnet", "layerwise", "model_names", "resnet", "revnet"]

_TABLE_MODELS: dict[str, Callable[..., nn.Sequential]] = {
    "resnet18": resnet,
    "revnet18": revnet,
    "irevnet18": irevnet,
    "layerwise18": layerwise,
    "hybrid18": hybrid,
}
_CIFAR_DEPTHS = (20, 32, 44, 56, 110, 1202)


def model_names() -> list[str]:
    """Names that :func:`create_model` knows; any ``resnet<6n+2>`` works besides."""
    return [*_TABLE_MODELS, *(f"resnet{depth}" for depth in _CIFAR_DEPTHS)]


def create_model(name: str, num_classes: int = 10, **options: Any) -> nn.Sequential:
    """The network called ``name`` with fresh weights.

    Args:
        num_classes: width of the output.
        options: of the family: ``in_channels``, ``width`` or ``widths``, ``blocks``, ``pooling``, ``slope``...

    Raises:
        UsageError: no such name; the message lists the near ones.
    """
    family = _TABLE_MODELS.get(name)
    if family is None:
        match = re.fullmatch(r"resnet(\d+)", name)
        if match is None:
            raise UsageError(
                found=f"no model is called {name!r}",
                expected="a name of the zoo",
                action=near_matches(name, model_names()),
            )
        family = functools.partial(cifar_resnet, int(match.group(1)))
    return family(num_classes, **options)
