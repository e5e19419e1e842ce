"""Showing three full slices instead of all leaves every prediction as it is, to the byte."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any, get_args

import pytest
import torch

import edgetrain
from edgetrain.memory import costs as costs_module
from edgetrain.memory import measure_costs, step, trace_step
from edgetrain.memory.operators import DeviceKind
from edgetrain.memory.timeline import timeline
from edgetrain.memory.trace import StepTrace
from edgetrain.nn.slices import SLICE_BYTES, abridged_slices, batch_slices, is_on_cuda, slice_weight
from edgetrain.planner import UniformMode

NETWORKS = ("hybrid18", "layerwise18", "revnet18")
INPUT, BATCH = (3, 32, 32), 90  # of 128 KiB a sample: five full slices of 2 MiB and a rest, eleven of 1 MiB and a rest


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(costs_module, "abridged_slices", contextlib.nullcontext)
    monkeypatch.setattr(step, "abridged_slices", contextlib.nullcontext)
    return monkeypatch


def test_which_slices_stand_for_how_many() -> None:
    x = torch.empty(1, 1, device="meta").expand(17, 2**18)  # of 1 MiB: eight slices of two, and one
    assert [slice_weight() for _ in batch_slices(x)] == [1] * 9
    with abridged_slices():
        shown = [((s.start, s.stop), slice_weight()) for s in batch_slices(x)]
        assert shown == [((0, 2), 1), ((2, 4), 1), ((4, 6), 6), ((16, 17), 1)]
        assert [slice_weight() for _ in batch_slices(x[:16])] == [1, 1, 6]
        assert [slice_weight() for _ in batch_slices(x[:5])] == [1, 1, 1]
        assert [slice_weight() for _ in batch_slices(x[:0])] == []
        nested = [slice_weight() for _ in batch_slices(x) for _ in batch_slices(x[:8])]
        assert sum(nested) == 9 * 4
        assert slice_weight() == 1
    assert slice_weight() == 1


def test_tensors_that_stand_for_those_of_a_cuda_device() -> None:
    x = torch.empty(1, 1, device="meta").expand(40, 2**18)
    assert not is_on_cuda(x)
    with abridged_slices("cuda"):
        assert is_on_cuda(x)
        assert [(s.start, s.stop) for s in batch_slices(x)] == [(0, 16), (16, 32), (32, 40)]
    with abridged_slices("cpu"):
        assert not is_on_cuda(x)


def test_a_step_for_a_cuda_device_has_its_slices() -> None:
    model = edgetrain.create_model("hybrid18", num_classes=10)
    plan = edgetrain.uniform_plan(model, "invert_layerwise", input_shape=INPUT, batch_size=BATCH)
    found = []
    for device in get_args(DeviceKind):
        trace = trace_step(
            model, input_shape=INPUT, batch_size=BATCH, wrap=lambda net: edgetrain.wrap(net, plan), device=device
        )
        factors = [call.arguments[0] for call in trace.calls if "convolution" in call.operator]
        found.append(max(factor.nbytes for factor in factors if factor.shape[1] == 8))  # of stage 1
        costs = measure_costs(model, input_shape=INPUT, batch_size=BATCH, measured=False, device=device)
        found.append(costs.blocks[1].usual("backward invert_layerwise").peak_bytes)
    on_cpu, cpu_peak, on_cuda, cuda_peak = found
    assert on_cpu <= SLICE_BYTES < on_cuda
    assert cuda_peak > cpu_peak + SLICE_BYTES


@pytest.mark.parametrize("name", NETWORKS)
def test_costs(name: str, full: pytest.MonkeyPatch) -> None:
    model = edgetrain.create_model(name, num_classes=10)
    whole = measure_costs(model, input_shape=INPUT, batch_size=BATCH, measured=False)
    full.undo()
    assert measure_costs(model, input_shape=INPUT, batch_size=BATCH, measured=False) == whole


def traced(name: str, mode: Any) -> StepTrace:
    model = edgetrain.create_model(name, num_classes=10)
    plan = edgetrain.uniform_plan(model, mode, input_shape=INPUT, batch_size=BATCH)
    return trace_step(model, input_shape=INPUT, batch_size=BATCH, wrap=lambda net: edgetrain.wrap(net, plan))


CLONE = "aten.clone.default", ""


def weighted(trace: StepTrace) -> Counter[tuple[str, str]]:
    """How often each module runs each operator."""
    counts = Counter[tuple[str, str]]()
    for call in trace.calls:
        counts[call.operator, call.module] += call.weight
    return counts


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("mode", get_args(UniformMode))
def test_steps(name: str, mode: Any, full: pytest.MonkeyPatch) -> None:
    whole = traced(name, mode)
    full.undo()
    short = traced(name, mode)
    lines = [timeline(trace, measured=False) for trace in (whole, short)]
    for field in ("peak_bytes", "resident_bytes", "kinds"):
        assert getattr(lines[1], field) == getattr(lines[0], field)
    assert len(short.calls) <= len(whole.calls)
    counts = [weighted(trace) for trace in (whole, short)]
    # autograd now and then clones a gradient that it could have taken; the clone belongs to no module
    clones = [count.pop(CLONE, 0) for count in counts]
    assert counts[1] == counts[0]
    if clones[0] == clones[1]:
        assert lines[1].modules == lines[0].modules
