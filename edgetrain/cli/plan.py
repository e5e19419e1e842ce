"""``edgetrain plan``: the fastest training step that fits a budget, with its reasons."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from edgetrain.cli.estimate import parse_shape

if TYPE_CHECKING:
    from edgetrain.memory.estimate import Precision


def plan(
    model: Annotated[str, typer.Argument(help="Name of the zoo, or module:function of your own.")],
    input_shape: Annotated[str, typer.Option("--input", help="Shape of one sample, CxHxW.")] = "3x32x32",
    batch: Annotated[int, typer.Option(min=1, help="Samples in a step.")] = 32,
    budget: Annotated[
        str | None, typer.Option(help="Peak memory, like 400MiB; without it what the profile says.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Profile; without it this machine, on which blocks are timed.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="sgd, sgd-plain, adam, adamw, rmsprop or adagrad.")] = "sgd",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16: of weights, activations and gradients.")] = "fp32",
    num_classes: Annotated[int, typer.Option(min=0, help="Classes; 0 leaves the model's own number.")] = 0,
    update_in_backward: Annotated[
        bool, typer.Option("--update-in-backward", help="Step the optimiser block by block.")
    ] = False,
    micro_batches: Annotated[int, typer.Option(min=0, help="Parts of a batch; 0: as few as fit.")] = 0,
    allow_ghost_batchnorm: Annotated[
        bool,
        typer.Option("--allow-ghost-batchnorm", help="Allow parts although batch norm then sees other statistics."),
    ] = False,
    snr_limit: Annotated[float, typer.Option(help="Least signal over noise of an inverted activation.")] = 1e4,
    freeze: Annotated[
        int, typer.Option(min=0, help="Leading blocks that are not trained and run in evaluation mode.")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights, whose noise is measured.")] = 0,
    explain: Annotated[
        bool, typer.Option("--explain", help="Every block's mode and reason, and what was rejected.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the plan as JSON to this file.")] = None,
) -> None:
    """Choose per block what to keep, recompute or invert, so that a step fits and is fast."""
    import torch

    from edgetrain.cli.model_argument import model_maker
    from edgetrain.planner import plan as make_plan
    from edgetrain.train.checkpoint import write_atomically

    torch.manual_seed(seed)
    shape = parse_shape(input_shape)
    net = model_maker(model, num_classes=num_classes or None, in_channels=shape[0], frozen=freeze)()
    found = make_plan(
        net,
        input_shape=shape,
        batch_size=batch,
        budget=budget,
        device=device,
        optimizer=optimizer,
        precision=cast("Precision", precision),
        update_in_backward=update_in_backward,
        micro_batches=micro_batches or None,
        allow_ghost_batchnorm=allow_ghost_batchnorm,
        snr_limit=snr_limit,
    )
    if out is not None:
        write_atomically(out, found.to_json().encode())
    if as_json:
        typer.echo(found.to_json())
        return
    where = "this machine" if device is None else device
    typer.echo(f"{model}, {batch} x {input_shape}, {precision}, {optimizer}, on {where}")
    if explain:
        typer.echo(found.explain())
        typer.echo(found.program.table())
    else:
        typer.echo(found.summary())
