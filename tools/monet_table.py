"""Predicted overhead of plans at the budgets of MONeT's published table.

Shah, Wu, Mohan, Chidambaram, Kraehenbuehl, "Memory optimization for deep networks" (MONeT), ICLR 2021: overhead over
keeping everything, measured by its authors on a GPU, at budgets from 10 to 5 GB. Here each network of the same batch is
planned to the same fractions of its keep-all peak; block times are measured on this machine on as many samples as are
quick, and continued to the batch. GoogLeNet and UNet are left out: timm has neither.

    python tools/monet_table.py
    python tools/monet_table.py --out docs/results/monet_table_cpu.json
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from environment import publish
from timm_networks import create

from edgetrain.errors import BudgetError
from edgetrain.memory import measured_times
from edgetrain.planner import Planner


@dataclass(frozen=True)
class Published:
    """A network of the table.

    Attributes:
        keep_all_gb: peak of keeping everything.
        overheads: (GB, part of the time of keeping everything).
    """

    name: str
    batch: int
    keep_all_gb: float
    overheads: tuple[tuple[float, float], ...]


TABLE = (
    Published("resnet50", 184, 15.06, ((10.01, 0.032), (8.01, 0.056), (6.00, 0.093), (4.99, 0.1195))),
    Published("mobilenetv2_100", 272, 14.46, ((5.01, 0.087),)),
    Published("vgg16", 176, 14.12, ((5.51, 0.091),)),
)


def rows_of(network: Published, seconds: float) -> list[dict[str, Any]]:
    """A row per published budget."""
    torch.manual_seed(0)
    model, shape = create(network.name), (3, 224, 224)
    times = measured_times(model, input_shape=shape, batch_size=network.batch, budget_s=seconds)
    planner = Planner(model, input_shape=shape, batch_size=network.batch, times=times)
    keep_all = planner.plan()
    rows = []
    for budget_gb, overhead in network.overheads:
        fraction = budget_gb / network.keep_all_gb
        row: dict[str, Any] = {"network": network.name, "batch": network.batch, "fraction": fraction}
        row |= {"keep_all_bytes": keep_all.peak_bytes, "published_overhead": overhead}
        began = time.perf_counter()
        try:
            plan = planner.plan(int(fraction * keep_all.peak_bytes))
        except BudgetError as error:
            rows.append(row | {"infeasible": str(error)})
            continue
        row |= {"plan_s": time.perf_counter() - began, "peak_bytes": plan.peak_bytes}
        row |= {"overhead": plan.step_seconds / keep_all.step_seconds - 1, "summary": plan.summary().splitlines()[0]}
        rows.append(row)
    return rows


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    head = f"{row['network']:<16} batch {row['batch']} at {row['fraction']:.1%} of the keep-all peak: "
    if "infeasible" in row:
        return f"{head}no plan fits (published {row['published_overhead']:+.1%})"
    return f"{head}{row['overhead']:+.1%} (published {row['published_overhead']:+.1%}); {row['summary']}"


def main() -> None:
    """Measures, plans, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="for the block times of a network")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    parser.add_argument("--out", type=Path, help="write the JSON document to this file too")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for network in TABLE:
        rows += rows_of(network, arguments.seconds)
        for row in rows[-len(network.overheads) :]:
            print(line(row), file=sys.stderr if arguments.json else sys.stdout, flush=True)
    publish(rows, out=arguments.out, as_json=arguments.json, seed=0)


if __name__ == "__main__":
    main()
