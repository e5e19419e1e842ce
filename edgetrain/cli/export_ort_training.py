"""``edgetrain export --format ort-training``: a run directory to artifacts for ONNX Runtime's training."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from edgetrain.errors import UsageError

if TYPE_CHECKING:
    from edgetrain.cli.export import Network


def export_ort_training(
    network: Network, *, run: Path | None, out: Path, batch: int | None, options: dict[str, Any], as_json: bool
) -> None:
    """Writes the artifacts to the folder ``out`` and says what was compared.

    Args:
        run: that the network is of; None: it has fresh weights.
        options: those of the command that have no meaning here, by name, with what was given.

    Raises:
        UsageError: one of them was given, ``out`` is a file, or the run's loss is another.
    """
    from edgetrain.cli.plain_step import order_note, plain_step
    from edgetrain.export.ort_training import export_ort_training as export
    from edgetrain.train.run_record import RunRecord

    for name, (given, default) in options.items():
        if given != default:
            raise UsageError(
                found=f"{name} with --format ort-training",
                expected="none: ONNX Runtime trains in float32 on the CPU",
                action="leave it out",
            )
    if out.is_file():
        raise UsageError(found=f"--out {out}, a file", expected="a folder", action="name another --out")
    model, shape, about, shown, _ = network
    note = None
    if run is not None:
        record = RunRecord.read(run)
        model, note = plain_step(run, record, model, "ort-training"), order_note(record)
    written = export(model, out, input_shape=shape, images=shown, batch_size=batch, about=about)
    if as_json:
        typer.echo(json.dumps({**asdict(written), "folder": str(written.folder), "note": note}))
        return
    typer.echo(
        f"{written.folder}: training, evaluation and optimiser model, checkpoint; {written.parameters:,} parameters\n"
        f"against PyTorch in float64: loss {written.loss_difference:.1e}, "
        f"gradients {written.gradient_difference:.1e} ({written.gradient_name}), "
        f"logits in evaluation {written.logits_difference:.1e}"
    )
    if note is not None:
        typer.echo(note)
