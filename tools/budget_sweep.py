"""Twenty budgets under the enforced cap, each in a fresh process: it trains, or it is refused before its first step.

The plan asked for first keeps everything, which takes more than most of the budgets: runs fall back on smaller plans,
down to where not even the smallest fits. There the budget that the message names is tried too.

    python tools/budget_sweep.py
    python tools/budget_sweep.py --budgets 40 90 --json
    python tools/budget_sweep.py --keep /tmp/sweep.jsonl --out docs/results/budget_sweep_cpu.json

A row's ``outcome`` is "trained", "refused" (exit code 5, no step done), or else what went wrong: a run that was killed,
that ended with another code, or that took more than its budget. ``peak_mib`` is the growth of the resident process;
what of it are pages of files (``of_files_mib``: library code that ran for the first time) no cap counts.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from environment import KeptRows, publish

from edgetrain.errors import BudgetError, StorageError
from edgetrain.train import newest_checkpoint
from edgetrain.units import MIB

BUDGETS = tuple(range(12, 132, 6))
_NAMED = re.compile(r"--budget (\d+)MiB")


def sweep(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per budget, and one for each budget that a refusal names."""
    kept, rows = KeptRows(arguments.keep), []
    named: set[int] = set()
    for mib in sorted(arguments.budgets):
        rows.append(_row(mib, arguments, kept))
        if rows[-1]["named_mib"]:
            named.add(rows[-1]["named_mib"])
    return rows + [{**_row(mib, arguments, kept), "named_by_a_refusal": True} for mib in sorted(named)]


def _row(mib: int, arguments: argparse.Namespace, kept: KeptRows) -> dict[str, Any]:
    key = f"{arguments.model} {arguments.mode} {mib}"
    row = kept.get(key)
    if row is None:
        row = run(mib, model=arguments.model, mode=arguments.mode)
        kept.add(key, row)
    print(_line(row), file=sys.stderr)
    return row


def run(mib: int, *, model: str, mode: str) -> dict[str, Any]:
    """One run on the digits inside ``mib``, as the command line makes it."""
    with tempfile.TemporaryDirectory(prefix="edgetrain-sweep-") as folder:
        words = ["train", "--model", model, "--data", "digits", "--mode", mode, "--budget", f"{mib}MiB"]
        words += ["--epochs", "1", "--batch-size", "32", "--limit-train", "256", "--limit-test", "128"]
        words += ["--out", folder, "--json", "--quiet"]
        began = time.monotonic()
        code = "import sys; from edgetrain.cli.main import main; sys.argv[0] = 'edgetrain'; main()"
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        seconds = time.monotonic() - began
        steps = _steps(Path(folder))
    message = done.stderr.strip().splitlines()[-1:] if done.returncode else []
    result = json.loads(done.stdout) if done.returncode == 0 else None
    named = _NAMED.search(done.stderr) if done.returncode else None
    return {
        "budget_mib": mib,
        "outcome": _outcome(done.returncode, steps, result),
        "exit_code": done.returncode,
        "steps": steps,
        "peak_mib": None if result is None else round(result["peak_bytes"] / MIB, 1),
        "of_files_mib": None if result is None else round(result["file_bytes"] / MIB, 1),
        "plans_given_up": None if result is None else len(result["events"]),
        "test_accuracy": None if result is None else result["history"][-1]["test_accuracy"],
        "named_mib": int(named.group(1)) if named else None,
        "message": message[0] if message else None,
        "seconds": round(seconds, 1),
    }


def _outcome(code: int, steps: int, result: dict[str, Any] | None) -> str:
    if code < 0:
        return f"killed by signal {-code}"
    if result is not None:
        counted_bytes = result["peak_bytes"] - result["file_bytes"]
        return "trained" if counted_bytes <= result["budget_bytes"] else "took more than its budget"
    return "refused" if code == BudgetError.exit_code and steps == 0 else f"exit code {code} after {steps} steps"


def _steps(folder: Path) -> int:
    """Steps that the run has saved; it saves after its only epoch, and when its plan changes."""
    try:
        return int(newest_checkpoint(folder / "checkpoints").state["position"]["step"])
    except StorageError:
        return 0


def _line(row: dict[str, Any]) -> str:
    peak = "" if row["peak_mib"] is None else f"  peak {row['peak_mib']:>6} MiB, {row['plans_given_up']} plans given up"
    named = "" if row["named_mib"] is None else f"  names {row['named_mib']} MiB"
    return f"{row['budget_mib']:>4} MiB  {row['outcome']:<26}{peak}{named}  {row['seconds']:.0f} s"


def main() -> None:
    """Runs the sweep; exit code 1 where a run neither trained nor was refused in time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="hybrid18")
    parser.add_argument("--mode", default="keep_all", help="as of edgetrain train")
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS, metavar="MIB")
    parser.add_argument("--keep", type=Path, help="rows found so far; a sweep that was stopped goes on from there")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = sweep(arguments)
    publish(rows, out=arguments.out, as_json=arguments.json)
    good = all(
        row["outcome"] == "trained" or (row["outcome"] == "refused" and "named_by_a_refusal" not in row) for row in rows
    )
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
