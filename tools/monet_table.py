"""Overhead of plans at the budgets of MONeT's published table, predicted and measured.

Shah, Wu, Mohan, Chidambaram, Kraehenbuehl, "Memory optimization for deep networks" (MONeT), ICLR 2021: overhead over
keeping everything, measured by its authors on a GPU of 16 GB. Here each network of the same batch is planned to the
same fractions of the peak of plain autograd, which keeps everything with torch's own operators. Its overhead is that
over the time of plain autograd with channels first or last, whichever is faster here. Block times are measured on this
machine on as many samples as are quick, and continued to the batch.

A step of that batch takes 14 GB: what is measured is a small batch, planned to keep the same part of what grows with
the batch, against keeping everything, in rounds in which each plan runs one step, in a heap that keeps what is freed,
as edgetrain's own runs do where a cap has room (:func:`edgetrain.targets.keep_freed_blocks`). UNet
is left out, no library that is used here has one; GoogLeNet is our own (tools/googlenet.py).

    python tools/monet_table.py
    python tools/monet_table.py --networks resnet50 --rounds 3
    python tools/monet_table.py --out docs/results/monet_table_cpu.json
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from environment import KeptRows, earlier_rows, publish, versions
from googlenet import googlenet
from planner_bench import OPTIMIZER, Contestant
from timm_networks import create
from torch import Tensor, nn

import edgetrain
from edgetrain.memory import Costs, measured_times, program_seconds, simulate
from edgetrain.memory.times import Times
from edgetrain.nn.layouts import with_channels_last
from edgetrain.planner import Plan, Planner
from edgetrain.planner.search import Candidate
from edgetrain.targets import keep_freed_blocks

INPUT = (3, 224, 224)


@dataclass(frozen=True)
class Published:
    """A network of the table.

    Attributes:
        few: samples in the batch that is measured.
        keep_all_gb: peak of keeping everything.
        overheads: (GB, part of the time of keeping everything).
    """

    name: str
    batch: int
    few: int
    keep_all_gb: float
    overheads: tuple[tuple[float, float], ...]

    def make(self) -> nn.Module:
        """With weights of seed 0."""
        torch.manual_seed(0)
        return googlenet() if self.name == "googlenet" else create(self.name)


TABLE = (
    Published(
        *("resnet50", 184, 16, 15.06),
        ((10.01, 0.0322), (9.01, 0.0468), (8.01, 0.0556), (6.99, 0.0728), (6.00, 0.0931), (4.99, 0.1195)),
    ),
    Published(
        *("googlenet", 320, 16, 14.93),
        ((9.98, 0.0713), (8.99, 0.0787), (8.01, 0.0844), (7.02, 0.0971), (6.01, 0.1214), (4.99, 0.1577)),
    ),
    Published(
        *("mobilenetv2_100", 272, 16, 14.46),
        ((10.02, 0.0240), (9.01, 0.0310), (8.02, 0.0477), (7.01, 0.0553), (6.01, 0.0755), (5.01, 0.0872)),
    ),
    Published(
        *("vgg16", 176, 8, 14.12),
        ((9.71, -0.0530), (8.66, -0.0464), (7.88, -0.0218), (6.82, 0.0199), (5.90, 0.0544), (5.51, 0.0911)),
    ),
)


def rows_of(network: Published, *, seconds: float, rounds: int) -> list[dict[str, Any]]:
    """A row per published budget."""
    keep_freed_blocks()
    model = network.make()
    planners, keep_all = _planners(model, network.batch, seconds)
    rows: list[dict[str, Any]] = []
    for budget_gb, published in network.overheads:
        fraction = budget_gb / network.keep_all_gb
        row: dict[str, Any] = {"network": network.name, "batch": network.batch, "fraction": fraction}
        row |= {"keep_all_bytes": keep_all.peak_bytes, "published_overhead": published}
        row["budget_bytes"] = int(fraction * keep_all.peak_bytes)
        began = time.perf_counter()
        plan = _fastest(planners, row["budget_bytes"])
        row["plan_s"] = time.perf_counter() - began
        if plan is not None:
            row |= {"peak_bytes": plan.peak_bytes, "overhead": _seconds(plan) / keep_all.seconds - 1}
            row |= {"summary": plan.summary().splitlines()[0], "channels_last": plan.program.channels_last}
        rows.append(row)
    growing = [_growing(row["budget_bytes"], planners[0].costs(network.batch), keep_all) for row in rows]
    for row, measured in zip(rows, _measured(network, model, growing, seconds=seconds, rounds=rounds), strict=True):
        row |= measured
    return rows


def _measured(
    network: Published, model: nn.Module, growing: list[float], *, seconds: float, rounds: int
) -> list[dict[str, Any]]:
    """The same part of what grows with the batch, on a few samples."""
    x, labels = torch.randn(network.few, *INPUT), torch.zeros(network.few, dtype=torch.long)
    plain = []
    for images in (x, with_channels_last(x)):
        plain.append(Contestant("keep all", (own := copy.deepcopy(model)), own, images, labels))
        plain[-1].measure()
    planners, stored = _planners(model, network.few, seconds)
    costs = planners[0].costs(network.few)
    runners: list[Contestant | None] = []
    rows: list[dict[str, Any]] = []
    for part in growing:
        fixed = _fixed(costs)
        budget = int(fixed + part * (stored.peak_bytes - fixed))
        row: dict[str, Any] = {"few": network.few, "few_budget_bytes": budget}
        plan = _fastest(planners, budget)
        if plan is None:
            runners.append(None)
        else:
            runner = Contestant("plan", (own := copy.deepcopy(model)), edgetrain.wrap(own, plan), x, labels)
            runner.measure()
            runners.append(runner)
            row |= {"few_peak_bytes": runner.peak_bytes, "few_predicted_bytes": plan.peak_bytes}
            row["few_predicted_overhead"] = _seconds(plan) / stored.seconds - 1
        rows.append(row)
    racing = [*plain, *(runner for runner in runners if runner is not None)]
    order = random.Random(0)
    for _ in range(rounds):
        for runner in order.sample(racing, len(racing)):
            runner.time()
    keep_all = min(plain, key=lambda runner: statistics.median(runner.seconds))
    for row, found in zip(rows, runners, strict=True):
        if found is not None:
            ratios = [one / other for one, other in zip(found.seconds, keep_all.seconds, strict=True)]
            row["few_overhead"] = statistics.median(ratios) - 1
    return rows


def _planners(model: nn.Module, batch: int, seconds: float) -> tuple[list[Planner], Candidate]:
    """One for each layout, and the step of plain autograd, which keeps everything: its peak, its time in the faster."""
    plain = _with_torch_pooling(model)
    planners, steps = [], []
    for channels_last in (False, True):
        of_plain, of_plan = (_planner(network, batch, seconds, channels_last) for network in (plain, model))
        program = edgetrain.uniform_plan(
            plain, "keep_all", input_shape=INPUT, batch_size=batch, channels_last=channels_last
        ).program
        peak_bytes = simulate(program, of_plain[0].costs(batch, channels_last)).peak_bytes
        steps.append(Candidate(program, peak_bytes, program_seconds(program, of_plain[1])))
        planners.append(of_plan[0])
    return planners, replace(steps[0], seconds=min(step.seconds for step in steps))


def _planner(model: nn.Module, batch: int, seconds: float, channels_last: bool) -> tuple[Planner, Times]:
    times = measured_times(
        model,
        input_shape=INPUT,
        batch_size=batch,
        optimizer=OPTIMIZER,
        budget_s=seconds,
        channels_last=channels_last,
    )
    return Planner(model, input_shape=INPUT, batch_size=batch, optimizer=OPTIMIZER, times=times), times


def _fastest(planners: list[Planner], budget_bytes: int) -> Plan | None:
    found = [plan for planner in planners if (plan := planner.fitting(budget_bytes)) is not None]
    return min(found, key=_seconds, default=None)


class _TorchMaxPool(nn.Module):
    """Max pooling that a plan does not know as such."""

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.pool = (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, *self.pool)


def _with_torch_pooling(model: nn.Module) -> nn.Module:
    """A copy of ``model``."""
    plain = copy.deepcopy(model)
    for path, layer in list(plain.named_modules()):
        if isinstance(layer, nn.MaxPool2d):
            plain.set_submodule(path, _TorchMaxPool(layer))
    return plain


def _fixed(costs: Costs) -> int:
    """Bytes that do not grow with the batch."""
    return costs.weight_bytes + costs.gradient_bytes + costs.optimizer_bytes


def _growing(budget_bytes: int, costs: Costs, keep_all: Candidate) -> float:
    """The part of what grows with the batch that a budget leaves."""
    return (budget_bytes - _fixed(costs)) / (keep_all.peak_bytes - _fixed(costs))


def _seconds(plan: Plan) -> float:
    assert plan.step_seconds is not None
    return plan.step_seconds


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    head = f"{row['network']:<16} batch {row['batch']} at {row['fraction']:.1%} of the keep-all peak: "
    ours = f"{row['overhead']:+.1%}" if "overhead" in row else "no plan fits"
    few = f"batch {row['few']}: "
    if "few_overhead" in row:
        off = row["few_predicted_bytes"] / row["few_peak_bytes"] - 1
        few += f"{row['few_overhead']:+.1%} measured, {row['few_predicted_overhead']:+.1%} predicted, peak {off:+.1%}"
    else:
        few += "no plan fits"
    return f"{head}{ours} (published {row['published_overhead']:+.1%}); {few}; {row.get('summary', '')}"


def main() -> None:
    """Measures, plans, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=[], help="names; all without it")
    parser.add_argument("--seconds", type=float, default=30.0, help="for the block times of a network")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    parser.add_argument("--out", type=Path, help="write the JSON document to this file too")
    parser.add_argument("--onto", type=Path, help="with --networks: the others' lines are those of this result")
    parser.add_argument("--keep", type=Path, help="keep every network's lines in this file too, and go on from there")
    arguments = parser.parse_args()
    kept, commit = KeptRows(arguments.keep), versions()["edgetrain"]
    others = earlier_rows(arguments.onto)
    rows: list[dict[str, Any]] = []
    for network in TABLE:
        if arguments.networks and network.name not in arguments.networks:
            rows += [row for row in others if row["network"] == network.name]
            continue
        known = kept.get(network.name)
        found = rows_of(network, seconds=arguments.seconds, rounds=arguments.rounds) if known is None else known["rows"]
        if known is None:
            kept.add(network.name, {"rows": found})
        rows += [row | {"commit": commit} for row in found]
        for row in found:
            print(line(row), file=sys.stderr if arguments.json else sys.stdout, flush=True)
    publish(rows, out=arguments.out, as_json=arguments.json, seed=0)


if __name__ == "__main__":
    main()
