"""Optimisers with state in 8 bit: what they hold and what a step takes, against torch's allocator."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import edgetrain
from edgetrain.errors import MissingExtraError
from edgetrain.memory import (
    OPTIMIZERS,
    classification_loss,
    measure_costs,
    measure_peak,
    predicted_times,
    timeline,
    trace_step,
)
from edgetrain.memory.eight_bit import EIGHT_BIT
from edgetrain.memory.measure import record_allocations
from edgetrain.memory.operators import RESULTS, InnerAllocations
from edgetrain.memory.rates import OperatorRates
from edgetrain.memory.trace import Call, TensorMeta

SHAPE = (3, 16, 16)
STATES = {"sgd-8bit": 1, "adamw-8bit": 2, "lion-8bit": 1}
TWO_STATES = ("adam", "lamb", "ademamix")
KERNELS = (*TWO_STATES, "momentum", "lars", "lion", "rmsprop", "adagrad")
UPDATE = "optimizer_update_8bit_blockwise"
RATES = OperatorRates({64: 5e10}, 1e10, 6e9, 5e-6, 0.0, "round numbers")


@pytest.fixture
def library() -> Any:
    return pytest.importorskip("bitsandbytes", reason="needs the extra eightbit: pip install 'edgetrain[eightbit]'")


def wide() -> nn.Module:
    """Weights at the peak, of sizes that are no multiple of 256; all others are below 4096 elements."""
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()
    return nn.Sequential(*stem, nn.Linear(128, 1001), nn.GELU(), nn.Linear(1001, 517))


def deep() -> nn.Module:
    """Activations at the peak."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, padding=1)]
    for _ in range(8):
        layers += [nn.Conv2d(32, 32, 3, padding=1), nn.GELU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def arguments(kernel: str, shape: tuple[int, ...], dtype: torch.dtype, *, quantised: bool, tables: Any) -> list[object]:
    parameter = torch.ones(shape, dtype=dtype)
    blocks = -(-parameter.numel() // 256)
    pair = (2,) if kernel == "ademamix" else ()
    two = kernel in TWO_STATES
    if not quantised:
        first, second = torch.ones(*pair, *shape), torch.ones(shape) if two else None
        return [
            kernel,
            parameter,
            parameter.clone(),
            first,
            second,
            None,
            *[0.0] * 2,
            *[0.9] * 4,
            1e-8,
            0.0,
            2,
            0.1,
            1.0,
        ]
    codes = torch.zeros(*pair, *shape, dtype=torch.uint8), torch.zeros(shape, dtype=torch.uint8) if two else None
    scales = torch.ones(*pair, blocks), torch.ones(blocks) if two else None
    table = tables()
    shared = [*[0.9] * 4, 1e-8, 2, 0.1, table, table if two else None]
    return [kernel, parameter, parameter.clone(), *codes, *shared, *scales, 0.0, 1.0]


def call_of(operator: str, given: list[object]) -> Call:
    metas = tuple(TensorMeta(tuple(a.shape), a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in given)
    return Call(operator, metas, (), (), "", "optimizer")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantised", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
def test_temporaries_of_every_kernel(kernel: str, quantised: bool, dtype: torch.dtype, library: Any) -> None:
    name = UPDATE if quantised else "optimizer_update_32bit"
    tables = library.functional.create_dynamic_map
    given = arguments(kernel, (77, 1001), dtype, quantised=quantised, tables=tables)
    (history,) = record_allocations(getattr(torch.ops.bitsandbytes, name).default, [given])
    measured = max(itertools.accumulate(nbytes for _, nbytes in history))
    call = call_of(f"bitsandbytes.{name}.default", given)
    predicted = sum(step.nbytes for step in InnerAllocations([call]).of(call))
    print(f"predicted {predicted}, measured {measured}, ratio {predicted / measured:.5f}")
    assert 0.9999 <= predicted / measured <= 1.0001
    assert InnerAllocations([call], "cuda").of(call) == (RESULTS,)


def test_an_unknown_kernel_counts_as_the_one_that_takes_most() -> None:
    weight = TensorMeta((64, 64), (64, 1), torch.float32)
    sizes = {
        kernel: sum(step.nbytes for step in InnerAllocations([]).of(call))
        for kernel in (*KERNELS, "new")
        if (call := Call(f"bitsandbytes.{UPDATE}.default", (kernel, weight, weight), (), (), "", "optimizer"))
    }
    assert sizes["new"] == max(sizes.values())


def step_of(net: nn.Module, stepper: torch.optim.Optimizer | None, x: Tensor) -> None:
    classification_loss(net(x)).backward()
    if stepper is not None:
        stepper.step()
    net.zero_grad(set_to_none=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [wide, deep])
@pytest.mark.parametrize("name", EIGHT_BIT)
def test_peak_of_a_step(name: str, make: Callable[[], nn.Module], dtype: torch.dtype, library: Any) -> None:
    def life() -> None:
        model = make().to(dtype)
        stepper = OPTIMIZERS[name](model.parameters())
        for _ in range(2):
            step_of(model, stepper, torch.zeros(8, *SHAPE, dtype=dtype))

    trace = trace_step(make, input_shape=SHAPE, batch_size=8, optimizer=name, dtype=dtype)
    line = timeline(trace)
    if make is wide and dtype == torch.float32:
        assert line.peak_call is not None
        assert "optimizer_update_8bit" in line.peak_call.operator
    measured = measure_peak(life).allocator_peak_bytes
    print(f"predicted {line.peak_bytes}, measured {measured}, ratio {line.peak_bytes / measured:.4f}")
    assert 0.99 <= line.peak_bytes / measured <= 1.01


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_state_and_update(name: str, library: Any) -> None:
    """A byte per element and four per block of 256, from 4096 elements on; the tables, 1 KiB each, once."""
    model = wide()
    costs = measure_costs(wide, input_shape=SHAPE, batch_size=8, optimizer=name)
    sizes = [p.numel() for p in model.parameters()]
    per_state = sum(n + 4 * -(-n // 256) if n >= 4096 else 4 * n for n in sizes)
    assert costs.optimizer_bytes == STATES[name] * (per_state + 1024)
    assert costs.optimizer_bytes < 0.27 * STATES[name] * 4 * sum(sizes)

    for p in model.parameters():
        p.grad = torch.ones_like(p)
    stepper = OPTIMIZERS[name](model.parameters())
    first = measure_peak(stepper.step)
    # the tables are made with the optimiser, before its first step
    assert costs.optimizer_bytes == pytest.approx(first.allocated_after_bytes + STATES[name] * 1024, rel=0.01)
    assert costs.update_bytes == pytest.approx(measure_peak(stepper.step).allocator_peak_bytes, rel=0.01)


@pytest.mark.parametrize("update_in_backward", [False, True])
@pytest.mark.parametrize("name", ["sgd-8bit", "adamw-8bit"])
def test_a_plan_needs_what_it_says(name: str, update_in_backward: bool, library: Any) -> None:
    times = predicted_times(measure_costs(deep, input_shape=SHAPE, batch_size=8, optimizer=name), RATES)
    options: dict[str, Any] = {"input_shape": SHAPE, "batch_size": 8, "optimizer": name, "times": times}
    keep_all = edgetrain.plan(deep(), **options)
    budget = int(0.7 * keep_all.peak_bytes)
    plan = edgetrain.plan(deep(), budget=budget, update_in_backward=update_in_backward, micro_batches=1, **options)
    assert set(plan.modes) != {"store"}

    def life() -> None:
        model = deep()
        net = edgetrain.wrap(model, plan, optimizer=OPTIMIZERS[name] if update_in_backward else None)
        stepper = None if update_in_backward else OPTIMIZERS[name](model.parameters())
        x = torch.zeros(8, *SHAPE)
        for _ in range(2):
            step_of(net, stepper, x)

    measured = measure_peak(life).allocator_peak_bytes
    print(f"predicted {plan.peak_bytes}, measured {measured}, ratio {plan.peak_bytes / measured:.4f}")
    assert 0.99 <= plan.peak_bytes / measured <= 1.01
    assert plan.peak_bytes <= budget


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident set from /proc")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the library loads its CUDA kernels too, which are larger")
def test_the_library_counts_as_part_of_the_process(library: Any) -> None:
    """What the import adds to a process that has taken a step."""
    code = (
        "import torch, pathlib, re\n"
        "def kib(): return int(re.search(r'VmRSS:\\s*(\\d+)', pathlib.Path('/proc/self/status').read_text())[1])\n"
        "weight = torch.nn.Parameter(torch.zeros(1))\n"
        "weight.grad = torch.zeros(1)\n"
        "torch.optim.SGD([weight], lr=0.1, fused=True).step()\n"
        "before = kib()\n"
        "import bitsandbytes\n"
        "print(kib() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    measured = int(done.stdout) * 1024

    def libraries(optimizer: str) -> int:
        found = edgetrain.estimate(deep, input_shape=SHAPE, batch_size=2, optimizer=optimizer)
        return next(line.nbytes for line in found.lines if line.name == "libraries")

    predicted = libraries("sgd-8bit") - libraries("sgd")
    print(f"predicted {predicted}, measured {measured}, ratio {predicted / measured:.3f}")
    assert 1.0 <= predicted / measured <= 1.15


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_without_the_library_the_error_names_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=name) as raised:
        trace_step(deep, input_shape=SHAPE, batch_size=2, optimizer=name)
    assert "edgetrain[eightbit]" in raised.value.action
    with pytest.raises(MissingExtraError):
        measure_costs(deep, input_shape=SHAPE, batch_size=2, optimizer=name)
