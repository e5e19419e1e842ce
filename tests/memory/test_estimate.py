"""Estimates: their parts, whether they fit, the largest batch, and what cannot be traced."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from step_networks import STEPS
from torch import Tensor, nn

from edgetrain.errors import ModelError, UsageError
from edgetrain.memory import Estimate, Line, estimate, estimate_measured, max_batch, measure_peak
from edgetrain.memory.step import classification_loss, optimizer_factory
from edgetrain.profiles import load_profile
from edgetrain.units import MIB

SHAPE = (3, 32, 32)
NET = STEPS["conv, batch norm"]


def of(device: str = "cpu", n: int = 8, **options: Any) -> Estimate:
    return estimate(NET, input_shape=SHAPE, batch_size=n, device=device, **options)


@pytest.mark.parametrize("device", ["cpu", "gtx750", "orin-nano-8gb", "rpi5-4gb"])
def test_lines_add_up(device: str):
    found = of(device)
    assert sum(line.nbytes for line in found.lines) == found.process_peak_bytes
    assert all(line.nbytes >= 0 for line in found.lines)
    assert found.peak_bytes <= found.reserved_bytes <= found.process_peak_bytes
    assert f"{found.process_peak_bytes / MIB:.1f} MiB" in found.table()
    assert found.to_dict()["fits"] is found.fits is True


def test_owners_are_blocks_of_two_levels():
    deep = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1))
    net = nn.Sequential(nn.Sequential(nn.Sequential(deep)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))
    found = estimate(net, input_shape=SHAPE, batch_size=4)
    assert found.owners[0][0] == "0.0"  # and not 0.0.0.2
    assert "0.0 " in found.table()


def test_cuda_has_workspaces_and_slack():
    lines = {line.name: line.nbytes for line in of("gtx750").lines}
    assert lines["cuBLAS workspace"] == load_profile("gtx750").cublas_workspace_bytes
    assert "allocator slack" in lines
    assert of("gtx750").reserved_bytes % (2 * MIB) == 0
    assert "cudnn_workspace" in of("gtx750").unknown


def test_does_not_fit():
    profile = load_profile("gtx750")
    assert profile.default_budget is not None
    tiny = profile.model_copy(update={"default_budget": profile.default_budget.model_copy(update={"value": 1.0})})
    found = estimate(NET, input_shape=SHAPE, batch_size=8, device=tiny)
    assert found.fits is False
    assert "missing" in found.table()


@pytest.mark.parametrize(
    ("options", "said"),
    [({"device": "gtx75"}, "gtx750"), ({"optimizer": "sdg"}, "sgd"), ({"precision": "fp8"}, "fp32")],
)
def test_unknown_names(options: dict[str, str], said: str):
    with pytest.raises(UsageError, match=said):
        of(**options)


def made_up(n: int, *, available: int | None, base: int = 100, slope: int = 7) -> Estimate:
    lines = (Line("all", base + slope * n),)
    whole = base + slope * n
    return Estimate("made up", n, "fp32", lines, whole, whole, whole, available, (), "", (), None)


@pytest.mark.parametrize("available", [107, 113, 114, 500, 535, 5000])
def test_max_batch_is_the_largest(available: int):
    found = max_batch(lambda n: made_up(n, available=available))
    assert found is not None
    largest = (available - 100) // 7
    assert found.fits
    assert largest - max(largest // 64 if largest >= 64 else 0, 0) <= found.batch_size <= largest


def test_max_batch_where_nothing_fits_or_nothing_is_known():
    assert max_batch(lambda n: made_up(n, available=106)) is None
    with pytest.raises(UsageError, match="nobody knows"):
        max_batch(lambda n: made_up(n, available=None))
    assert max_batch(lambda n: made_up(n, available=10**9), limit=300).batch_size == 300  # type: ignore[union-attr]


def test_max_batch_of_a_step_that_needs_two_samples():
    def make(n: int) -> Estimate:
        if n < 2:
            raise ModelError(found="one sample", expected="two", action="more")
        return made_up(n, available=170)

    found = max_batch(make)
    assert found is not None
    assert found.batch_size == 10


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate, self.head = nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = F.relu(x) if x.sum() != 0 else F.gelu(x)
        return self.head(x.mean((2, 3)))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Deciding()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_a_decision_by_data_is_named():
    with pytest.raises(ModelError) as caught:
        estimate(Outer(), input_shape=SHAPE, batch_size=2)
    assert "inner (Deciding)" in str(caught.value)
    assert "--measure" in str(caught.value)


def test_measured_is_close_to_the_real_peak():
    found = estimate_measured(Outer, input_shape=SHAPE, batch_size=16)

    def life() -> None:
        net, x = Outer(), torch.randn(16, *SHAPE)
        stepper = optimizer_factory("sgd")(net.parameters())
        for _ in range(2):
            net.zero_grad(set_to_none=True)
            classification_loss(net(x)).backward()
            stepper.step()

    assert found.peak_bytes == pytest.approx(measure_peak(life).allocator_peak_bytes, rel=0.05)
    assert sum(line.nbytes for line in found.lines) == found.process_peak_bytes


class Heads(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.conv, self.one, self.two, self.kind = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), nn.Linear(8, 3), kind

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x).mean((2, 3))
        return {"one": self.one(x), "two": self.two(x)} if self.kind is dict else (self.one(x), self.two(x))


@dataclasses.dataclass
class Output:
    logits: Tensor


class Dataclass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Output:
        return Output(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize("net", [Heads(dict), Heads(tuple), Dataclass()])
def test_outputs_that_are_no_tensor(net: nn.Module):
    found = estimate(net, input_shape=SHAPE, batch_size=4)
    assert found.timeline is not None
    assert found.timeline.resident_bytes > 0


class NeedsData(nn.Module):
    """Its shape follows from the values of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        width = int(torch.linspace(4, 8, 3).sum().item())
        self.conv, self.head = nn.Conv2d(3, width, 3), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).mean((2, 3)))


def test_a_model_whose_construction_needs_data():
    assert estimate(NeedsData, input_shape=SHAPE, batch_size=2).peak_bytes > 0


def test_a_lazy_model_says_what_to_do():
    with pytest.raises(ModelError, match="lazy"):
        estimate(nn.Sequential(nn.Flatten(), nn.LazyLinear(5)), input_shape=SHAPE, batch_size=2)
