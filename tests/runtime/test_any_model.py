"""Networks that are no Sequential, cut and trained in every mode, against plain autograd in float64."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, TwoBranches, conv
from torch import Tensor, nn

import edgetrain
from edgetrain.chain import Chain, chain_of
from edgetrain.errors import ModelError

BOUND = 1e-10
SHAPE = (3, 3, 8, 8)


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name][0]().double()


def step(net: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(7)
    loss = F.cross_entropy(net(x), torch.arange(x.shape[0]) % 10)
    loss.backward()
    return loss.detach()


def assert_same_step(model: nn.Module, mode: Any, shape: tuple[int, ...] = SHAPE, steps: int = 2) -> None:
    """``steps`` steps of the wrapped model and of a copy under plain autograd, from the same numbers."""
    plain = copy.deepcopy(model)
    before = describe(model)
    net = edgetrain.wrap(
        model,
        edgetrain.uniform_plan(model, mode, input_shape=shape[1:], batch_size=shape[0]),  # type: ignore[arg-type]
    )
    for seed in range(steps):
        torch.manual_seed(seed)
        x = torch.randn(shape, dtype=torch.double)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        actual, expected = step(net, a), step(plain, b)
        assert abs(actual - expected) <= BOUND * abs(expected)
        assert_close("input", a.grad, b.grad, 0.0)
    assert_gradients(model, plain)
    for (name, c), d in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(c, d, rtol=BOUND, atol=1e-12, msg=name)
    assert describe(model) == before, "nothing stays attached to the model"


def assert_gradients(model: nn.Module, plain: nn.Module) -> None:
    # a gradient that is zero but for round-off (a bias in front of a batch norm) is measured against the largest
    largest = max(float(p.grad.norm()) for p in plain.parameters() if p.grad is not None)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            assert_close(name, p.grad, q.grad, 1e-4 * largest)


def assert_close(name: str, a: Tensor | None, b: Tensor | None, floor: float) -> None:
    assert a is not None
    assert b is not None
    error = float((a - b).norm()) / max(float(b.norm()), floor)
    assert error < BOUND, f"{name}: {error:.1e}"


def describe(model: nn.Module) -> Any:
    return [
        (path, type(m), sorted(m.__dict__), list(m._modules), list(m._parameters), list(m._buffers), m.training)
        for path, m in model.named_modules()
    ]


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks(name: str) -> None:
    model = network(name)
    chain = chain_of(model)
    expected = NETWORKS[name][1]
    assert not expected or [block.name for block in chain.blocks] == expected
    owned = {id(p) for p in model.parameters()}
    held = {id(p) for block in chain.blocks for p in block.module.parameters()}
    assert held == owned
    assert chain.shapes(SHAPE)[-1] == (3, 10)
    for training in (True, False):
        model.train(training)
        for shape in (SHAPE, (5, 3, 8, 8)):
            x = torch.randn(shape, dtype=torch.double)
            state = copy.deepcopy(model.state_dict())
            torch.manual_seed(3)
            expected_output = model(x.clone())
            model.load_state_dict(state)
            torch.manual_seed(3)
            torch.testing.assert_close(run(chain, x), expected_output, rtol=0, atol=0)


def run(chain: Chain, x: Tensor) -> Tensor:
    for block in chain.blocks:
        x = block.module(x)
    return x


@pytest.mark.parametrize("mode", ["keep_all", "selective", "recompute"])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients(name: str, mode: str) -> None:
    assert_same_step(network(name), mode)


@pytest.mark.parametrize("mode", ["invert", "invert_selective", "invert_layerwise"])
def test_inversion_inside_a_forward_of_ones_own(mode: str) -> None:
    model = network("reversible")
    plan = edgetrain.uniform_plan(model, mode, input_shape=SHAPE[1:], batch_size=SHAPE[0])  # type: ignore[arg-type]
    assert plan.modes[1] == plan.modes[2] == ("invert" if mode == "invert_layerwise" else mode)
    assert_same_step(model, mode)


@pytest.mark.parametrize("name", ["residual", "training branch", "two branches"])
def test_a_frozen_network(name: str) -> None:
    """Evaluation mode with gradients, planned in training mode."""
    for mode in ("selective", "recompute"):
        assert_same_step(network(name).eval(), mode)


def test_a_mode_that_changes_after_wrapping() -> None:
    model = network("training branch")
    net = edgetrain.wrap(model, edgetrain.uniform_plan(model, "recompute", input_shape=SHAPE[1:], batch_size=3))
    plain = copy.deepcopy(model)
    x = torch.randn(SHAPE, dtype=torch.double)
    for training in (True, False, True):
        net.train(training)
        plain.train(training)
        assert torch.equal(step(net, x), step(plain, x))
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["windows", "two branches"])
def test_sizes_of_two_forward_passes_before_their_backward_passes(name: str) -> None:
    model = network(name)
    plain = copy.deepcopy(model)
    net = edgetrain.wrap(model, edgetrain.uniform_plan(model, "recompute", input_shape=SHAPE[1:], batch_size=3))
    a, b = torch.randn(3, 3, 8, 8, dtype=torch.double), torch.randn(5, 3, 8, 8, dtype=torch.double)
    (net(a).sum() - net(b).square().sum()).backward()
    (plain(a).sum() - plain(b).square().sum()).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-11)


def test_tied_weights_are_updated_once() -> None:
    model = network("tied")
    plain = copy.deepcopy(model)
    plan = edgetrain.uniform_plan(
        model, "recompute", input_shape=SHAPE[1:], batch_size=SHAPE[0], update_in_backward=True
    )
    net = edgetrain.wrap(model, plan, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    x = torch.randn(SHAPE, dtype=torch.double)
    step(net, x)
    step(plain, x)
    optimizer.step()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12, msg=name)


def test_wrapped_networks_are_copied_and_models_are_pickled() -> None:
    model = network("two branches")
    plan = edgetrain.uniform_plan(model, "recompute", input_shape=SHAPE[1:], batch_size=SHAPE[0])
    net = edgetrain.wrap(model, plan)
    x = torch.randn(SHAPE, dtype=torch.double)
    twin = copy.deepcopy(net)
    assert torch.equal(step(net, x), step(twin, x))
    for p, q in zip(model.parameters(), twin.model.parameters(), strict=True):
        assert p is not q
        assert torch.equal(p.grad, q.grad)  # type: ignore[arg-type]
    again = pickle.loads(pickle.dumps(model))
    assert list(again.state_dict()) == list(model.state_dict())


def test_a_model_moved_after_wrapping() -> None:
    """``double()`` replaces buffers; a block sees what the model holds."""
    torch.manual_seed(0)
    model = TwoBranches()
    net = edgetrain.wrap(model, edgetrain.uniform_plan(model, "recompute", input_shape=SHAPE[1:], batch_size=3))
    net.double()
    x = torch.randn(SHAPE, dtype=torch.double)
    assert torch.equal(step(net, x), step(copy.deepcopy(model), x))


def test_a_block_that_overwrites_the_batch_is_stored_and_one_that_hides_it_is_found() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = conv(3, 8), nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(F.leaky_relu_(x, 0.5)).mean((2, 3)))

    plan = edgetrain.uniform_plan(First(), "recompute", input_shape=SHAPE[1:], batch_size=3)
    assert plan.modes[0] == "store"
    assert "overwrites its input" in plan.reasons[0]

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(F.leaky_relu_(x, 0.5) if float(x.detach().mean()) > -9 else x)

    model = nn.Sequential(conv(3, 8), Hidden(), conv(8, 8))
    net = edgetrain.wrap(model, edgetrain.uniform_plan(model, "recompute", input_shape=SHAPE[1:], batch_size=3))
    with pytest.raises(ModelError, match="overwrites its input"):
        net(torch.randn(SHAPE))


def test_random_modes() -> None:
    from edgetrain.chain import MODES
    from edgetrain.planner import Plan, schedule

    for seed, name in enumerate(NETWORKS):
        model = network(name)
        plain, draw, chain = copy.deepcopy(model), random.Random(seed), chain_of(model)
        modes = [draw.choice([m for m in MODES if block.allows(m)]) for block in chain.blocks]
        program = schedule([block.name for block in chain.blocks], chain.shapes(SHAPE), modes)
        net = edgetrain.wrap(model, Plan(tuple(modes), ("",) * len(modes), program))
        x = torch.randn(SHAPE, dtype=torch.double)
        assert abs(step(net, x) - step(plain, x)) < BOUND
        assert_gradients(model, plain)


SMALL_IMAGES: dict[str, dict[str, Any]] = {"vit_small_patch16_224": {"img_size": 32, "depth": 3}}


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "vit_small_patch16_224"])
def test_networks_of_timm(name: str) -> None:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    import timm_networks

    torch.manual_seed(0)
    options = {"drop_rate": 0.1, "num_classes": 10, **SMALL_IMAGES.get(name, {})}
    model = timm_networks.create(name, **options).double()
    assert len(chain_of(model).blocks) >= 8
    assert_same_step(model, "recompute", (2, 3, 32, 32), steps=1)
