"""Folded against unfolded networks in ONNX Runtime: latency, memory, nodes, paired in one run.

Each network is written twice in evaluation mode with running statistics of its own: as it stands, parametrisations and
batch norms included (torch's newer graph writer without its optimiser, which folds), and folded by
``edgetrain.export_onnx``. All graphs of a network are open at once; in each round every one of them runs once, in
random order, and the ratios are medians over the rounds. A DiracNet is compared with the plain network of its shape
besides. Memory is the growth of a fresh process from loading the graph to the end of its first run.

    python tools/export_bench.py
    pip install onnxscript     # of the newer graph writer
    python tools/export_bench.py --batch 16 --rounds 50
    python tools/export_bench.py --out docs/results/export_bench_cpu.json
"""

from __future__ import annotations

import argparse
import collections
import logging
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from environment import publish
from onnxscript.optimizer import fold_constants
from torch import Tensor, nn

import edgetrain
from edgetrain.targets import select_target

SHAPE = (3, 32, 32)
ALLOWED = {"Conv", "Relu", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Flatten", "Gemm", "Reshape"}
"""All that a folded DiracNet may have: convolutions, ReLU, pooling and the classifier."""


@dataclass(frozen=True)
class Case:
    """A network.

    Attributes:
        plain: the network of the same shape without Dirac weights.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    plain: str | None = None


CASES = (
    Case("diracnet-28-1", plain="plain-28-1"),
    Case("diracnet-34-2", plain="plain-34-2"),
    Case("hybrid18", {"width": 16}),
    Case("revnet18"),
    Case("wrn-16-2"),
)


def trained(name: str, options: dict[str, Any]) -> nn.Module:
    """Weights of seed 0, statistics of normal random images."""
    torch.manual_seed(0)
    model = edgetrain.create_model(name, **options)
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(16, *SHAPE))
    return model.eval()


def write_unfolded(model: nn.Module, images: Tensor, path: Path) -> None:
    """``model`` as it stands, with a batch of the size of ``images``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            opset_version=18,
            optimize=False,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
        )
    assert program is not None
    fold_constants(program.model)  # ONNX Runtime lacks the comparison of booleans in which an identity matrix ends
    program.save(str(path))


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """With ONNX Runtime's own settings: it fuses what it can."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def memory_of(path: Path, batch_size: int) -> int:
    """Growth in bytes of a fresh process that loads and runs the graph."""
    command = [sys.executable, __file__, "--memory", str(path), "--batch", str(batch_size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.strip().splitlines()[-1])


def grow(path: Path, batch_size: int) -> int:
    """The same, in this process."""
    images = np.zeros((batch_size, *SHAPE), dtype=np.float32)
    target = select_target("cpu")
    target.start()
    session = open_session(path)
    session.run(["logits"], {"images": images})
    return target.peak_bytes()


def measure(case: Case, batch_size: int, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """One row per graph of the network."""
    images = torch.randn((batch_size, *SHAPE), generator=torch.Generator().manual_seed(1))
    model = trained(case.name, case.options)
    with torch.no_grad():
        expected = model(images).numpy()
    graphs = {"unfolded": folder / "unfolded.onnx", "folded": folder / "folded.onnx"}
    write_unfolded(model, images, graphs["unfolded"])
    edgetrain.export_onnx(model, graphs["folded"], input_shape=SHAPE, images=images, batch_size=batch_size)
    if case.plain is not None:
        graphs["plain, folded"] = folder / "plain.onnx"
        plain = trained(case.plain, case.options)
        edgetrain.export_onnx(plain, graphs["plain, folded"], input_shape=SHAPE, images=images, batch_size=batch_size)
    sessions = {label: open_session(path) for label, path in graphs.items()}
    feed = {"images": images.numpy()}
    seconds: dict[str, list[float]] = {label: [] for label in graphs}
    for number in range(-3, rounds):
        for label in random.Random(number).sample(list(sessions), len(sessions)):
            began = time.perf_counter()
            sessions[label].run(["logits"], feed)
            if number >= 0:
                seconds[label].append(time.perf_counter() - began)
    rows = []
    for label, path in graphs.items():
        nodes = onnx.load(str(path)).graph.node
        operators = collections.Counter(node.op_type for node in nodes if node.op_type != "Constant")
        against = "plain, folded" if label == "folded" and case.plain else "unfolded"
        row: dict[str, Any] = {
            "network": case.name,
            "graph": label,
            "batch_size": batch_size,
            "nodes": sum(operators.values()),
            "operators": dict(sorted(operators.items())),
            "latency_ms": 1e3 * statistics.median(seconds[label]),
            "over_unfolded": ratio(seconds[label], seconds["unfolded"]),
            "process_bytes": memory_of(path, batch_size),
            "file_bytes": path.stat().st_size,
        }
        if label == "folded" and case.plain:
            row["over_plain"] = ratio(seconds[label], seconds[against])
            row["only_plain_operators"] = set(operators) <= ALLOWED
        if label != "plain, folded":
            actual = sessions[label].run(["logits"], feed)[0]
            row["max_difference"] = float(np.abs(actual - expected).max() / np.abs(expected).max())
        rows.append(row)
    return rows


def ratio(seconds: list[float], others: list[float]) -> float:
    """Median over the rounds."""
    return statistics.median(a / b for a, b in zip(seconds, others, strict=True))


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    over_plain = f"{row['over_plain']:.3f}" if "over_plain" in row else "-"
    difference = f"{row['max_difference']:.1e}" if "max_difference" in row else "-"
    return (
        f"{row['network']:<15} {row['graph']:<14} {row['nodes']:>5} {row['latency_ms']:>9.2f} "
        f"{row['over_unfolded']:>9.3f} {over_plain:>7} {row['process_bytes'] / 2**20:>9.1f} {difference:>11}"
    )


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--networks", nargs="+", default=[case.name for case in CASES])
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    parser.add_argument("--out", type=Path, help="write the JSON document to this file too")
    parser.add_argument("--memory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # the graph writer tells of packages that it could use
    if arguments.memory is not None:
        print(grow(arguments.memory, arguments.batch))
        return
    stream = sys.stderr if arguments.json else sys.stdout
    heads = f"{'network':<15} {'graph':<14} {'nodes':>5} {'ms':>9} {'/unfolded':>9} {'/plain':>7} {'MiB':>9}"
    print(f"{heads} {'difference':>11}", file=stream)
    rows = []
    for case in CASES:
        if case.name not in arguments.networks:
            continue
        with tempfile.TemporaryDirectory() as folder:
            for row in measure(case, arguments.batch, arguments.rounds, Path(folder)):
                rows.append(row)
                print(line(row), file=stream, flush=True)
    publish(rows, out=arguments.out, as_json=arguments.json, seed=0)


if __name__ == "__main__":
    main()
