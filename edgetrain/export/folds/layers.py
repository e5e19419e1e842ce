"""Affine maps into the weights of a convolution or a linear layer.

With W of one group viewed as (groups, out/groups, in/groups, k...), an affine map per channel goes

    after:   s (W x + b) + t = (s W) x + (s b + t)                       s, t per output channel
    before:  W (s x + t) + b = (W s) x + (b + sum over in, k of W t)     s, t per input channel

Transposed convolutions keep the weight as (in, out/groups, k...), that is (groups, in/groups, out/groups, k...). The
second line holds at the border only where padding is none, or repeats pixels of the map itself; :func:`border_reason`.
Computed in float64, stored in the layer's own type.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgetrain.chain.fakes import NeedsDataError
from edgetrain.export.folds.draft import Weighted


def channels_out(layer: Weighted) -> int:
    """Channels of the result."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def channels_in(layer: Weighted) -> int:
    """Channels of the input."""
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def shifts(shift: Tensor) -> bool:
    """Whether ``shift`` is not zero everywhere; one without data is some value or other, and not zero."""
    try:
        return bool((shift != 0).any())
    except NeedsDataError:
        return True


def map_output(layer: Weighted, scale: Tensor, shift: Tensor) -> None:
    """``layer`` becomes ``scale * layer + shift``, both (out,) in float64."""
    weight, outputs = _grouped(layer)
    shape = [1] * weight.dim()
    shape[0], shape[outputs] = weight.shape[0], weight.shape[outputs]
    scale, shift = scale.to(weight), shift.to(weight)
    _set_weight(layer, weight * scale.reshape(shape))
    if layer.bias is not None or shifts(shift):
        _set_bias(layer, _bias(layer) * scale + shift)


def map_input(layer: Weighted, scale: Tensor, shift: Tensor) -> None:
    """``layer(x)`` becomes ``layer(scale * x + shift)``, both (in,) in float64."""
    weight, outputs = _grouped(layer)
    inputs = 3 - outputs
    shape = [1] * weight.dim()
    shape[0], shape[inputs] = weight.shape[0], weight.shape[inputs]
    scale, shift = scale.to(weight), shift.to(weight)
    if shifts(shift):
        summed = [axis for axis in range(1, weight.dim()) if axis != outputs]
        _set_bias(layer, _bias(layer) + (weight * shift.reshape(shape)).sum(summed).reshape(-1))
    _set_weight(layer, weight * scale.reshape(shape))


def add_diagonal(layer: Weighted, scale: Tensor, shift: Tensor) -> None:
    """``layer(x)`` becomes ``scale * x + shift + layer(x)``, both (c,): a Dirac delta is added to each filter."""
    weight = layer.weight.detach().double()
    delta = torch.zeros_like(weight)
    if isinstance(layer, nn.Linear):
        delta.fill_diagonal_(1.0)
    else:
        nn.init.dirac_(delta, layer.groups)
    scale, shift = scale.to(weight), shift.to(weight)
    if shifts(shift):
        _set_bias(layer, _bias(layer) + shift)
    _set_weight(layer, weight + delta * scale.reshape(-1, *[1] * (weight.dim() - 1)))


def border_reason(layer: Weighted, shift: Tensor) -> str | None:
    """Why a shift of the input cannot go into ``layer``: its border would see another one."""
    if isinstance(layer, nn.Linear) or not shifts(shift):
        return None
    if layer.transposed:
        return "is a transposed convolution, whose outputs do not all sum over the same taps"
    padded = layer.padding != "valid" if isinstance(layer.padding, str) else any(layer.padding)
    if layer.padding == "same" and all(k == 1 for k in layer.kernel_size):
        return None
    if padded and layer.padding_mode == "zeros":
        return "pads with zeros, which the shift would change"
    return None


def keeps_shape(layer: Weighted) -> bool:
    """Whether input and output have the same shape and every kernel a centre."""
    if isinstance(layer, nn.Linear):
        return layer.in_features == layer.out_features
    if layer.transposed or layer.in_channels != layer.out_channels or any(s != 1 for s in layer.stride):
        return False
    if any(k % 2 == 0 for k in layer.kernel_size):
        return False
    if isinstance(layer.padding, str):
        return layer.padding == "same" or all(k == 1 for k in layer.kernel_size)
    sizes = zip(layer.padding, layer.kernel_size, layer.dilation, strict=True)
    return all(2 * p == d * (k - 1) for p, k, d in sizes)


def _grouped(layer: Weighted) -> tuple[Tensor, int]:
    """The weight in float64 as (groups, a, b, k...), and which of axes 1 and 2 counts the outputs."""
    weight = layer.weight.detach().double()
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    transposed = not isinstance(layer, nn.Linear) and layer.transposed
    return weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:]), 2 if transposed else 1


def _bias(layer: Weighted) -> Tensor:
    if layer.bias is None:
        return torch.zeros(channels_out(layer), dtype=torch.double, device=layer.weight.device)
    return layer.bias.detach().double()


def _set_weight(layer: Weighted, weight: Tensor) -> None:
    old = layer.weight
    layer.weight = nn.Parameter(weight.reshape(old.shape).to(old.dtype), requires_grad=False)


def _set_bias(layer: Weighted, bias: Tensor) -> None:
    layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=False)
