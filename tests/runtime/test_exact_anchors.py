"""Exact anchors: how many blocks must be recomputed for a layer-wise network's gradients to be what autograd gives.

An anchor is a block that is recomputed from its kept input: the run of inversions ends at it, and the one below starts
from an exact output. Anchors stand where the predicted signal-to-noise ratio would fall under a limit.
"""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edgetrain
from edgetrain.chain import Mode, Noise, chain_of, measure_noise
from edgetrain.planner import Plan, schedule

SHAPE = (8, 3, 16, 16)


def batch(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(SHAPE, dtype=torch.double).to(dtype), torch.randint(0, 10, SHAPE[:1])


def network(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return edgetrain.create_model("layerwise18", width=8, slope=0.1).to(dtype)


def with_anchors(noise: Noise, limit: float) -> tuple[Mode, ...]:
    """The longest runs from the end that keep ``limit``, an anchor between two; what has no inverse is stored."""
    runs, modes, last = noise.longest_runs(limit, way="invert_layerwise"), list[Mode](), len(noise.blocks) - 1
    while last >= 0:
        modes += ["invert_layerwise"] * (last + 1 - runs[last])
        last = runs[last] - 1
        if last >= 0:
            modes.append("store" if noise.blocks[last] is None else "recompute")
            last -= 1
    return tuple(reversed(modes))


def gradients(model: nn.Module, modes: tuple[Mode, ...] | None) -> dict[str, Tensor]:
    """In double precision, by autograd where there are no modes."""
    model = copy.deepcopy(model)
    x, labels = batch(next(model.parameters()).dtype)
    net = model
    if modes is not None:
        chain = chain_of(model)
        program = schedule([block.name for block in chain.blocks], chain.shapes(SHAPE), modes)
        net = edgetrain.wrap(model, Plan(modes, ("",) * len(modes), program))
    F.cross_entropy(net(x), labels).backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def worst_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative error; a gradient that is zero but for round-off is measured against the largest."""
    largest = max(float(g.norm()) for g in expected.values())
    return max(float((found[n] - g).norm()) / max(float(g.norm()), 1e-4 * largest) for n, g in expected.items())


def rows(dtype: torch.dtype, limits: tuple[float, ...]) -> list[tuple[int, float]]:
    """(anchors, gradient error) per limit; prints them."""
    model, expected = network(dtype), gradients(network(torch.double), None)
    noise = measure_noise(model, batch(dtype)[0])
    found = []
    for limit in limits:
        modes = with_anchors(noise, limit)
        anchors, error = modes.count("recompute"), worst_error(gradients(model, modes), expected)
        print(
            f"{dtype} limit {limit:.0e}: {anchors} anchors, lowest SNR {min(noise.snrs(modes)):.1e}, error {error:.1e}"
        )
        assert min(noise.snrs(modes)) >= limit
        found.append((anchors, error))
    return found


def test_two_anchors_make_double_precision_exact() -> None:
    (none, pure), (two, exact) = rows(torch.double, (0.0, 1e22))
    assert none == 0
    assert pure > 1e-6, "inverting all the way is far from autograd"
    assert two == 2
    assert exact < 1e-10


def test_the_error_goes_with_the_root_of_the_noise() -> None:
    limits = (1e4, 1e8, 1e12, 1e16, 1e20, 1e24)
    found = rows(torch.double, limits)
    for limit, (_, error) in zip(limits, found, strict=True):
        assert error < 10 * limit**-0.5
    assert [anchors for anchors, _ in found] == sorted(anchors for anchors, _ in found)


def fewest_anchors(noise: Noise, limit: float) -> int:
    """By trying all places; how many it takes depends on how this processor rounds."""
    every = with_anchors(noise, math.inf)
    layers = [i for i, mode in enumerate(every) if mode == "recompute"]
    for count in range(len(layers) + 1):
        for chosen in itertools.combinations(layers, count):
            modes = list(every)
            for i in set(layers) - set(chosen):
                modes[i] = "invert_layerwise"
            if min(noise.snrs(modes), default=math.inf) >= limit:
                return count
    return len(layers)


@pytest.mark.parametrize(("limit", "bound"), [(1e4, 0.3), (1e8, 1e-3)])
def test_single_precision(limit: float, bound: float) -> None:
    (_, pure), (anchors, error) = rows(torch.float, (0.0, limit))
    assert not pure < 1, "the gradients of pure inversion are noise"
    assert anchors == fewest_anchors(measure_noise(network(torch.float), batch(torch.float)[0]), limit) < 4
    assert error < bound
