"""Fine-tuning inside a cap against the same network, seeds and data keeping everything; and what decoding takes.

A hybrid network is trained on grey images (Fashion-MNIST) and adapted to photographs of magnetic tiles (Huang, Qiu,
Yuan 2018), each run in a fresh process through the command line, with its defaults but for what is named here. With
--keep, runs that are there are not made again, and one that was stopped goes on. Inside the cap the fastest plan that
fits is taken, which may invert blocks and then differs by rounding, unless --snr-limit inf forbids it; how far the
gradients of one of its steps are from those of plain autograd stands beside it. The first seed is trained in the cap by
recomputation too, which computes the same bits as keeping everything. The exported graph goes through ``edgetrain
infer`` with the test photographs.

    python tools/finetune_bench.py --pretrain DIR --data DIR --out docs/results/finetune_cpu.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from environment import publish
from PIL import Image

from edgetrain.cli.trained import load_run, run_images
from edgetrain.memory.estimate import estimate
from edgetrain.planner import Plan
from edgetrain.runtime import wrap
from edgetrain.train import Recipe
from edgetrain.train.run_record import RunRecord

WAYS = {"planned": "inside the cap", "recompute": "inside the cap, recomputing", "keep_all": "keeping everything"}
"""Mode -> what it is called."""

MIB = 2**20
TOOLS = Path(__file__).resolve().parent
"""Where the command runs: a function in a module that is here can be named to it."""

FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "JPEG": ("JPEG", {}),
    "progressive JPEG": ("JPEG", {"progressive": True, "subsampling": 0}),
    "PNG": ("PNG", {"compress_level": 1}),
}
"""Name -> format and options of a photograph of 4000x3000."""

DECODE = """
import json, sys
from pathlib import Path
from edgetrain.targets import return_large_blocks
from edgetrain.train.data.decode import decode_image, decoding_bytes

def kib(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

return_large_blocks(2**20)
small, large = sys.argv[1:]
decode_image(small, path=small, channels=3, size=(64, 64))
Path("/proc/self/clear_refs").write_text("5")
before = kib("VmRSS")
decode_image(large, path=large, channels=3, size=(64, 64))
peak = (kib("VmHWM") - before) * 1024
print(json.dumps([peak, decoding_bytes(large, channels=3, size=(64, 64))]))
"""


def command(*words: str | Path) -> dict[str, Any]:
    """The result of one command of edgetrain in a fresh process."""
    arguments = [sys.executable, "-m", "edgetrain.cli.main", *map(str, words), "--json", "--quiet"]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True, cwd=TOOLS)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def made(folder: Path, *words: str | Path) -> dict[str, Any]:
    """As :func:`command` into ``folder``, or what is there from before; a run that was stopped goes on."""
    kept = folder / "result.json"
    if kept.exists():
        return json.loads(kept.read_text())
    if any((folder / "checkpoints").glob("*.safetensors")):
        return command("resume", folder)
    return command(*words, "--out", folder)


def finetuned(arguments: argparse.Namespace, runs: Path, mode: str, seed: int) -> dict[str, Any]:
    """One row: a run inside the budget, or one that keeps everything."""
    capped = mode != "keep_all"
    folder = runs / f"{mode}-{seed}"
    result = made(
        folder,
        *("finetune", "--from", runs / "pretrained", "--data", arguments.data, "--mode", mode, "--seed", str(seed)),
        *("--budget", arguments.budget if capped else "none", "--epochs", str(arguments.epochs)),
        *("--batch-size", str(arguments.batch_size), "--image-size", str(arguments.image_size)),
        *(() if arguments.learning_rate is None else ("--learning-rate", str(arguments.learning_rate))),
        *(() if arguments.snr_limit is None or mode != "planned" else ("--snr-limit", str(arguments.snr_limit))),
    )
    return {
        "label": WAYS[mode],
        "seed": seed,
        "accuracy": result["accuracy"],
        "macro_f1": result["macro_f1"],
        "exported_accuracy": exported_accuracy(Path(result["export"]), arguments.data / "test"),
        "recall": {row["name"]: row["recall"] for row in result["per_class"]},
        "confusion": result["confusion"],
        "losses": [epoch["loss"] for epoch in result["history"]],
        "peak_bytes": result["peak_bytes"],
        "planned_bytes": result["planned_bytes"] or step_bytes(folder),
        "budget_bytes": result["budget_bytes"],
        "events": len(result["events"]),
        "modes": dict(Counter(Plan.from_json((folder / "plan.json").read_text()).modes)),
        "images_per_second": result["history"][-1]["images_per_second"],
        "batch_size": result["batch_size"],
        "epochs": len(result["history"]),
        "input_shape": result["input_shape"],
        "images": result["images"],
    }


def exported_accuracy(graph: Path, photographs: Path) -> float:
    """Part of ``photographs`` (a folder per class) to whose class the exported graph puts them first."""
    words = [sys.executable, "-m", "edgetrain.cli.main", "infer", str(graph), str(photographs), "--json"]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)["predictions"]
    return sum(Path(one["image"]).parent.name == one["label"] for one in found) / len(found)


def step_bytes(run: Path) -> int:
    """Predicted peak of a step of ``run``, whose plan is of one mode and says none."""
    trained, plan = load_run(run), Plan.from_json((run / "plan.json").read_text())
    return estimate(
        trained.model,
        input_shape=trained.record.input_shape,
        batch_size=plan.input_shape[0],
        optimizer=Recipe().optimizer_for(trained.model),
        wrap=lambda model: wrap(model, plan),
    ).peak_bytes


def largest_class(run: Path) -> float:
    """Part of the test images that are of the most common class: the accuracy of calling everything that."""
    counts = [row["images"] for row in json.loads((run / "result.json").read_text())["per_class"]]
    return max(counts) / sum(counts)


def gradient_difference(run: Path) -> float:
    """Norm of the difference between the gradients of a step by the plan of ``run`` and by plain autograd, over theirs.

    On its network as it is at the end, and a batch of its test images.
    """
    trained, plan = load_run(run), Plan.from_json((run / "plan.json").read_text())
    images = run_images(trained.record, split="test", count=plan.input_shape[0])
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (trained.record.mean, trained.record.std))
    model, batch = trained.model.train(), (images.pixels - mean) / std
    assert images.labels is not None
    gradients = []
    for network in (model, wrap(model, plan)):  # both normalise by the batch, not by what they have seen
        model.zero_grad()
        F.cross_entropy(network(batch), images.labels).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    plain, planned = gradients
    return float((planned - plain).norm() / plain.norm())


def decoding() -> list[dict[str, Any]]:
    """What decoding a photograph of 12 megapixels for 64x64 takes, as predicted and as growth of a process."""
    rows = []
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        for name, (kind, options) in FORMATS.items():
            files = [f"{folder}/small", f"{folder}/large"]
            for file, size in zip(files, ((40, 40), (4000, 3000)), strict=True):
                Image.fromarray(noise).resize(size).save(file, kind, **options)
            done = subprocess.run([sys.executable, "-c", DECODE, *files], capture_output=True, text=True, check=True)
            measured, predicted = json.loads(done.stdout)
            rows.append({"format": name, "peak_bytes": measured, "predicted_bytes": predicted})
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, and by plan less keeping everything in points, with its standard error.

    And whether the plan, and recomputation, gave what keeping everything did: every epoch's loss, and as many test
    images of each class taken for each other.
    """
    planned, recomputed, kept = ([row for row in rows if row["label"] == label] for label in WAYS.values())
    found: dict[str, Any] = {}
    for key in ("accuracy", "macro_f1"):
        differences = [100 * (one[key] - other[key]) for one, other in zip(planned, kept, strict=True)]
        spread = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else None
        found[key] = {of[0]["label"]: statistics.mean(row[key] for row in of) for of in (planned, kept)}
        found[key] |= {"difference_points": statistics.mean(differences), "standard_error_points": spread}
    same = ("losses", "confusion", "accuracy", "macro_f1")
    for name, of in (("plan", planned), ("recomputing", recomputed)):
        if of:
            found[f"{name}_is_the_same"] = all(
                one[key] == other[key] for one, other in zip(of, kept, strict=False) for key in same
            )
    return found


def main() -> None:
    """Trains, adapts in both ways, measures decoding, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrain", type=Path, required=True, help="images to train on first")
    parser.add_argument("--data", type=Path, required=True, help="the photographs")
    parser.add_argument("--model", default="hybrid18", help="of the zoo, or module:function of a module here")
    parser.add_argument("--limit-pretrain", type=int, default=4000)
    parser.add_argument("--pretrain-epochs", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--budget", default="300MiB")
    parser.add_argument("--learning-rate", type=float, help="of fine-tuning, else the command's default")
    parser.add_argument("--snr-limit", type=float, help="of the plan, else the command's default; inf: no noise")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--no-recompute", action="store_true", help="leave the run by recomputation out")
    parser.add_argument("--keep", type=Path, help="folder of the runs")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    parser.add_argument("--out", type=Path, help="write the JSON document to this file too")
    arguments = parser.parse_args()
    arguments.pretrain, arguments.data = arguments.pretrain.resolve(), arguments.data.resolve()
    shown = sys.stderr if arguments.json else sys.stdout
    with tempfile.TemporaryDirectory() as folder:
        runs = (arguments.keep or Path(folder)).resolve()
        pretrained = made(
            runs / "pretrained",
            *("train", "--model", arguments.model, "--data", arguments.pretrain, "--batch-size", "32"),
            *("--image-size", "32", "--mode", "keep_all"),
            *("--limit-train", str(arguments.limit_pretrain), "--limit-test", "1000"),
            *("--epochs", str(arguments.pretrain_epochs)),
        )
        rows = []
        for seed in range(arguments.seeds):
            for mode in WAYS:
                if mode == "recompute" and (seed > 0 or arguments.no_recompute):
                    continue
                row = finetuned(arguments, runs, mode, seed)
                rows.append(row)
                print(
                    f"seed {seed} {row['label']:<27} accuracy {row['accuracy']:.2%}  macro-F1 {row['macro_f1']:.2%}  "
                    f"peak {row['peak_bytes'] / MIB:.0f} MiB  planned {row['planned_bytes'] / MIB:.0f} MiB",
                    file=shown,
                    flush=True,
                )
        first = RunRecord.read(runs / "pretrained")  # one that was kept may have had other options
        assert first.training is not None
        publish(
            rows,
            out=arguments.out,
            as_json=arguments.json,
            summary=summary(rows),
            model=first.model,
            pretrained={
                "data": Path(first.data).name,
                "images": first.training.limit_train,
                "epochs": len(pretrained["history"]),
                "test_accuracy": pretrained["history"][-1]["test_accuracy"],
            },
            largest_class=largest_class(runs / "planned-0"),
            gradient_difference=gradient_difference(runs / "planned-0"),
            decoding=decoding(),
        )


if __name__ == "__main__":
    main()
