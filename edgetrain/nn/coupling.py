"""Invertible convolution by additive coupling, and the layers made from it.

    y1 = x1 + F(x2),  y2 = x2 + G(y1)        x2 = y2 - G(y1),  x1 = y1 - F(x2)

with F and G one convolution each on half of the channels (section 3.4.1.3 of the source; the scheme is that of
Dinh et al. 2015 and Gomez et al. 2017). A :class:`CouplingLayer` is conv -> batch norm -> leaky ReLU; it has
2 * 9 (c/2)^2 = 4.5 c^2 convolution weights at kernel size 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgetrain.errors import ModelError
from edgetrain.nn.activation import InvertibleLeakyReLU
from edgetrain.nn.batchnorm import InvertibleBatchNorm, accumulate
from edgetrain.nn.dirac import dirac_
from edgetrain.nn.grid import Grid
from edgetrain.nn.invertible import Invertible
from edgetrain.nn.layouts import copied, laid_out_as, new_like
from edgetrain.nn.sequential import InvertibleSequential
from edgetrain.nn.slices import FINE_SLICE_BYTES, batch_slices


class CouplingConv(Invertible):
    """Two shape-preserving convolutions coupled over channel halves.

    Args:
        channels: c, even.
        kernel_size: odd.
        dirac: give both convolutions a Dirac weight, :mod:`edgetrain.nn.dirac`.

    Raises:
        ModelError: the channels have no halves, or the kernel no centre.
    """

    def __init__(self, channels: int, *, kernel_size: int = 3, dirac: bool = False) -> None:
        super().__init__()
        check_halves(channels)
        if kernel_size % 2 == 0:
            raise ModelError(
                found=f"a kernel size of {kernel_size}",
                expected="an odd one, so that the convolution preserves the shape",
                action=f"use {kernel_size + 1}",
            )
        half, padding = channels // 2, kernel_size // 2
        self.f = nn.Conv2d(half, half, kernel_size, padding=padding, bias=False)
        self.g = nn.Conv2d(half, half, kernel_size, padding=padding, bias=False)
        if dirac:
            dirac_(self.f)
            dirac_(self.g)

    @property
    def keeps_layout(self) -> bool:
        return True

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, 1)
        y1 = x1 + self.f(x2)
        y2 = x2 + self.g(y1)
        return torch.cat([y1, y2], 1)

    @torch.no_grad()
    def forward_(self, x: Tensor, *, replay: bool = False) -> Tensor:
        for s in batch_slices(x):
            x1, x2 = x[s].chunk(2, 1)
            x1.add_(_convolve(self.f, x2))
            x2.add_(_convolve(self.g, x1))
        return x

    @torch.no_grad()
    def inverse_(self, y: Tensor) -> Tensor:
        for s in batch_slices(y):
            y1, y2 = y[s].chunk(2, 1)
            y2.sub_(_convolve(self.g, y1))
            y1.sub_(_convolve(self.f, y2))
        return y

    @torch.no_grad()
    def backward_from_output(self, y: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        for s in batch_slices(y):
            y1, y2 = y[s].chunk(2, 1)
            d1, d2 = dy[s].chunk(2, 1)
            known = laid_out_as(y1, y)
            y2.sub_(_convolve(self.g, known))
            _convolution_backward(self.g, known, d2, d1)
            known = laid_out_as(y2, y)
            y1.sub_(_convolve(self.f, known))
            _convolution_backward(self.f, known, d1, d2)
        return y, dy

    @torch.no_grad()
    def backward_between(self, x: Tensor, y: Tensor, dy: Tensor) -> Tensor:
        """As of :class:`Invertible`, without any noise: nothing is inverted."""
        for s in batch_slices(y):
            d1, d2 = dy[s].chunk(2, 1)
            _convolution_backward(self.g, laid_out_as(y[s].chunk(2, 1)[0], y), d2, d1)
            _convolution_backward(self.f, laid_out_as(x[s].chunk(2, 1)[1], y), d1, d2)
        return dy


class CouplingLayer(InvertibleSequential):
    """Coupling convolution, invertible batch norm, invertible leaky ReLU: the unit of the layer-wise network.

    Args:
        channels: c, even.
        slope: of the leaky ReLU, :class:`InvertibleLeakyReLU`.
        eps_i: of the batch norm, :class:`InvertibleBatchNorm`.
        dirac: as for :class:`CouplingConv`.
    """

    def __init__(self, channels: int, *, slope: float = 0.1, eps_i: float = 0.1, dirac: bool = False) -> None:
        self.conv: CouplingConv
        self.norm: InvertibleBatchNorm
        self.act: InvertibleLeakyReLU
        super().__init__(
            conv=CouplingConv(channels, dirac=dirac),
            norm=InvertibleBatchNorm(channels, eps_i=eps_i),
            act=InvertibleLeakyReLU(slope),
        )

    @property
    def between(self) -> bool:
        return True

    @torch.no_grad()
    def backward_between(self, x: Tensor, y: Tensor, dy: Tensor) -> Tensor:
        sums = _zero_sums(y)
        for s in batch_slices(y, FINE_SLICE_BYTES):
            z, dz = self.act.backward_from_output(copied(y[s]), dy[s])
            _add_sums(sums, self.norm.gradient_sums(z, dz))
        self.norm.add_gradients(*sums)
        for s in batch_slices(y, FINE_SLICE_BYTES):
            z = self.act.inverse_(copied(y[s]))
            u, du = self.norm.backward_with_sums(z, dy[s], sums, count=y.numel() // y.shape[1])
            self.conv.backward_between(x[s], u, du)
        return dy

    def forward(self, x: Tensor) -> Tensor:
        # a batch norm does not need its output for its gradient, so the activation may take its place
        return F.leaky_relu_(self.norm(self.conv(x)), self.act.slope)


class CouplingStack(InvertibleSequential):
    """Coupling layers as one residual module of a reversible block: the hybrid's F and G.

    As a residual its input is known, so nothing has to be inverted down to it; see
    :meth:`backward_as_residual`.

    Args:
        channels: c, even.
        depth: number of coupling layers, at least 1.
        slope: as for :class:`CouplingLayer`, and ``eps_i`` and ``dirac``.
    """

    def __init__(
        self, channels: int, *, depth: int = 2, slope: float = 0.1, eps_i: float = 0.1, dirac: bool = False
    ) -> None:
        super().__init__(
            **{f"layer{k}": CouplingLayer(channels, slope=slope, eps_i=eps_i, dirac=dirac) for k in range(depth)}
        )

    @torch.no_grad()
    def backward_as_residual(
        self, x: Tensor, dy: Tensor, minuend: Tensor, dx: Tensor, *, grid: Grid | None = None
    ) -> None:
        """Walks the layers backward with one buffer of the size of ``x`` (two from three layers on).

        Between layers k and k-1 travel ``z``, the normalised values before the activation, and their gradient
        ``dz``; the sums over the whole batch that a batch norm's gradient needs are taken while the slice that
        produces ``z`` and ``dz`` is at hand. The first layer's ``z`` is not carried: it is computed again from
        the exact input at the price of inverting, and its place is taken by its gradient. Forward convolutions:
        one pass for the output, one for the hidden activations.

        Args:
            x: input (n, c, h, w), left alone, as ``dy``, the gradient with respect to the output.
            minuend: the output is subtracted from it in place.
            dx: the gradient with respect to ``x`` is added to it in place.
            grid: the output is rounded to it. It must then have the bits of the first pass, and a convolution's
                depend on the size of a slice: all of the output is computed as that pass did.
        """
        layers = [layer for layer in self.layers() if isinstance(layer, CouplingLayer)]
        first, last = layers[0], layers[-1]
        count = x.numel() // x.shape[1]
        outputs = None if grid is None else self.forward_(copied(x), replay=True)
        carried = new_like(x, x.shape) if outputs is None else outputs
        carried_gradient = new_like(x, x.shape) if len(layers) > 2 else carried
        sums = _zero_sums(x)
        for s in batch_slices(x, FINE_SLICE_BYTES):
            y = self.forward_(copied(x[s]), replay=True) if outputs is None else copied(outputs[s])
            minuend[s].sub_(y if grid is None else grid.round(y))
            z, dz = last.act.backward_from_output(y, copied(dy[s]))
            _add_sums(sums, last.norm.gradient_sums(z, dz))
            carried[s] = dz if len(layers) == 1 else z
        last.norm.add_gradients(*sums)

        for layer, below in zip(layers[:0:-1], layers[-2::-1], strict=True):
            sums_below = _zero_sums(x)
            for s in batch_slices(x, FINE_SLICE_BYTES):
                z = carried[s]
                dz = layer.act.derivative_(z, copied(dy[s])) if layer is last else copied(carried_gradient[s])
                u, du = layer.conv.backward_from_output(*layer.norm.backward_with_sums(z, dz, sums, count=count))
                z, dz = below.act.backward_from_output(u, du)
                _add_sums(sums_below, below.norm.gradient_sums(z, dz))
                # z stands in its place already; below the second layer only the gradient is carried on
                (carried if below is first else carried_gradient)[s] = dz
            sums = sums_below
            below.norm.add_gradients(*sums)

        for s in batch_slices(x, FINE_SLICE_BYTES):
            z = first.norm.forward_(first.conv.forward_(copied(x[s])), replay=True)
            y, dz = first.norm.backward_with_sums(z, carried[s], sums, count=count)
            dx[s].add_(first.conv.backward_between(x[s], y, dz))


def check_halves(channels: int) -> None:
    """Raises ModelError where ``channels`` cannot be split in two."""
    if channels % 2 or channels <= 0:
        raise ModelError(
            found=f"{channels} channels",
            expected="an even number, because a coupling works on two halves",
            action=f"use {channels + channels % 2 or 2} channels",
        )


def _convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)


def _convolution_backward(conv: nn.Conv2d, x: Tensor, dy: Tensor, dx: Tensor) -> None:
    """Adds the gradient with respect to ``x`` to ``dx`` and that of the weight to its ``.grad``, in place.

    The weight of a parametrised convolution is computed here, and its gradient goes on to what it was computed from.
    """
    with torch.enable_grad():
        weight = conv.weight
    mask = [True, weight.requires_grad, False]
    gradient, weight_gradient, _ = torch.ops.aten.convolution_backward(
        laid_out_as(dy, x),
        x,
        weight,
        None,
        conv.stride,
        conv.padding,
        conv.dilation,
        False,
        [0, 0],
        conv.groups,
        mask,
    )
    dx.add_(gradient)
    if weight_gradient is None:
        return
    if weight.is_leaf:
        accumulate(weight, weight_gradient)
    else:
        torch.autograd.backward([weight], [weight_gradient])


def _zero_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    zero = x.new_zeros(x.shape[1])
    return zero, zero.clone()


def _add_sums(sums: tuple[Tensor, Tensor], part: tuple[Tensor, Tensor]) -> None:
    sums[0].add_(part[0])
    sums[1].add_(part[1])
