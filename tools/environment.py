"""What every result states beside its figures: machine, versions, command; and how it is published."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "numpy", "onnx", "onnxruntime", "onnxruntime-training-cpu", "tensorrt-rtx-cu13")


def machine() -> dict[str, Any]:
    """Processor, cores, memory and GPU of this host."""
    facts: dict[str, Any] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = properties.name
        facts["gpu_memory_bytes"] = properties.total_memory
    return facts


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Its name, and where Linux tells its family and model: two of one name can differ by a factor of three."""
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    first = cpuinfo.read_text().partition("\n\n")[0]
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    name = fields.get("model name") or platform.processor() or platform.machine()
    kind = [f"{what} {fields[key]}" for what, key in (("family", "cpu family"), ("model", "model")) if key in fields]
    return ", ".join([name, *([" ".join(kind)] if kind else [])])


def versions() -> dict[str, str]:
    """Python, the packages that matter, and the commit, marked where the tree differs from it."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    root = Path(__file__).resolve().parent.parent
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=True
        )
        found["edgetrain"] = commit.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["edgetrain"] = metadata.version("edgetrain")
    return found


def command() -> str:
    """The command line that made this result, where to write it left out."""
    words, skip = [], False
    for word in sys.argv[1:]:
        if skip or word in ("--out", "--keep", "--onto", "--json"):
            skip = word in ("--out", "--keep", "--onto")
            continue
        # a path of this machine says nothing elsewhere: its last part does
        words.append(Path(word).name if word.startswith(("/", "..")) else word)
    return " ".join(["python", f"tools/{Path(sys.argv[0]).name}", *words])


def publish(rows: list[dict[str, Any]], *, out: Path | None, as_json: bool, **more: Any) -> None:
    """Writes ``rows`` with machine, versions and command to ``out`` and, as JSON, to stdout."""
    document = {"machine": machine(), "versions": versions(), "command": command(), **more, "rows": rows}
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=1) + "\n")
    if as_json:
        print(json.dumps(document))


def earlier_rows(result: Path | None) -> list[dict[str, Any]]:
    """Those of an earlier result, each with the commit that found it; none without one."""
    if result is None:
        return []
    document = json.loads(result.read_text())
    return [{"commit": document["versions"]["edgetrain"], **row} for row in document["rows"]]


class KeptRows:
    """Rows of a long run, one JSON line each, kept as they are found: a run that was stopped goes on from there.

    Rows found by another commit, in a changed tree or with other versions are not taken.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._versions = versions()
        self._rows: dict[str, dict[str, Any]] = {}
        if path is None or not path.exists() or self._versions["edgetrain"].endswith("-dirty"):
            return
        for line in path.read_text().splitlines():
            try:
                kept = json.loads(line)
            except json.JSONDecodeError:  # the line at which a run was stopped
                continue
            if kept["versions"] == self._versions and kept["machine"] == machine():
                self._rows[kept["key"]] = kept["row"]

    def get(self, key: str) -> dict[str, Any] | None:
        """The row kept under ``key``, or None."""
        return self._rows.get(key)

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Keeps ``row`` under ``key``."""
        self._rows[key] = row
        if self._path is not None:
            kept = {"key": key, "versions": self._versions, "machine": machine(), "row": row}
            with self._path.open("a") as file:
                file.write(json.dumps(kept) + "\n")
