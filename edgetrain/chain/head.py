"""The layer of a network that makes its logits, and another in its place for other classes.

It is found by running one sample: of the linear layers and 1x1 convolutions, the last that runs and gives as many
numbers as the network does. The order in which modules are registered says nothing: gates and auxiliary outputs have
linear layers too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgetrain.chain.chain import restore_state, saved_state
from edgetrain.errors import ModelError


@torch.no_grad()
def find_head(model: nn.Module, input_shape: tuple[int, int, int]) -> str:
    """Path in ``model`` of the layer that makes the logits; "" for the model itself.

    Args:
        model: left as it is.
        input_shape: (c, h, w) of a sample.

    Raises:
        ModelError: the model does not take such a sample, does not give (n, classes), or has no such layer.
    """
    ran: list[tuple[str, int]] = []
    layers = {name: layer for name, layer in model.named_modules() if _width(layer) is not None}
    hooks = [
        layer.register_forward_hook(lambda module, x, y, name=name: ran.append((name, _width(module) or 0)))
        for name, layer in layers.items()
    ]
    modes, saved = [(module, module.training) for module in model.modules()], saved_state(model)
    try:
        for module, _ in modes:
            module.training = False
        parameter = next(model.parameters(), torch.empty(0))
        x = torch.zeros(1, *input_shape, dtype=parameter.dtype, device=parameter.device)
        output = model(x)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ModelError(
            found=f"the network fails on a sample of {'x'.join(map(str, input_shape))}: {str(error).splitlines()[0]}",
            expected="a network that takes images of that shape",
            action="pass --image-size with a side that it takes",
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
        restore_state(saved)
    if not isinstance(output, Tensor) or output.dim() != 2:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ModelError(
            found=f"a network that gives {shape} for one sample",
            expected="one tensor (n, classes)",
            action="wrap the model so that it returns the logits alone",
        )
    found = next((name for name, width in reversed(ran) if width == output.shape[1]), None)
    if found is None:
        raise ModelError(
            found=f"no linear layer or 1x1 convolution that gives the {output.shape[1]} outputs of the network",
            expected="one whose place a layer for other classes can take",
            action="let the function take num_classes and make the head for them",
        )
    return found


def replace_head(model: nn.Module, name: str, classes: int) -> nn.Module:
    """``model`` with fresh weights for ``classes`` logits in the layer ``name``, in place.

    Raises:
        ModelError: no linear layer or 1x1 convolution is called so.
    """
    try:
        old = model.get_submodule(name)
    except AttributeError:
        old = model
    new = _renewed(old, classes)
    if new is None:
        raise ModelError(
            found=f"{name or 'the model'}, which is no linear layer and no 1x1 convolution",
            expected="the layer that makes the logits",
            action="use the model with which the run was made",
        )
    if not name:
        return new
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
    return model


def _width(layer: nn.Module) -> int | None:
    """How many logits ``layer`` makes; None where it is of another kind."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1:
        return layer.out_channels
    return None


def _renewed(old: nn.Module, classes: int) -> nn.Module | None:
    if _width(old) is None:
        return None
    weight = next(old.parameters())
    if isinstance(old, nn.Linear):
        return nn.Linear(old.in_features, classes, bias=old.bias is not None, dtype=weight.dtype, device=weight.device)
    assert isinstance(old, nn.Conv2d)
    return nn.Conv2d(
        old.in_channels,
        classes,
        1,
        bias=old.bias is not None,
        dtype=weight.dtype,
        device=weight.device,
    )
