"""Dirac weights against the formula (5.5) written out, in groups and non-square; gradients; removal."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

import edgetrain
from edgetrain.chain import measure_noise
from edgetrain.errors import ModelError
from edgetrain.nn import (
    CouplingConv,
    CouplingLayer,
    CouplingStack,
    DiracConv2d,
    DiracParametrization,
    DiracProjection,
    HybridBlock,
    Invertible,
    dirac_,
    dirac_projection_,
    identity_plus_,
)

# channels in and out, kernel, groups: square, wider, narrower, in groups of each kind, even and one-sided kernels
SHAPES = [
    (6, 6, (3, 3), 1),
    (4, 9, (3, 3), 1),
    (9, 4, (5, 3), 1),
    (6, 6, (3, 3), 3),
    (6, 12, (1, 1), 3),
    (12, 6, (2, 4), 3),
    (4, 4, (3, 3), 4),
]


def delta_of(conv: nn.Module) -> Tensor:
    """torch's own, on which the definition rests."""
    return nn.init.dirac_(torch.zeros_like(conv.weight), conv.groups)


def original(conv: nn.Module) -> Tensor:
    return conv.parametrizations.weight.original


def column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def normalised(weight: Tensor) -> Tensor:
    return torch.stack([filter_ / filter_.square().sum().sqrt() for filter_ in weight])


def randomise(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(0.3, 1.5)


@pytest.mark.parametrize(("inputs", "outputs", "kernel", "groups"), SHAPES)
def test_weight_is_the_formula(inputs: int, outputs: int, kernel: tuple[int, int], groups: int) -> None:
    torch.manual_seed(0)
    conv = dirac_(nn.Conv2d(inputs, outputs, kernel, groups=groups).double())
    part = conv.parametrizations.weight[0]
    assert torch.equal(part.a, torch.full_like(part.a, 1.0))
    assert torch.equal(part.b, torch.full_like(part.b, 0.1))
    expected = delta_of(conv) + 0.1 * normalised(original(conv))
    torch.testing.assert_close(conv.weight, expected, rtol=1e-13, atol=1e-14)
    with torch.no_grad():
        part.a.uniform_(-1, 1)
        part.b.uniform_(-1, 1)
    expected = column(part.a) * delta_of(conv) + column(part.b) * normalised(original(conv))
    torch.testing.assert_close(conv.weight, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_with_b_zero_it_is_the_identity(dimensions: int) -> None:
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    conv = dirac_(kind(5, 5, 3, padding=1, bias=False), b=0.0)
    x = torch.randn(2, 5, *[6] * dimensions)
    assert torch.equal(conv(x), x)


def test_first_weights_are_standard_normal() -> None:
    torch.manual_seed(0)
    drawn = original(DiracConv2d(64, 64, 3)).detach()
    n = drawn.numel()
    assert abs(float(drawn.mean())) < 4 / n**0.5  # standard error of a mean
    assert abs(float(drawn.var()) - 1) < 4 * (2 / n) ** 0.5  # and of a variance
    conv = identity_plus_(nn.Conv2d(64, 64, 3), sigma=1e-4)
    assert abs(float(original(conv).detach().std()) / 1e-4 - 1) < 4 / (2 * n) ** 0.5


@pytest.mark.parametrize(("inputs", "outputs", "kernel", "groups"), SHAPES)
def test_projection_starts_as_the_delta_and_is_a_convolution_beside(
    inputs: int, outputs: int, kernel: tuple[int, int], groups: int
) -> None:
    conv = dirac_projection_(nn.Conv2d(inputs, outputs, kernel, groups=groups).double())
    part = conv.parametrizations.weight[0]
    torch.testing.assert_close(conv.weight, delta_of(conv) + 0.1 * normalised(original(conv)), rtol=1e-13, atol=1e-14)
    with torch.no_grad():
        part.projection.normal_()
    expected = 0.1 * normalised(original(conv))
    expected[:, :, kernel[0] // 2, kernel[1] // 2] += part.projection
    torch.testing.assert_close(conv.weight, expected, rtol=1e-13, atol=1e-14)


def test_projection_beside_the_convolution() -> None:
    torch.manual_seed(0)
    conv = dirac_projection_(nn.Conv2d(4, 9, 3, padding=1, bias=False).double())
    part = conv.parametrizations.weight[0]
    nn.init.normal_(part.projection)
    x = torch.randn(2, 4, 5, 5, dtype=torch.double)
    apart = F.conv2d(x, part.projection[:, :, None, None]) + F.conv2d(x, 0.1 * normalised(original(conv)), padding=1)
    torch.testing.assert_close(conv(x), apart)


@pytest.mark.parametrize(("inputs", "outputs", "groups"), [(4, 4, 1), (2, 5, 1), (6, 4, 2)])
def test_gradients(inputs: int, outputs: int, groups: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(outputs, inputs // groups, 3, 3, dtype=torch.double, requires_grad=True)
    for kind in (DiracParametrization, DiracProjection):
        part = kind(weight.detach(), groups=groups)
        randomise(part)
        names = [name for name, _ in part.named_parameters()]

        def run(w: Tensor, *values: Tensor, part: nn.Module = part, names: list[str] = names) -> Tensor:
            return torch.func.functional_call(part, dict(zip(names, values, strict=True)), (w,))

        assert torch.autograd.gradcheck(run, (weight, *part.parameters()))


def test_a_filter_of_zeros_gives_the_identity() -> None:
    conv = DiracConv2d(3, 3, 3)
    nn.init.zeros_(original(conv))
    assert torch.equal(conv.weight, delta_of(conv))
    conv(torch.randn(1, 3, 5, 5)).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in conv.parameters())


def test_identity_plus() -> None:
    conv = identity_plus_(nn.Conv2d(6, 4, 3, groups=2), sigma=0.5)
    assert torch.equal(conv.weight, delta_of(conv) + original(conv))
    before = original(conv).clone()
    conv(torch.randn(1, 6, 5, 5))
    assert torch.equal(original(conv), before)


@pytest.mark.parametrize("name", ["dirac", "projection", "identity"])
def test_nothing_changes_when_the_parametrisation_goes(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), DiracConv2d(6, 6, 3)).double()
    give = {"dirac": dirac_, "projection": dirac_projection_, "identity": functools.partial(identity_plus_, sigma=0.1)}
    give[name](model[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8, dtype=torch.double)).square().mean().backward()
        optimizer.step()
    model.eval()
    x = torch.randn(4, 3, 8, 8, dtype=torch.double)
    expected = model(x)
    others = {name for name in model.state_dict() if "parametrizations" not in name}
    for module in model.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    assert type(model[0]) is nn.Conv2d
    assert set(model.state_dict()) == others | {"0.weight", "3.weight"}
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_beside_weight_norm() -> None:
    torch.manual_seed(0)
    conv = dirac_(weight_norm(nn.Conv2d(4, 4, 3, padding=1)).double())
    parts = conv.parametrizations.weight
    made = torch._weight_norm(parts.original1, parts.original0, 0)
    torch.testing.assert_close(conv.weight, delta_of(conv) + 0.1 * normalised(made))
    model = nn.Sequential(conv, weight_norm(nn.Conv2d(4, 4, 3)).double(), nn.Flatten(), nn.Linear(16, 2).double())
    x = torch.randn(3, 4, 4, 4, dtype=torch.double)
    plain = copy.deepcopy(model)
    plan = edgetrain.uniform_plan(model, "recompute", input_shape=(4, 4, 4), batch_size=3)
    for net in (plain, edgetrain.wrap(model, plan)):
        net(x).square().sum().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)


def test_a_state_goes_to_another_layer() -> None:
    one, other = DiracConv2d(4, 6, 3), DiracConv2d(4, 6, 3)
    randomise(one)
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.weight, one.weight)


def test_refusals() -> None:
    with pytest.raises(ModelError, match="in whose weight the identity"):
        dirac_(nn.Linear(3, 3))
    with pytest.raises(ModelError, match="in whose weight the identity"):
        dirac_(nn.ConvTranspose2d(3, 3, 3))
    with pytest.raises(ModelError, match="already"):
        dirac_(DiracConv2d(3, 3, 3))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def gradients(layer: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in layer.named_parameters()}


@pytest.mark.parametrize("make", [lambda: CouplingConv(6, dirac=True), lambda: CouplingStack(8, depth=3, dirac=True)])
def test_gradients_from_the_output(make: Any) -> None:
    """Those of W, a and b through W_hat, in a layer that inverts, against autograd."""
    torch.manual_seed(0)
    layer: Invertible = make().double()
    plain = copy.deepcopy(layer)
    channels = 6 if isinstance(layer, CouplingConv) else 8
    x = torch.randn(3, channels, 6, 6, dtype=torch.double, requires_grad=True)
    dy = torch.randn_like(x)
    plain(x).backward(dy)
    y = layer.forward_(x.detach().clone())
    back, dx = layer.backward_from_output(y, dy.clone())
    assert relative(back, x.detach()) < 1e-10
    assert x.grad is not None
    assert relative(dx, x.grad) < 1e-10
    expected = gradients(plain)
    assert expected.keys() == gradients(layer).keys()
    for name, gradient in gradients(layer).items():
        assert relative(gradient, expected[name]) < 1e-10, name


def test_frozen_scales_stay_without_gradients() -> None:
    layer = CouplingConv(4, dirac=True)
    frozen = [p for name, p in layer.named_parameters() if name.endswith((".a", ".b"))]
    for parameter in frozen:
        parameter.requires_grad_(False)
    layer.backward_from_output(layer.forward_(torch.randn(2, 4, 5, 5)), torch.randn(2, 4, 5, 5))
    assert all(p.grad is None for p in frozen)
    assert all(p.grad is not None for p in layer.parameters() if p.requires_grad)


def noise_per_layer(make: Any) -> float:
    """Factor by which the ratio of signal to noise falls from one layer to the one below, inverted one by one."""
    torch.manual_seed(0)
    layers = nn.Sequential(*[make() for _ in range(4)])
    noise = measure_noise(layers, torch.randn(16, 16, 8, 8))
    return float(noise.run_snr(1, 3, way="invert") / noise.run_snr(0, 3, way="invert"))


def test_noise_of_an_inverted_coupling() -> None:
    plain, dirac = (noise_per_layer(lambda d=d: CouplingLayer(16, dirac=d)) for d in (False, True))
    assert dirac > 5 * plain
    blocks, dirac_blocks = (noise_per_layer(lambda d=d: HybridBlock(16, dirac=d)) for d in (False, True))
    assert dirac_blocks < 5 * blocks
