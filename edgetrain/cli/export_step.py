"""``edgetrain export RUN --format train-step``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from edgetrain.errors import UsageError, near_matches

if TYPE_CHECKING:
    from edgetrain.export.train_step.write import TrainStepExport

TRAIN_STEP = "train-step"


def export_step(run: Path | None, *, out: Path | None, device: str | None, optimizer: str, as_json: bool) -> None:
    """Writes the directory and says what is in it."""
    from edgetrain.cli.plain_step import order_note
    from edgetrain.train.run_record import RunRecord

    exported = write_step(run, out=out, device=device, optimizer=optimizer)
    assert run is not None
    note = order_note(RunRecord.read(run))
    if as_json:
        document = {"path": str(exported.path), "nodes": exported.nodes, "manifest": exported.manifest, "note": note}
        typer.echo(json.dumps(document))
        return
    typer.echo(str(exported))
    if note is not None:
        typer.echo(note)
    typer.echo(f"train it without PyTorch: python -m edgetrain.lite {exported.path} --data PATH")


def write_step(run: Path | None, *, out: Path | None, device: str | None, optimizer: str) -> TrainStepExport:
    """The step of the run's plan, with the weights that it has reached."""
    from edgetrain.cli.plain_step import plain_step
    from edgetrain.cli.trained import load_run
    from edgetrain.export.opset import choose_opset
    from edgetrain.export.train_step.optimizers import OPTIMIZERS
    from edgetrain.export.train_step.write import Data, export_train_step
    from edgetrain.planner import Plan
    from edgetrain.profiles import load_profile
    from edgetrain.train import Recipe

    if run is None:
        raise UsageError(
            found=f"--format {TRAIN_STEP} without a run",
            expected="a run, whose plan is the step",
            action="name the directory that edgetrain train wrote",
        )
    if optimizer not in OPTIMIZERS:
        known = list(OPTIMIZERS)
        raise UsageError(
            found=f"--optimizer {optimizer}",
            expected="one of " + ", ".join(known),
            action=near_matches(optimizer, known),
        )
    trained = load_run(run)
    record, settings = trained.record, trained.record.training
    model = plain_step(run, record, trained.model, TRAIN_STEP)
    plan = Plan.read(run / "plan.json")
    recipe = Recipe(
        epochs=1 if settings is None else settings.epochs,
        batch_size=plan.input_shape[0],
        peak_rate=None if settings is None else settings.learning_rate,
        seed=record.seed,
    )
    return export_train_step(
        model,
        plan,
        out or run / "export" / TRAIN_STEP,
        data=Data(record.classes, record.mean, record.std, record.seed),
        recipe=recipe,
        optimizer=None if optimizer == "sgd" else OPTIMIZERS[optimizer](),
        name=record.model,
        opset=choose_opset(None if device is None else load_profile(device)).version,
    )
