"""Seconds of a training step: added up from block times, against the whole step.

Two sums for every network and mode: of the times that a stopwatch took of the blocks one by one, and of those that
the roofline gives from this host's rates. The whole step is forward pass, loss, backward pass and optimiser of the
wrapped model. Steps and stopwatch alternate, and the least of each counts: another process only ever adds to them.

    python tools/step_prediction.py
    python tools/step_prediction.py --networks hybrid18 resnet20 --rounds 5 --json
    OMP_NUM_THREADS=1 python tools/step_prediction.py --processor-time    # where other work runs beside it
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args
from unittest import mock

import torch
from environment import publish
from timm_networks import create
from torch import nn

import edgetrain
from edgetrain.memory import (
    OPTIMIZERS,
    OperatorRates,
    classification_loss,
    measure_costs,
    measured_times,
    predicted_times,
    program_seconds,
    rates_of,
)
from edgetrain.planner import Plan, UniformMode

# name, batch, pixels of a side
CASES: dict[str, tuple[int, int]] = {
    "hybrid18": (64, 32),
    "revnet18": (64, 32),
    "resnet20": (64, 32),
    "timm:resnet50": (16, 64),
}
SHORT_S = 0.2  # of one calibrated case


def make(name: str) -> nn.Module:
    """The network, with 10 classes."""
    torch.manual_seed(0)
    if name.startswith("timm:"):
        return create(name.removeprefix("timm:"), num_classes=10)
    return edgetrain.create_model(name, num_classes=10)


def host_rates(device: str, clock: Callable[[], float]) -> OperatorRates:
    """Of this host, as ``edgetrain calibrate`` measures them, on the clock that the steps are measured on."""
    from edgetrain.cli.calibrate import profile_of
    from edgetrain.targets.calibrate import calibrate

    kind: Literal["cpu", "cuda"] = "cuda" if device.startswith("cuda") else "cpu"
    with mock.patch("time.perf_counter", clock):
        calibration = calibrate(kind, case_seconds=SHORT_S)
    return rates_of(profile_of(calibration, name="this-host", device=kind))


def stepper(model: nn.Module, plan: Plan, batch: torch.Tensor, clock: Callable[[], float]) -> Callable[[], float]:
    """Seconds of one step of ``plan``, each time it is called."""
    net = copy.deepcopy(model)
    wrapped = edgetrain.wrap(net, plan)
    optimizer = OPTIMIZERS["sgd"]([p for p in net.parameters() if p.requires_grad])
    for group in optimizer.param_groups:
        group["lr"] = 0.0

    def step() -> float:
        began = clock()
        classification_loss(wrapped(batch)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if batch.is_cuda:
            torch.cuda.synchronize()
        return clock() - began

    return step


def measure(
    name: str,
    batch_size: int,
    side: int,
    rounds: int,
    rates: OperatorRates,
    device: str,
    clock: Callable[[], float],
) -> list[dict[str, Any]]:
    """A row for each mode."""
    model, shape = make(name).to(device), (3, side, side)
    batch = torch.randn(batch_size, *shape, device=device)
    costs = measure_costs(make(name), input_shape=shape, batch_size=batch_size, measured=False)
    predicted = predicted_times(costs, rates)
    plans: dict[UniformMode, Plan] = {
        mode: edgetrain.uniform_plan(model, mode, input_shape=shape, batch_size=batch_size)
        for mode in get_args(UniformMode)
    }
    steps = {mode: stepper(model, plan, batch, clock) for mode, plan in plans.items()}
    for step in steps.values():
        step()
    whole: dict[UniformMode, list[float]] = {mode: [] for mode in plans}
    summed: dict[UniformMode, list[float]] = {mode: [] for mode in plans}
    spent = []
    for _ in range(rounds):
        began = time.perf_counter()
        measured = measured_times(model, input_shape=shape, batch_size=batch_size, clock=clock)
        spent.append(time.perf_counter() - began)
        for mode, plan in plans.items():
            summed[mode].append(program_seconds(plan.program, measured))
            whole[mode] += [steps[mode]() for _ in range(3)]
    return [
        {
            "network": name,
            "batch": batch_size,
            "side": side,
            "mode": mode,
            "whole_s": min(whole[mode]),
            "measured_s": min(summed[mode]),
            "predicted_s": program_seconds(plan.program, predicted),
            "measured_ratio": min(summed[mode]) / min(whole[mode]),
            "predicted_ratio": program_seconds(plan.program, predicted) / min(whole[mode]),
            "stopwatch_s": max(spent),
        }
        for mode, plan in plans.items()
    ]


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--batch", type=int, help="instead of each network's own")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processor-time", action="store_true", help="count it in place of seconds of a clock")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    parser.add_argument("--out", type=Path, help="write the JSON document to this file too")
    arguments = parser.parse_args()
    stream = sys.stderr if arguments.json else sys.stdout
    clock = time.process_time if arguments.processor_time else time.perf_counter
    rates = host_rates(arguments.device, clock)
    rows: list[dict[str, Any]] = []
    print(f"{'network':<14} {'mode':<17}      step  measured  ratio predicted  ratio", file=stream)
    for name in arguments.networks:
        batch_size, side = CASES[name]
        for row in measure(name, arguments.batch or batch_size, side, arguments.rounds, rates, arguments.device, clock):
            rows.append(row)
            print(
                f"{name:<14} {row['mode']:<17} {row['whole_s'] * 1e3:>6.1f} ms {row['measured_s'] * 1e3:>6.1f} ms "
                f"{row['measured_ratio']:>6.2f} {row['predicted_s'] * 1e3:>6.1f} ms {row['predicted_ratio']:>6.2f}",
                file=stream,
                flush=True,
            )
    publish(rows, out=arguments.out, as_json=arguments.json, seed=0)


if __name__ == "__main__":
    main()
