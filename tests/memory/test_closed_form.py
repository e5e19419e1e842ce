"""The closed formulas against the printed table, and a training step against the formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import edgetrain
from edgetrain.memory import (
    PRINTED,
    floor_bytes_per_pixel,
    measure_peak,
    resnet_bytes_per_pixel,
    reversible_bytes_per_pixel,
)


def test_formulas_give_the_printed_figures() -> None:
    assert resnet_bytes_per_pixel() == pytest.approx(PRINTED["resnet18"], rel=0.005)
    for family in ("revnet18", "irevnet18", "layerwise18", "hybrid18"):
        assert reversible_bytes_per_pixel(family) == PRINTED[family]
    assert floor_bytes_per_pixel() == 256


def step_bytes_per_pixel(name: str, mode: Any, batch_size: int, **options: Any) -> float:
    torch.manual_seed(0)
    model = edgetrain.create_model(name, **options)
    plan = edgetrain.uniform_plan(model, mode, input_shape=(3, 32, 32), batch_size=batch_size)
    net = edgetrain.wrap(model, plan)
    x, labels = torch.randn(batch_size, 3, 32, 32), torch.zeros(batch_size, dtype=torch.long)

    def step(samples: int) -> None:
        F.cross_entropy(net(x[:samples]), labels[:samples]).backward()

    step(2)
    return measure_peak(lambda: step(batch_size)).allocator_peak_bytes / (batch_size * 1024)


@pytest.mark.parametrize(
    ("name", "mode", "bound"), [("hybrid18", "invert_layerwise", 352), ("layerwise18", "invert_layerwise", 320)]
)
@pytest.mark.slow
def test_batch_of_512_stays_under_the_printed_bytes_per_pixel(name: str, mode: str, bound: float) -> None:
    measured = step_bytes_per_pixel(name, mode, 512)
    print(f"{name}: printed {bound}, measured {measured:.1f}")
    assert measured <= bound


def test_the_bytes_of_one_more_sample() -> None:
    """What a hundred more samples cost, per pixel: the batch-sized tensors alone, under the printed figures."""
    small, large = 64, 160
    for name, mode in (("hybrid18", "invert_layerwise"), ("layerwise18", "invert_layerwise")):
        options = {"blocks": (1, 1), "pooling": ("channel",)}
        peaks = [step_bytes_per_pixel(name, mode, n, **options) * n for n in (small, large)]
        marginal = (peaks[1] - peaks[0]) / (large - small)
        expected = {"hybrid18": 320, "layerwise18": 256}[name]
        assert expected <= marginal <= expected * 1.03, name


def test_peak_of_a_reversible_chain_is_constant_in_depth() -> None:
    peaks = [step_bytes_per_pixel("hybrid18", "invert_layerwise", 32, blocks=(depth,), pooling=()) for depth in (2, 8)]
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01)
