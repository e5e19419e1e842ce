"""``edgetrain demo``: scikit-learn's digits, a hybrid network, a hard memory cap, ONNX, one table."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from edgetrain.units import format_mib, parse_size

DEMO_WIDTH = 16
DEMO_BATCH = 128
DEMO_BUDGET = "72MiB"


def demo(
    budget: Annotated[str, typer.Option(help="Hard memory cap.")] = DEMO_BUDGET,
    epochs: Annotated[int, typer.Option(min=1)] = 6,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    out: Annotated[Path | None, typer.Option(help="Run directory; a temporary one if absent.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option(help="No progress on stderr.")] = False,
) -> None:
    """Train on handwritten digits inside a memory cap, export to ONNX, verify, and show what it took."""
    run_dir = Path(tempfile.mkdtemp(prefix="edgetrain-demo-")) if out is None else out
    result = run_demo(budget_bytes=parse_size(budget), epochs=epochs, seed=seed, run_dir=run_dir, quiet=quiet)
    if as_json:
        typer.echo(json.dumps(result))
        return
    _show(result)


def run_demo(*, budget_bytes: int, epochs: int, seed: int, run_dir: Path, quiet: bool) -> dict[str, Any]:
    """What ``edgetrain demo`` does, as a value."""
    import functools

    import torch

    from edgetrain.cli.progress import TrainingProgress
    from edgetrain.cli.trained import load_run, run_images
    from edgetrain.export import export_onnx
    from edgetrain.models import create_model
    from edgetrain.train import Recipe
    from edgetrain.train.advice import Change, peak_bytes
    from edgetrain.train.capped import train_capped
    from edgetrain.train.data import Loader, channel_statistics, open_source
    from edgetrain.train.run_record import RunRecord

    source, test_source = (open_source("digits", split=split) for split in ("train", "test"))
    shape = (source.channels, 16, 16)
    mean, std = channel_statistics(source, shape, seed=seed)
    record = RunRecord(
        model="hybrid18",
        options={"width": DEMO_WIDTH},
        data="digits",
        classes=tuple(source.classes),
        input_shape=shape,
        mean=tuple(map(float, mean)),
        std=tuple(map(float, std)),
        seed=seed,
    )
    shared: dict[str, Any] = {"image_size": shape, "mean": mean, "std": std, "seed": seed}

    def test_loader() -> Loader:
        return Loader(test_source, batch_size=DEMO_BATCH, augment=False, shuffle=False, drop_last=False, **shared)

    def make_batches() -> tuple[Any, Any]:
        training = Loader(source, batch_size=DEMO_BATCH, augment=True, shuffle=True, drop_last=True, **shared)
        return training, test_loader()

    make_model = functools.partial(
        create_model, "hybrid18", len(source.classes), in_channels=source.channels, width=DEMO_WIDTH
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    changes: tuple[Change, ...] = ("--budget",)
    with TrainingProgress(budget_bytes=budget_bytes, quiet=quiet) as progress:
        run = train_capped(
            make_model,
            make_batches,
            mode="invert_layerwise",
            input_shape=shape,
            recipe=Recipe(epochs=epochs, batch_size=DEMO_BATCH, seed=seed),
            run_dir=run_dir,
            record=record,
            budget_bytes=budget_bytes,
            device=device,
            watch=progress.watch,
            changes=changes,
        )
    fixed, per_sample = peak_bytes(make_model, "keep_all", input_shape=shape, device=device)
    trained = load_run(run_dir)  # what was saved, as edgetrain export would find it
    images = run_images(record, split="test", count=len(test_source))
    export = export_onnx(
        trained.model, run_dir / "export" / "model.onnx", input_shape=shape, images=images, about=trained.about
    )
    return {
        "model": f"hybrid18, width {DEMO_WIDTH}",
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "budget_bytes": budget_bytes,
        "peak_bytes": run.peak_bytes,
        "keep_all_bytes": int(fixed + per_sample * DEMO_BATCH),
        "train_accuracy": run.history[-1].accuracy,
        "test_accuracy": run.history[-1].test_accuracy,
        "images_per_second": run.history[-1].images_per_second,
        "onnx": str(export.path),
        "onnx_certificate": str(export.certificate_path),
        "onnx_images": export.images,
        "onnx_max_difference": export.max_difference,
        "onnx_top1_agreement": export.top1_agreement,
    }


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="digits, trained by inversion inside a hard memory cap", show_header=False)
    table.add_row("network", f"{result['model']}, {result['parameters']:,} parameters")
    table.add_row("memory cap (enforced)", format_mib(result["budget_bytes"]))
    table.add_row("peak of the run", format_mib(result["peak_bytes"]))
    table.add_row("same step keeping everything (estimate)", format_mib(result["keep_all_bytes"]))
    table.add_row("test accuracy", f"{result['test_accuracy']:.1%}")
    table.add_row("speed", f"{result['images_per_second']:.0f} images/s")
    table.add_row(
        "ONNX against PyTorch",
        f"{result['onnx_top1_agreement']:.0%} of {result['onnx_images']} classes agree, "
        f"logits within {result['onnx_max_difference']:.0e}",
    )
    Console().print(table)
    typer.echo(f"graph: {result['onnx']}, certificate beside it")
