"""What of a network is trained when it is adapted to other data: a choice, and each has its price in memory.

| choice | trained | stored for the rest |
|---|---|---|
| ``all`` | everything | - |
| ``last:K`` | the last K blocks of the chain | nothing: the blocks before run in evaluation mode, without a gradient |
| ``head`` | the layer that makes the logits | nothing, likewise |
| ``bias-norm`` | biases, the affine parameters of normalisation layers, the head | what the gradient passes through |

``bias-norm`` (biases alone: H. Cai et al., TinyTL, 2020) saves gradients and the optimiser's state of the weights, but
the gradient still passes through every layer from the first that has something to train. The head is always trained:
its weights may be fresh.

Batch norm that is ``fixed`` normalises by the running statistics and leaves them alone: an affine map, whose scale and
shift may still be trained. Samples of a batch then do not meet, and splitting a batch is exact.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from edgetrain.chain.chain import parts_of
from edgetrain.chain.freezing import freeze, hold_in_evaluation
from edgetrain.errors import UsageError
from edgetrain.nn import InvertibleBatchNorm

BatchNormMode = Literal["live", "fixed"]

_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, InvertibleBatchNorm)
_NORMS = (*_BATCH_NORMS, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm, nn.LayerNorm)


def train_only(model: nn.Module, what: str, *, head: str) -> nn.Module:
    """Freezes what the choice ``what`` leaves out, in place, and gives ``model`` back.

    Args:
        what: ``all``, ``last:K``, ``head`` or ``bias-norm``.
        head: path of the layer that makes the logits, :func:`edgetrain.chain.head.find_head`.

    Raises:
        UsageError: no such choice, or no such number of blocks.
    """
    if what == "all":
        return model
    if what == "head":
        return _head_only(model, head)
    if what == "bias-norm":
        return _bias_norm_only(model, head)
    kind, _, number = what.partition(":")
    if kind != "last" or not number.isdecimal():
        raise UsageError(
            found=f"--train {what}",
            expected="all, last:K, head or bias-norm",
            action="write last:3 for the last three blocks",
        )
    blocks = len(parts_of(model))
    if not 1 <= int(number) <= blocks:
        raise UsageError(
            found=f"--train {what} of a network with {blocks} blocks",
            expected=f"a number from 1 to {blocks}",
            action="edgetrain plan MODEL --explain lists the blocks",
        )
    return freeze(model, blocks - int(number))


def fix_batch_norm(model: nn.Module) -> nn.Module:
    """Fixes the statistics of every batch norm in ``model``, in place, and gives it back."""
    hold_in_evaluation(module for module in model.modules() if isinstance(module, _BATCH_NORMS))
    return model


def _head_only(model: nn.Module, head: str) -> nn.Module:
    layer = model.get_submodule(head)
    model.requires_grad_(False)
    layer.requires_grad_(True)
    hold_in_evaluation(module for module in model.modules() if layer not in module.modules())
    return model


def _bias_norm_only(model: nn.Module, head: str) -> nn.Module:
    model.requires_grad_(False)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, _NORMS) or name == "bias" or name.endswith("_bias"):
                parameter.requires_grad_(True)
    model.get_submodule(head).requires_grad_(True)
    return model
