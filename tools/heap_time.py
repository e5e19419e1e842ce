"""What page faults cost a training step, with each way of setting glibc's heap, paired in one run.

The step is plain autograd's, which keeps everything. Each way runs in a process of its own: ``default`` as a program
finds glibc; ``returned`` where large blocks go back to the kernel when they are freed
(:func:`edgetrain.targets.return_large_blocks`); ``kept`` where they stay (:func:`edgetrain.targets.keep_freed_blocks`).
In every round each takes one step, in random order; ratios are medians over the rounds.

    python tools/heap_time.py
    python tools/heap_time.py --networks hybrid18 resnet50 --rounds 20
    python tools/heap_time.py --out docs/results/heap_time_cpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from environment import publish
from planner_bench import CASES, Case, Contestant, build

from edgetrain.nn.layouts import with_channels_last
from edgetrain.nn.slices import SLICE_BYTES
from edgetrain.targets import keep_freed_blocks, return_large_blocks

WAYS = ("default", "returned", "kept")
_FIRST = 3  # steps before any is timed: glibc's own threshold has followed the program by then


def serve(case: Case, way: str, *, channels_last: bool) -> None:
    """A step for every line that comes in: its seconds, page faults and the most that the process has held."""
    if way == "returned":
        return_large_blocks(2 * SLICE_BYTES)
    elif way == "kept":
        keep_freed_blocks()
    model = build(case)
    x, labels = torch.randn(case.batch, 3, case.size, case.size), torch.zeros(case.batch, dtype=torch.long)
    runner = Contestant(way, model, model, with_channels_last(x) if channels_last else x, labels)
    for _ in range(_FIRST):
        runner.step()
    for _ in sys.stdin:
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        runner.step()
        seconds, usage = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
        print(json.dumps([seconds, usage.ru_minflt - before, 1024 * usage.ru_maxrss]), flush=True)


def measured(case: Case, rounds: int, *, channels_last: bool) -> dict[str, Any]:
    """A row."""
    command = [sys.executable, __file__, "--case", json.dumps(vars(case)), *(["--channels-last"] * channels_last)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    servers = {way: subprocess.Popen([*command, "--way", way], **pipes) for way in WAYS}
    try:
        return _row(case, servers, rounds, channels_last=channels_last)
    finally:
        for server in servers.values():
            server.kill()
            server.wait()


def _row(case: Case, servers: dict[str, subprocess.Popen[str]], rounds: int, *, channels_last: bool) -> dict[str, Any]:
    order, answers = random.Random(0), {way: list[list[float]]() for way in WAYS}
    for _ in range(rounds):
        for way in order.sample(WAYS, len(WAYS)):
            server = servers[way]
            assert server.stdin is not None
            assert server.stdout is not None
            server.stdin.write("\n")
            server.stdin.flush()
            answer = server.stdout.readline()
            if not answer:
                raise RuntimeError(f"{case.name}, {way}: the process ended with {server.wait()}")
            answers[way].append(json.loads(answer))
    row: dict[str, Any] = {"network": case.name, "batch": case.batch, "size": case.size, "channels_last": channels_last}
    for way in WAYS:
        seconds, faults, most = zip(*answers[way], strict=True)
        row[f"{way}_s"], row[f"{way}_faults"] = statistics.median(seconds), statistics.median(faults)
        row[f"{way}_resident_bytes"] = int(max(most))
        if way != "kept":
            ratios = [one[0] / kept[0] for one, kept in zip(answers[way], answers["kept"], strict=True)]
            row[f"{way}_over_kept"] = statistics.median(ratios)
    return row


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    ways = "; ".join(
        f"{way} {row[f'{way}_s']:.3f} s, {row[f'{way}_faults']:,.0f} faults, "
        f"{row[f'{way}_resident_bytes'] / 2**20:.0f} MiB"
        for way in WAYS
    )
    ratios = f"default/kept {row['default_over_kept']:.2f}, returned/kept {row['returned_over_kept']:.2f}"
    return f"{row['network']:<16}{' channels last' if row['channels_last'] else '':<15} {ratios} | {ways}"


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=[], help="names; all without it")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    parser.add_argument("--out", type=Path, help="write the JSON document to this file too")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--channels-last", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        serve(Case(**json.loads(arguments.case)), arguments.way, channels_last=arguments.channels_last)
        return
    rows: list[dict[str, Any]] = []
    for case in CASES:
        if arguments.networks and case.name not in arguments.networks:
            continue
        for channels_last in (False, True):
            rows.append(measured(case, arguments.rounds, channels_last=channels_last))
            print(line(rows[-1]), file=sys.stderr if arguments.json else sys.stdout, flush=True)
    publish(rows, out=arguments.out, as_json=arguments.json, seed=0)


if __name__ == "__main__":
    main()
