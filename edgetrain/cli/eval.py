"""``edgetrain eval``: how the network of a run does on its own test images, or on others of the same classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from edgetrain.errors import UsageError, near_matches

SPLITS = ["test", "train"]


def evaluate(
    run: Annotated[
        Path, typer.Argument(help="Directory of edgetrain train or finetune; its last good checkpoint.", metavar="RUN")
    ],
    data: Annotated[
        str | None, typer.Option(help="Other images of the same classes, or 'digits'; default: the data of the run.")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="test or train; default test, of another folder CLASS/* every image.", metavar="test|train"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="That many images, each class in proportion; default as in training.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images at once; default as in training, at most 128.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
) -> None:
    """Test a trained network: accuracy, macro-F1, precision and recall per class, confusion matrix."""
    if split is not None and split not in SPLITS:
        raise UsageError(
            found=f"--split {split}", expected="one of " + ", ".join(SPLITS), action=near_matches(split, SPLITS)
        )
    from edgetrain.cli.evaluating import evaluate_run, show

    result = evaluate_run(run, data=data, split=split, limit=limit, batch_size=batch_size)
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
    else:
        show(result)
