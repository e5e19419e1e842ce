"""Invertible layers with channels last: what they give is as it is with channels first, and laid out as it came."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from edgetrain.errors import ModelError
from edgetrain.nn.activation import InvertibleLeakyReLU
from edgetrain.nn.attention import AttentionTap
from edgetrain.nn.batchnorm import InvertibleBatchNorm
from edgetrain.nn.coupling import CouplingConv, CouplingLayer, CouplingStack
from edgetrain.nn.invertible import Invertible, Rerun
from edgetrain.nn.layouts import copied, memory_format, with_channels_last
from edgetrain.nn.normalisation import Statistics, _pixels_in_lines, batch_moments, channel_sums, normalise
from edgetrain.nn.pooling import BatchPool, ChannelPool
from edgetrain.nn.replay import recording
from edgetrain.nn.reversible import HybridBlock, ReversibleBlock

BOUND = 1e-10  # the project's, in float64
SHAPE = (8, 12, 64, 64)  # of 384 KiB a sample: two slices, or four fine ones
FIRST, LAST = torch.contiguous_format, torch.channels_last


def branch() -> nn.Module:
    return nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())


def tap() -> AttentionTap:
    found = AttentionTap(mapping="sum", power=2)
    target = torch.rand(SHAPE[0], SHAPE[2] * SHAPE[3], dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found.target, found.scale = nn.functional.normalize(target), torch.tensor(3.0, dtype=torch.float64)
    return found


LAYERS = {
    "activation": lambda: InvertibleLeakyReLU(0.2),
    "batch norm": lambda: InvertibleBatchNorm(12),
    "coupling": lambda: CouplingConv(12),
    "coupling layer": lambda: CouplingLayer(12),
    "stack of three": lambda: CouplingStack(12, depth=3),
    "reversible": lambda: ReversibleBlock(branch(), branch()),
    "attention": lambda: tap(),
    "channel pooling": lambda: ChannelPool(),
    "batch pooling": lambda: BatchPool(),
    "hybrid": lambda: HybridBlock(12),
    "hybrid of three": lambda: HybridBlock(12, depth=3),
}


def build(name: str) -> Invertible:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    for p in layer.parameters():
        if p.dim() == 1:
            nn.init.uniform_(p, 0.5, 1.5)
    return layer.double()


def tensors(count: int, layout: torch.memory_format, *, half: bool, shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    """Of one seed; ``half``: the upper half of the channels of a larger tensor, as in a reversible block."""
    generator = torch.Generator().manual_seed(1)
    n, c, *size = shape
    found = []
    for _ in range(count):
        x = torch.randn(n, 2 * c, *size, dtype=torch.float64, generator=generator).contiguous(memory_format=layout)
        found.append(x.chunk(2, 1)[1] if half else copied(x.chunk(2, 1)[1]))
    return found


def passes(name: str, layout: torch.memory_format, *, half: bool) -> list[Tensor]:
    """Everything that the layer gives, in every way."""
    layer = build(name)
    (x,) = tensors(1, layout, half=half)
    y = layer.forward_(copied(x))
    dy = tensors(2, layout, half=half, shape=tuple(y.shape))[1]
    results, gradients = [copied(y), layer.inverse(y)], []
    ways = [layer.backward_from_output, layer.backward_holding]
    if layer.between:
        ways.append(lambda y, dy: (x, layer.backward_between(x, y, dy)))
    for back in ways:
        found, gradient = back(copied(y), copied(dy))
        results += [copied(found), gradient]
        gradients += [p.grad for p in layer.parameters()]
        assert all(p.grad.stride() == p.stride() for p in layer.parameters())
        layer.zero_grad(set_to_none=True)
    assert all(t.is_contiguous(memory_format=layout) for t in results)
    with recording():
        results.append(layer(x))
    results.append(layer(x))
    assert {memory_format(t) for t in results} == {layout}
    return [t.detach() for t in results] + gradients


@pytest.mark.parametrize("half", [False, True], ids=["whole", "half"])
@pytest.mark.parametrize("name", LAYERS)
def test_channels_last_as_first(name: str, half: bool):
    assert build(name).keeps_layout
    for got, expected in zip(passes(name, LAST, half=half), passes(name, FIRST, half=half), strict=True):
        assert float((got - expected).norm() / expected.norm()) < BOUND


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_residual_with_channels_last(depth: int):
    found = []
    for layout in (FIRST, LAST):
        torch.manual_seed(0)
        stack = CouplingStack(12, depth=depth).double()
        x, dy, minuend, dx = tensors(4, layout, half=True)
        stack.forward_(x.clone())
        stack.backward_as_residual(x, dy, minuend, dx)
        found.append([minuend, dx, *(p.grad for p in stack.parameters())])
    for got, expected in zip(*found, strict=True):
        assert float((got - expected).norm() / expected.norm()) < BOUND


class Planes(InvertibleLeakyReLU):
    """As a layer of somebody else, who says nothing of layouts."""

    keeps_layout = Invertible.keeps_layout


def test_who_works_on_planes_alone():
    layers = [HybridBlock(12, exact=True), Planes(), ReversibleBlock(branch(), Planes())]
    assert not any(layer.keeps_layout for layer in layers)


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 8, 16, 20, 40, 64, 100])
@pytest.mark.parametrize("size", [1, 3, 4, 8])
@pytest.mark.parametrize("half", [False, True], ids=["whole", "half"])
def test_sums_with_channels_last(channels: int, size: int, half: bool):
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(6, 2 * channels, size, size, dtype=torch.float64, generator=generator) for _ in range(2))
    mean, invstd = (torch.rand(channels, dtype=torch.float64, generator=generator) for _ in range(2))
    last = [t.contiguous(memory_format=LAST).chunk(2, 1)[0] for t in (x, dy)]
    if not half:
        last = [t.contiguous(memory_format=LAST) for t in last]
    x, dy = (t.chunk(2, 1)[0] for t in (x, dy))
    sums = channel_sums(*last, mean, invstd)
    dims = (0, 2, 3)
    torch.testing.assert_close(sums[0], dy.sum(dims), rtol=BOUND, atol=BOUND)
    xhat = (x - mean.view(1, -1, 1, 1)) * invstd.view(1, -1, 1, 1)
    torch.testing.assert_close(sums[1], (dy * xhat).sum(dims), rtol=BOUND, atol=BOUND)
    found = batch_moments(last[0])
    torch.testing.assert_close(found[0], x.mean(dims), rtol=BOUND, atol=BOUND)
    torch.testing.assert_close(found[1], x.var(dims, correction=0), rtol=BOUND, atol=BOUND)


def test_pixels_that_fill_lines_of_the_cache():
    def pixels(channels: int, *, dtype: torch.dtype = torch.float32, layout: torch.memory_format = LAST) -> int:
        x = torch.randn(4, channels, 8, 8, dtype=dtype).contiguous(memory_format=layout)
        return _pixels_in_lines(x, x)

    assert [pixels(c) for c in (3, 8, 16, 20, 24, 40, 64, 256)] == [16, 2, 1, 4, 2, 2, 1, 1]
    assert [pixels(c, dtype=torch.float64) for c in (8, 20)] == [1, 2]
    assert pixels(20, layout=FIRST) == pixels(20, dtype=torch.bfloat16) == pixels(1001) == 1


def test_strides_of_one_image_do_not_matter():
    x = torch.randn(6, 5, 3).permute(2, 0, 1)[None]  # as from rows of pixels: the batch's stride is 1
    assert x.stride()[0] < x.numel()
    y = with_channels_last(x)
    assert torch.equal(x, y)
    assert y.data_ptr() == x.data_ptr()
    assert memory_format(x) == memory_format(y) == LAST
    assert y.stride() == (90, 1, 15, 3)


@pytest.mark.parametrize("pool", [ChannelPool(), BatchPool()])
def test_the_gradient_of_pooling_keeps_channels_last(pool: Invertible):
    x = torch.randn(4, 6, 8, 8, dtype=torch.float64).contiguous(memory_format=LAST).requires_grad_()
    y = pool(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
    assert memory_format(dx) == LAST
    assert torch.autograd.gradcheck(pool, (x[:1].detach().requires_grad_(),))
    assert torch.autograd.gradgradcheck(pool, (x[:1].detach().requires_grad_(),))


def test_a_residual_hands_its_gradient_on_with_channels_last():
    (x,) = tensors(1, LAST, half=True, shape=(4, 6, 8, 8))
    rerun = Rerun(branch().double(), x.data, replay=None)
    dx = rerun.backward(torch.ones_like(rerun.take_output()))
    assert dx is not None
    assert memory_format(dx) == LAST


class Shifted(nn.Module):
    """Its parameter's gradient is the output's, of one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift[None]


def test_a_gradient_that_is_handed_through_is_a_copy():
    module, dy = Shifted(), torch.randn(1, 3, 2, 2)
    kept = dy.clone()
    dx = Rerun(module, torch.randn(1, 3, 2, 2), replay=None).backward(dy)
    assert dx is not None
    dx.zero_()
    assert torch.equal(dy, kept)
    assert torch.equal(module.shift.grad, kept[0])


def test_a_gradient_without_memory_of_its_own_gets_it():
    dx = Rerun(nn.AdaptiveAvgPool2d(1), torch.randn(2, 3, 4, 4), replay=None).backward(torch.ones(2, 3, 1, 1))
    assert dx is not None
    assert dx.is_contiguous()


def test_pooling_at_a_single_pixel_is_no_view():
    x = torch.randn(2, 3, 2, 2).contiguous(memory_format=LAST).requires_grad_()
    for pool in (ChannelPool(), BatchPool()):
        nn.functional.relu_(pool(x)).sum().backward()


def test_what_overwrites_its_input_has_no_gradient():
    with pytest.raises(ModelError, match="ReLU that overwrites its input"):
        Rerun(nn.ReLU(inplace=True), torch.randn(2, 3), replay=None)


@pytest.mark.parametrize("layout", [FIRST, LAST], ids=["first", "last"])
def test_gradient_of_a_normalisation(layout: torch.memory_format):
    generator = torch.Generator().manual_seed(0)
    x, dy = (
        torch.randn(6, 20, 5, 4, dtype=torch.float64, generator=generator).contiguous(memory_format=layout)
        for _ in range(2)
    )
    scale, bias = (torch.rand(20, dtype=torch.float64, generator=generator) for _ in range(2))
    mean, var = batch_moments(x)
    ours, theirs = ([t.clone().requires_grad_() for t in (x, scale, bias)] for _ in range(2))
    normalise(*ours, Statistics(mean, (var + 1e-5).rsqrt())).backward(dy)
    nn.functional.batch_norm(theirs[0], None, None, theirs[1], theirs[2], training=True).backward(dy)
    for got, expected in zip(ours, theirs, strict=True):
        assert float((got.grad - expected.grad).norm() / expected.grad.norm()) < BOUND
    assert memory_format(ours[0].grad) == layout
