"""Freezing the first blocks of a network, as in fine-tuning: their weights, and what their batch norms have learned.

A frozen block is not trained, runs in evaluation mode whatever mode its model is in, and changes nothing of itself.
With live batch norm it would: running statistics drift away from the weights that were trained with them, and the
batch is seen by layers that cannot adapt. Random layers (dropout) are off as well; what a ``forward`` that was cut does
by itself according to ``self.training``, such as ``F.dropout``, follows the mode of its own module.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

from torch import nn

from edgetrain.chain.chain import parts_of
from edgetrain.errors import UsageError


def freeze(model: nn.Module, blocks: int) -> nn.Module:
    """Freezes the first ``blocks`` blocks of the chain of ``model``, in place, and gives it back.

    Args:
        model: any module.
        blocks: how many, of those that ``edgetrain plan --explain`` lists where nothing is frozen or sampled. Plans are
            then made as for any other model; the frozen blocks appear in them as one with the first that is trained.
            Weights and modules that a later block has too stay as they are.

    Raises:
        UsageError: a negative number, or nothing is left to train.
    """
    parts = parts_of(model)
    chosen = [part.module for part in parts[: max(0, blocks)]]
    kept = [part.module for part in parts[len(chosen) :]]
    shared = {parameter for module in kept for parameter in module.parameters()}
    frozen = {parameter for module in chosen for parameter in module.parameters()} - shared
    if blocks < 0 or not any(p.requires_grad and p not in frozen for p in model.parameters()):
        raise UsageError(
            found=f"{blocks} frozen blocks of {len(parts)}",
            expected="a number from 0 that leaves something to train",
            action="freeze fewer blocks",
        )
    for parameter in frozen:
        parameter.requires_grad_(False)
    trained = {inner for module in kept for inner in module.modules()}
    hold_in_evaluation({inner for top in chosen for inner in top.modules()} - trained)
    return model


def hold_in_evaluation(modules: Iterable[nn.Module]) -> None:
    """Puts ``modules``, not what is inside them, into evaluation mode for good, whatever mode is asked for later."""
    for module in modules:
        module.training = False
        vars(module)["train"] = functools.partial(_unmoved, module)


def is_frozen(module: nn.Module) -> bool:
    """Whether :func:`freeze` keeps ``module`` in evaluation mode."""
    return isinstance(vars(module).get("train"), functools.partial)


def _unmoved(module: nn.Module, mode: bool = True) -> nn.Module:
    """In the place of ``module.train``."""
    return module
