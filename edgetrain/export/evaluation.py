"""A module in evaluation mode on the CPU, and its logits: what every form of the network is compared with."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from edgetrain.errors import ModelError
from edgetrain.export.verify import Logits

_BATCH = 64


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model`` on the CPU and in evaluation mode; afterwards as it was, every part of it."""
    modes = [(module, module.training) for module in model.modules()]
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    try:
        model.cpu().eval()
        yield
    finally:
        model.to(device)
        for module, training in modes:
            module.training = training


def logits_of(model: nn.Module, pixels: Tensor) -> Logits:
    """Logits (n, classes) of ``pixels`` (n, c, h, w).

    Raises:
        ModelError: ``model`` does not take them, or gives something else.
    """
    model.eval()
    with torch.no_grad():
        return np.concatenate([_logits(model, part) for part in pixels.split(_BATCH)])


def rounding_of(model: nn.Module, pixels: Tensor, single: Logits) -> float:
    """Largest difference of the logits in float32, ``single``, from those in float64, relative to the largest."""
    exact = logits_of(copy.deepcopy(model).double(), pixels.double())
    return float(np.abs(single - exact).max() / np.abs(exact).max())


def _logits(model: nn.Module, pixels: Tensor) -> Logits:
    try:
        logits = model(pixels)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ModelError(
            found=f"a network that fails on images of {'x'.join(map(str, pixels.shape[1:]))}: "
            + (str(error).strip().splitlines() or [type(error).__name__])[0],
            expected="a network that takes them, (n, c, h, w)",
            action="pass the shape that it was made for",
        ) from error
    if not isinstance(logits, Tensor) or logits.shape[:-1] != pixels.shape[:1]:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(
            found=f"a network that gives {shape} for {len(pixels)} images",
            expected="logits, a tensor (n, classes)",
            action="wrap the network in a module that returns its logits alone",
        )
    return logits.numpy()
