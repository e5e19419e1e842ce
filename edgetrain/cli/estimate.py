"""``edgetrain estimate``: will a training step fit a device, answered before it runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

import typer

from edgetrain.errors import BudgetError, UsageError

if TYPE_CHECKING:
    from edgetrain.memory.estimate import Estimate, Precision


def estimate(
    model: str = typer.Argument(..., help="Name of the zoo, or module:function of your own."),
    input_shape: str = typer.Option("3x32x32", "--input", help="Shape of one sample, CxHxW."),
    batch: int = typer.Option(32, "--batch", min=1, help="Samples in a step."),
    device: str = typer.Option("cpu", help="Profile, a name of edgetrain devices or a path."),
    optimizer: str = typer.Option(
        "sgd", help="sgd, sgd-plain, adam, adamw, rmsprop, adagrad, sgd-8bit, adamw-8bit, lion-8bit or none."
    ),
    precision: str = typer.Option("fp32", help="fp32, bf16 or fp16: of weights, activations and gradients."),
    mode: str = typer.Option(
        "",
        help="keep_all, selective, recompute, invert, invert_selective or invert_layerwise; without it plain autograd.",
    ),
    num_classes: int = typer.Option(0, "--num-classes", min=0, help="Classes; 0 leaves the model's own number."),
    pooling: str | None = typer.Option(None, help="Pooling sequence of a network of the zoo, c or b for each: ccb."),
    max_batch: bool = typer.Option(False, "--max-batch", help="Find the largest batch that fits."),
    measure: bool = typer.Option(False, "--measure", help="Run small batches for real, where a trace fails."),
    json_output: bool = typer.Option(False, "--json", help="Print one JSON document."),
) -> None:
    """Predict the memory of a training step on a device."""
    shape = parse_shape(input_shape)

    def at(batch_size: int) -> Estimate:
        return _estimate(model, shape, batch_size, device, optimizer, precision, mode, num_classes, pooling, measure)

    if max_batch:
        from edgetrain.memory.estimate import max_batch as largest

        found = largest(at)
        if found is None:
            least = at(1)
            raise BudgetError(
                found=f"{model} on {device}: one sample takes {least.process_peak_bytes / 2**20:.0f} MiB",
                expected=f"at most {(least.available_bytes or 0) / 2**20:.0f} MiB, what the device has left",
                action="try --mode recompute, a smaller --input, or --precision bf16",
            )
    else:
        found = at(batch)
    if json_output:
        typer.echo(json.dumps({"model": model, "input_shape": list(shape), "optimizer": optimizer, **found.to_dict()}))
        return
    typer.echo(f"{model}, {found.batch_size} x {input_shape}, {found.precision}, {optimizer}, on {found.device}")
    typer.echo(found.table())
    if found.fits is not None:
        typer.echo(f"It {'fits' if found.fits else 'does not fit'}.")
    from edgetrain.profiles import load_profile

    profile = load_profile(device)
    if profile.training != "pytorch":
        typer.echo(f"PyTorch does not train there ({profile.training}): {profile.training_reason}.")


def parse_shape(text: str) -> tuple[int, int, int]:
    """``CxHxW`` as three numbers above zero; raises UsageError."""
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(
            found=f"--input {text}", expected="channels, height and width, each above zero", action="write 3x224x224"
        )
    return cast("tuple[int, int, int]", tuple(int(part) for part in parts))


def _estimate(
    model: str,
    shape: tuple[int, int, int],
    batch_size: int,
    device: str,
    optimizer: str,
    precision: str,
    mode: str,
    num_classes: int,
    pooling: str | None,
    measure: bool,
) -> Estimate:
    from edgetrain.cli.model_argument import model_maker
    from edgetrain.memory.estimate import estimate, estimate_measured

    make = model_maker(model, num_classes=num_classes or None, in_channels=shape[0], pooling=pooling)
    chosen = None if optimizer == "none" else optimizer
    if measure:
        if mode or precision != "fp32":
            raise UsageError(
                found="--measure with --mode or --precision",
                expected="a plain step in fp32: that is what is run",
                action="leave them out",
            )
        return estimate_measured(make, input_shape=shape, batch_size=batch_size, device=device, optimizer=chosen)
    wrap: Any = None
    if mode:
        wrap = _planned(mode, shape, batch_size)
    return estimate(
        make,
        input_shape=shape,
        batch_size=batch_size,
        device=device,
        optimizer=chosen,
        precision=cast("Precision", precision),
        wrap=wrap,
    )


def _planned(mode: str, shape: tuple[int, int, int], batch_size: int) -> Any:
    from typing import get_args

    import edgetrain
    from edgetrain.errors import near_matches
    from edgetrain.planner import UniformMode

    known = list(get_args(UniformMode))
    if mode not in known:
        raise UsageError(
            found=f"--mode {mode}", expected="one of " + ", ".join(known), action=near_matches(mode, known)
        )

    def wrap(module: Any) -> Any:
        plan = edgetrain.uniform_plan(module, cast(Any, mode), input_shape=shape, batch_size=batch_size)
        return edgetrain.wrap(module, plan)

    return wrap
