"""Predicted noise against real inversion, the arithmetic of runs, and that measuring leaves no trace."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import edgetrain
from edgetrain.chain import BFLOAT16_NSR, BlockNoise, Noise, Way, chain_of, measure_noise
from edgetrain.errors import UsageError
from edgetrain.nn import CouplingLayer, HybridBlock, Invertible, InvertibleSequential, ReversibleBlock
from edgetrain.nn.noise import alpha_batch_norm, alpha_leaky_relu, nsr, retrace, snr
from edgetrain.runtime.offload import offload

WAYS: tuple[Way, Way] = ("invert", "invert_layerwise")


def layerwise(depth: int, slope: float) -> nn.Sequential:
    return nn.Sequential(*[CouplingLayer(32, slope=slope) for _ in range(depth)])


def hybrid(depth: int, slope: float) -> nn.Sequential:
    return nn.Sequential(*[HybridBlock(32, slope=slope) for _ in range(depth)])


@torch.no_grad()
def forward(model: nn.Module, x: Tensor) -> tuple[list[nn.Module], list[Tensor]]:
    blocks, z = [block.module for block in chain_of(model).blocks], [x]
    for block in blocks:
        z.append(block.forward_(z[-1].clone()) if isinstance(block, Invertible) else block(z[-1]))
    return blocks, z


@torch.no_grad()
def deviations(model: nn.Module, noise: Noise, x: Tensor, way: Way, *, rounded: bool = False) -> list[float]:
    """log10(predicted SNR / SNR of really inverting) of every run of blocks, while the latter is above 10.

    Args:
        rounded: runs start from what is left after bfloat16.
    """
    blocks, z = forward(model, x)
    found = []
    for last, block in enumerate(noise.blocks):
        if block is None:
            continue
        y, real = z[last + 1].clone(), math.inf
        if rounded:
            y = offload(y, "bfloat16").fetch()
        runs = noise.run_snrs(last, way=way, output_nsr=BFLOAT16_NSR if rounded else 0.0)
        for k, predicted in enumerate(runs):
            module, true_input = blocks[last - k], z[last - k]
            assert isinstance(module, Invertible)
            y, hidden = retrace(module, true_input, y)
            real = min(real, snr(true_input, y))
            if way == "invert_layerwise" and max(hidden, default=0.0) > 0:
                real = min(real, 1 / max(hidden))
            if real < 10:
                break
            if real < math.inf:
                found.append(math.log10(predicted / real))
    return found


def assert_predicts(found: list[float], *, lowest: float = -0.5) -> None:
    print(f"log10(predicted/measured) of {len(found)} runs: {min(found):+.2f} to {max(found):+.2f}")
    assert found
    assert min(found) > lowest
    assert max(found) < math.log10(2)


@pytest.mark.parametrize("slope", [0.4, 0.2, 0.1, 0.05])
@pytest.mark.parametrize("family", [layerwise, hybrid])
def test_predicts_every_run_of_fresh_networks(family: Callable[[int, float], nn.Sequential], slope: float) -> None:
    for depth in (3, 7, 12):
        torch.manual_seed(depth)
        model, x = family(depth, slope), torch.randn(16, 32, 8, 8)
        noise = measure_noise(model, x)
        for way in WAYS:
            assert_predicts(deviations(model, noise, x, way))


@pytest.mark.parametrize("slope", [0.4, 0.2, 0.1])
@pytest.mark.parametrize("family", [layerwise, hybrid])
def test_predicts_every_run_from_bfloat16(family: Callable[[int, float], nn.Sequential], slope: float) -> None:
    """To the safe side where slopes are small: small values, whose noise is amplified, are rounded by little."""
    for depth in (3, 7):
        torch.manual_seed(depth)
        model, x = family(depth, slope), torch.randn(16, 32, 8, 8)
        noise = measure_noise(model, x)
        for way in WAYS:
            found = deviations(model, noise, x, way, rounded=True)
            assert_predicts(found, lowest=-0.8 if family is hybrid else -2.5)


def test_a_run_from_bfloat16_is_shorter_and_says_so() -> None:
    block = BlockNoise(gain=4.0, own=1e-14, rounding=1e-13, hidden_gain=2.0, hidden_own=1e-13)
    noise = Noise((None, *(block,) * 6), torch.float32, "made up")
    limit = 1e4  # NSR 1 / (3 * 2^16) grows fourfold in each block: 1e-4 lies between the second and the third
    assert noise.longest_runs(limit, way="invert", output_nsr=BFLOAT16_NSR) == (1, 1, 1, 2, 3, 4, 5)
    assert noise.longest_runs(limit, way="invert") == (1,) * 7
    expected = [BFLOAT16_NSR * 4.0**k for k in (1, 2)]
    snrs = noise.snrs(["store", *["recompute"] * 4, "invert", "invert"], rounded={0, 3, 6})
    assert [1 / snr for snr in snrs[5:][::-1]] == pytest.approx(expected)
    assert [1 / snr for snr in (snrs[0], snrs[3])] == pytest.approx([BFLOAT16_NSR] * 2)
    assert snrs[1] == snrs[2] == snrs[4] == math.inf


@pytest.mark.parametrize("name", ["layerwise18", "hybrid18", "revnet18", "irevnet18"])
@pytest.mark.parametrize("training", [True, False])
def test_predicts_every_run_of_networks_after_some_steps(name: str, training: bool) -> None:
    torch.manual_seed(0)
    width = {"widths": (8, 16, 32, 32)} if name == "revnet18" else {"width": 8}
    model = edgetrain.create_model(name, **width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    labels = torch.arange(16) % 10
    x = torch.randn(16, 3, 16, 16) + torch.randn(10, 3, 16, 16)[labels]
    for _ in range(10):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    model.train(training)
    noise = measure_noise(model, x)
    for way in WAYS:
        assert_predicts(deviations(model, noise, x, way), lowest=-1.0)


def test_exact_blocks_have_no_noise_of_their_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[HybridBlock(32, exact=True) for _ in range(4)])
    noise = measure_noise(model, torch.randn(8, 32, 8, 8))
    first, *others = noise.blocks
    # the first meets a stream off the grid and gives it back rounded: 12 / step^2 for one of standard deviation 1
    assert first is not None
    assert 1 / first.own == pytest.approx(12 / 2.0**-24, rel=0.05)
    assert all(block is not None and block.own == block.rounding == 0.0 for block in others)
    assert noise.run_snr(1, 3, way="invert") == math.inf


def test_closed_formulas_inside_a_network() -> None:
    """(3.22c) for every batch norm by its batch statistics, (3.28c) for the first activation, against white noise.

    Deeper down the signal is not symmetric around zero any more, and (3.28c) is off by half.
    """
    torch.manual_seed(0)
    model, x = layerwise(4, 0.1).double(), torch.randn(16, 32, 16, 16).double()
    _, z = forward(model, x)
    for layer, layer_input in zip(model, z[:-1], strict=True):
        assert isinstance(layer, CouplingLayer)
        u = layer.conv(layer_input).detach()
        normalised = layer.norm.forward_(u.clone(), replay=True)
        mean, std = u.mean((0, 2, 3)), u.var((0, 2, 3), correction=0).sqrt()
        gains = []
        for part, true_input, output in (
            (layer.norm, u, normalised),
            (layer.act, normalised, layer.act(normalised)),
        ):
            noisy = output + 1e-6 * torch.randn_like(output)
            gains.append(nsr(true_input, part.inverse(noisy)) / nsr(output, noisy))
        predicted = alpha_batch_norm(mean, std, layer.norm.scale().detach(), layer.norm.bias.detach())
        assert 1 / gains[0] == pytest.approx(predicted, rel=0.05)
        assert 1 / gains[1] == pytest.approx(alpha_leaky_relu(0.1), rel=0.05 if layer is model[0] else 0.5)


def test_hidden_activations_are_those_of_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """What activations give back while a hybrid block runs backward is as noisy as :func:`retrace` says."""
    torch.manual_seed(0)
    block, x = HybridBlock(16), torch.randn(4, 16, 8, 8)
    entered: list[Tensor] = []
    inverted: list[Tensor] = []
    activation = edgetrain.nn.InvertibleLeakyReLU
    plain_forward, plain_inverse = activation.forward_, activation.inverse_

    def noting_forward(self: edgetrain.nn.InvertibleLeakyReLU, z: Tensor, *, replay: bool = False) -> Tensor:
        entered.append(z.clone())
        return plain_forward(self, z, replay=replay)

    def noting_inverse(self: edgetrain.nn.InvertibleLeakyReLU, y: Tensor) -> Tensor:
        z = plain_inverse(self, y)
        inverted.append(z.clone())
        return z

    monkeypatch.setattr(activation, "forward_", noting_forward)
    monkeypatch.setattr(activation, "inverse_", noting_inverse)
    y = block.forward_(x.clone())
    noisy = y + 1e-4 * torch.randn_like(y)
    true = entered[:4]  # of f's two layers, then of g's
    block.backward_from_output(noisy.clone(), torch.randn_like(y))
    backward = [nsr(z, back) for z, back in zip(true[::-1], inverted, strict=True)]
    # per module retrace walks z1, its norm's and its convolution's input, z0
    _, hidden = retrace(block, x, noisy)
    assert [hidden[k] for k in (0, 3, 4, 7)] == pytest.approx(backward, rel=1e-3)
    assert len(hidden) == 8


def test_measuring_leaves_no_trace() -> None:
    torch.manual_seed(0)
    residual = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5))
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        ReversibleBlock(residual, copy.deepcopy(residual)),
        CouplingLayer(8),
        nn.ReLU(),
        HybridBlock(8),
    )
    x = torch.randn(4, 3, 8, 8)
    model(x).sum().backward()
    state, kept = copy.deepcopy(model.state_dict()), x.clone()
    buffers = [id(buffer) for buffer in model.buffers()]
    saved = [layer.saved for layer in model.modules() if isinstance(layer, Invertible)]
    gradients, random_state = [p.grad.clone() for p in model.parameters() if p.grad is not None], torch.get_rng_state()
    noise = measure_noise(model, x)
    assert [block is None for block in noise.blocks] == [True, True, False, False, True, False]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [id(buffer) for buffer in model.buffers()] == buffers
    assert all(
        a is b.saved for a, b in zip(saved, (m for m in model.modules() if isinstance(m, Invertible)), strict=True)
    )
    assert all(torch.equal(a, b.grad) for a, b in zip(gradients, model.parameters(), strict=True) if b.grad is not None)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(x, kept)
    assert measure_noise(model, x) == noise
    assert "normal" in measure_noise(model, (4, 3, 8, 8)).source


def test_another_type_scales_the_rounding() -> None:
    torch.manual_seed(0)
    model, x = layerwise(4, 0.1), torch.randn(8, 32, 16, 16)
    single, double = measure_noise(model, x), measure_noise(model.double(), x)
    for scaled, measured in zip(single.in_dtype(torch.double).blocks, double.blocks, strict=True):
        assert scaled is not None
        assert measured is not None
        assert scaled.gain == pytest.approx(measured.gain, rel=0.05)
        for a, b in zip(
            (scaled.own, scaled.rounding, scaled.hidden_own),
            (measured.own, measured.rounding, measured.hidden_own),
            strict=True,
        ):
            assert a == pytest.approx(b, rel=0.5)


def test_the_sample_must_be_finite() -> None:
    with pytest.raises(UsageError, match="not finite"):
        measure_noise(layerwise(1, 0.1), torch.full((2, 32, 4, 4), math.nan))


STEEP = BlockNoise(gain=10.0, own=1e-8, rounding=1e-8, hidden_gain=100.0, hidden_own=1e-7)


def test_runs_by_hand() -> None:
    noise = Noise((None, STEEP, STEEP, STEEP, None, STEEP), torch.float32, "by hand")
    # 1e-8, 1.1e-7, 1.11e-6; hidden 1e-7, 1.1e-6, 1.11e-5
    assert noise.run_snrs(3, way="invert") == pytest.approx((1e8, 1 / 1.1e-7, 1 / 1.11e-6))
    assert noise.run_snrs(3, way="invert_layerwise") == pytest.approx((1e7, 1 / 1.1e-6, 1 / 1.11e-5))
    assert noise.run_snr(1, 3, way="invert") == pytest.approx(1 / 1.11e-6)
    assert noise.run_snr(0, 3, way="invert") == 0.0
    assert noise.longest_runs(5e6, way="invert") == (1, 1, 1, 2, 5, 5)
    assert noise.longest_runs(5e6, way="invert_layerwise") == (1, 1, 2, 3, 5, 5)
    assert noise.longest_runs(1e9, way="invert") == (1, 2, 3, 4, 5, 6)
    modes = ("store", "invert_layerwise", "recompute", "invert", "store", "invert")
    assert noise.snrs(modes) == pytest.approx((math.inf, 1e7, math.inf, 1e8, math.inf, 1e8))


def test_noise_far_above_the_signal_stays_finite() -> None:
    torch.manual_seed(0)
    noise = measure_noise(nn.Sequential(*[CouplingLayer(4, slope=0.05) for _ in range(60)]), torch.randn(4, 4, 4, 4))
    assert all(block is not None and 1 < block.gain < 1e4 for block in noise.blocks)


def test_runs_of_150_blocks_are_quick() -> None:
    noise = Noise((STEEP,) * 150, torch.float32, "by hand")
    start = time.perf_counter()
    noise.longest_runs(1e4, way="invert_layerwise")
    assert time.perf_counter() - start < 0.5


def test_blocks_whose_inverse_has_nothing_left_cannot_be_used() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(InvertibleSequential(a=edgetrain.nn.InvertibleBatchNorm(4, eps_i=0.0)), CouplingLayer(4))
    model[0].a.weight.data.zero_()
    noise = measure_noise(model, torch.randn(4, 4, 8, 8))
    assert noise.longest_runs(1.0, way="invert") == (1, 2)
