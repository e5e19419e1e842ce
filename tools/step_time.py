"""Time of a training step against the same network keeping everything, paired in one run.

Each repeat times one step of either, alternating, after a warm-up; the ratio is the median over the pairs. "plain"
is the network itself under torch's autograd.

    python tools/step_time.py
    python tools/step_time.py --json
    python tools/step_time.py --out docs/results/step_time_cpu.json
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from environment import publish
from torch import nn

import edgetrain

CASES: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("RevNet, invert", "revnet18", "invert", {}),
    ("hybrid, invert layer-wise", "hybrid18", "invert_layerwise", {}),
    ("layer-wise, invert layer-wise", "layerwise18", "invert_layerwise", {}),
)


def measure(model: nn.Module, mode: str, batch_size: int, repeats: int, device: str) -> dict[str, Any]:
    """Seconds per step of ``mode`` and of plain autograd, and the median of their ratios."""
    plain = copy.deepcopy(model)
    plan = edgetrain.uniform_plan(model, mode, input_shape=(3, 32, 32), batch_size=batch_size)  # type: ignore[arg-type]
    planned = edgetrain.wrap(model, plan)
    x, labels = torch.randn(batch_size, 3, 32, 32, device=device), torch.randint(0, 10, (batch_size,), device=device)

    def seconds(net: nn.Module) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        F.cross_entropy(net(x), labels).backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for net in (planned, plain):
        seconds(net)
    pairs = [(seconds(planned), seconds(plain)) for _ in range(repeats)]
    ratios = sorted(a / b for a, b in pairs)
    return {
        "seconds": statistics.median(a for a, _ in pairs),
        "plain_seconds": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[0],
        "ratio_high": ratios[-1],
    }


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    parser.add_argument("--out", type=Path, help="write the JSON document to this file too")
    arguments = parser.parse_args()
    stream = sys.stderr if arguments.json else sys.stdout
    rows = []
    for label, name, mode, options in CASES:
        torch.manual_seed(0)
        model = edgetrain.create_model(name, **options).to(arguments.device)
        row = {"label": label, "model": name, "mode": mode}
        row |= measure(model, mode, arguments.batch, arguments.repeats, arguments.device)
        rows.append(row)
        print(
            f"{label:<32} {row['seconds']:.2f} s, plain {row['plain_seconds']:.2f} s: "
            f"{row['ratio']:.2f}x ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})",
            file=stream,
            flush=True,
        )
    publish(rows, out=arguments.out, as_json=arguments.json, seed=0)


if __name__ == "__main__":
    main()
