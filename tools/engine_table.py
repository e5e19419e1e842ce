"""Engines of two networks in fp32, fp16 and INT8: size of the file, and the device memory that the builder names.

Built with TensorRT for RTX, which needs no GPU, for compute capability 8.6 within the memory of a device's profile;
nothing is run. Weights are fresh, so sizes say something and accuracy would not.

    python tools/engine_table.py                                    # a table
    python tools/engine_table.py --out docs/results/engine_table.json
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from environment import publish
from graph_variants import INPUT_SHAPE, MODELS, write_variant

import edgetrain
from edgetrain.errors import MissingExtraError
from edgetrain.export.precision import Precision
from edgetrain.units import MIB

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")


def build(name: str, precision: Precision, folder: Path, *, device: str, capability: str, batch: int) -> dict[str, Any]:
    """One engine, as a row."""
    graph = write_variant(name, precision, folder)
    report = edgetrain.build_engine(
        graph,
        graph.with_suffix(".engine"),
        device=device,
        compute_capability=capability,
        precision=precision,
        batch=batch,
    )
    return {
        "model": name,
        "options": MODELS[name],
        "input_shape": INPUT_SHAPE,
        "precision": precision,
        "batch": batch,
        "device": device,
        "compute_capability": capability,
        "builder": f"{report.builder} {report.version}",
        "onnx_bytes": graph.stat().st_size,
        "engine_bytes": report.engine_bytes,
        "activation_bytes": report.activation_bytes,
        "weights_bytes": report.weights_bytes,
        "scratch_bytes": report.scratch_bytes,
        "workspace_limit_bytes": report.workspace_limit_bytes,
        "layers": report.layers,
        "build_seconds": report.seconds,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """For a person; sizes in MiB."""
    columns = ("onnx", "engine", "activation", "weights", "scratch")
    lines = [
        f"{'model':<10} {'precision':<9} " + " ".join(f"{name:>10}" for name in columns) + "  MiB, layers, seconds"
    ]
    for row in rows:
        sizes = (row[f"{name}_bytes"] for name in columns)
        cells = " ".join("         -" if size is None else f"{size / MIB:>10.3f}" for size in sizes)
        lines.append(f"{row['model']:<10} {row['precision']:<9} {cells}  {row['layers']}, {row['build_seconds']:.1f}")
    return "\n".join(lines)


def main() -> None:
    """Builds, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--out", type=Path, help="write it to this file")
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=sorted(MODELS))
    parser.add_argument("--device", default="orin-nano-8gb", help="profile whose memory is the limit")
    parser.add_argument("--compute-capability", default="8.6")
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows = [
                build(
                    name,
                    precision,
                    Path(folder),
                    device=arguments.device,
                    capability=arguments.compute_capability,
                    batch=arguments.batch,
                )
                for name in arguments.models
                for precision in PRECISIONS
            ]
    except MissingExtraError as error:
        sys.exit(str(error))
    publish(rows, out=arguments.out, as_json=arguments.json, seed=0)
    if not arguments.json:
        print(table(rows))


if __name__ == "__main__":
    main()
