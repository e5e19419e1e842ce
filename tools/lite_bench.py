"""A training step with and without PyTorch: peak of the whole process, time to the first step, images per second.

    python tools/lite_bench.py --batch 32 --out docs/results/lite_cpu.json

Each row is a process of its own, one after the other: PyTorch keeping everything, PyTorch with the plan, both as
exported steps in edgetrain.lite, and ONNX Runtime's training artifacts (SGD without momentum; its arena off and on).
Batches are random numbers. The time to the first step begins before the interpreter and ends with that step. All of it
is done ``--repeats`` times in turn; a row has the medians, the highest peak, and the median of the ratios to the step
of PyTorch with the same plan in the same turn. The exported plan also runs where the process may have no more data than
``--cap``, and so does PyTorch: RLIMIT_DATA, set before the interpreter starts, which counts the heap and private
writable mappings but not the files of libraries.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from edgetrain.lite.budget import one_thread_for_blas
from edgetrain.units import MIB, parse_size

PLANS = ("keep_all", "invert")
ORT_TRAINING, ORT_WITH_ARENA = "ort-training", "ort-training, arena"
CLASSES = 10
SHAPE = (3, 32, 32)


def main() -> None:
    """Prints a row per process, or one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="hybrid18")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3, help="turns; medians are shown")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cap", default="200MiB", help="of the data of a whole process")
    parser.add_argument("--out", type=Path, help="file of the JSON document")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(_worker(options)))
        return
    rows = list(_rows(options))
    from environment import publish  # imports torch, which most of the processes below must not

    settings = {name: getattr(options, name) for name in ("model", "batch", "steps", "repeats", "threads")}
    publish(rows, out=options.out, as_json=options.json, seed=0, settings=settings)
    if not options.json:
        for row in rows:
            print("  ".join(f"{key} {value}" for key, value in row.items()))


def _rows(options: argparse.Namespace) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        for plan in PLANS:
            _run(options, f"export:{plan}:{folder}/{plan}")
        _run(options, f"export:{ORT_TRAINING}:{folder}/{ORT_TRAINING}")
        turns = [list(_turn(options, folder)) for _ in range(options.repeats)]
    for rows in zip(*turns, strict=True):
        yield _median(rows)


def _turn(options: argparse.Namespace, folder: str) -> Any:
    """A row per process, without a cap and then with it."""
    seconds: dict[str, float] = {}
    for runner, plan in (("torch", PLANS[0]), ("torch", PLANS[1]), ("lite", PLANS[0]), ("lite", PLANS[1])):
        row = {"runner": runner, "plan": plan} | _run(options, f"{runner}:{plan}:{folder}/{plan}")
        own = seconds.setdefault(plan, row["step_seconds"])  # PyTorch's
        yield row | {"times_torch": row["step_seconds"] / own}
    for runner in (ORT_TRAINING, ORT_WITH_ARENA):
        row = _run(options, f"{runner}:keep_all:{folder}/{ORT_TRAINING}")
        times = row["step_seconds"] / seconds["keep_all"]
        yield {"runner": runner, "plan": "keep_all"} | row | {"times_torch": times}
    cap = parse_size(options.cap)
    for runner in ("torch", "lite"):
        row = {"runner": runner, "plan": "invert", "cap_bytes": cap}
        yield row | _run(options, f"{runner}:invert:{folder}/invert", cap=cap)


def _median(rows: Any) -> dict[str, Any]:
    """One row of several turns; it ran where all of them did."""
    failed = [row for row in rows if not row["ran"]]
    if failed:
        return dict(failed[0])
    shared = {key: value for key, value in rows[0].items() if not isinstance(value, float)}
    medians = {key: statistics.median(row[key] for row in rows) for key in rows[0] if isinstance(rows[0][key], float)}
    highest = {"process_peak_bytes": max(row["process_peak_bytes"] for row in rows)}
    mib = round(highest["process_peak_bytes"] / MIB, 1)
    return shared | {key: round(value, 4) for key, value in medians.items()} | highest | {"process_peak_mib": mib}


def _run(options: argparse.Namespace, worker: str, *, cap: int | None = None) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", worker, "--model", options.model]
    for name in ("batch", "steps", "threads"):
        command += [f"--{name}", str(getattr(options, name))]

    def limit() -> None:
        if cap is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (cap, cap))

    began = time.time()
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    if done.returncode:
        if cap is None:
            raise SystemExit(done.stderr)
        return {"ran": False, "error": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "first" in result:
        result["first_step_seconds"] = round(result.pop("first") - began, 3)
    return {"ran": True} | result


def _worker(options: argparse.Namespace) -> dict[str, Any]:
    runner, plan, folder = options.worker.split(":", 2)
    if runner == "export":
        return _export(options, plan, Path(folder))
    step = _torch_step(options, plan) if runner == "torch" else _array_step(options, runner, folder)
    step()
    first, seconds = time.time(), []
    for _ in range(options.steps):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    return {
        "first": first,
        "images_per_second": round(options.batch / min(seconds), 2),
        "step_seconds": round(min(seconds), 4),
        "process_peak_bytes": peak,
        "process_peak_mib": round(peak / MIB, 1),
    }


def _model(options: argparse.Namespace, plan: str) -> tuple[Any, Any]:
    import torch

    import edgetrain

    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    model = edgetrain.create_model(options.model, num_classes=CLASSES)
    if plan == ORT_TRAINING:
        return model, None
    return model, edgetrain.uniform_plan(
        model, plan, input_shape=SHAPE, batch_size=options.batch, update_in_backward=plan != "keep_all"
    )


def _export(options: argparse.Namespace, plan: str, folder: Path) -> dict[str, Any]:
    from edgetrain.export.train_step.write import Data, export_train_step

    model, made = _model(options, plan)
    if plan == ORT_TRAINING:
        from edgetrain.export import export_ort_training

        export_ort_training(model, folder, input_shape=SHAPE, batch_size=options.batch, optimizer="sgd")
        return {}
    data = Data(tuple("0123456789"), (0.5,) * 3, (0.25,) * 3)
    return {"nodes": export_train_step(model, made, folder, data=data).nodes}


def _torch_step(options: argparse.Namespace, plan: str) -> Any:
    import torch

    import edgetrain
    from edgetrain.train import Recipe

    model, made = _model(options, plan)
    make = Recipe().optimizer_for(model)
    net = edgetrain.wrap(model.train(), made, optimizer=make)
    last = None if net.optimizers else make(list(model.parameters()))
    x, y = torch.randn(options.batch, *SHAPE), torch.randint(0, CLASSES, (options.batch,))

    def step() -> None:
        torch.nn.functional.cross_entropy(net(x), y).backward()
        if last is not None:
            last.step()
            last.zero_grad()

    return step


def _array_step(options: argparse.Namespace, runner: str, folder: str) -> Any:
    one_thread_for_blas()  # as the command line of edgetrain.lite does
    import numpy as np

    random = np.random.default_rng(0)
    x = random.standard_normal((options.batch, *SHAPE), dtype=np.float32)
    y = random.integers(0, CLASSES, options.batch)
    if runner in (ORT_TRAINING, ORT_WITH_ARENA):
        from edgetrain.ort_steps import OrtSteps

        steps = OrtSteps(folder, threads=options.threads, arena=runner == ORT_WITH_ARENA)
        return lambda: steps.step(x, y, rate=0.0)
    import edgetrain.lite

    run = edgetrain.lite.load(folder, threads=options.threads)
    return lambda: run.step(x, y, 0.0)


if __name__ == "__main__":
    main()
