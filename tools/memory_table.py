"""Table 3.1 of the source side by side: printed, closed formula, measured.

Bytes per input pixel of one training step beyond weights, their gradients, the optimiser's state and the batch:
at the allocator (torch's own events on the CPU, max_memory_allocated on CUDA), and as growth of the whole process
(CPU): with large blocks going back to the kernel when they are freed, as ``edgetrain train`` does under a budget, and
with the C library's own heap. Every case runs in fresh processes, one for each kind of measurement.

    python tools/memory_table.py                           # batch 512 of 3x32x32
    python tools/memory_table.py --json
    python tools/memory_table.py --out docs/results/memory_table_cpu.json
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from environment import publish

from edgetrain.memory import (
    PRINTED,
    measure_peak,
    measure_process_growth,
    resnet_bytes_per_pixel,
    reversible_bytes_per_pixel,
)


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        printed: bytes per pixel in the source; None where it prints none.
        closed: bytes per pixel by the closed formula; None where it has none.
    """

    label: str
    model: str
    mode: str
    closed: float | None = None
    printed: float | None = None
    options: dict[str, Any] = field(default_factory=dict)


KINDS = ("allocator", "process", "own heap")
CASES = (
    Case("ResNet, keep all", "resnet18", "keep_all", resnet_bytes_per_pixel(), PRINTED["resnet18"]),
    Case(
        "RevNet 32 channels, invert",
        "revnet18",
        "invert",
        reversible_bytes_per_pixel("revnet18"),
        PRINTED["revnet18"],
        {"widths": (32, 64, 128, 256)},
    ),
    Case("RevNet 40 channels, invert", "revnet18", "invert", reversible_bytes_per_pixel("revnet18", 40)),
    Case("i-RevNet, invert", "irevnet18", "invert", reversible_bytes_per_pixel("irevnet18"), PRINTED["irevnet18"]),
    Case(
        "layer-wise, invert layer-wise",
        "layerwise18",
        "invert_layerwise",
        reversible_bytes_per_pixel("layerwise18"),
        PRINTED["layerwise18"],
    ),
    Case(
        "hybrid, invert layer-wise",
        "hybrid18",
        "invert_layerwise",
        reversible_bytes_per_pixel("hybrid18"),
        PRINTED["hybrid18"],
    ),
    Case("hybrid, keep all", "hybrid18", "keep_all"),
    Case("layer-wise, keep all", "layerwise18", "keep_all"),
    Case("RevNet 32 channels, keep all", "revnet18", "keep_all", options={"widths": (32, 64, 128, 256)}),
)


def measure(case: Case, kind: str, batch_size: int, size: int, device: str) -> float:
    """Bytes per pixel of ``case`` in this process; ``kind`` is "allocator", "process" or "own heap"."""
    import torch
    import torch.nn.functional as F

    import edgetrain
    from edgetrain.nn.slices import SLICE_BYTES
    from edgetrain.targets import return_large_blocks

    if kind == "process":
        return_large_blocks(2 * SLICE_BYTES)
    torch.manual_seed(0)
    model = edgetrain.create_model(case.model, **case.options).to(device)
    plan = edgetrain.uniform_plan(model, case.mode, input_shape=(3, size, size), batch_size=batch_size)  # type: ignore[arg-type]
    net = edgetrain.wrap(model, plan)
    x = torch.randn(batch_size, 3, size, size, device=device)
    labels = torch.randint(0, 10, (batch_size,), device=device)

    def step(images: torch.Tensor, targets: torch.Tensor) -> None:
        F.cross_entropy(net(images), targets).backward()

    step(x[:2], labels[:2])  # gradients exist from now on, libraries are loaded
    if kind != "allocator":
        taken = measure_process_growth(lambda: step(x, labels))
    else:
        taken = measure_peak(lambda: step(x, labels), device=device).allocator_peak_bytes
    return taken / (batch_size * size * size)


def in_fresh_process(index: int, kind: str, arguments: argparse.Namespace) -> float:
    """:func:`measure` of ``CASES[index]`` in a process of its own."""
    command = [sys.executable, __file__, "--case", str(index), "--kind", kind, "--device", arguments.device]
    command += ["--batch", str(arguments.batch), "--size", str(arguments.size)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{CASES[index].label}: {done.stderr[-2000:]}")
    return float(done.stdout.strip().splitlines()[-1])


def rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per case."""
    table = []
    for index, case in enumerate(CASES):
        row: dict[str, Any] = {
            "label": case.label,
            "model": case.model,
            "mode": case.mode,
            "printed": case.printed,
            "closed_form": case.closed,
            "allocator": in_fresh_process(index, "allocator", arguments),
        }
        if arguments.device == "cpu":
            row["process"] = in_fresh_process(index, "process", arguments)
            row["process_over_allocator"] = row["process"] / row["allocator"]
            row["own_heap"] = in_fresh_process(index, "own heap", arguments)
        table.append(row)
        print(_line(row), file=sys.stderr if arguments.json else sys.stdout, flush=True)
    return table


def _line(row: dict[str, Any]) -> str:
    cells = [row["printed"], row["closed_form"], row["allocator"], row.get("process"), row.get("own_heap")]
    numbers = " ".join(f"{'-' if cell is None else format(cell, '.1f'):>10}" for cell in cells)
    ratio = row.get("process_over_allocator")
    return f"{row['label']:<32} {numbers} {'-' if ratio is None else format(ratio, '.2f'):>19}"


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    parser.add_argument("--out", type=Path, help="write the JSON document to this file too")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=KINDS, default="allocator", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        case = CASES[arguments.case]
        print(measure(case, arguments.kind, arguments.batch, arguments.size, arguments.device))
        return
    if not arguments.json:
        heads = " ".join(f"{head:>10}" for head in ("printed", "closed", "allocator", "process", "own heap"))
        print(f"{'bytes per input pixel':<32} {heads} {'process / allocator':>19}")
    publish(rows(arguments), out=arguments.out, as_json=arguments.json, seed=0)


if __name__ == "__main__":
    main()
