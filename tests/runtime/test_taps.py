"""Attention taps in every mode against plain autograd on activations that hooks catch, in float64."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edgetrain
from edgetrain.chain import MODES, Tapped, chain_of, groups_of
from edgetrain.nn import BatchPool
from edgetrain.nn.attention import AttentionTap, Mapping, attention_map, normalised_maps
from edgetrain.planner import Plan, schedule

BOUND = 1e-10
SHAPE = (3, 3, 16, 16)
BETA = 1e3
SMALL: dict[str, dict[str, Any]] = {
    "resnet20": {"width": 4},
    "revnet18": {"widths": (8, 16, 32, 32)},
    "hybrid18": {"width": 4},
    "wrn-16-1": {"width": 4},
}


def tapped(name: str, *, mapping: Mapping = "sum", power: int = 2) -> Tapped:
    torch.manual_seed(0)
    model = edgetrain.create_model(name, **SMALL[name]).double()
    return Tapped(model, groups_of(chain_of(model), SHAPE[1:]), mapping=mapping, power=power)


def batch(model: Tapped) -> tuple[Tensor, Tensor, list[Tensor]]:
    torch.manual_seed(1)
    targets = [
        F.normalize(torch.rand(SHAPE[0], g.size[0] * g.size[1], dtype=torch.double), dim=1) for g in model.groups
    ]
    return torch.randn(SHAPE, dtype=torch.double), torch.randint(0, 10, SHAPE[:1]), targets


def expected_loss(model: Tapped, x: Tensor, labels: Tensor, targets: list[Tensor]) -> Tensor:
    """(6.1) written down again, on the blocks' outputs, without a tap."""
    blocks = [block.module for block in chain_of(model.model).blocks]
    loss, z, number = torch.zeros((), dtype=torch.double), x, 0
    for i, block in enumerate(blocks):
        z = block(z)
        if number < len(targets) and i == model.groups[number].last:
            tap = model.taps[number]
            assert isinstance(tap, AttentionTap)
            powers = z.abs() ** tap.power
            q = powers.sum(1) if tap.mapping == "sum" else powers.amax(1)
            for _ in range(model.groups[number].poolings):
                q = BatchPool().permute_back(q[:, None])[:, 0]
            q = q.flatten(1)
            beta = BETA / (q.shape[1] * len(x))
            loss = loss + beta / 2 * (q / q.norm(dim=1, keepdim=True) - targets[number]).norm(dim=1).sum()
            number += 1
    assert number == len(targets)
    return loss + F.cross_entropy(z, labels)


def assert_same_step(model: Tapped, plan: Plan | None) -> None:
    plain = copy.deepcopy(model)
    x, labels, targets = batch(model)
    expected = expected_loss(plain, x, labels, targets)
    expected.backward()
    net = model.train() if plan is None else edgetrain.wrap(model, plan)
    model.aim(targets)
    logits = net(x)
    loss = F.cross_entropy(logits, labels) + BETA * model.take_terms()
    loss.backward()
    assert abs(float(loss.detach() - expected.detach())) <= BOUND * abs(float(expected.detach()))
    largest = max(float(q.grad.norm()) for q in plain.parameters() if q.grad is not None)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert p.grad is not None, name
        assert q.grad is not None, name
        assert float((p.grad - q.grad).norm()) < BOUND * max(float(q.grad.norm()), 1e-4 * largest), name
    for (name, b), c in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(b, c[1], rtol=BOUND, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    "mode", [None, "keep_all", "selective", "recompute", "invert", "invert_selective", "invert_layerwise"]
)
@pytest.mark.parametrize("name", SMALL)
def test_every_mode_gives_the_gradients_and_statistics_of_plain_autograd(name: str, mode: Any) -> None:
    model = tapped(name)
    plan = mode and edgetrain.uniform_plan(model, mode, input_shape=SHAPE[1:], batch_size=SHAPE[0])
    assert_same_step(model, plan)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", SMALL)
def test_so_do_mixed_modes(name: str, seed: int) -> None:
    model, draw = tapped(name), random.Random(seed)
    blocks = chain_of(model).blocks
    modes = [draw.choice([mode for mode in MODES if block.allows(mode)]) for block in blocks]
    program = schedule([block.name for block in blocks], chain_of(model).shapes(SHAPE), modes)
    assert_same_step(model, Plan(tuple(modes), ("",) * len(modes), program))


@pytest.mark.parametrize("mode", ["keep_all", "recompute", "invert_layerwise"])
@pytest.mark.parametrize(("mapping", "power"), [("sum", 1), ("sum", 4), ("max", 1), ("max", 2)])
def test_other_maps(mapping: Mapping, power: int, mode: Any) -> None:
    model = tapped("hybrid18", mapping=mapping, power=power)
    assert_same_step(model, edgetrain.uniform_plan(model, mode, input_shape=SHAPE[1:], batch_size=SHAPE[0]))


def test_groups_end_where_the_resolution_falls() -> None:
    model = edgetrain.create_model("resnet20")
    blocks = chain_of(model).blocks
    groups = groups_of(chain_of(model), (3, 32, 32))
    assert [(blocks[g.last].name, g.size) for g in groups] == [
        ("stage1.2", (32, 32)),
        ("stage2.2", (16, 16)),
        ("stage3.2", (8, 8)),
    ]


def test_batch_pooled_positions_are_put_back_into_their_map() -> None:
    x = torch.randn(2, 5, 8, 8)
    pooled = BatchPool()(BatchPool()(x))
    torch.testing.assert_close(attention_map(pooled, poolings=2), x.square().sum(1))


def test_a_target_is_interpolated_and_has_length_one() -> None:
    target = normalised_maps(torch.rand(2, 8, 8), (4, 4))
    torch.testing.assert_close(target.norm(dim=1), torch.ones(2))
    assert target.shape == (2, 16)


def test_what_equals_its_target_has_no_gradient_and_no_nan() -> None:
    tap = AttentionTap().train()
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    tap.target = F.normalize(attention_map(x.detach()).flatten(1))
    tap(x).sum().backward(retain_graph=True)
    assert tap.term is not None
    assert float(tap.term.detach()) == pytest.approx(0, abs=1e-6)
    dead = torch.zeros(2, 3, 4, 4, requires_grad=True)
    tap(dead)
    tap.term.backward()
    assert dead.grad is not None
    assert torch.isfinite(dead.grad).all()


def test_in_evaluation_it_is_the_network_itself() -> None:
    model = tapped("hybrid18").eval()
    x, _, _ = batch(model)
    assert torch.equal(model(x), model.model(x))


def test_terms_are_taken_once() -> None:
    model = tapped("resnet20")
    with pytest.raises(edgetrain.errors.ModelError, match="without a term"):
        model.take_terms()


def test_planner_knows_that_a_tap_before_an_ordinary_block_is_not_inverted() -> None:
    taps = [block for block in chain_of(tapped("resnet20")).blocks if isinstance(block.module, nn.Module)]
    refusing = [block for block in taps if isinstance(block.module, AttentionTap)]
    assert all("invert" in block.refusals for block in refusing)
    free = [block for block in chain_of(tapped("hybrid18")).blocks if isinstance(block.module, AttentionTap)]
    assert any(block.allows("invert_layerwise") for block in free)
