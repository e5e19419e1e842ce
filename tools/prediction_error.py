"""How far predictions of a step's memory are from what is measured.

Networks x batch sizes x (keep all, recompute every block, invert where the network can) x (SGD, AdamW). Predictions
come from traces under fake tensors (edgetrain.memory); every case is measured in a fresh process, on the CPU: the
growth of the process (VmHWM) over two steps first, torch's allocator (profiler events, model and optimiser included)
over two more. On a CUDA device: max_memory_allocated and max_memory_reserved.

Peers, on the plain cases of the middle batch, where they are installed: torch's MemTracker, torchinfo, accelerate.

    python tools/prediction_error.py                          # all of it
    python tools/prediction_error.py --networks resnet18 resnet50
    python tools/prediction_error.py --out docs/results/prediction_error_cpu.json
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from environment import KeptRows, publish

OPTIMIZERS = ("sgd", "adamw")
PLAIN = "keep_all"


@dataclass(frozen=True)
class Network:
    """A network of the table; ``modes`` besides keep all."""

    name: str
    size: int
    batches: tuple[int, int, int]
    modes: tuple[str, ...] = ("recompute",)
    timm: bool = False


SMALL, LARGE = (16, 32, 64), (2, 4, 8)
NETWORKS = (
    Network("resnet18", 32, SMALL),
    Network("resnet20", 32, SMALL),
    Network("revnet18", 32, SMALL, ("recompute", "invert")),
    Network("irevnet18", 32, SMALL, ("recompute", "invert")),
    Network("layerwise18", 32, SMALL, ("recompute", "invert_layerwise")),
    Network("hybrid18", 32, SMALL, ("recompute", "invert_layerwise")),
    Network("resnet50", 128, LARGE, timm=True),
    Network("mobilenetv2_100", 128, LARGE, timm=True),
    Network("mobilenetv3_large_100", 128, LARGE, timm=True),
    Network("efficientnet_b0", 128, LARGE, timm=True),
    Network("convnext_tiny", 128, LARGE, timm=True),
    Network("vit_small_patch16_224", 128, LARGE, timm=True),
    Network("densenet121", 128, LARGE, timm=True),
)


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    network: str
    size: int
    batch: int
    mode: str
    optimizer: str
    timm: bool

    def make(self) -> Any:
        """The network with fresh weights."""
        if not self.timm:
            from edgetrain import create_model

            return create_model(self.network)
        from timm_networks import create

        return create(self.network, **({"img_size": self.size} if self.network.startswith("vit") else {}))

    def wrap(self, model: Any) -> Any:
        """What is trained: the network itself, or as its plan says."""
        import edgetrain

        if self.mode == PLAIN:
            return model
        shape = (3, self.size, self.size)
        return edgetrain.wrap(model, edgetrain.uniform_plan(model, self.mode, input_shape=shape, batch_size=self.batch))  # type: ignore[arg-type]


def cases(names: list[str]) -> Iterator[Case]:
    """Every case of the networks called ``names``, or of all."""
    for network in NETWORKS:
        if names and network.name not in names:
            continue
        for batch in network.batches:
            for mode in (PLAIN, *network.modes):
                for optimizer in OPTIMIZERS:
                    yield Case(network.name, network.size, batch, mode, optimizer, network.timm)


def predict(case: Case, device: str) -> dict[str, int]:
    """Bytes that the step will take."""
    from edgetrain.memory import estimate

    found = estimate(
        case.make,
        input_shape=(3, case.size, case.size),
        batch_size=case.batch,
        device=device,
        optimizer=case.optimizer,
        wrap=case.wrap,
    )
    if device == "cpu":
        return {"allocator": found.peak_bytes, "process": found.process_peak_bytes}
    return {"allocator": found.peak_bytes, "reserved": found.reserved_bytes}


def measure(case: Case, device: str) -> dict[str, int]:
    """Bytes that steps of ``case`` take in this process."""
    import torch

    from edgetrain.memory import OPTIMIZERS as FACTORIES
    from edgetrain.memory import classification_loss, measure_peak
    from edgetrain.targets import return_large_blocks, select_target

    def steps() -> None:
        torch.manual_seed(0)
        model = case.make().to(device).train()
        net = case.wrap(model)
        optimizer = FACTORIES[case.optimizer](model.parameters())
        x = torch.randn(case.batch, 3, case.size, case.size, device=device)
        for _ in range(2):
            classification_loss(net(x)).backward()
            optimizer.step()
            optimizer.zero_grad()

    if device != "cpu":
        steps()  # libraries
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        steps()
        return {
            "allocator": torch.cuda.max_memory_allocated(device),
            "reserved": torch.cuda.max_memory_reserved(device),
        }
    return_large_blocks()
    _warm_up(case)
    target = select_target("cpu")
    target.start()
    steps()
    process = target.peak_bytes()
    gc.collect()
    return {"allocator": measure_peak(steps).allocator_peak_bytes, "process": process}


def _warm_up(case: Case) -> None:
    """Loads what is loaded once, whatever the model: Python modules, the optimiser's, OpenMP's threads."""
    import torch
    from torch import nn

    from edgetrain.memory import OPTIMIZERS as FACTORIES
    from edgetrain.memory import classification_loss

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    optimizer = FACTORIES[case.optimizer](model.parameters())
    net: Any = model
    if case.mode != PLAIN:
        import edgetrain

        net = edgetrain.wrap(model, edgetrain.uniform_plan(model, "recompute", input_shape=(3, 8, 8), batch_size=4))
    with torch.device("meta"):
        case.make()
    classification_loss(net(torch.randn(4, 3, 8, 8))).backward()
    optimizer.step()


def peers(case: Case) -> dict[str, int]:
    """Bytes that other tools say a plain step takes, by their names."""
    import torch

    torch.manual_seed(0)
    model, x = case.make().train(), torch.randn(case.batch, 3, case.size, case.size)
    found = {"MemTracker": _mem_tracker(case, model, x)}
    if importlib.util.find_spec("torchinfo") is not None:
        found["torchinfo"] = _torchinfo(model, x)
    if importlib.util.find_spec("accelerate") is not None:
        found["accelerate"] = _accelerate(model)
    return found


def _mem_tracker(case: Case, model: Any, x: Any) -> int:
    """torch's own tracker (torch.distributed._tools), around real steps."""
    import torch
    from torch.distributed._tools.mem_tracker import MemTracker

    from edgetrain.memory import OPTIMIZERS as FACTORIES
    from edgetrain.memory import classification_loss

    optimizer = FACTORIES[case.optimizer](model.parameters())
    tracker = MemTracker()
    tracker.track_external(model, optimizer, x)
    with tracker:
        for _ in range(2):
            classification_loss(model(x)).backward()
            optimizer.step()
            optimizer.zero_grad()
            tracker.reset_mod_stats()
    return int(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])


def _torchinfo(model: Any, x: Any) -> int:
    """Input, outputs of the layers forward and backward, parameters: its "estimated total size"."""
    from torchinfo import summary

    found = summary(model, input_data=x, verbose=0)
    return int(found.total_input + found.total_output_bytes + found.total_param_bytes)


def _accelerate(model: Any) -> int:
    """Four times the weights, what ``accelerate estimate-memory`` gives for training with Adam."""
    from accelerate.utils import calculate_maximum_sizes

    return 4 * int(calculate_maximum_sizes(model)[0])


def in_fresh_process(case: Case, kind: str, device: str) -> dict[str, int]:
    """:func:`measure` or :func:`peers` in a process of its own."""
    command = [sys.executable, __file__, "--case", json.dumps(asdict(case)), "--kind", kind, "--device", device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{case}: {done.stderr[-2000:]}")
    result: dict[str, int] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def rows_of(chosen: list[Case], arguments: argparse.Namespace) -> Iterator[tuple[Case, dict[str, Any]]]:
    """The lines of the table, in order; the next ones are measured while one is predicted."""
    kept = KeptRows(arguments.keep)
    keys = {case: json.dumps([asdict(case), arguments.device, arguments.peers]) for case in chosen}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        measuring = {
            case: pool.submit(in_fresh_process, case, "measured", arguments.device)
            for case, key in keys.items()
            if kept.get(key) is None
        }
        try:
            for case, key in keys.items():
                row = kept.get(key)
                if row is None:
                    row = _row(case, measuring[case].result(), arguments)
                    kept.add(key, row)
                yield case, row
        finally:
            pool.shutdown(cancel_futures=True)


def _row(case: Case, measured: dict[str, int], arguments: argparse.Namespace) -> dict[str, Any]:
    predicted = predict(case, arguments.device)
    row: dict[str, Any] = {**asdict(case), "measured": measured, "predicted": predicted}
    row["error"] = {key: predicted[key] / measured[key] - 1 for key in measured}
    middle = next(network.batches[1] for network in NETWORKS if network.name == case.network)
    if arguments.peers and case.mode == PLAIN and case.batch == middle and arguments.device == "cpu":
        row["peers"] = in_fresh_process(case, "peers", arguments.device)
        row["peer_errors"] = {name: nbytes / measured["allocator"] - 1 for name, nbytes in row["peers"].items()}
    return row


def summary_of(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Median and extremes of the errors, in percent, ours and the peers'."""
    errors: dict[str, list[float]] = {}
    for row in rows:
        for key, error in (*row["error"].items(), *row.get("peer_errors", {}).items()):
            errors.setdefault(key, []).append(100 * error)
    return {
        key: {
            "cases": len(values),
            "median_absolute": statistics.median(map(abs, values)),
            "worst_absolute": max(map(abs, values)),
            "lowest": min(values),
            "highest": max(values),
        }
        for key, values in errors.items()
    }


def _line(case: Case, row: dict[str, Any]) -> str:
    cells = [f"{case.network:<22} {case.batch:>3} {case.mode:<16} {case.optimizer:<5}"]
    for key, error in row["error"].items():
        sizes = " / ".join(f"{row[source][key] / 2**20:.1f}" for source in ("predicted", "measured"))
        cells.append(f"{key} {sizes} MiB {100 * error:+.2f} %")
    cells += [f"{name} {100 * error:+.1f} %" for name, error in row.get("peer_errors", {}).items()]
    return "  ".join(cells)


def main() -> None:
    """Predicts, measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=[], help="names; all without it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="cases measured side by side, each in its process")
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    parser.add_argument("--out", type=Path, help="write the JSON document to this file too")
    parser.add_argument("--keep", type=Path, help="keep every line in this file too; what it has is not measured again")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=("measured", "peers"), default="measured", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        case = Case(**json.loads(arguments.case))
        print(json.dumps(measure(case, arguments.device) if arguments.kind == "measured" else peers(case)))
        return
    stream = sys.stderr if arguments.json else sys.stdout
    rows = []
    for case, row in rows_of(list(cases(arguments.networks)), arguments):
        rows.append(row)
        print(_line(case, row), file=stream, flush=True)
    summary = summary_of(rows)
    for key, figures_of in summary.items():
        print(key, ", ".join(f"{name} {value:.2f}" for name, value in figures_of.items()), file=stream)
    publish(rows, out=arguments.out, as_json=arguments.json, summary_percent=summary, seed=0)


if __name__ == "__main__":
    main()
