"""``python -m edgetrain.lite EXPORT --data PATH``: trains an exported step, inside a budget for the whole process."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetrain.errors import EdgetrainError
from edgetrain.lite.budget import is_out_of_memory, limit_process, one_thread_for_blas, over_budget, peak_bytes
from edgetrain.units import parse_size

if TYPE_CHECKING:
    from edgetrain.lite.run import LiteRun


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, or that of the error."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.data is None and options.inference is None:
        parser.error("the following arguments are required: --data or --inference")
    try:
        budget = None if options.budget is None else parse_size(options.budget)
        if budget is not None:
            limit_process(budget)
        one_thread_for_blas()
        try:
            _run(options)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise over_budget(budget, error) from error
    except EdgetrainError as error:
        print(f"error: {error.found}\n  expected: {error.expected}\n  to do: {error.action}", file=sys.stderr)
        return error.exit_code
    return 0


def _run(options: argparse.Namespace) -> None:
    from edgetrain.lite.run import load  # imports NumPy

    run = load(options.export, threads=options.threads)
    out = options.out or options.export.parent / f"{options.export.name}-run"
    if options.data is None:
        run.restore(out)
        _export(run, options)
        return
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
        document = {"run": str(out), "history": [asdict(record) for record in history]}
        written = {} if options.inference is None else _written(run, options)
        print(json.dumps(document | written | {"peak_bytes": peak_bytes()}))
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
    if options.inference is not None:
        _export(run, options)


def _export(run: LiteRun, options: argparse.Namespace) -> None:
    written = _written(run, options)
    if options.json:
        print(json.dumps(written | {"peak_bytes": peak_bytes()}))
        return
    print(f"{options.inference}: the folded network, logits within {written['difference']:.0e} of the state's")


def _written(run: LiteRun, options: argparse.Namespace) -> dict[str, Any]:
    return {"inference": str(options.inference), "difference": run.export(options.inference)}


def _show(step: int, steps: int, loss: float) -> None:
    if sys.stderr.isatty():
        print(f"\rstep {step}/{steps}  loss {loss:.4f}", end="\n" if step == steps else "", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m edgetrain.lite", description="Train an exported step.")
    parser.add_argument("export", type=Path, help="directory of edgetrain export --format train-step")
    parser.add_argument("--data", help="folder or file of images and labels; needed unless --inference is given")
    parser.add_argument("--inference", type=Path, help="write the folded inference model there; alone: of --out's run")
    parser.add_argument("--epochs", type=int, help="default: those of the export")
    parser.add_argument("--learning-rate", type=float, help="highest one; default: that of the export")
    parser.add_argument("--limit-train", type=int, help="use that many training images")
    parser.add_argument("--plain", action="store_true", help="no augmentation")
    parser.add_argument("--budget", help="memory of the whole process, enforced, such as 200MiB")
    parser.add_argument("--threads", type=int, help="of ONNX Runtime; default: one per core")
    parser.add_argument("--out", type=Path, help="run directory; default: EXPORT-run beside the export")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON document")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    return parser


if __name__ == "__main__":
    sys.exit(main())
