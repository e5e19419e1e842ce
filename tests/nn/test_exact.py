"""Exact reversible blocks: the same bits back, through any number of them, and the gradients of plain autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import edgetrain
from edgetrain.errors import ModelError, TrainingError
from edgetrain.nn import HybridBlock, InvertibleSequential, ReversibleBlock
from edgetrain.nn.grid import grid_of
from edgetrain.nn.noise import snr

BATCH = 37  # float32 convolutions of the last samples of a slice have other bits than those of full slices


def stateful(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.Dropout(0.2),
    )


BLOCKS: dict[str, Callable[[], ReversibleBlock]] = {
    "modules": lambda: ReversibleBlock(stateful(8), stateful(8), exact=True),
    "hybrid": lambda: HybridBlock(16, exact=True),
    "one module invertible": lambda: ReversibleBlock(stateful(8), HybridBlock(8), exact=True),
}


@pytest.fixture(params=BLOCKS)
def block(request: pytest.FixtureRequest) -> ReversibleBlock:
    torch.manual_seed(0)
    return BLOCKS[request.param]()


def on_grid(x: Tensor) -> Tensor:
    return grid_of(x.dtype).round(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_hundred_blocks_give_the_same_bits_back(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network = InvertibleSequential(**{f"block{k}": BLOCKS[name]() for k in range(100)}).to(dtype)
    x = torch.randn(3, 16, 4, 4, dtype=dtype)
    y = network.forward_(x.clone())
    back = network.inverse(y)
    assert torch.equal(back, on_grid(x))
    assert snr(on_grid(x), back) == float("inf")
    assert torch.equal(network.backward_from_output(y, torch.randn_like(y) / 100)[0], on_grid(x))


@pytest.mark.parametrize("size", [6, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_way_has_the_same_bits(block: ReversibleBlock, dtype: torch.dtype, size: int) -> None:
    """Size 32 takes several slices of the batch, the last one not full."""
    block = block.to(dtype)
    plain, layerwise, holding = block, copy.deepcopy(block), copy.deepcopy(block)
    x = torch.randn(BATCH, 16, size, size, dtype=dtype)
    torch.manual_seed(1)
    expected = plain(x.clone().requires_grad_())
    for other, method in ((layerwise, "backward_from_output"), (holding, "backward_holding")):
        torch.manual_seed(1)
        y = other.forward_(x.clone())
        assert torch.equal(y, expected.detach())
        assert torch.equal(getattr(other, method)(y, torch.randn_like(y))[0], on_grid(x))


@pytest.mark.parametrize("method", ["backward_from_output", "backward_holding"])
def test_gradients_are_those_of_plain_autograd_of_the_rounding_network(block: ReversibleBlock, method: str) -> None:
    network = nn.Sequential(block, *[copy.deepcopy(block) for _ in range(3)]).double()
    plain = copy.deepcopy(network)
    x, dy = torch.randn(2, 5, 16, 6, 6, dtype=torch.double)
    leaf = x.clone().requires_grad_()
    torch.manual_seed(1)
    plain(leaf).backward(dy)
    torch.manual_seed(1)
    y, gradient = x.clone(), dy.clone()
    for layer in network:
        y = layer.forward_(y)
    for layer in reversed(network):
        y, gradient = getattr(layer, method)(y, gradient)
    assert torch.equal(y, on_grid(x))
    assert leaf.grad is not None
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-10, atol=1e-10)
    for (name, p), q in zip(network.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-10, msg=name)
    for (name, b), c in zip(network.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(b, c, rtol=1e-12, atol=1e-14, msg=name)


def test_noise_below_half_a_step_is_removed(block: ReversibleBlock) -> None:
    x = torch.randn(5, 16, 6, 6)
    y = block.forward_(x.clone())
    noisy = y + 0.4 * 2.0**-12 * (2 * torch.rand_like(y) - 1)
    assert torch.equal(block.inverse(noisy), on_grid(x))


def test_a_stream_beyond_the_grid_ends_the_run(block: ReversibleBlock) -> None:
    x = torch.randn(2, 16, 4, 4)
    x[1, 3, 0, 0] = 5000.0
    with pytest.raises(TrainingError, match=r"and \d{4}.*expected values within 4096"):
        block.forward_(x)
    x[1, 3, 0, 0] = float("nan")
    with pytest.raises(TrainingError, match="nan"):
        block.forward_(x)


def test_types_without_the_bits_are_refused() -> None:
    with pytest.raises(ModelError, match=r"bfloat16.*train in float32"):
        HybridBlock(8, exact=True).bfloat16().forward_(torch.randn(1, 8, 4, 4).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sum_at_the_ends_of_the_grid(dtype: torch.dtype) -> None:
    """Exactness at the limit: the next step is not a float any more."""
    grid = grid_of(dtype)
    step, limit = torch.tensor(2.0**-grid.bits, dtype=dtype), torch.tensor(grid.limit, dtype=dtype)
    x = limit - step
    assert x != limit
    assert (x + step) - step == x
    assert limit + step == limit
    assert torch.equal(grid.round(2.5 * step), 2 * step), "ties go to the even multiple"


@pytest.mark.parametrize("name", ["hybrid18", "irevnet18", "revnet18"])
def test_models_train_in_every_mode_with_the_same_loss(name: str) -> None:
    """float32: the modes agree on the logits to the bit, because the blocks do and the rest is stored."""
    torch.manual_seed(0)
    options = {"widths": (8, 16, 32, 32)} if name == "revnet18" else {"width": 8}
    model = edgetrain.create_model(name, exact=True, **options)
    x = torch.randn(4, 3, 16, 16)
    stages = {}
    for mode in ("keep_all", "invert", "invert_selective", "invert_layerwise"):
        copied = copy.deepcopy(model)
        plan = edgetrain.uniform_plan(copied, mode, input_shape=(3, 16, 16), batch_size=4)
        edgetrain.wrap(copied, plan)(x).square().sum().backward()
        stages[mode] = {n: p.grad for n, p in copied.named_parameters()}
    for mode in ("invert", "invert_selective", "invert_layerwise"):
        for n, gradient in stages[mode].items():
            error = float((gradient - stages["keep_all"][n]).norm() / stages["keep_all"][n].norm())  # type: ignore[operator,union-attr]
            assert error < 1e-3, f"{mode} {n}: {error:.1e}"
