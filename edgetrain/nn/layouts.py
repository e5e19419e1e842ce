"""Where the channels of an image are in memory: first, each a plane of its own, or last, those of a pixel together.

torch calls the two ``torch.contiguous_format`` and ``torch.channels_last``. Convolutions, batch norm and pooling give
their results as their input comes. On a CPU convolutions are quicker where channels come last: oneDNN then works on the
tensors as they are, which it otherwise copies to a layout of its own and back.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgetrain.errors import ModelError

_FEWEST = 8  # input channels of a group


def memory_format(x: Tensor) -> torch.memory_format:
    """``torch.channels_last`` if that is how ``x`` is laid out and not row by row too, else ``contiguous_format``.

    Holes between pixels, as in some of the channels of a larger tensor, do not matter.
    """
    if x.dim() != 4 or x.is_contiguous():
        return torch.contiguous_format
    return torch.channels_last if are_channels_last(tuple(x.shape), x.stride()) else torch.contiguous_format


def are_channels_last(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether a tensor of ``shape`` (n, c, h, w) has its channels last, holes between pixels or not.

    Of rows, columns and samples, the stride does not matter where there is one.
    """
    extent = shape[1]
    for dim in (3, 2, 0):
        if shape[dim] != 1:
            if strides[dim] < extent:
                return False
            extent = strides[dim] * shape[dim]
    return strides[1] == 1


def corrupting_convolution(module: nn.Module) -> str | None:
    """Path of a layer in ``module`` that must not run with channels last; None where there is none.

    The weights' gradient of a 1x1 convolution with a stride and fewer than 8 input channels writes where it must not,
    on a CPU whose vector instructions are AVX2 (oneDNN 3.12 in torch 2.13, one thread): the process dies, or goes on.
    """
    for path, layer in module.named_modules():
        strided = isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and max(layer.stride) > 1
        if strided and layer.in_channels // layer.groups < _FEWEST:
            return path or type(layer).__name__
    return None


def check_channels_last(module: nn.Module) -> None:
    """Raises ModelError where ``module`` must not run with channels last."""
    path = corrupting_convolution(module)
    if path is not None:
        raise ModelError(
            found=f"channels last asked for a network with {path}, a 1x1 convolution of few channels with a stride",
            expected="channels first: oneDNN's gradient of it corrupts memory with channels last",
            action="leave channels_last out",
        )


def with_channels_last(x: Tensor) -> Tensor:
    """The images ``x`` (n, c, h, w) with channels last; a copy if they are not. Anything else as it is."""
    if x.dim() != 4:
        return x
    # torch goes by all strides, those of dimensions of one element included
    return x.contiguous(memory_format=torch.channels_last).as_strided(x.shape, channels_last_strides(tuple(x.shape)))


def is_channels_last(x: Tensor) -> bool:
    """Whether ``x`` is laid out so, and not row by row too, without holes."""
    return memory_format(x) == torch.channels_last and x.is_contiguous(memory_format=torch.channels_last)


def laid_out_as(x: Tensor, model: Tensor) -> Tensor:
    """``x`` in the layout of ``model``, without holes; a copy if it is in another."""
    return x.contiguous(memory_format=memory_format(model))


def copied(x: Tensor) -> Tensor:
    """A copy of ``x`` in its own layout, without holes."""
    return x.clone(memory_format=memory_format(x))


def new_like(x: Tensor, shape: tuple[int, ...], *, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a tensor of ``shape`` in the layout of ``x``, not filled.

    Args:
        dtype: None: that of ``x``.
    """
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=memory_format(x))


def channels_last_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of an image batch (n, c, h, w) whose channels come last."""
    _, c, h, w = shape
    return c * h * w, 1, c * w, c
