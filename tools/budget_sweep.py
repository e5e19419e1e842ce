"""Training under budgets from far too small to ample: it stays inside the cap or is refused before the first step.

A hybrid network of width 8 is trained for one epoch on digits in batches of 64 images, through the command line and
each time in a fresh process, under every budget. A refusal names a budget: that one is tried too, and it is compared
with the smallest that trained.

    python tools/budget_sweep.py
    python tools/budget_sweep.py --out docs/results/budget_sweep_cpu.json
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from environment import KeptRows, publish

from edgetrain.planner import Plan

MIB = 2**20
TOOLS = Path(__file__).resolve().parent
BUDGETS = (1, 2, 4, 8, 12, 16, 18, 20, 22, 24, 26, 28, 30, 32, 36, 40, 48, 64, 96, 160)
"""In MiB."""

REFUSED = 5
"""Exit code of a budget that is too small (docs/cli.md)."""

_NAMED = re.compile(r"--budget (\d+)MiB")


def trained(budget_mib: int, *, epochs: int = 1) -> dict[str, Any]:
    """How one run under ``budget_mib`` ended: ``trained``, ``refused`` before its first step, or ``failed``."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = ["train", "--model", "narrow_hybrid:hybrid18_quarter", "--data", "digits", "--batch-size", "64"]
        words += ["--image-size", "16", "--epochs", str(epochs), "--budget", f"{budget_mib}MiB", "--out", str(run)]
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "edgetrain.cli.main", *words, "--json", "--quiet"],
            capture_output=True,
            text=True,
            cwd=TOOLS,
        )
        row: dict[str, Any] = {
            "budget_bytes": budget_mib * MIB,
            "exit_code": done.returncode,
            "seconds": time.perf_counter() - start,
            "message": done.stderr.strip(),
        }
        began = any((run / "checkpoints").glob("*")) or bool(_text(run / "metrics.jsonl"))
        if done.returncode == 0:
            result = json.loads(done.stdout)
            row |= {
                "outcome": "trained",
                "peak_bytes": result["peak_bytes"],
                "file_bytes": result["file_bytes"],
                "events": len(result["events"]),
                "accuracy": result["history"][-1]["test_accuracy"],
                "modes": dict(Counter(Plan.from_json((run / "plan.json").read_text()).modes)),
            }
        else:
            named = _NAMED.search(done.stderr)
            row["outcome"] = "refused" if done.returncode == REFUSED and named and not began else "failed"
            row["named_bytes"] = int(named[1]) * MIB if named else None
    return row


def _text(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many ended how, the most that a run took of its cap, and the budgets named against the smallest that did."""
    ran = [row for row in rows if row["outcome"] == "trained"]
    counted = [(row["peak_bytes"] - row["file_bytes"], row["budget_bytes"]) for row in ran]
    return {
        "outcomes": dict(Counter(row["outcome"] for row in rows)),
        "largest_part_of_cap": max(peak / budget for peak, budget in counted),
        "smallest_trained_bytes": min(row["budget_bytes"] for row in ran),
        "largest_refused_bytes": max(
            (row["budget_bytes"] for row in rows if row["outcome"] == "refused"), default=None
        ),
        "named_bytes": sorted({row["named_bytes"] for row in rows if row["outcome"] == "refused"}),
    }


def main() -> None:
    """Trains under every budget and every one that was named, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="file of the rows, to go on from")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    parser.add_argument("--out", type=Path, help="write the JSON document to this file too")
    arguments = parser.parse_args()
    shown = sys.stderr if arguments.json else sys.stdout
    kept, rows = KeptRows(arguments.keep), []
    waiting = list(BUDGETS)
    while waiting:
        mib = waiting.pop(0)
        row = kept.get(str(mib))
        if row is None:
            row = trained(mib)
            kept.add(str(mib), row)
        rows.append(row)
        if row["outcome"] == "trained":
            counted = (row["peak_bytes"] - row["file_bytes"]) / MIB
            told = f"took {counted:.1f} MiB, fell back {row['events']} times, {row['accuracy']:.1%}"
        else:
            told = row["message"].splitlines()[-1] if row["message"] else f"exit code {row['exit_code']}"
        print(f"{mib:4} MiB  {row['outcome']:<8} {row['seconds']:4.0f} s  {told}", file=shown, flush=True)
        if not waiting:  # what the refusals named, where the sweep has it not
            named = {row["named_bytes"] // MIB for row in rows if row["outcome"] == "refused"}
            waiting = sorted(named - {row["budget_bytes"] // MIB for row in rows})
    publish(rows, out=arguments.out, as_json=arguments.json, summary=summary(rows))


if __name__ == "__main__":
    main()
