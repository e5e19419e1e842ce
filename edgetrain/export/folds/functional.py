"""``F.conv2d(x, weight, bias, ...)`` on fixed weights becomes a layer, into which the other folds go.

Convolutions that pad by hand ("same" padding of other frameworks), or that standardise their weight on each call (Qiao
et al. 2019), call the function; the weight is then a parameter, or a constant that was computed from one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from edgetrain.export.folds.draft import Draft, Weighted

_KINDS: dict[Any, Callable[..., Weighted]] = {F.conv1d: nn.Conv1d, F.conv2d: nn.Conv2d, F.conv3d: nn.Conv3d}


def _call(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: Any = 1
) -> None:
    """The signature of torch's convolutions, which they do not tell."""


def layers_of_functions(draft: Draft) -> None:
    """Calls a new layer, named after the operation, in the place of every convolution or linear function."""
    for node in list(draft.graph.nodes):
        if node.op != "call_function" or node.target not in (*_KINDS, F.linear):
            continue
        given = inspect.signature(_call).bind(*node.args, **node.kwargs)
        given.apply_defaults()
        x, weight, bias, *options = given.arguments.values()
        tensors = draft.tensor(weight), draft.tensor(bias)
        if tensors[0] is None or (bias is not None and tensors[1] is None) or _computed(options):
            continue
        name = draft.free_name(node.name)
        draft.root.add_module(name, _layer(node.target, tensors[0], tensors[1], options))
        draft.grow(f"{name}.weight", [str(weight.target)])
        if bias is not None:
            draft.grow(f"{name}.bias", [str(bias.target)])
        with draft.graph.inserting_before(node):
            call = draft.graph.call_module(name, (x,))
        draft.replace(node, call)
        draft.count_calls()
    draft.drop_unused()


def _computed(options: list[Any]) -> bool:
    """Whether one of the options is a result, or several."""
    parts = [part for option in options for part in (option if isinstance(option, (list, tuple)) else [option])]
    return any(isinstance(part, torch.fx.Node) for part in parts)


def _layer(function: Any, weight: Tensor, bias: Tensor | None, options: list[Any]) -> nn.Module:
    layer: Weighted
    if function is F.linear:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    else:
        stride, padding, dilation, groups = options
        kernel, sizes = tuple(weight.shape[2:]), (weight.shape[1] * groups, weight.shape[0])
        layer = _KINDS[function](*sizes, kernel, stride, padding, dilation, groups, bias is not None)
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer.eval()
