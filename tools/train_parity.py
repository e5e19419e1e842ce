"""Training by inversion against the same network, seed and data keeping everything.

Each mode runs in a fresh process through the code of `edgetrain train`; the inverting one inside an enforced cap.

    python tools/train_parity.py --data DIR --limit-train 10000 --epochs 6 --out docs/results/train_parity.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from environment import publish

MODES = (("invert_layerwise", "inverting"), ("keep_all", "keeping everything"))


def train(arguments: argparse.Namespace, mode: str) -> dict[str, Any]:
    """The result of one training run in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "edgetrain.cli.main", "train", "--json", "--quiet"]
        command += ["--model", arguments.model, "--data", str(arguments.data), "--mode", mode]
        command += ["--epochs", str(arguments.epochs), "--batch-size", str(arguments.batch_size)]
        command += ["--seed", str(arguments.seed), "--out", folder]
        if arguments.limit_train:
            command += ["--limit-train", str(arguments.limit_train)]
        if arguments.limit_test:
            command += ["--limit-test", str(arguments.limit_test)]
        if mode != "keep_all":
            command += ["--budget", arguments.budget]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    result.pop("checkpoint")
    return result


def main() -> None:
    """Trains both ways, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="hybrid18")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--limit-train", type=int)
    parser.add_argument("--limit-test", type=int)
    parser.add_argument("--budget", default="200MiB", help="enforced on the inverting run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    parser.add_argument("--out", type=Path, help="write the JSON document to this file too")
    arguments = parser.parse_args()
    rows = []
    for mode, label in MODES:
        rows.append({"label": label, **train(arguments, mode)})
        last = rows[-1]["history"][-1]
        print(
            f"{label:<20} test {last['test_accuracy']:.2%}  loss {last['loss']:.4f}  "
            f"peak {rows[-1]['peak_bytes'] / 2**20:.0f} MiB  {last['images_per_second']:.0f} images/s",
            file=sys.stderr if arguments.json else sys.stdout,
            flush=True,
        )
    summary = {
        "accuracy_difference_points": 100
        * (rows[0]["history"][-1]["test_accuracy"] - rows[1]["history"][-1]["test_accuracy"]),
        "peak_ratio": rows[1]["peak_bytes"] / rows[0]["peak_bytes"],
    }
    publish(rows, out=arguments.out, as_json=arguments.json, summary=summary)


if __name__ == "__main__":
    main()
