"""Many models on many devices: does a step fit, how large a batch, how many images per second.

Each model is traced once per mode and batch size, and the traces are replayed for every profile
(:mod:`edgetrain.report.devices`); models run in processes of their own, one per core.

    python tools/memory_report.py                                        # ten models, every profile
    python tools/memory_report.py --models resnet18 hybrid18 --devices gtx750 nano-4gb --batch 64
    python tools/memory_report.py --markdown
    python tools/memory_report.py --json --out docs/results/memory_report.json
"""

from __future__ import annotations

import argparse
import functools
import gc
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from environment import publish

from edgetrain import create_model
from edgetrain.cli.estimate import parse_shape
from edgetrain.profiles import load_profile, profile_names
from edgetrain.report import device_rows

MODELS = (  # those that take longest first: no core is idle at the end
    "resnet110",
    "hybrid18",
    "layerwise18",
    "irevnet18",
    "resnet56",
    "resnet44",
    "resnet32",
    "revnet18",
    "resnet18",
    "resnet20",
)


def rows_of(
    model: str, *, shape: tuple[int, int, int], batch_size: int, devices: tuple[str, ...]
) -> list[dict[str, Any]]:
    """A row per device and mode of ``model``."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    gc.disable()  # a trace makes a few large cycles and millions of objects without any: a fifth of the time
    started = time.perf_counter()
    profiles = [load_profile(name) for name in devices]
    found = device_rows(create_model(model), input_shape=shape, batch_size=batch_size, profiles=profiles)
    seconds = time.perf_counter() - started
    gc.collect()
    return [
        {
            "model": model,
            "device": row.device,
            "available_bytes": row.available_bytes,
            "at_most": row.at_most,
            "trains": row.trains,
            **fit.model_dump(),
            "seconds_for_the_model": seconds,
        }
        for row in found
        for fit in row.fits
    ]


def markdown(rows: list[dict[str, Any]]) -> str:
    """Models down, devices across: the largest batch, keeping everything / in the leanest uniform mode."""
    devices = list(dict.fromkeys(row["device"] for row in rows))
    lines = ["| model | " + " | ".join(devices) + " |", "|---|" + "---:|" * len(devices)]
    for model in dict.fromkeys(row["model"] for row in rows):
        cells = []
        for device in devices:
            batches = [row["largest_batch"] for row in rows if (row["model"], row["device"]) == (model, device)]
            cells.append(" / ".join("-" if batch is None else str(batch) for batch in batches))
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs all models and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME")
    parser.add_argument("--devices", nargs="+", default=profile_names(), metavar="PROFILE")
    parser.add_argument("--input", default="3x32x32", metavar="CxHxW")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    work = functools.partial(
        rows_of, shape=parse_shape(arguments.input), batch_size=arguments.batch, devices=tuple(arguments.devices)
    )
    started = time.perf_counter()
    # a forked process would inherit torch's threads in whatever state they are
    with ProcessPoolExecutor(arguments.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = [row for found in pool.map(work, arguments.models) for row in found]
    seconds = time.perf_counter() - started
    publish(
        rows, out=arguments.out, as_json=arguments.json, seconds=seconds, batch=arguments.batch, input=arguments.input
    )
    if arguments.json:
        return
    if arguments.markdown:
        print(markdown(rows))
        return
    for row in rows:
        fits = {True: "fits", False: "does not fit", None: "?"}[row["fits"]]
        batch = "-" if row["largest_batch"] is None else row["largest_batch"]
        rate = "-" if row["images_per_s"] is None else f"{row['images_per_s']:.1f}"
        needed = f"{row['needed_bytes'] / 2**20:.0f} MiB"
        print(f"{row['model']:<12} {row['device']:<20} {row['mode']:<17} {needed:>9} {fits:<12} {batch:>6} {rate:>9}")
    print(f"{seconds:.0f} s")


if __name__ == "__main__":
    main()
