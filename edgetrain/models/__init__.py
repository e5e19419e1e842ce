"""The zoo: :func:`create_model` makes a network by name, each a ``torch.nn.Sequential`` of blocks."""

from __future__ import annotations

import functools
import inspect
import itertools
import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from edgetrain.errors import UsageError, near_matches
from edgetrain.models.cifar_resnet import cifar_resnet
from edgetrain.models.diracnet import diracnet, imagenet_diracnet
from edgetrain.models.parts import POOLINGS
from edgetrain.models.plain import plain, vgg
from edgetrain.models.residual import resnet, revnet
from edgetrain.models.reversible import hybrid, irevnet, layerwise
from edgetrain.models.wide_resnet import wide_resnet

__all__ = [
    "cifar_resnet",
    "create_model",
    "diracnet",
    "hybrid",
    "imagenet_diracnet",
    "irevnet",
    "layerwise",
    "model_names",
    "plain",
    "pooling_letters",
    "pooling_sequences",
    "resnet",
    "revnet",
    "vgg",
    "wide_resnet",
]

_TABLE_MODELS: dict[str, Callable[..., nn.Sequential]] = {
    "resnet18": resnet,
    "revnet18": revnet,
    "irevnet18": irevnet,
    "layerwise18": layerwise,
    "hybrid18": hybrid,
    "revnet18-exact": functools.partial(revnet, exact=True),
    "irevnet18-exact": functools.partial(irevnet, exact=True),
    "hybrid18-exact": functools.partial(hybrid, exact=True),
    "diracnet-18": functools.partial(imagenet_diracnet, 18),
    "diracnet-34": functools.partial(imagenet_diracnet, 34),
    "vgg16": vgg,
}
_NUMBERED_MODELS: dict[str, Callable[..., nn.Sequential]] = {
    r"resnet(\d+)": cifar_resnet,
    r"wrn-(\d+)-(\d+)": wide_resnet,
    r"diracnet-(\d+)-(\d+)": diracnet,
    r"plain-(\d+)(?:-(\d+))?": plain,
}
"""By the form of the name; the numbers in it, 1 where one is left out, are the first arguments."""
_NUMBERED_NAMES = (
    *(f"resnet{depth}" for depth in (20, 32, 44, 56, 110, 1202)),
    *("wrn-16-1", "wrn-16-2", "wrn-28-10", "diracnet-28-5", "diracnet-28-10", "plain-34"),
)


def model_names() -> list[str]:
    """Names that :func:`create_model` knows.

    Any ``resnet<6n+2>`` works besides, and any 6N + 4 and k in ``wrn-<6N+4>-<k>``, ``diracnet-`` and ``plain-``.
    """
    return [*_TABLE_MODELS, *_NUMBERED_NAMES]


def create_model(name: str, num_classes: int = 10, **options: Any) -> nn.Sequential:
    """The network called ``name`` with fresh weights.

    Args:
        num_classes: width of the output.
        options: of the family: ``in_channels``, ``width`` or ``widths``, ``blocks``, ``pooling``, ``slope``...

    Raises:
        UsageError: no such name; the message lists the near ones.
    """
    family = _family(name)
    if family is None:
        raise UsageError(
            found=f"no model is called {name!r}",
            expected="a name of the zoo",
            action=near_matches(name, model_names()),
        )
    return family(num_classes, **options)


def pooling_sequences(name: str, **options: Any) -> tuple[tuple[str, ...], ...]:
    """Every ``pooling`` that :func:`create_model` takes with the other ``options``: one pooling between two stages.

    The families that can be inverted pool by channels or by batch. ResNet and RevNet of the table and the plain chains
    pool by maximum alone, CIFAR ResNets and wide ones by strides.

    Raises:
        UsageError: no network of the zoo has that name, or its pooling cannot be chosen.
    """
    family = _family(name) if isinstance(name, str) else None
    choices = [known for known, other in _TABLE_MODELS.items() if _takes_pooling(other)]
    if family is None:
        raise UsageError(
            found=f"{name if isinstance(name, str) else type(name).__name__}, which is no network of the zoo",
            expected="one that is built here and whose pooling can be chosen: " + ", ".join(choices),
            action="take one of these, or plan the network as it is",
        )
    if not _takes_pooling(family):
        raise UsageError(
            found=f"{name}, which downsamples in one way alone",
            expected="a network whose pooling can be chosen: " + ", ".join(choices),
            action="take one of these, or plan the network as it is",
        )
    blocks = options.get("blocks", inspect.signature(family).parameters["blocks"].default)
    return tuple(itertools.product(POOLINGS, repeat=max(0, len(blocks) - 1)))


def pooling_letters(pooling: Iterable[str]) -> str:
    """Its short form, a letter for each: "ccb" for ("channel", "channel", "batch")."""
    return "".join(name[0] for name in pooling)


def _takes_pooling(family: Callable[..., nn.Sequential]) -> bool:
    return "pooling" in inspect.signature(family).parameters


def _family(name: str) -> Callable[..., nn.Sequential] | None:
    """What makes the network of that name; None where there is none."""
    if name in _TABLE_MODELS:
        return _TABLE_MODELS[name]
    for form, family in _NUMBERED_MODELS.items():
        if match := re.fullmatch(form, name):
            return functools.partial(family, *(int(number or 1) for number in match.groups()))
    return None
