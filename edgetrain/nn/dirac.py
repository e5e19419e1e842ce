"""Dirac parametrisation: convolutions whose weight is a scaled identity plus a small learned part.

    W_hat = diag(a) I + diag(b) W_norm                              (5.5)
    W_hat = I + W,  W ~ N(0, sigma^2)                               (section 5.3.3, on initialisation)

(Zagoruyko, thesis, section 5.3; Zagoruyko and Komodakis 2017, "DiracNets".) I is the Dirac delta of the convolution, 1
at the centre of the kernel from channel i to channel i and 0 elsewhere, so that I * x = x; W_norm is each filter over
its Euclidean norm; a and b have one number per output channel, a = 1.0 and b = 0.1 at the start, and W ~ N(0, 1). A
network of such layers has skip-connections that nobody sees: once trained, W_hat is an ordinary weight.

All of it hangs on ``torch.nn.utils.parametrize``: ``conv.weight`` is W_hat, ``conv.parametrizations.weight.original``
is W, and ``parametrize.remove_parametrizations(conv, "weight", leave_parametrized=True)`` leaves the plain layer.

Deviations. (5.2) prints a delta that is 1 over the whole kernel, which would blur: this one is that of
``torch.nn.init.dirac_``, in groups too. Where a layer changes the number of channels, I joins the first min(in, out).
The authors' code stores a delta per layer; here it is made anew each time and not kept.
"""

from __future__ import annotations

from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from edgetrain.errors import ModelError

_EPS = 1e-12
"""Least norm of a filter, below which it is not normalised, as in ``torch.nn.functional.normalize``."""

Convolution = TypeVar("Convolution", nn.Conv1d, nn.Conv2d, nn.Conv3d)


class DiracParametrization(nn.Module):
    """``W -> diag(a) I + diag(b) W_norm``, (5.5).

    Args:
        weight: of the convolution, (out, in / groups, k, ...).
        groups: of the convolution.
        a: first value of a; ``b`` likewise.

    Attributes:
        undecayed: parameters that weight decay leaves alone: towards zero they would end the layer.
    """

    undecayed: ClassVar[tuple[str, ...]] = ("a", "b")

    def __init__(self, weight: Tensor, *, groups: int = 1, a: float = 1.0, b: float = 0.1) -> None:
        super().__init__()
        self.groups = groups
        self.a = nn.Parameter(weight.new_full(weight.shape[:1], a))
        self.b = nn.Parameter(weight.new_full(weight.shape[:1], b))

    def forward(self, weight: Tensor) -> Tensor:
        return _normalised(weight, self.b).add_(_centred(self.a.view(-1, 1) * _identity(weight, self.groups), weight))

    def extra_repr(self) -> str:
        return f"{len(self.a)}, groups={self.groups}"


class DiracProjection(nn.Module):
    """``W -> P + diag(b) W_norm`` for layers that change the number of channels: P in the place of diag(a) I.

    P (out, in / groups) stands at the centre of the kernel, as a convolution of size 1 beside that of W; it starts as
    the Dirac delta of the first min(in, out) channels. :mod:`edgetrain.models.diracnet` says where it comes from.

    Args:
        weight: as for :class:`DiracParametrization`, and ``groups`` and ``b``.
    """

    undecayed: ClassVar[tuple[str, ...]] = ("b",)

    def __init__(self, weight: Tensor, *, groups: int = 1, b: float = 0.1) -> None:
        super().__init__()
        self.groups = groups
        self.b = nn.Parameter(weight.new_full(weight.shape[:1], b))
        self.projection = nn.Parameter(_identity(weight, groups))

    def forward(self, weight: Tensor) -> Tensor:
        return _normalised(weight, self.b).add_(_centred(self.projection, weight))

    def extra_repr(self) -> str:
        return f"{len(self.b)}, groups={self.groups}"


class IdentityPlus(nn.Module):
    """``W -> I + W``.

    Args:
        groups: of the convolution.
    """

    def __init__(self, *, groups: int = 1) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, weight: Tensor) -> Tensor:
        return weight + _centred(_identity(weight, self.groups), weight)

    def extra_repr(self) -> str:
        return f"groups={self.groups}"


class DiracConv2d(nn.Conv2d):
    """``nn.Conv2d`` under :func:`dirac_`; x (n, c, h, w) -> (n, out, h', w').

    I keeps the pixels in place where the kernel is odd, the stride 1 and the padding half of the kernel; this is up to
    the caller, as are the arguments, which are those of ``nn.Conv2d``.

    Args:
        in_channels: c.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
        )
        dirac_(self)


def dirac_(conv: Convolution, *, a: float = 1.0, b: float = 0.1) -> Convolution:
    """Makes the weight of ``conv`` that of (5.5), with W ~ N(0, 1), and gives ``conv`` back.

    Another parametrisation that is there already, such as weight norm, makes W.

    Raises:
        ModelError: no convolution, or one that has an identity in its weight already.
    """
    _draw(conv, 1.0)
    parametrize.register_parametrization(
        conv, "weight", DiracParametrization(conv.weight, groups=conv.groups, a=a, b=b)
    )
    return conv


def dirac_projection_(conv: Convolution, *, b: float = 0.1) -> Convolution:
    """As :func:`dirac_`, with :class:`DiracProjection`."""
    _draw(conv, 1.0)
    parametrize.register_parametrization(conv, "weight", DiracProjection(conv.weight, groups=conv.groups, b=b))
    return conv


def identity_plus_(conv: Convolution, *, sigma: float) -> Convolution:
    """Makes the weight of ``conv`` I + W with W ~ N(0, sigma^2), whatever the shape, and gives ``conv`` back.

    Raises:
        ModelError: as for :func:`dirac_`.
    """
    _draw(conv, sigma)
    parametrize.register_parametrization(conv, "weight", IdentityPlus(groups=conv.groups))
    return conv


@torch.no_grad()
def _draw(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, sigma: float) -> None:
    """W ~ N(0, sigma^2) in a layer that can take an identity."""
    if not isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        raise ModelError(
            found=f"a Dirac weight for {type(conv).__name__}",
            expected="nn.Conv1d, nn.Conv2d or nn.Conv3d, in whose weight the identity has a place",
            action="choose such a layer",
        )
    made = parametrize.is_parametrized(conv, "weight")
    parts = conv.get_submodule("parametrizations.weight").children() if made else ()
    if any(isinstance(part, DiracParametrization | DiracProjection | IdentityPlus) for part in parts):
        raise ModelError(
            found=f"{type(conv).__name__} with an identity in its weight already",
            expected="one identity",
            action="call this once, on a layer fresh from its constructor",
        )
    drawn = torch.randn_like(conv.weight).mul_(sigma)
    if made:
        conv.weight = drawn  # a property, which asks what has made the weight
    else:
        conv.weight.copy_(drawn)


def _normalised(weight: Tensor, scale: Tensor) -> Tensor:
    """``diag(scale) W_norm``, new memory; autograd keeps nothing of its size but the weight itself."""
    ones = (1,) * (weight.dim() - 1)
    norm = torch.linalg.vector_norm(weight.flatten(1), dim=1).clamp_min(_EPS)
    return weight * (scale / norm).view(-1, *ones)


def _identity(weight: Tensor, groups: int) -> Tensor:
    """I at the centre of the kernel: (out, in / groups), a row for each output channel."""
    out, inputs = weight.shape[:2]
    return torch.eye(out // groups, inputs, dtype=weight.dtype, device=weight.device).repeat(groups, 1)


def _centred(matrix: Tensor, weight: Tensor) -> Tensor:
    """``matrix`` (out, in / groups) at the centre of a kernel of zeros, in the shape of ``weight``."""
    kernel = weight.shape[2:]
    margins = [margin for size in reversed(kernel) for margin in (size // 2, size - size // 2 - 1)]
    return F.pad(matrix.view(*matrix.shape, *(1,) * len(kernel)), margins)
