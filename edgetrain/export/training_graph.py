"""A network in training mode as a graph from which ONNX Runtime can derive gradients.

Batch norms normalise by the batch and give their new running statistics as further outputs. A few layers of the zoo
are written in other operators than the ones they compute with, as ONNX Runtime (1.19.2) has no gradient for those:

- :class:`InvertibleBatchNorm`: ``|gamma + eps_i|`` becomes the scale of an ordinary batch norm.
- :class:`Head`: the maximum over everything that remains becomes one MaxPool over the parts of an image side by side.
- :class:`MaxPoolPad`: MaxPool and Pad.
- A batch norm that stays in evaluation mode, as in a frozen block, becomes ``factor x + offset``: in training, ONNX
  Runtime normalises every batch norm by the batch, without a word.
- ``chunk`` becomes Split, one buffer for each part's gradient; as Slice, every part has a gradient of the whole size.

Names are those of :mod:`edgetrain.export.graph`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from edgetrain.errors import ExportError
from edgetrain.export.graph import plain_name, write_module
from edgetrain.models.parts import HEAD_SCALE, Head, MaxPoolPad
from edgetrain.nn import InvertibleBatchNorm

if TYPE_CHECKING:
    from onnx import ModelProto


def write_training_graph(
    model: nn.Module, sample: Tensor, path: Path, *, opset: int, batch_size: int | None
) -> ModelProto:
    """``model`` on the CPU as a forward graph in ``path`` that trains what ``requires_grad`` says.

    Frozen blocks stay in evaluation mode (:func:`edgetrain.chain.freeze`), all others are in training mode.

    Args:
        sample: (n, c, h, w), to trace with.
        batch_size: fixed; None leaves it open.

    Raises:
        ExportError: two names stand for one parameter, or the graph writer cannot express the module.
    """
    _refuse_ties(model)
    written = _replaced(copy.deepcopy(model).train())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with _Splits():
        graph = write_module(written, sample, path, opset=opset, batch_size=batch_size, fold_constants=False)
    _restore(graph, state)  # tracing runs the network once, which moves its running statistics
    return graph


class _BatchNorm(nn.Module):
    """:class:`InvertibleBatchNorm` on torch's own function, with the same parameters and buffers."""

    def __init__(self, norm: InvertibleBatchNorm) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)
        self.momentum, self.eps, self.eps_i = norm.momentum, norm.eps, norm.eps_i

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.weight + self.eps_i).abs()
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(x, mean, var, scale, self.bias, self.training, self.momentum, self.eps)


class _Affine(nn.Module):
    """A batch norm by its running statistics: ``factor x + offset``, per channel."""

    def __init__(self, norm: nn.BatchNorm2d | InvertibleBatchNorm) -> None:
        super().__init__()
        self.offset: Tensor
        self.factor: Tensor
        zeros = torch.zeros(1, len(norm.running_mean), 1, 1)  # type: ignore[arg-type]
        with torch.no_grad():
            offset = norm(zeros)
            self.register_buffer("offset", offset)
            self.register_buffer("factor", norm(zeros + 1) - offset)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor + self.offset


class _Head(nn.Module):
    """:class:`Head` with one MaxPool: parts side by side, (parts n, c, h, w) -> (n, c, parts h, w) -> (n, c)."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.linear, self.parts = head.linear, head.parts

    def forward(self, x: Tensor) -> Tensor:
        c, h, w = map(int, x.shape[1:])
        if self.parts > 1:
            x = x.view(-1, self.parts, c, h, w).transpose(1, 2).reshape(-1, c, self.parts * h, w)
        return self.linear(F.max_pool2d(x, (self.parts * h, w)).flatten(1)) * HEAD_SCALE


class _MaxPoolPad(nn.Module):
    """:class:`MaxPoolPad` as MaxPool and Pad: each half of the channels gets half of the zeros."""

    def __init__(self, pool: MaxPoolPad) -> None:
        super().__init__()
        self.out_channels, self.slope = pool.out_channels, pool.slope

    def forward(self, x: Tensor) -> Tensor:
        c, h, w = map(int, x.shape[1:])
        halves = F.max_pool2d(x, 2).view(-1, 2, c // 2, h // 2, w // 2)
        y = F.pad(halves, (0, 0, 0, 0, 0, (self.out_channels - c) // 2)).view(-1, self.out_channels, h // 2, w // 2)
        return y if self.slope is None else F.leaky_relu(y, self.slope)


class _Splits(TorchFunctionMode):
    """Inside, ``chunk`` is ``split`` with sizes that do not depend on the batch."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.chunk, Tensor.chunk):
            return _split(*args, **kwargs)
        return func(*args, **kwargs)


def _split(input: Tensor, chunks: int, dim: int = 0) -> tuple[Tensor, ...]:
    return input.split(-(-int(input.shape[dim]) // chunks), dim)


_REPLACED: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    InvertibleBatchNorm: _BatchNorm,
    Head: _Head,
    MaxPoolPad: _MaxPoolPad,
}


def _replaced(module: nn.Module) -> nn.Module:
    """``module`` with the layers above in their other form, in place."""
    for name, child in module.named_children():
        replace = _REPLACED.get(type(child))
        if isinstance(child, nn.BatchNorm2d | InvertibleBatchNorm) and not child.training:
            replace = _Affine
        setattr(module, name, _replaced(child) if replace is None else replace(child))
    return module


def _refuse_ties(model: nn.Module) -> None:
    names: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = names.setdefault(parameter, name)
        if first != name:
            raise ExportError(
                found=f"one parameter with two names, {first} and {name}",
                expected="a parameter for each name: the graph would train two",
                action="untie them, or train with edgetrain train",
            )


def _restore(graph: ModelProto, state: dict[str, Tensor]) -> None:
    """Gives what is in ``state`` the numbers it has there."""
    from onnx import numpy_helper

    values = {plain_name(name): value for name, value in state.items()}
    for initialiser in graph.graph.initializer:
        value = values.get(initialiser.name)
        if value is not None:
            initialiser.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value.numpy()), initialiser.name))
