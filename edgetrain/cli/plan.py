"""``edgetrain plan``: the fastest training step that fits a budget, with its reasons."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetrain.cli.estimate import parse_shape
from edgetrain.errors import UsageError

if TYPE_CHECKING:
    from edgetrain.planner import Plan, PlanFromScratch, SequencePlan


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
    optimizer: Annotated[
        str, typer.Option(help="sgd, sgd-plain, adam, adamw, rmsprop, adagrad, sgd-8bit, adamw-8bit or lion-8bit.")
    ] = "sgd",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16: of weights, activations and gradients.")] = "fp32",
    num_classes: Annotated[int, typer.Option(min=0, help="Classes; 0 leaves the model's own number.")] = 0,
    pooling: Annotated[
        str | None, typer.Option(help="Pooling sequence of a network of the zoo, c or b for each: ccb.")
    ] = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Choose the pooling sequence too, which changes what is trained.")
    ] = False,
    update_in_backward: Annotated[
        bool, typer.Option("--update-in-backward", help="Step the optimiser block by block.")
    ] = False,
    micro_batches: Annotated[int, typer.Option(min=0, help="Parts of a batch; 0: as few as fit.")] = 0,
    allow_ghost_batchnorm: Annotated[
        bool,
        typer.Option("--allow-ghost-batchnorm", help="Allow parts although batch norm then sees other statistics."),
    ] = False,
    snr_limit: Annotated[
        float, typer.Option(help="Least signal over noise of an inverted or rounded activation.")
    ] = 1e4,
    stored_precision: Annotated[
        str | None, typer.Option(help="bf16: what is kept may wait in bfloat16; rounds gradients.")
    ] = None,
    sample_modules: Annotated[
        str | None,
        typer.Option(help="Residual modules of each stage that run in a step, 1/2 or 5,4,4; changes training."),
    ] = None,
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

    from edgetrain.chain import SampledNetwork
    from edgetrain.cli.model_argument import model_maker, sampled_maker
    from edgetrain.files import write_atomically
    from edgetrain.planner import plan as make_plan
    from edgetrain.planner import plan_from_scratch

    shape = parse_shape(input_shape)
    arguments: dict[str, Any] = {
        "input_shape": shape,
        "batch_size": batch,
        "budget": budget,
        "device": device,
        "optimizer": optimizer,
        "precision": precision,
        "update_in_backward": update_in_backward,
        "micro_batches": micro_batches or None,
        "allow_ghost_batchnorm": allow_ghost_batchnorm,
        "snr_limit": snr_limit,
        "stored_precision": stored_precision,
    }
    found: Plan | PlanFromScratch
    net = None
    if from_scratch:
        others = {"--pooling": pooling, "--sample-modules": sample_modules, "--freeze": freeze or None}
        for option, given in others.items():
            if given is not None:
                raise UsageError(
                    found=f"{option} with --from-scratch",
                    expected="one of them: --from-scratch chooses the pooling sequence of a whole new network",
                    action="leave one out",
                )
        found = plan_from_scratch(
            model,
            **arguments,
            options={"num_classes": num_classes} if num_classes else None,
            seed=seed,
            on_sequence=_say,
        )
        best = found.plan
    else:
        torch.manual_seed(seed)
        make_model = model_maker(
            model, num_classes=num_classes or None, in_channels=shape[0], pooling=pooling, frozen=freeze
        )
        net = sampled_maker(make_model, sample_modules, input_shape=shape, seed=seed)()
        found = best = make_plan(net, **arguments)
    if out is not None:
        write_atomically(out, best.to_json().encode())
    if as_json:
        typer.echo(found.to_json())
        return
    where = "this machine" if device is None else device
    typer.echo(f"{model}, {batch} x {input_shape}, {precision}, {optimizer}, on {where}")
    if isinstance(net, SampledNetwork):
        typer.echo(f"in each step {net.extra_repr()} modules of its stages, which changes training")
    if explain:
        typer.echo(found.explain())
        typer.echo(best.program.table())
    else:
        typer.echo(found.summary())


def _say(row: SequencePlan) -> None:
    """Progress, on stderr."""
    from edgetrain.models import pooling_letters

    took = "does not fit" if row.plan is None else f"{1e3 * row.plan.step_seconds:.1f} ms"
    typer.echo(f"pooling {pooling_letters(row.pooling)}: {took}", err=True)
