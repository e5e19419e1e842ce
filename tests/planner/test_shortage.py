"""What is advised where no plan fits: every change that is named is made, and a plan then fits."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import edgetrain
from edgetrain.errors import BudgetError, ModelError, UsageError
from edgetrain.planner import Planner
from edgetrain.units import parse_size


class FixedPositions(nn.Module):
    """A transformer of 4x4 patches whose position embeddings are for images of 32x32."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, stride=4)
        self.positions = nn.Parameter(torch.zeros(1, 64, 32))
        self.encoder = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        z = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        y: Tensor = self.head(self.encoder(z).mean(1))
        return y


def halving(channels: int = 16) -> nn.Sequential:
    """Four poolings, the last of which leaves no pixel of images smaller than 16x16; no batch norm."""
    layers: list[nn.Module] = []
    for inputs in (3, channels, channels, channels):
        layers += [nn.Conv2d(inputs, channels, 3, padding=1), nn.GELU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def normalised() -> nn.Sequential:
    """With a live batch norm."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 16), (16, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def heavy() -> nn.Sequential:
    """Little activation and many weights."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, stride=4, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4096, 256), nn.Linear(256, 10)
    )


CASES: dict[str, tuple[Any, tuple[int, int, int], int, str | None, float]] = {
    "resnet on a CPU": (functools.partial(edgetrain.create_model, "resnet20"), (3, 32, 32), 16, "rpi5-4gb", 0.6),
    "batch norm on CUDA": (normalised, (3, 96, 96), 32, "gtx750", 0.7),
    "poolings": (halving, (3, 96, 64), 1, "rpi5-4gb", 0.6),
    "fixed positions": (FixedPositions, (3, 32, 32), 16, "rpi5-4gb", 0.6),
    "many weights": (heavy, (3, 32, 32), 8, "rpi5-4gb", 0.8),
    "many weights here": (heavy, (3, 32, 32), 8, None, 0.8),
    "one sample on CUDA": (functools.partial(halving, 64), (3, 256, 256), 1, "orin-nano-8gb", 0.8),
}


@functools.cache
def advice(name: str) -> tuple[list[tuple[str, str]], int]:
    """Options and values of the advice, and the budget."""
    make, shape, batch, device, part = CASES[name]
    torch.manual_seed(0)
    planner = Planner(make(), input_shape=shape, batch_size=batch, device=device)
    budget = int(part * planner.needed()[0])
    with pytest.raises(BudgetError) as raised:
        planner.plan(budget)
    found = re.findall(r"--([a-z-]+)(?: (?:to )?([\w-]+))?", raised.value.action)
    return found, budget


def followed(name: str, option: str, value: str, budget: int) -> edgetrain.Plan:
    make, shape, batch, device, _ = CASES[name]
    torch.manual_seed(0)
    model = make()
    arguments: dict[str, Any] = {"input_shape": shape, "batch_size": batch, "device": device, "budget": budget}
    match option:
        case "batch":
            arguments["batch_size"] = int(value)
        case "input":
            arguments["input_shape"] = tuple(int(n) for n in value.split("x"))
        case "freeze":
            edgetrain.freeze(model, int(value))
        case "budget":
            arguments["budget"] = parse_size(value)
        case "optimizer" | "precision":
            arguments[option] = value
        case "update-in-backward" | "allow-ghost-batchnorm":
            arguments[option.replace("-", "_")] = True
        case _:
            raise AssertionError(option)
    return edgetrain.plan(model, **arguments)


@pytest.mark.parametrize("name", CASES)
def test_every_change_that_is_named_fits(name: str) -> None:
    changes, budget = advice(name)
    assert len(changes) > 1
    for option, value in changes:
        costed = followed(name, option, value, budget).costed
        assert costed is not None
        limit = parse_size(value) if option == "budget" else budget
        assert max(costed.peak_bytes, costed.reserved_bytes or 0) <= limit, (option, value)


def test_the_cheapest_change_comes_first() -> None:
    order = [
        "update-in-backward",
        "allow-ghost-batchnorm",
        "batch",
        "optimizer",
        "precision",
        "input",
        "freeze",
        "budget",
    ]
    for name in CASES:
        named = [*dict(advice(name)[0])]
        assert named == [option for option in order if option in named]


@pytest.mark.parametrize("name", ["resnet on a CPU", "poolings"])
def test_no_larger_image_fits(name: str) -> None:
    changes, budget = advice(name)
    make, shape, batch, device, _ = CASES[name]
    channels, height, width = (int(n) for n in dict(changes)["input"].split("x"))
    side, short = min(height, width) + 8, min(shape[1:])
    assert side <= short
    larger = channels, side * shape[1] // short // 8 * 8, side * shape[2] // short // 8 * 8
    with pytest.raises(BudgetError):
        edgetrain.plan(make(), input_shape=larger, batch_size=batch, device=device, budget=budget)


def test_a_smaller_image_is_named_only_where_the_model_takes_it() -> None:
    assert "input" not in dict(advice("fixed positions")[0])
    assert "input" not in dict(advice("many weights")[0])
    with pytest.raises(ModelError):
        Planner(FixedPositions(), input_shape=(3, 24, 24), batch_size=1, device="rpi5-4gb")


def test_half_precision_is_advised_only_where_it_can_be_planned() -> None:
    assert "precision" in dict(advice("many weights here")[0])
    changes, budget = advice("many weights")
    assert "precision" not in dict(changes)
    with pytest.raises(UsageError, match="bf16"):  # the profile has no rates for it
        followed("many weights", "precision", "bf16", budget)
