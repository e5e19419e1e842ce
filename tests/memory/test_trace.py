"""The peak of a traced step against the one that torch's allocator had in a real step."""

from __future__ import annotations

import copy
import resource
from collections.abc import Callable
from typing import Any

import pytest
import torch
from step_networks import STEPS
from torch import nn

import edgetrain
from edgetrain.memory import OPTIMIZERS, StepTrace, classification_loss, measure_peak, timeline, trace_step
from edgetrain.memory.eight_bit import EIGHT_BIT
from edgetrain.memory.step import optimizer_factory

LOW, HIGH = 0.995, 1.03
SHAPE = (3, 32, 32)
OF_EACH_KIND = [
    "grouped",
    "depthwise",
    "dilated",
    "transposed",
    "group norm",
    "interpolation",
    "attention",
    "transformer",
]


def real_peak_bytes(
    make: Callable[[], nn.Module],
    n: int,
    *,
    dtype: torch.dtype = torch.float32,
    optimizer: str | None = "sgd",
    wrap: Callable[[nn.Module], nn.Module] | None = None,
) -> int:
    """From the model's creation over two steps: the second one has the optimiser's state from its beginning."""

    def life() -> None:
        model = make().to(dtype).train()
        net = model if wrap is None else wrap(model)
        stepper = None if optimizer is None else optimizer_factory(optimizer)(trained(model))
        x = torch.zeros(n, *SHAPE, dtype=dtype)
        for _ in range(2):
            classification_loss(net(x)).backward()
            if stepper is not None:
                stepper.step()
            model.zero_grad(set_to_none=True)

    return measure_peak(life).allocator_peak_bytes


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def assert_predicted(make: Callable[[], nn.Module], n: int, **options: Any) -> None:
    predicted = timeline(trace_step(make, input_shape=SHAPE, batch_size=n, **options)).peak_bytes
    measured = real_peak_bytes(make, n, **options)
    print(f"predicted {predicted}, measured {measured}, ratio {predicted / measured:.4f}")
    assert LOW <= predicted / measured <= HIGH


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("n", [1, 16])
def test_peak(name: str, n: int):
    assert_predicted(STEPS[name], n)


@pytest.mark.parametrize("name", ["conv, batch norm", "depthwise", "pixel shuffle"])
@pytest.mark.parametrize("n", [2, 3, 7])
def test_peak_of_odd_batches(name: str, n: int):
    assert_predicted(STEPS[name], n)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_peak_of_other_types(name: str, dtype: torch.dtype):
    assert_predicted(STEPS[name], 5, dtype=dtype)


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, None])
@pytest.mark.parametrize("name", ["linear", "depthwise"])  # weights at the peak, activations at the peak
def test_peak_with_optimizer(name: str, optimizer: str | None):
    if optimizer in EIGHT_BIT:
        pytest.importorskip("bitsandbytes", reason="needs the extra eightbit: pip install 'edgetrain[eightbit]'")
    assert_predicted(STEPS[name], 4, optimizer=optimizer)


@pytest.mark.parametrize("name", ["20 and 40 channels", "pixel shuffle", "strided"])
def test_peak_with_two_threads(name: str):
    """Each thread has its scratch, and few samples are not spread over all of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert_predicted(STEPS[name], 20)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "mode", ["keep_all", "selective", "recompute", "invert", "invert_selective", "invert_layerwise"]
)
@pytest.mark.parametrize("name", ["hybrid18", "layerwise18"])
def test_peak_of_a_plan(name: str, mode: Any):
    def wrap(model: nn.Module) -> nn.Module:
        return edgetrain.wrap(model, edgetrain.uniform_plan(model, mode, input_shape=SHAPE, batch_size=2))

    assert_predicted(lambda: edgetrain.create_model(name, num_classes=10, width=8), 2, wrap=wrap)


def test_parts_add_up_to_the_peak():
    trace = trace_step(STEPS["conv, batch norm"], input_shape=SHAPE, batch_size=4)
    line = timeline(trace)
    assert sum(line.kinds.values()) == line.peak_bytes == max(point.bytes for point in line.points)
    fixed = sum(line.kinds[kind] for kind in ("weights", "gradients", "optimizer", "batch"))
    assert sum(line.modules.values()) == line.peak_bytes - fixed
    parameters = 12 * 27 + 2 * 12 + 24 * (12 * 9 + 1) + 2 * 24 + 5 * 25
    statistics = 2 * (12 + 24) * 4 + 2 * 8  # mean, variance; the number of batches
    assert line.kinds["weights"] == parameters * 4 + statistics
    assert line.kinds["optimizer"] == parameters * 4
    assert line.kinds["batch"] == 4 * 3 * 32 * 32 * 4
    assert line.resident_bytes == sum(line.kinds[kind] for kind in ("weights", "optimizer", "batch"))


def test_phases_and_modules():
    net = nn.Sequential()
    net.add_module("stem", nn.Conv2d(3, 16, 3, padding=1))
    net.add_module("body", nn.Sequential(nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1)))
    net.add_module("head", nn.Sequential(nn.Flatten(), nn.Linear(8 * 32 * 32, 5)))
    trace = trace_step(net, input_shape=SHAPE, batch_size=2)

    def where(operator: str) -> list[tuple[str, str]]:
        return [(call.phase, call.module) for call in trace.calls if call.operator.startswith(f"aten.{operator}.")]

    assert where("convolution") == [("forward", "stem"), ("forward", "body.1")]
    assert where("convolution_backward") == [("backward", "body.1"), ("backward", "stem")]
    assert where("threshold_backward") == [("backward", "body.0")]
    assert where("addmm") == [("forward", "head.1")]
    assert where("mm") == [("backward", "head.1"), ("backward", "head.1")]
    assert where("nll_loss_forward") == [("forward", "")]
    assert order_of_phases(trace) == ["forward", "backward", "optimizer"]


def order_of_phases(trace: StepTrace) -> list[str]:
    return list(dict.fromkeys(call.phase for call in trace.calls))


def test_the_module_is_left_alone():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Flatten(), nn.Linear(7200, 5)).eval()
    net[1].train()
    before, parameters, random = copy.deepcopy(net.state_dict()), list(net.parameters()), torch.get_rng_state()
    trace_step(net, input_shape=SHAPE, batch_size=4, optimizer="adam")
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert all(type(p) is nn.Parameter and p.grad is None for p in net.parameters())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert [m.training for m in net] == [False, True, False, False, False]
    assert not net.training
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    net(torch.randn(2, *SHAPE)).sum().backward()  # real tensors still go through it


def test_random_state_function_comes_back():
    function = torch.get_rng_state
    trace_step(STEPS["dropout"], input_shape=SHAPE, batch_size=2)
    assert torch.get_rng_state is function


def test_a_large_model_takes_no_memory():
    """2.5 billion weights of 4 bytes."""
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trace = trace_step(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 812_500), nn.Linear(812_500, 8)),
        input_shape=SHAPE,
        batch_size=2,
    )
    assert timeline(trace).resident_bytes > 2 * 10**10  # weights and momentum
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 100 * 1024
