"""``edgetrain export``: a run directory to a verified file for a device."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from edgetrain.cli.export_step import TRAIN_STEP, export_step
from edgetrain.cli.export_text import export_text
from edgetrain.errors import UsageError, near_matches

if TYPE_CHECKING:
    from torch import nn

    from edgetrain.export.describe import About
    from edgetrain.export.images import ImageSet
    from edgetrain.export.onnx import Export
    from edgetrain.export.precision import Precision

SUFFIXES = {"onnx": ".onnx", "tensorrt": ".engine"}
"""Formats, and what their files end in."""
FORMATS = [*SUFFIXES, "ort-training", TRAIN_STEP]
CALIBRATION_IMAGES = 256


def export(
    run: Annotated[Path | None, typer.Argument(help="Run directory of edgetrain train.")] = None,
    model: Annotated[
        str | None, typer.Option(help="In place of a run: a network with fresh weights, to try a device.")
    ] = None,
    input_shape: Annotated[str, typer.Option("--input", help="Shape of one image, with --model.")] = "3x32x32",
    num_classes: Annotated[int, typer.Option("--num-classes", min=2, help="Classes, with --model.")] = 10,
    format: Annotated[
        str,
        typer.Option(
            help="onnx, tensorrt, ort-training, or train-step: the planned step, which trains without PyTorch."
        ),
    ] = "onnx",
    device: Annotated[str | None, typer.Option(help="Profile of the device, like orin-nano-8gb.")] = None,
    precision: Annotated[str, typer.Option(help="fp32, fp16 or int8.")] = "fp32",
    batch: Annotated[
        int | None, typer.Option(min=1, help="onnx: fixed batch, else any; tensorrt: largest batch, else 1.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Test images to compare on.")] = 64,
    out: Annotated[
        Path | None, typer.Option(help="File (.onnx, .engine) or folder to write; default: RUN/export.")
    ] = None,
    refittable: Annotated[
        bool, typer.Option("--refittable", help="An engine that takes new weights later, with --refit.")
    ] = False,
    refit: Annotated[
        Path | None,
        typer.Option(help="Give this engine the weights of the run, in place or as --out."),
    ] = None,
    optimizer: Annotated[str, typer.Option(help="train-step: sgd or adamw.")] = "sgd",
    explain: Annotated[bool, typer.Option("--explain", help="Print folds, findings and the refit map.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the certificate as one JSON document.")] = False,
) -> None:
    """Export a trained network: folded, checked, and compared with PyTorch before the file gets its name."""
    if format == TRAIN_STEP:
        export_step(run, out=out, device=device, optimizer=optimizer, as_json=as_json)
        return
    if format not in FORMATS:
        raise UsageError(
            found=f"--format {format}", expected="one of " + ", ".join(FORMATS), action=near_matches(format, FORMATS)
        )
    if format == "ort-training":
        from edgetrain.cli.export_ort_training import export_ort_training

        export_ort_training(
            load_network(run, model, input_shape, num_classes, precision="fp32", images=images),
            run=run,
            out=out or (run or Path()) / "export" / format,
            batch=batch,
            options={
                "--device": (device, None),
                "--precision": (precision, "fp32"),
                "--refittable": (refittable, False),
                "--refit": (refit, None),
                "--explain": (explain, False),
            },
            as_json=as_json,
        )
        return
    if format == "onnx" and (refittable or refit is not None):
        raise UsageError(
            found="--refittable or --refit with --format onnx", expected="an engine", action="pass --format tensorrt"
        )
    if refittable and refit is not None:
        raise UsageError(
            found="--refittable and --refit",
            expected="one of them",
            action="leave out --refittable: nothing is built",
        )
    target = _target(out, run, format, precision)
    engine = None if format == "onnx" else target
    exported, images_shown = run_export(
        run=run,
        model=model,
        input_shape=input_shape,
        num_classes=num_classes,
        device=device,
        precision=precision,
        batch=batch if engine is None else None,
        images=images,
        out=target.with_suffix(".onnx"),
    )
    certificate, report = exported.certificate, None
    if engine is not None:
        from edgetrain.export.engine_step import engine_of, refitted

        if refit is not None:
            report, certificate = refitted(exported, refit, refit if out is None else target, images_shown)
        else:
            report, certificate = engine_of(exported, engine, batch=batch, refittable=refittable, images=images_shown)
    if as_json:
        document: dict[str, Any] = {"path": str(exported.path), "certificate_path": str(exported.certificate_path)}
        document["engine"] = None if report is None else str(report.path)
        typer.echo(json.dumps(document | {"certificate": json.loads(certificate.to_json())}))
        return
    typer.echo(export_text(replace(exported, certificate=certificate), explain=explain))
    if report is not None:
        typer.echo(str(report))


def run_export(
    *,
    run: Path | None,
    model: str | None,
    input_shape: str,
    num_classes: int,
    device: str | None,
    precision: str,
    batch: int | None,
    images: int,
    out: Path,
) -> tuple[Export, ImageSet | None]:
    """What ``edgetrain export --format onnx`` does, as a value, and the images that it compared on."""
    from edgetrain.export import export_onnx

    network, shape, about, shown, calibration = load_network(
        run, model, input_shape, num_classes, precision=precision, images=images
    )
    exported = export_onnx(
        network,
        out,
        input_shape=shape,
        images=shown,
        device=device,
        precision=cast("Precision", precision),
        batch_size=batch,
        calibration=calibration,
        about=about,
    )
    return exported, shown


def _target(out: Path | None, run: Path | None, format: str, precision: str) -> Path:
    """The file to write: ``out`` where it has the ending of the format, else one of the usual name in that folder.

    Raises:
        UsageError: another ending.
    """
    suffix = SUFFIXES[format]
    if out is not None and out.suffix == suffix and not out.is_dir():
        return out
    if out is not None and out.suffix and not out.is_dir():
        raise UsageError(
            found=f"--out {out} with --format {format}",
            expected=f"a file that ends in {suffix}, or a folder",
            action=f"pass --out {out.with_suffix(suffix)}",
        )
    folder = (run or Path()) / "export" if out is None else out
    return folder / f"{'model' if precision == 'fp32' else f'model-{precision}'}{suffix}"


Network = tuple["nn.Module", "tuple[int, int, int]", "About", "ImageSet | None", "ImageSet | None"]
"""A network, its input shape (c, h, w), what is known of it, and images to compare and to calibrate on."""


def load_network(
    run: Path | None, model: str | None, input_shape: str, num_classes: int, *, precision: str, images: int
) -> Network:
    """The network of a run, or one with fresh weights; raises UsageError where not exactly one is named."""
    if (run is None) == (model is None):
        raise UsageError(
            found="neither a run nor --model" if run is None else "both a run and --model",
            expected="one of them",
            action="name the directory that edgetrain train wrote, or pass --model for fresh weights",
        )
    return _fresh(cast(str, model), input_shape, num_classes) if run is None else _trained(run, precision, images)


def _trained(run: Path, precision: str, images: int) -> Network:
    from edgetrain.cli.trained import load_run, run_images

    trained = load_run(run)
    shown = run_images(trained.record, split="test", count=images)
    calibration = None
    if precision == "int8":
        calibration = run_images(trained.record, split="train", count=CALIBRATION_IMAGES)
    return trained.model, trained.record.input_shape, trained.about, shown, calibration


def _fresh(model: str, input_shape: str, num_classes: int) -> Network:
    import torch

    from edgetrain.cli.estimate import parse_shape
    from edgetrain.cli.model_argument import model_maker
    from edgetrain.export.describe import About

    shape = parse_shape(input_shape)
    torch.manual_seed(0)
    network = model_maker(model, num_classes=num_classes, in_channels=shape[0])()
    return network, shape, About(name=f"{model}, fresh weights"), None, None
