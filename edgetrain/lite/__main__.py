"""``python -m edgetrain.lite EXPORT --data PATH``: trains an exported step, or evaluates it."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from edgetrain.errors import EdgetrainError
from edgetrain.lite import load


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, or that of the error."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except EdgetrainError as error:
        print(f"error: {error.found}\n  expected: {error.expected}\n  to do: {error.action}", file=sys.stderr)
        return error.exit_code
    return 0


def _run(options: argparse.Namespace) -> None:
    run = load(options.export, threads=options.threads)
    out = options.out or options.export.parent / f"{options.export.name}-run"
    history = run.fit(
        options.data,
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        run_dir=out,
        resume=options.resume,
        augment=not options.plain,
        limit_train=options.limit_train,
        on_step=None if options.quiet else _show,
    )
    if options.json:
        print(json.dumps({"run": str(out), "peak_bytes": peak_bytes(), "history": [asdict(r) for r in history]}))
        return
    for record in history:
        test = "" if record.test_accuracy is None else f"  test {record.test_accuracy:.2%}"
        print(
            f"epoch {record.epoch:>3}  loss {record.loss:.4f}  train {record.accuracy:.2%}{test}  "
            f"{record.images_per_second:.0f} images/s"
        )
    peak = peak_bytes()
    print("" if peak is None else f"peak of the whole process {peak / 2**20:.0f} MiB; ", end="")
    print(f"run in {out}")


def peak_bytes() -> int | None:
    """The most memory that this process has had; None where Linux does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), None)


def _show(step: int, steps: int, loss: float) -> None:
    if sys.stderr.isatty():
        print(f"\rstep {step}/{steps}  loss {loss:.4f}", end="\n" if step == steps else "", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m edgetrain.lite", description="Train an exported step.")
    parser.add_argument("export", type=Path, help="directory of edgetrain export --format train-step")
    parser.add_argument("--data", required=True, help="folder or file of images and labels")
    parser.add_argument("--epochs", type=int, help="default: those of the export")
    parser.add_argument("--learning-rate", type=float, help="highest one; default: that of the export")
    parser.add_argument("--limit-train", type=int, help="use that many training images")
    parser.add_argument("--plain", action="store_true", help="no augmentation")
    parser.add_argument("--threads", type=int, help="of ONNX Runtime; default: one per core")
    parser.add_argument("--out", type=Path, help="run directory; default: EXPORT-run beside the export")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON document")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    return parser


if __name__ == "__main__":
    sys.exit(main())
