"""``edgetrain infer``: what an exported network says of images."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def infer(
    graph: Annotated[Path, typer.Argument(help="File that edgetrain export wrote.")],
    images: Annotated[list[Path], typer.Argument(help="Images, or folders of them.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Classify images with an exported network."""
    from edgetrain.export.inference import infer as classify

    result = classify(graph, images)
    if as_json:
        typer.echo(json.dumps(asdict(result)))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("image", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("probability")
    for prediction in result.predictions:
        table.add_row(prediction.image, prediction.label, f"{prediction.probability:.1%}")
    Console().print(table)
    typer.echo(
        f"{len(result.predictions)} images; one alone takes {result.latency_ms:.2f} ms "
        f"(median of {result.runs}, {result.evaluator})"
    )
