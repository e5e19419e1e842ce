"""Activations that wait in bfloat16: what rounding does to them, and to the gradients that are computed from them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from rounding import by_hand, rounded
from torch import Tensor, nn

import edgetrain
from edgetrain.chain import BFLOAT16_NSR, chain_of
from edgetrain.errors import ModelError
from edgetrain.nn.noise import snr
from edgetrain.planner import Plan
from edgetrain.runtime import Backward, Fetch, Forward, Free, Head, Instruction, Offload, Program
from edgetrain.runtime.offload import offload

SHAPE = (4, 3, 8, 8)
UNIT_ROUNDOFF = 2.0**-8  # half of the spacing of 8 significant bits, relative to the power of two below


class Closed(nn.Module):
    """One block, whatever is inside."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def five_blocks() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        Closed(nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        nn.Conv2d(8, 8, 3, padding=1),
        edgetrain.nn.CouplingLayer(8),
        Closed(nn.Flatten(), nn.Linear(512, 10)),
    ).double()


ONE: list[Instruction] = [
    Forward(0, "all"),
    Free(0),
    Forward(1, "all"),
    Forward(2, "input"),
    Offload(2, "bfloat16"),
    Forward(3, "all"),
    Forward(4, "all"),
    Head(),
    Backward(4, "saved"),
    Backward(3, "saved"),
    Fetch(2),
    Backward(2, "recompute"),
    Free(2),
    Backward(1, "saved"),
    Backward(0, "saved"),
]
"""The input of the second convolution alone."""

ALL: list[Instruction] = [
    Forward(0, "all"),
    Forward(1, "input"),
    Offload(1, "bfloat16"),
    Forward(2, "input"),
    Offload(2, "bfloat16"),
    Forward(3, "nothing"),
    Forward(4, "input"),
    Offload(4, "bfloat16"),
    Head(),
    Fetch(4),
    Backward(4, "recompute"),
    Backward(3, "invert_layerwise"),
    Free(3),
    Fetch(2),
    Backward(2, "recompute"),
    Free(2),
    Fetch(1),
    Backward(1, "recompute"),
    Free(1),
    Backward(0, "saved"),
]
"""Inputs of a batch norm and a convolution, and the anchor from which an inversion starts."""


def gradients(model: nn.Module, steps: list[Instruction] | None) -> dict[str, Tensor]:
    """Of one step from the same batch; by plain autograd without ``steps``."""
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    x, labels = torch.randn(SHAPE, dtype=torch.double), torch.randint(0, 10, SHAPE[:1])
    net = model
    if steps is not None:
        chain = chain_of(model)
        program = Program(tuple(b.name for b in chain.blocks), chain.shapes(SHAPE), tuple(steps))
        net = edgetrain.wrap(model, Plan(("store",) * 5, ("",) * 5, program))
    F.cross_entropy(net(x), labels).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_each_value_is_off_by_the_unit_roundoff_at_most_and_keeps_its_type_and_layout() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        x = (torch.randn(8, 16, 32, 32, dtype=dtype) * torch.logspace(-20, 20, 32, dtype=dtype)).transpose(2, 3)
        held = offload(x, "bfloat16")
        assert held.copy is not None
        assert held.copy.nbytes == 2 * x.numel()
        back = held.fetch()
        assert (back.dtype, back.stride()) == (x.dtype, x.stride())
        assert torch.equal(back, rounded(x))
        error = ((back - x).abs() / x.abs()).max()
        worst = UNIT_ROUNDOFF / (1 + UNIT_ROUNDOFF)  # half way between 1 and the next
        assert 0.99 * worst < error <= worst + 2.0**-24  # torch rounds float64 to float32 first


def test_noise_of_rounding_is_at_most_that_of_the_derivation() -> None:
    """The spacing is eps = 2^-7 from 1 to 2, the mean square of the error eps^2 / 12 if it is spread evenly.

    Values just above 1 have a mean square of 1, those just below 2 of 4, any others lie in between.
    """
    worst, best = 3 * 2.0**16, 3 * 2.0**18
    assert pytest.approx(worst) == 1 / BFLOAT16_NSR
    torch.manual_seed(0)
    spread = torch.rand(10**6, dtype=torch.double)

    def measured(x: Tensor) -> float:
        return snr(x, offload(x, "bfloat16").fetch())

    assert measured(1 + 2.0**-5 * spread) == pytest.approx(worst, rel=0.04)
    assert measured(2 - 2.0**-5 * spread) == pytest.approx(best, rel=0.04)
    for x in (torch.randn(10**6), torch.rand(10**6), torch.randn(10**6).relu(), torch.exp(3 * torch.randn(10**6))):
        assert worst < measured(x) < best
        print(f"{measured(x):.3g}")


def test_the_gradient_of_a_convolution_is_off_by_no_more_than_the_rounding_of_its_input() -> None:
    """dW = conv(z, g) is linear in z, and |rounded z - z| <= u |z|, so |d| <= u conv(|z|, |g|), value by value.

    z waits, g[3] comes from exact activations, and the gradients of the bias and of z do not depend on z.
    """
    model = five_blocks()
    exact, found = gradients(model, None), gradients(model, ONE)
    seen: dict[str, Tensor] = {}
    probe = copy.deepcopy(model)
    probe[2].register_forward_hook(lambda _, inputs, output: seen.update(z=inputs[0].detach(), y=output))
    probe[2].register_full_backward_hook(lambda _, __, outputs: seen.update(g=outputs[0]))
    gradients_of = copy.deepcopy(probe)
    torch.manual_seed(1)
    x, labels = torch.randn(SHAPE, dtype=torch.double), torch.randint(0, 10, SHAPE[:1])
    F.cross_entropy(gradients_of(x), labels).backward()
    weight = probe[2].weight
    assert isinstance(weight, Tensor)
    bound = UNIT_ROUNDOFF * torch.nn.grad.conv2d_weight(seen["z"].abs(), weight.shape, seen["g"].abs(), padding=1)
    error = (found["2.weight"] - exact["2.weight"]).abs()
    assert bool((error <= bound).all())
    assert float((error / bound).max()) > 1e-2  # it was rounded
    for name in exact.keys() - {"2.weight"}:
        torch.testing.assert_close(found[name], exact[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("steps", [ONE, ALL], ids=["a convolution", "with an inversion"])
def test_gradients_are_those_of_the_same_activations_rounded_by_hand(steps: list[Instruction]) -> None:
    model = five_blocks()
    found, exact = gradients(model, steps), gradients(model, None)
    with by_hand() as indices:
        expected = gradients(model, steps)
    assert sorted(indices) == sorted(step.index for step in steps if isinstance(step, Fetch))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12)
    assert any(float((found[name] - exact[name]).abs().max()) > 1e-6 for name in exact)


def test_what_bfloat16_would_not_shorten_is_refused() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.int64):
        with pytest.raises(ModelError, match="make the plan again"):
            offload(torch.ones(4, dtype=dtype), "bfloat16")


def test_programs_written_before_there_was_bfloat16_are_read() -> None:
    text = (
        '{"version": 1, "names": ["a"], "shapes": [[1, 2], [1, 2]], "instructions": [{"op": "forward", "block": 0, '
        '"keep": "input"}, {"op": "offload", "index": 0, "to": "host"}, {"op": "head"}, {"op": "fetch", "index": 0}, '
        '{"op": "backward", "block": 0, "how": "recompute"}]}'
    )
    old = Program.from_json(text)
    assert old.instructions[1] == Offload(0, "host")
    new = Program(old.names, old.shapes, (Offload(0, "bfloat16"), Fetch(0)))
    assert Program.from_json(new.to_json()) == new
    assert "offload z[0] to bfloat16" in new.table()
