"""Max pooling that keeps a byte for each output, against torch's own: values, gradients, memory."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edgetrain
from edgetrain.memory import measure_costs, measure_peak, simulate
from edgetrain.nn import max_pool
from edgetrain.nn.lean import lean_operators_in
from edgetrain.nn.max_pool import max_pool2d
from edgetrain.nn.slices import whole_batch
from edgetrain.planner import Planner

KERNELS = ((2, 2), (3, 3), (3, 1), (1, 1), (1, 4), (5, 2), (16, 2))
STRIDES = ((1, 1), (2, 2), (3, 1))
PADDINGS = ((0, 0), (1, 0), (1, 1))
WINDOWS = [
    (kernel, stride, padding, ceil_mode)
    for kernel, stride, padding, ceil_mode in itertools.product(KERNELS, STRIDES, PADDINGS, (False, True))
    if all(p <= k // 2 for p, k in zip(padding, kernel, strict=True))
]


def with_ties(dtype: torch.dtype = torch.float64) -> Tensor:
    """Two thirds of the elements are equal to a neighbour; the first image has nothing but -inf."""
    torch.manual_seed(0)
    x = torch.randn(5, 3, 18, 13).mul_(2).round_().relu_().to(dtype)
    x[0] = -torch.inf
    return x


@pytest.fixture(params=["by shifts", "by index"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a CPU, and that of CUDA, whose operators a CPU has too."""
    if request.param == "by index":
        monkeypatch.setattr(max_pool, "_pool_by_shifts", max_pool._pool_by_index)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("kernel", "stride", "padding", "ceil_mode"), WINDOWS)
@pytest.mark.parametrize("slice_bytes", [1, 2**20])
def test_values_and_gradients_are_torchs(kernel, stride, padding, ceil_mode, slice_bytes, monkeypatch):
    monkeypatch.setattr(max_pool, "FINE_SLICE_BYTES", slice_bytes)
    x = with_ties()
    ours, torchs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = max_pool2d(ours, kernel, stride, padding, ceil_mode=ceil_mode)
    expected = F.max_pool2d(torchs, kernel, stride, padding, ceil_mode=ceil_mode)
    dy = torch.randn_like(expected)
    y.backward(dy)
    expected.backward(dy)
    assert torch.equal(y, expected)
    assert torch.equal(ours.grad, torchs.grad)
    assert torch.equal(max_pool2d(x, kernel, stride, padding, ceil_mode=ceil_mode), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_types_and_layouts(dtype: torch.dtype):
    x = with_ties(dtype).to(memory_format=torch.channels_last).requires_grad_()
    (gradient,) = torch.autograd.grad(max_pool2d(x, 3, 2, 1).sum(), x)
    y = F.max_pool2d(x, 3, 2, 1)
    assert torch.equal(max_pool2d(x, 3, 2, 1), y)
    assert torch.equal(gradient, torch.autograd.grad(y.sum(), x)[0])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_gradient_can_be_differentiated(layout: torch.memory_format):
    results = []
    for pool in (max_pool2d, F.max_pool2d):
        x = with_ties()[1:].contiguous(memory_format=layout).requires_grad_()
        y = pool(x, 3, 2, 1)
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), x)
        results.append((gradient.detach(), second))
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=0)


def test_some_of_the_channels_of_a_larger_tensor():
    whole = with_ties()[1:].repeat(1, 4, 1, 1).contiguous(memory_format=torch.channels_last)
    half = whole.chunk(2, 1)[1].detach().requires_grad_()
    y, expected = max_pool2d(half, 2), F.max_pool2d(half, 2)
    assert torch.equal(y, expected)
    assert y.stride() == expected.stride()


def test_no_sample():
    x = torch.randn(0, 3, 8, 8, requires_grad=True)
    y = max_pool2d(x, 2)
    y.sum().backward()
    assert y.shape == (0, 3, 4, 4)
    assert x.grad is not None
    assert x.grad.shape == x.shape


def test_nan_and_infinity_reach_the_output():
    x = with_ties()
    x[1, 0, 4, 4], x[2, 1, 5, 5] = torch.nan, torch.inf
    assert torch.equal(max_pool2d(x, 3, 1, 1).isnan(), F.max_pool2d(x, 3, 1, 1).isnan())
    assert torch.equal(max_pool2d(x[2:], 3, 1, 1), F.max_pool2d(x[2:], 3, 1, 1))


@pytest.mark.parametrize(
    "arguments", [(17,), ((2, 17), 1), (2, 2, 0, 2)], ids=["a long window", "a wide window", "dilated"]
)
def test_what_a_byte_cannot_say_is_left_to_torch(arguments):
    x = torch.randn(2, 3, 20, 20, requires_grad=True)
    y = max_pool2d(x, *arguments)
    assert torch.equal(y, F.max_pool2d(x, *arguments))
    assert "MaxPool2DWithIndices" in type(y.grad_fn).__name__


def test_a_graph_is_written_with_torchs_operator():
    with whole_batch():
        y = max_pool2d(torch.randn(2, 3, 8, 8, requires_grad=True), 2)
    assert "MaxPool2DWithIndices" in type(y.grad_fn).__name__


@pytest.mark.parametrize("arguments", [(3, 1, 2), (9,), (2, 0)], ids=["padding", "larger than the image", "stride 0"])
def test_errors_are_torchs(arguments):
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    with pytest.raises(RuntimeError) as torchs:
        F.max_pool2d(x, *arguments)
    with pytest.raises(RuntimeError) as ours:
        max_pool2d(x, *arguments)
    assert str(ours.value) == str(torchs.value)


def kept_bytes(x: Tensor, module: nn.Module) -> int:
    """What autograd saves when ``module`` runs on ``x`` as a stored block."""
    kept: list[Tensor] = []
    with (
        lean_operators_in(module),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        module(x)
    return sum(t.nbytes for t in kept)


def test_a_byte_is_kept_for_each_output():
    x = torch.randn(2, 4, 8, 8, requires_grad=True) * 1.0
    assert kept_bytes(x, nn.MaxPool2d(2)) == x.numel() // 4
    assert kept_bytes(x, nn.Sequential(nn.Tanh(), nn.MaxPool2d(3, 1, 1))) == x.nbytes + x.numel()
    assert kept_bytes(x.contiguous(memory_format=torch.channels_last), nn.MaxPool2d(2)) == x.numel() // 4


def test_indices_that_are_asked_for_are_torchs():
    pool, x = nn.MaxPool2d(2, return_indices=True), torch.randn(2, 4, 8, 8)
    with lean_operators_in(pool):
        y, index = pool(x)
    assert torch.equal(y, F.max_pool2d(x, 2))
    assert index.dtype == torch.int64


class Branches(nn.Module):
    """Two branches side by side, as in an Inception module."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(channels, channels, 1), nn.ReLU(inplace=True))
        self.plain = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.pooled(x), self.plain(x)], 1)


def pooling_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(Branches(4), Branches(8), nn.MaxPool2d(3, 2, ceil_mode=True)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)),
    )


@pytest.mark.parametrize("mode", ["keep_all", "selective", "recompute", "budget"])
def test_a_planned_step_is_that_of_plain_autograd(mode: str):
    plain, model = pooling_network().double(), pooling_network().double()
    x = torch.randn(6, 3, 16, 16, dtype=torch.float64)
    shape = {"input_shape": (3, 16, 16), "batch_size": 6}
    if mode == "budget":
        planner = Planner(model, **shape)
        plan = planner.fitting(planner.needed()[0])
        assert plan is not None
    else:
        plan = edgetrain.uniform_plan(model, mode, **shape)
    plain(x).square().sum().backward()
    edgetrain.wrap(model, plan)(x).square().sum().backward()
    for ours, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-10, atol=1e-12)


def test_the_prediction_of_a_step_knows_it():
    model = pooling_network()
    plan = edgetrain.uniform_plan(model, "keep_all", input_shape=(3, 32, 32), batch_size=16)
    costs = measure_costs(model, input_shape=(3, 32, 32), batch_size=16, optimizer=None)
    net, x = edgetrain.wrap(model, plan), torch.randn(16, 3, 32, 32)

    def step(run: nn.Module) -> int:
        def one() -> None:
            F.cross_entropy(run(x), torch.zeros(16, dtype=torch.long)).backward()
            run.zero_grad(set_to_none=True)

        one()
        return measure_peak(one).allocator_peak_bytes

    ours, plain = step(net), step(model)
    predicted = simulate(plan.program, costs).peak_bytes - costs.weight_bytes - x.nbytes
    assert predicted == pytest.approx(ours, rel=0.01)
    assert ours < 0.9 * plain
