"""Which operations are an affine map per channel, ``scale * x + shift``.

Batch norm with running statistics, as a module or a function:

    scale = gamma / sqrt(var + eps),   shift = beta - scale mean                     (Ioffe and Szegedy 2015)

and arithmetic with constants: ``x + c``, ``x - c``, ``c - x``, ``x * c``, ``x / c`` with a number, a parameter or a
buffer. Input normalisation ``(x - mean) / std`` is two of them, a classifier's factor is one.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgetrain.export.folds.draft import Draft, Weighted, name_of


@dataclass(frozen=True)
class Affine:
    """``scale * x + shift`` in float64.

    Attributes:
        x: what it is applied to.
        scale: (c,) of a batch norm; otherwise shaped as it is broadcast over ``x``, as ``shift``.
        sources: names of the parameters and buffers they were computed from.
        batch_norm: whether it is one.
        shifts: whether it has a shift, whatever its values; a factor has none.
    """

    x: torch.fx.Node
    scale: Tensor
    shift: Tensor
    sources: tuple[str, ...]
    batch_norm: bool
    shifts: bool = True

    def per_channel(self, layer: Weighted, channels: int) -> tuple[Tensor, Tensor] | None:
        """``(scale, shift)``, each (channels,), next to ``layer``; None where it is no map per channel there."""
        if self.batch_norm:
            return (self.scale, self.shift) if self.scale.numel() == channels else None
        trailing = 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)
        vectors = [_as_vector(value, channels, trailing) for value in (self.scale, self.shift)]
        scale, shift = vectors
        return None if scale is None or shift is None else (scale, shift)


def is_batch_norm(draft: Draft, node: torch.fx.Node) -> bool:
    """Whether ``node`` is a batch norm, of whatever statistics."""
    return isinstance(draft.module(node), _BatchNorm) or node.target in (F.batch_norm, torch.batch_norm)


def affine_of(draft: Draft, node: torch.fx.Node) -> Affine | None:
    """What ``node`` does, if it is an affine map with fixed factors."""
    module = draft.module(node)
    if isinstance(module, _BatchNorm):
        return _of_module(node, module)
    if node.target is F.batch_norm:
        return _of_function(draft, node)
    return _of_arithmetic(draft, node)


def _of_module(node: torch.fx.Node, norm: _BatchNorm) -> Affine | None:
    if norm.running_mean is None or norm.running_var is None or not isinstance(node.args[0], torch.fx.Node):
        return None
    names = [n for n in ("weight", "bias", "running_mean", "running_var") if getattr(norm, n) is not None]
    sources = tuple(f"{node.target}.{name}" for name in names)
    factors = _normalisation(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
    return Affine(node.args[0], *factors, sources, True)


def _of_function(draft: Draft, node: torch.fx.Node) -> Affine | None:
    given = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs)
    given.apply_defaults()
    values = given.arguments
    names = ("running_mean", "running_var", "weight", "bias")
    mean, var, weight, bias = (draft.tensor(values[name]) for name in names)
    unknown = any(values[n] is not None and draft.tensor(values[n]) is None for n in names)
    x, eps = values["input"], values["eps"]
    if mean is None or var is None or unknown or values["training"] is not False:
        return None
    if not isinstance(x, torch.fx.Node) or not isinstance(eps, (int, float)):
        return None
    sources = tuple(str(values[n].target) for n in names if values[n] is not None)
    return Affine(x, *_normalisation(mean, var, weight, bias, eps), sources, True)


def _normalisation(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    scale = (var.detach().double() + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.detach().double()
    shift = -scale * mean.detach().double()
    return scale, shift if bias is None else shift + bias.detach().double()


_ARITHMETIC = {"add", "sub", "mul", "truediv", "div"}


def _of_arithmetic(draft: Draft, node: torch.fx.Node) -> Affine | None:
    name = name_of(node)
    if name not in _ARITHMETIC or len(node.args) != 2 or node.kwargs:
        return None
    left, right = (_constant(draft, part) for part in node.args)
    if (left is None) == (right is None) or (left is not None and name in ("truediv", "div")):
        return None
    x, constant = (node.args[0], right) if left is None else (node.args[1], left)
    assert constant is not None
    one, zero = torch.ones_like(constant), torch.zeros_like(constant)
    scale = {"mul": constant, "truediv": constant.reciprocal(), "div": constant.reciprocal()}.get(name, one)
    shift = {"add": constant, "sub": -constant if left is None else constant}.get(name, zero)
    if name == "sub" and left is not None:
        scale = -one
    sources = tuple(str(part.target) for part in node.args if draft.tensor(part) is not None)  # type: ignore[union-attr]
    shifts = name in ("add", "sub")
    return Affine(x, scale, shift, sources, False, shifts) if isinstance(x, torch.fx.Node) else None


def _constant(draft: Draft, part: object) -> Tensor | None:
    if isinstance(part, (int, float)) and not isinstance(part, bool):
        return torch.tensor(float(part), dtype=torch.double)
    tensor = draft.tensor(part)
    return None if tensor is None or not tensor.is_floating_point() else tensor.detach().double()


def _as_vector(value: Tensor, channels: int, trailing: int) -> Tensor | None:
    """``value`` as (channels,), if over a map (n, channels, ...) with ``trailing`` axes it varies with the channel."""
    if value.dim() > trailing + 2:
        return None
    if value.numel() == 1:
        return value.reshape(1).expand(channels)
    axis = value.dim() - 1 - trailing
    alone = axis >= 0 and all(size == 1 for k, size in enumerate(value.shape) if k != axis)
    return value.reshape(-1) if alone and value.shape[axis] == channels else None
