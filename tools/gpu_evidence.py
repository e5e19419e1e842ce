"""Everything that only a CUDA device can show, in one call of under ten minutes, written as one JSON file.

Table 3.1 at `max_memory_allocated`, step times against plain autograd, predicted against measured memory, and CIFAR-10
trained inside 400 MiB of the allocator. Without a CUDA device it says so, writes nothing and exits with 0.

    python tools/gpu_evidence.py --data DIR_WITH_CIFAR10 --out docs/results/gpu_evidence.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from environment import publish

TOOLS = Path(__file__).resolve().parent
TRAINING_LIMIT_S = 420
PREDICTED = ("resnet18", "hybrid18")


def tool(name: str, *arguments: str) -> list[dict[str, Any]]:
    """Rows of another tool, run on the CUDA device."""
    command = [sys.executable, str(TOOLS / name), "--device", "cuda", "--json", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    rows: list[dict[str, Any]] = json.loads(done.stdout)["rows"]
    return rows


def train(data: Path, epochs: int, budget: str) -> dict[str, Any]:
    """The hybrid network on CIFAR-10 inside ``budget``."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "edgetrain.cli.main", "train", "--json", "--quiet", "--out", folder]
        command += ["--model", "hybrid18", "--data", str(data), "--budget", budget]
        command += ["--epochs", str(epochs), "--batch-size", "512"]
        start = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=TRAINING_LIMIT_S)
    result: dict[str, Any] = json.loads(done.stdout)
    result.pop("checkpoint")
    return {"kind": "training", "seconds": time.perf_counter() - start, **result}


def main() -> None:
    """Measures on CUDA, or says that there is none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="CIFAR-10; without it nothing is trained")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--budget", default="400MiB")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    parser.add_argument("--out", type=Path, help="write the JSON document to this file too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured and nothing is written", file=sys.stderr)
        return
    rows: list[dict[str, Any]] = [{"kind": "memory", **row} for row in tool("memory_table.py")]
    rows += [{"kind": "time", **row} for row in tool("step_time.py", "--repeats", "20")]
    rows += [{"kind": "prediction", **row} for row in tool("prediction_error.py", "--networks", *PREDICTED)]
    if arguments.data is not None:
        rows.append(train(arguments.data, arguments.epochs, arguments.budget))
    publish(rows, out=arguments.out, as_json=arguments.json)


if __name__ == "__main__":
    main()
