"""Plans that may leave no noise: what is inverted comes back bit for bit, so a run is the one that keeps everything."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgetrain import wrap
from edgetrain.chain import measure_noise
from edgetrain.memory.rates import INSTRUCTION_SECONDS, START_SECONDS, OperatorRates
from edgetrain.models import create_model
from edgetrain.nn import ReversibleBlock
from edgetrain.planner import Plan, Planner

SHAPE, BATCH = (3, 32, 32), 8
RATES = OperatorRates({1: 1e10}, 1e10, 5e9, START_SECONDS["cpu"], INSTRUCTION_SECONDS, "made up")


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return create_model(name, **({} if name.startswith("revnet") else {"width": 8}))


def plans(model: nn.Module, *, snr_limit: float) -> list[Plan]:
    """At shares of what keeping everything takes, from the leanest that there is."""
    noise = measure_noise(model, torch.randn(BATCH, *SHAPE))
    planner = Planner(model, input_shape=SHAPE, batch_size=BATCH, snr_limit=snr_limit, times=RATES, noise=noise)
    least, most = planner.least().peak_bytes, planner.front()[-1].peak_bytes
    return [planner.plan(round(least + share * (most - least))) for share in (0.0, 0.2, 0.5)]


def step(model: nn.Module, plan: Plan | None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Loss, gradients and running statistics of one step; ``plan`` None: by plain autograd."""
    torch.manual_seed(1)
    net = copy.deepcopy(model).to(dtype)
    x, labels = torch.randn(BATCH, *SHAPE).to(dtype), torch.randint(0, 10, (BATCH,))
    loss = F.cross_entropy((net if plan is None else wrap(net, plan))(x), labels)
    loss.backward()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    return [loss.detach(), *gradients, *(buffer.clone() for buffer in net.buffers())]


@pytest.mark.parametrize("name", ["hybrid18-exact", "revnet18-exact", "irevnet18-exact"])
def test_exact_blocks_are_inverted_and_a_step_has_the_bits_of_plain_autograd(name: str) -> None:
    model = network(name)
    expected, found = step(model, None), plans(model, snr_limit=math.inf)
    for plan in found:
        assert set(plan.snrs) == {math.inf}
        assert all(torch.equal(one, other) for one, other in zip(step(model, plan), expected, strict=True))
    stages = [i for i, block in enumerate(found[0].program.names) if block.startswith("stage")]
    assert any(found[0].modes[i].startswith("invert") for i in stages)


def test_a_batch_is_not_split_where_no_layer_mixes_samples() -> None:
    """Gradients of parts are added in another order than those of the batch."""

    def branch() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU())

    torch.manual_seed(0)
    blocks = [ReversibleBlock(branch(), branch(), exact=True) for _ in range(3)]
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    )
    for plan in plans(model, snr_limit=math.inf):
        assert plan.micro_batches == 1
    assert plans(model, snr_limit=1e4)[0].micro_batches > 1


def test_a_residual_that_is_zero_for_now_does_not_pass_for_exact() -> None:
    def branch() -> nn.Module:
        norm = nn.BatchNorm2d(4)
        nn.init.zeros_(norm.weight)
        return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), norm)

    blocks = [ReversibleBlock(branch(), branch()) for _ in range(2)]
    noise = measure_noise(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *blocks), torch.randn(BATCH, *SHAPE))
    assert all("invert" in ways for ways in noise.forbidden(math.inf)[1:])
    assert not any(noise.forbidden(1e30))


def test_other_blocks_are_not_inverted_and_the_plan_says_what_noise_they_would_leave() -> None:
    """Their passes in place differ from those of autograd by round-off: in float64 any plan keeps to 1e-10."""
    model = network("hybrid18")
    expected = step(model, None, torch.float64)
    for plan in plans(model, snr_limit=math.inf):
        stages = [i for i, block in enumerate(plan.program.names) if block.startswith("stage")]
        assert not any(plan.modes[i].startswith("invert") for i in stages)
        told = {other.name: other.reason for other in plan.rejected[stages[0]]}
        assert "signal-to-noise ratio" in told["invert"]
        assert "signal-to-noise ratio" in told["invert_layerwise"]
        for one, other in zip(step(model, plan, torch.float64), expected, strict=True):
            assert float((one - other).abs().max()) <= 1e-10 * float(other.abs().max().clamp_min(1e-12))


def test_a_block_whose_hidden_layers_are_too_noisy_one_by_one_is_inverted_as_a_whole() -> None:
    model = network("hybrid18-exact")
    noise = measure_noise(model, torch.randn(BATCH, *SHAPE))
    limit = 2 / max(block.hidden_own for block in noise.blocks if block is not None)
    forbidden = noise.forbidden(limit)
    assert any("invert_layerwise" in ways and "invert" not in ways for ways in forbidden)
    found = plans(model, snr_limit=limit)
    for plan in found:
        assert min(plan.snrs) >= limit
        assert not any(mode in ways for mode, ways in zip(plan.modes, forbidden, strict=True))
    assert any(
        "invert_layerwise" in ways and mode == "invert" for mode, ways in zip(found[0].modes, forbidden, strict=True)
    )
