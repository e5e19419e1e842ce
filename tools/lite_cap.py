"""Training where the whole process may have no more than a cap, with and without PyTorch.

    python tools/lite_cap.py --cifar cifar10 --out docs/results/lite_cap_cpu.json

For each data set, ``edgetrain train`` and the exported step of the same plan in edgetrain.lite: RLIMIT_DATA, set
before the interpreter starts, which counts every private writable mapping, touched or not. The peak is VmHWM: what was
resident at most, with the pages of libraries, which the limit does not count. Digits come with scikit-learn; of
CIFAR-10, in Parquet files, ``--train`` and ``--test`` images are taken, each class alike. The step is exported
untrained. Times are left out, so that it needs no quiet machine.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from edgetrain.units import MIB, parse_size

MODEL, SEED = "hybrid18", 0


def main() -> None:
    """Prints a row per data set and runner, or one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cap", default="200MiB", help="of the whole process")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=4, help="of digits")
    parser.add_argument("--cifar-epochs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cifar", type=Path, help="folder with CIFAR-10 as train.parquet and test.parquet")
    parser.add_argument("--train", type=int, default=4000, help="images of CIFAR-10")
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="file of the JSON document")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = list(_rows(options, Path(folder)))
    from environment import publish

    names = ("cap", "batch", "epochs", "cifar_epochs", "threads", "train", "test")
    settings = {"model": MODEL} | {name: getattr(options, name) for name in names}
    publish(rows, out=options.out, as_json=options.json, seed=SEED, settings=settings)
    if not options.json:
        for row in rows:
            print("  ".join(f"{key} {value}" for key, value in row.items()))


def _rows(options: argparse.Namespace, folder: Path) -> Any:
    sets = [("digits", _digits(folder / "digits.npz"), 16, options.epochs)]
    if options.cifar is not None:
        sets.append(("cifar10", _cifar(options, folder / "cifar10"), 32, options.cifar_epochs))
    for name, data, size, epochs in sets:
        step = folder / f"step-{name}"
        _export(options, step, size, epochs)
        shared = ["--data", str(data), "--epochs", str(epochs), "--quiet", "--json"]
        torch = ["-m", "edgetrain.cli.main", "train", *shared, "--model", MODEL, "--mode", "invert"]
        torch += ["--batch-size", str(options.batch), "--image-size", str(size), "--out", str(folder / f"run-{name}")]
        lite = ["-m", "edgetrain.lite", str(step), *shared, "--threads", str(options.threads)]
        if name == "digits":
            lite.append("--plain")  # a mirrored digit is another one
        for runner, words in (("torch", torch), ("lite", lite)):
            row = {"data": name, "image_size": size, "epochs": epochs, "runner": runner}
            yield row | _run(words, parse_size(options.cap))


def _run(words: list[str], cap_bytes: int) -> dict[str, Any]:
    """What became of the program ``words`` inside the cap."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (cap_bytes, cap_bytes))

    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, preexec_fn=limit)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        return {"cap_bytes": cap_bytes, "ran": False, "error": last[-200:]}
    result = json.loads(done.stdout.splitlines()[-1])
    first, last = result["history"][0], result["history"][-1]
    return {
        "cap_bytes": cap_bytes,
        "ran": True,
        "loss_first_epoch": round(first["loss"], 4),
        "loss_last_epoch": round(last["loss"], 4),
        "test_accuracy": round(last["test_accuracy"], 4),
        "process_peak_bytes": result["peak_bytes"],
        "process_peak_mib": round(result["peak_bytes"] / MIB, 1),
    }


def _digits(path: Path) -> Path:
    """Both splits, as ``--data digits`` has them, in an archive that needs no scikit-learn."""
    import numpy as np

    from edgetrain.train.data.digits import DigitsSource

    arrays = {}
    for split, prefix in (("train", ""), ("test", "test_")):
        source = DigitsSource(split)
        arrays[f"{prefix}images"] = np.stack([source.decode(k) for k in range(len(source))])
        arrays[f"{prefix}labels"] = source.labels
    np.savez(path, **arrays)
    return path


def _cifar(options: argparse.Namespace, folder: Path) -> Path:
    """The first images of each class as files in a folder per class."""
    from collections import Counter

    import pyarrow.parquet as parquet

    for split, count in (("train", options.train), ("test", options.test)):
        table = parquet.read_table(options.cifar / f"{split}.parquet").to_pylist()
        classes = len({row["label"] for row in table})
        seen: Counter[int] = Counter()
        for row in table:
            label = row["label"]
            if seen[label] < count // classes:
                path = folder / split / str(label) / f"{seen[label]:04}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(row["image"]["bytes"])
                seen[label] += 1
    return folder


def _export(options: argparse.Namespace, step: Path, size: int, epochs: int) -> None:
    """In a process of its own, as PyTorch stays in one that has imported it."""
    code = f"""
import torch, edgetrain
from edgetrain.export.train_step.write import Data, export_train_step
from edgetrain.train import Recipe
torch.manual_seed({SEED})
model = edgetrain.create_model({MODEL!r}, num_classes=10)
shape, batch = (3, {size}, {size}), {options.batch}
plan = edgetrain.uniform_plan(model, "invert", input_shape=shape, batch_size=batch, update_in_backward=True)
data = Data(tuple("0123456789"), (0.5,) * 3, (0.25,) * 3, {SEED})
export_train_step(model, plan, {str(step)!r}, data=data, recipe=Recipe(epochs={epochs}, batch_size=batch))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


if __name__ == "__main__":
    main()
