"""How long edgetrain takes to say whether ResNet-50 fits, and what tracing a large step takes itself.

- `edgetrain estimate` in fresh processes, next to a bare `import torch`, on which nobody here has an influence;
- the trace of a step at batch 256: seconds and peak of the process.

    python tools/estimate_speed.py
    python tools/estimate_speed.py --json
    python tools/estimate_speed.py --out docs/results/estimate_speed_cpu.json
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
INPUT = (3, 224, 224)
DEVICES = ("cpu", "orin-nano-8gb")
STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))  # width, blocks, stride of the first


def resnet50(num_classes: int = 1000) -> Any:
    """ResNet-50 (He et al. 2016), the stride in the 3x3 convolutions; without timm, whose import takes seconds."""
    from torch import Tensor, nn

    class Bottleneck(nn.Module):
        def __init__(self, inputs: int, width: int, stride: int) -> None:
            super().__init__()
            self.conv1, self.norm1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
            self.norm2 = nn.BatchNorm2d(width)
            self.conv3, self.norm3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
            self.relu = nn.ReLU(inplace=True)
            self.shortcut: nn.Module = nn.Identity()
            if inputs != 4 * width or stride != 1:
                projection = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)
                self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(4 * width))

        def forward(self, x: Tensor) -> Tensor:
            y = self.relu(self.norm1(self.conv1(x)))
            y = self.norm3(self.conv3(self.relu(self.norm2(self.conv2(y)))))
            y += self.shortcut(x)
            return self.relu(y)

    stem = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
    layers: list[nn.Module] = [*stem]
    channels = 64
    for width, blocks, first in STAGES:
        for stride in (first, *[1] * (blocks - 1)):
            layers.append(Bottleneck(channels, width, stride))
            channels = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


def trace(batch: int) -> dict[str, float]:
    """Traces a step of SGD with momentum here and now."""
    import torch

    from edgetrain.memory import trace_step
    from edgetrain.memory.timeline import timeline

    imported_bytes = process_peak_bytes()
    began = time.perf_counter()
    peak_bytes = timeline(trace_step(resnet50, input_shape=INPUT, batch_size=batch)).peak_bytes
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "process_peak_bytes": process_peak_bytes(),
        "imported_bytes": imported_bytes,
        "predicted_bytes": peak_bytes,
        "threads": torch.get_num_threads(),
    }


def process_peak_bytes() -> int:
    """VmHWM of this process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def run(*arguments: str) -> str:
    """What ``python ARGUMENTS`` prints in a fresh process, in the folder of this file."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=FOLDER, capture_output=True, text=True, check=True, env=os.environ
    ).stdout


def seconds_of(*arguments: str) -> float:
    """Wall time of ``python ARGUMENTS``, start of the interpreter included."""
    began = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - began


def row(label: str, seconds: list[float], **more: Any) -> dict[str, Any]:
    """The median of ``seconds`` with its range."""
    middle = statistics.median(seconds)
    return {"label": label, "seconds": middle, "seconds_low": min(seconds), "seconds_high": max(seconds), **more}


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=256, help="of the step that is traced")
    parser.add_argument("--trace-here", action="store_true", help="trace once in this process and print JSON")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    parser.add_argument("--out", type=Path, help="write the JSON document to this file too")
    arguments = parser.parse_args()
    if arguments.trace_here:
        print(json.dumps(trace(arguments.batch)))
        return
    from environment import publish

    shape = "x".join(map(str, INPUT))
    estimate = ["-m", "edgetrain.cli.main", "estimate", "estimate_speed:resnet50", "--input", shape, "--batch", "32"]
    cases = {"import torch": ["-c", "import torch"]}
    cases |= {f"edgetrain estimate, {device}": [*estimate, "--device", device] for device in DEVICES}
    seconds: dict[str, list[float]] = {label: [] for label in cases}
    traces = []
    run("-c", "import torch, edgetrain")  # from the disk
    for _ in range(arguments.repeats):
        for label, command in cases.items():
            seconds[label].append(seconds_of(*command))
        traces.append(json.loads(run(Path(__file__).name, "--trace-here", "--batch", str(arguments.batch))))
    rows = [row(label, taken) for label, taken in seconds.items()]
    most = functools.reduce(lambda a, b: a if a["process_peak_bytes"] >= b["process_peak_bytes"] else b, traces)
    kept = {name: most[name] for name in ("process_peak_bytes", "imported_bytes", "predicted_bytes")}
    rows.append(row(f"trace, batch {arguments.batch}", [one["seconds"] for one in traces], **kept))
    stream = sys.stderr if arguments.json else sys.stdout
    for one in rows:
        line = f"{one['label']:<34} {one['seconds']:.2f} s ({one['seconds_low']:.2f} to {one['seconds_high']:.2f})"
        peak = f", process {one['process_peak_bytes'] / 2**20:.0f} MiB" if "process_peak_bytes" in one else ""
        print(line + peak, file=stream)
    publish(rows, out=arguments.out, as_json=arguments.json)


if __name__ == "__main__":
    main()
