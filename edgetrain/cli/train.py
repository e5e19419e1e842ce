"""``edgetrain train``: data, a model, a budget; a trained run directory."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from edgetrain.errors import DataError, UsageError, near_matches
from edgetrain.units import format_mib, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from edgetrain.planner import Plan
    from edgetrain.train.run_record import RunRecord

PLANNED = "planned"
CheckpointEvery = Annotated[
    int | None, typer.Option(min=1, help="Save after that many steps too, not only after each epoch.")
]
PauseFile = Annotated[Path | None, typer.Option(help="While this file exists the run waits between steps.")]
MaxTemp = Annotated[
    float | None, typer.Option(help="Degrees Celsius; while the hottest thermal zone is above the run waits.")
]


def train(
    data: Annotated[str, typer.Option(help="Folder or file of images and labels, or 'digits'.")],
    model: Annotated[str, typer.Option(help="Name in the zoo, or module:function.")] = "hybrid18",
    pooling: Annotated[
        str | None, typer.Option(help="Pooling sequence of a network of the zoo, c or b for each: ccb.")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Hard memory cap, like 400MiB.")] = None,
    device: Annotated[str | None, typer.Option(help="Device profile, like gtx750; gives the default budget.")] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 50,
    batch_size: Annotated[int, typer.Option(min=2)] = 512,
    mode: Annotated[
        str,
        typer.Option(
            help="planned: per block, the fastest that fits; or keep_all, selective, recompute, invert, "
            "invert_selective, invert_layerwise."
        ),
    ] = PLANNED,
    plan: Annotated[Path | None, typer.Option(help="A plan of edgetrain plan --out, in place of --mode.")] = None,
    update_in_backward: Annotated[
        bool, typer.Option("--update-in-backward", help="A plan that steps the optimiser block by block.")
    ] = False,
    sample_modules: Annotated[
        str | None,
        typer.Option(help="Residual modules of each stage that run in a step, 1/2 or 5,4,4; changes training."),
    ] = None,
    freeze: Annotated[
        int, typer.Option(min=0, help="Leading blocks that are not trained and run in evaluation mode.")
    ] = 0,
    image_size: Annotated[int | None, typer.Option(min=8, help="Side in pixels; images are resized.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak rate; default 0.4 per 512 samples.")] = None,
    limit_train: Annotated[int | None, typer.Option(min=1, help="Use that many training images.")] = None,
    limit_test: Annotated[int | None, typer.Option(min=1, help="Use that many test images.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    checkpoint_every: CheckpointEvery = None,
    pause_file: PauseFile = None,
    max_temp: MaxTemp = None,
    out: Annotated[Path, typer.Option(help="Run directory.")] = Path("runs/last"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option(help="No progress on stderr.")] = False,
    live: Annotated[
        bool, typer.Option("--live", help="A chart of memory against the budget on stderr, where it is a terminal.")
    ] = False,
) -> None:
    """Train a network on images inside a hard memory cap."""
    result = run_training(
        data=data,
        model=model,
        pooling=pooling,
        budget_bytes=choose_budget(budget, device),
        epochs=epochs,
        batch_size=batch_size,
        mode=mode,
        plan_file=plan,
        update_in_backward=update_in_backward,
        sample_modules=sample_modules,
        freeze=freeze,
        image_size=image_size,
        learning_rate=learning_rate,
        limit_train=limit_train,
        limit_test=limit_test,
        seed=seed,
        checkpoint_every=checkpoint_every,
        pause_file=pause_file,
        max_temp=max_temp,
        out=out,
        quiet=quiet,
        live=live,
    )
    show_result(result, out=out, as_json=as_json)


def show_result(result: dict[str, Any], *, out: Path, as_json: bool) -> None:
    """Prints what :func:`run_training` gave."""
    if as_json:
        typer.echo(json.dumps(result))
        return
    for record in result["history"]:
        test = "" if record["test_accuracy"] is None else f"  test {record['test_accuracy']:.2%}"
        typer.echo(
            f"epoch {record['epoch']:>3}  loss {record['loss']:.4f}  train {record['accuracy']:.2%}{test}  "
            f"{record['images_per_second']:.0f} images/s"
        )
    for event in result["events"]:
        size = "" if event["after_bytes"] is None else f" of {format_mib(event['after_bytes'])}"
        typer.echo(f"{event['kind']} after step {event['step']}: went on with a smaller plan{size}")
    if result["broken_images"]:
        typer.echo(f"left out {result['broken_images']} broken images")
    against = "" if result["budget_bytes"] is None else f" of {format_mib(result['budget_bytes'])}"
    if result["predicted_step_seconds"] is not None:
        typer.echo(
            f"step {1e3 * result['step_seconds']:.0f} ms, predicted {1e3 * result['predicted_step_seconds']:.0f} ms "
            f"({result['step_seconds'] / result['predicted_step_seconds'] - 1:+.0%}, loading and decoding included)"
        )
    typer.echo(f"peak memory {format_mib(result['peak_bytes'])}{against}; run in {out}")


def choose_budget(budget: str | None, device: str | None) -> int | None:
    """Bytes of ``budget``, or the default of the profile ``device``, or None for no cap.

    Raises:
        UsageError: no such profile, or no size.
    """
    if device is not None:
        from edgetrain.profiles import load_profile

        default = load_profile(device).default_budget_bytes
        return default if budget is None else parse_size(budget)
    return None if budget is None else parse_size(budget)


def run_training(
    *,
    data: str,
    model: str,
    pooling: str | None = None,
    budget_bytes: int | None,
    epochs: int,
    batch_size: int,
    mode: str,
    plan_file: Path | None = None,
    update_in_backward: bool = False,
    sample_modules: str | None = None,
    freeze: int = 0,
    image_size: int | None,
    learning_rate: float | None,
    limit_train: int | None,
    limit_test: int | None,
    seed: int,
    checkpoint_every: int | None = None,
    pause_file: Path | None = None,
    max_temp: float | None = None,
    out: Path,
    resumed: RunRecord | None = None,
    plan: Plan | None = None,
    quiet: bool,
    live: bool = False,
) -> dict[str, Any]:
    """What ``edgetrain train`` does, as a value: the result that ``--json`` prints.

    Args:
        resumed: the record of the run in ``out`` that goes on; None starts one.
        plan: by which it goes on.
    """
    import numpy as np
    import torch

    from edgetrain.cli.model_argument import model_maker, sampled_maker
    from edgetrain.cli.progress import training_display
    from edgetrain.files import write_atomically
    from edgetrain.planner import Plan, UniformMode
    from edgetrain.targets.pressure import PressureGauge
    from edgetrain.train import Recipe, Throttle
    from edgetrain.train.capped import train_capped
    from edgetrain.train.data import Loader, channel_statistics, open_source, sample_images
    from edgetrain.train.run_record import RunRecord, Training
    from edgetrain.train.trial import EVALUATION_BATCH_SIZE

    known = [PLANNED, *get_args(UniformMode)]
    if mode not in known:
        raise UsageError(
            found=f"--mode {mode}", expected="one of " + ", ".join(known), action=near_matches(mode, known)
        )
    if update_in_backward and (mode != PLANNED or plan_file is not None):
        raise UsageError(
            found="--update-in-backward with --mode or --plan",
            expected="one that a plan is made for",
            action="leave --mode and --plan out, or make the plan with --update-in-backward",
        )
    if live and quiet:
        raise UsageError(
            found="--live with --quiet",
            expected="one of them: a live view is progress",
            action="leave --quiet out; where stderr is no terminal, --live draws nothing but the plain progress",
        )
    if learning_rate is not None and not 0 < learning_rate < math.inf:
        raise UsageError(
            found=f"--learning-rate {learning_rate}", expected="a number above zero", action="write it like 0.1"
        )
    throttle = Throttle(pause_file=pause_file, max_celsius=max_temp)
    source = open_source(data, split="train", limit=limit_train, seed=seed)
    try:
        test_source = open_source(data, split="test", limit=limit_test, seed=seed)
    except DataError as error:
        if not error.found.endswith("has no test split"):
            raise
        test_source = None
    make_model = model_maker(
        model, num_classes=len(source.classes), in_channels=source.channels, pooling=pooling, frozen=freeze
    )
    side = image_size or default_image_size(source)
    input_shape = (source.channels, side, side)
    batch_size = min(batch_size, len(source))
    chosen: UniformMode | Plan | None = None if mode == PLANNED else cast(UniformMode, mode)
    if plan_file is not None:
        chosen = read_plan(plan_file, channels=source.channels, images=len(source))
    if plan is not None:
        chosen = plan
    if isinstance(chosen, Plan):
        check_activations(chosen, make_model)
        batch_size, *shape = chosen.input_shape
        input_shape = (shape[0], shape[1], shape[2])
    make_model = sampled_maker(make_model, sample_modules, input_shape=input_shape, seed=seed)
    recipe = Recipe(epochs=epochs, batch_size=batch_size, peak_rate=learning_rate, seed=seed)
    statistics = channel_statistics(source, input_shape, seed=seed) if resumed is None else (resumed.mean, resumed.std)
    mean, std = (np.asarray(values, dtype=np.float64) for values in statistics)
    record = resumed or RunRecord(
        model=model,
        pooling=pooling,
        data=data if data == "digits" else str(Path(data).resolve()),
        classes=tuple(source.classes),
        input_shape=input_shape,
        mean=tuple(map(float, mean)),
        std=tuple(map(float, std)),
        seed=seed,
        training=Training(
            epochs=epochs,
            learning_rate=learning_rate,
            budget_bytes=budget_bytes,
            sample_modules=sample_modules,
            freeze=freeze,
            limit_train=limit_train,
            limit_test=limit_test,
            checkpoint_every=checkpoint_every,
            threads=torch.get_num_threads(),
        ),
    )
    loaders: list[Loader] = []

    def make_batches() -> tuple[Any, Any]:
        shared: dict[str, Any] = {"image_size": input_shape, "mean": mean, "std": std, "seed": seed}
        training = Loader(source, batch_size=batch_size, augment=True, shuffle=True, drop_last=True, **shared)
        loaders.append(training)
        if test_source is None:
            return training, None
        test_batch = min(batch_size, EVALUATION_BATCH_SIZE)
        testing = Loader(test_source, batch_size=test_batch, augment=False, shuffle=False, drop_last=False, **shared)
        loaders.append(testing)
        return training, testing

    sample = None if chosen is not None else sample_images(source, input_shape, mean, std, seed=seed)

    (out / "result.json").unlink(missing_ok=True)  # of an earlier run
    with training_display(budget_bytes=budget_bytes, quiet=quiet, live=live) as progress:
        run = train_capped(
            make_model,
            make_batches,
            mode=chosen,
            sample=sample,
            update_in_backward=update_in_backward,
            input_shape=input_shape,
            recipe=recipe,
            run_dir=out,
            record=record,
            budget_bytes=budget_bytes,
            device="cuda" if torch.cuda.is_available() else "cpu",
            resume=resumed is not None,
            watch=progress.watch,
            checkpoint_every=checkpoint_every,
            throttle=throttle,
            gauge=PressureGauge(),
        )
    result = {
        "model": model,
        "pooling": pooling,
        "mode": "plan" if isinstance(chosen, Plan) else mode,
        "sample_modules": sample_modules,
        "freeze": freeze,
        "predicted_step_seconds": None if run.plan.costed is None else run.plan.costed.step_seconds,
        "step_seconds": batch_size / run.history[-1].images_per_second,
        "classes": list(source.classes),
        "input_shape": list(input_shape),
        "batch_size": batch_size,
        "seed": seed,
        "history": [asdict(record) for record in run.history],
        "events": [asdict(event) for event in run.events],
        "peak_bytes": run.peak_bytes,
        "file_bytes": run.file_bytes,
        "budget_bytes": run.budget_bytes,
        "broken_images": len({path for loader in loaders for path, _ in loader.broken}),
        "checkpoint": str(run.checkpoint),
        "normalisation": {"mean": [float(v) for v in mean], "std": [float(v) for v in std]},
    }
    write_atomically(out / "result.json", json.dumps(result).encode())
    return result


def read_plan(path: Path, *, channels: int, images: int) -> Plan:
    """The plan in ``path``, which says batch and image size.

    Raises:
        ModelError: it is none, or for other data.
        UsageError: it is for more images than there are.
    """
    from edgetrain.errors import ModelError
    from edgetrain.planner import Plan

    plan = Plan.from_json(path.read_text())
    batch_size, *shape = plan.input_shape
    if len(shape) != 3 or shape[0] != channels:
        raise ModelError(
            found=f"a plan for samples of {'x'.join(map(str, shape))}",
            expected=f"images of {channels} channels, which the data have",
            action=f"make a plan with --input {channels}xHxW",
        )
    if batch_size > images:
        raise UsageError(
            found=f"a plan for batches of {batch_size} and {images} training images",
            expected="one batch at least",
            action=f"make a plan with --batch {images} or less",
        )
    return plan


def check_activations(plan: Plan, make_model: Callable[[], nn.Module]) -> None:
    """Raises ModelError where the network has other activations than the one that ``plan`` was made for.

    Networks that differ in their pooling sequence have blocks of the same names. The number of classes is left out.
    """
    from edgetrain.chain import chain_of
    from edgetrain.errors import ModelError
    from edgetrain.targets import release_free_memory

    chain, program = chain_of(make_model()), plan.program
    if tuple(block.name for block in chain.blocks) == program.names:  # else edgetrain.wrap says what differs
        shapes = chain.shapes(program.shapes[0])
        for name, own, planned in zip(program.names[1:], shapes[1:-1], program.shapes[1:-1], strict=True):
            if own != planned:
                raise ModelError(
                    found=f"a plan in which {name} takes {planned} and a model in which it takes {own}",
                    expected="the model that the plan was made for",
                    action="pass the --model and --pooling of the plan, or make a new plan",
                )
    del chain
    release_free_memory()


def default_image_size(source: Any) -> int:
    """Side of the first readable image, rounded up to a multiple of 8 (three poolings halve it), 16 to 64."""
    height, width = _first_image(source).shape[:2]
    return max(16, -(-min(max(height, width), 64) // 8) * 8)


def _first_image(source: Any) -> Any:
    """The first image that is not broken; raises BrokenImage where all are."""
    from edgetrain.train.data import BrokenImage

    for index in range(len(source) - 1):
        try:
            return source.decode(index)
        except BrokenImage:
            continue
    return source.decode(len(source) - 1)
