"""``edgetrain train``: data, a model, a budget; a trained run directory."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from edgetrain.cli import objective_options
from edgetrain.errors import DataError, UsageError, near_matches
from edgetrain.units import format_mib, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from edgetrain.planner import Plan, UniformMode
    from edgetrain.targets.ledger import Ledger
    from edgetrain.train.run_record import ObjectiveRecord, RunRecord

PLANNED = "planned"
DEFAULT_SNR_LIMIT = 1e4
SnrLimit = Annotated[
    float,
    typer.Option(
        help="Least signal over noise of what plans invert, those to fall back on too; inf: it comes back as it was."
    ),
]
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
    snr_limit: SnrLimit = DEFAULT_SNR_LIMIT,
    sample_modules: Annotated[
        str | None,
        typer.Option(help="Residual modules of each stage that run in a step, 1/2 or 5,4,4; changes training."),
    ] = None,
    freeze: Annotated[
        int, typer.Option(min=0, help="Leading blocks that are not trained and run in evaluation mode.")
    ] = 0,
    image_size: Annotated[int | None, typer.Option(min=8, help="Side in pixels; images are resized.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak rate; default 0.4 per 512 samples.")] = None,
    objective: objective_options.ObjectiveName = "cross-entropy",
    label_smoothing: objective_options.LabelSmoothing = 0.0,
    teacher: objective_options.TeacherRun = None,
    teacher_outputs: objective_options.TeacherOutputs = None,
    temperature: objective_options.Temperature = None,
    alpha: objective_options.Alpha = None,
    beta: objective_options.Beta = None,
    attention_map: objective_options.AttentionMap = None,
    margin: objective_options.Margin = None,
    embedding: objective_options.Embedding = None,
    limit_train: Annotated[int | None, typer.Option(min=1, help="Use that many training images.")] = None,
    limit_test: Annotated[int | None, typer.Option(min=1, help="Use that many test images.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    checkpoint_every: CheckpointEvery = None,
    pause_file: PauseFile = None,
    max_temp: MaxTemp = None,
    out: Annotated[Path, typer.Option(help="Run directory.")] = Path("runs/last"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option(help="No progress on stderr.")] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write TensorBoard event files into OUT/tensorboard.")
    ] = False,
    live: Annotated[
        bool, typer.Option("--live", help="A chart of memory against the budget on stderr, where it is a terminal.")
    ] = False,
) -> None:
    """Train a network on images inside a hard memory cap."""
    learned = objective_options.objective_record(
        objective,
        label_smoothing=label_smoothing,
        teacher=teacher,
        teacher_outputs=teacher_outputs,
        temperature=temperature,
        alpha=alpha,
        beta=beta,
        attention_map=attention_map,
        margin=margin,
        embedding=embedding,
    )
    from edgetrain.cli.automatic_budget import memory_ledger

    result = run_training(
        data=data,
        model=model,
        pooling=pooling,
        ledger=memory_ledger(device),
        budget_bytes=choose_budget(budget, device),
        epochs=epochs,
        batch_size=batch_size,
        mode=mode,
        plan_file=plan,
        update_in_backward=update_in_backward,
        snr_limit=snr_limit,
        sample_modules=sample_modules,
        freeze=freeze,
        image_size=image_size,
        learning_rate=learning_rate,
        objective=learned,
        limit_train=limit_train,
        limit_test=limit_test,
        seed=seed,
        checkpoint_every=checkpoint_every,
        pause_file=pause_file,
        max_temp=max_temp,
        out=out,
        tensorboard=tensorboard,
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
    ledger: Ledger,
    budget_bytes: int | None,
    epochs: int,
    batch_size: int,
    mode: str,
    plan_file: Path | None = None,
    update_in_backward: bool = False,
    snr_limit: float = DEFAULT_SNR_LIMIT,
    sample_modules: str | None = None,
    freeze: int = 0,
    image_size: int | None,
    learning_rate: float | None,
    objective: ObjectiveRecord | None = None,
    limit_train: int | None,
    limit_test: int | None,
    seed: int,
    checkpoint_every: int | None = None,
    pause_file: Path | None = None,
    max_temp: float | None = None,
    out: Path,
    tensorboard: bool = False,
    resumed: RunRecord | None = None,
    plan: Plan | None = None,
    quiet: bool,
    live: bool = False,
) -> dict[str, Any]:
    """What ``edgetrain train`` does, as a value: the result that ``--json`` prints.

    Args:
        ledger: the memory of this machine.
        objective: None: cross-entropy.
        resumed: the record of the run in ``out`` that goes on; None starts one.
        plan: by which it goes on.
    """
    import torch

    from edgetrain.cli.model_argument import model_maker, sampled_maker
    from edgetrain.cli.training import Job, check_display, run_job
    from edgetrain.files import write_atomically
    from edgetrain.planner import Plan
    from edgetrain.train import Recipe, Throttle
    from edgetrain.train.data import channel_statistics, open_source
    from edgetrain.train.run_record import RunRecord, Training

    check_mode(mode)
    if update_in_backward and (mode != PLANNED or plan_file is not None):
        raise UsageError(
            found="--update-in-backward with --mode or --plan",
            expected="one that a plan is made for",
            action="leave --mode and --plan out, or make the plan with --update-in-backward",
        )
    check_snr_limit(snr_limit)
    check_display(live=live, quiet=quiet)
    check_rate(learning_rate)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    throttle = Throttle(pause_file=pause_file, max_celsius=max_temp)
    source = open_source(data, split="train", limit=limit_train, seed=seed)
    try:
        test_source = open_source(data, split="test", limit=limit_test, seed=seed)
    except DataError as error:
        if not error.found.endswith("has no test split"):
            raise
        test_source = None
    learned = objective or objective_options.objective_record()
    if learned.name == "attention-transfer" and sample_modules is not None:
        raise UsageError(
            found="--sample-modules with --objective attention-transfer",
            expected="one of them: a module that is left out has no attention",
            action="leave --sample-modules out, or pass --objective distillation",
        )
    make_model = model_maker(
        model,
        num_classes=learned.embedding or len(source.classes),
        in_channels=source.channels,
        pooling=pooling,
        frozen=freeze,
    )
    side = image_size or default_image_size(source)
    input_shape = (source.channels, side, side)
    order = objective_options.order_of(learned, source)
    batch_size = objective_options.whole_groups(learned, min(batch_size, len(source) if order is None else len(order)))
    chosen: UniformMode | Plan | None = None if mode == PLANNED else cast("UniformMode", mode)
    if plan_file is not None:
        chosen = read_plan(plan_file, channels=source.channels, images=len(source))
    if plan is not None:
        chosen = plan
    if isinstance(chosen, Plan):
        if learned.name != "attention-transfer":
            check_activations(chosen, make_model)
        batch_size, *shape = chosen.input_shape
        input_shape = (shape[0], shape[1], shape[2])
    make_model = sampled_maker(make_model, sample_modules, input_shape=input_shape, seed=seed)
    recipe = Recipe(epochs=epochs, batch_size=batch_size, peak_rate=learning_rate, seed=seed)
    mean, std = channel_statistics(source, input_shape, seed=seed) if resumed is None else (resumed.mean, resumed.std)
    setup = objective_options.set_up(
        learned,
        make_model=make_model,
        source=source,
        input_shape=input_shape,
        batch_size=batch_size,
        statistics=(tuple(map(float, mean)), tuple(map(float, std))),
        seed=seed,
        device=device,
    )
    make_model = setup.make_model
    if isinstance(chosen, Plan) and learned.name == "attention-transfer":
        check_activations(chosen, make_model)
    record = resumed or RunRecord(
        model=model,
        pooling=pooling,
        data=data if data == "digits" else str(Path(data).resolve()),
        classes=tuple(source.classes),
        input_shape=input_shape,
        mean=tuple(map(float, mean)),
        std=tuple(map(float, std)),
        seed=seed,
        embedding=learned.embedding,
        training=Training(
            epochs=epochs,
            learning_rate=learning_rate,
            budget_bytes=budget_bytes,
            sample_modules=sample_modules,
            freeze=freeze,
            limit_train=limit_train,
            limit_test=limit_test,
            checkpoint_every=checkpoint_every,
            objective=learned,
            threads=torch.get_num_threads(),
            tensorboard=tensorboard,
            snr_limit=snr_limit if math.isfinite(snr_limit) else None,
        ),
    )
    job = Job(make_model, record, recipe, source, test_source, chosen, update_in_backward, setup=setup)
    _, outcome = run_job(
        job,
        ledger=ledger,
        budget_bytes=budget_bytes,
        out=out,
        resume=resumed is not None,
        checkpoint_every=checkpoint_every,
        throttle=throttle,
        quiet=quiet,
        live=live,
    )
    result = {
        "model": model,
        "pooling": pooling,
        "mode": "plan" if isinstance(chosen, Plan) else mode,
        "sample_modules": sample_modules,
        "freeze": freeze,
        "objective": learned.name,
        "embedding": learned.embedding,
        **outcome,
    }
    write_atomically(out / "result.json", json.dumps(result).encode())
    return result


def check_mode(mode: str) -> None:
    """Raises UsageError where there is no such ``--mode``."""
    from edgetrain.planner import UniformMode

    known = [PLANNED, *get_args(UniformMode)]
    if mode not in known:
        raise UsageError(
            found=f"--mode {mode}", expected="one of " + ", ".join(known), action=near_matches(mode, known)
        )


def check_rate(learning_rate: float | None) -> None:
    """Raises UsageError where a learning rate is not a number above zero."""
    if learning_rate is not None and not 0 < learning_rate < math.inf:
        raise UsageError(
            found=f"--learning-rate {learning_rate}", expected="a number above zero", action="write it like 0.1"
        )


def check_snr_limit(snr_limit: float) -> None:
    """Raises UsageError where ``--snr-limit`` is no ratio."""
    if not snr_limit > 0:
        raise UsageError(
            found=f"--snr-limit {snr_limit}", expected="a number above zero, or inf", action="write it like 1e4"
        )


def read_plan(path: Path, *, channels: int, images: int) -> Plan:
    """The plan in ``path``, which says batch and image size.

    Raises:
        ModelError: it is none, or for other data.
        UsageError: it is for more images than there are.
    """
    from edgetrain.errors import ModelError
    from edgetrain.planner import Plan

    plan = Plan.read(path)
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
    height, width = first_image(source).shape[:2]
    return max(16, -(-min(max(height, width), 64) // 8) * 8)


def first_image(source: Any) -> Any:
    """The first image that is not broken; raises BrokenImage where all are."""
    from edgetrain.train.data import BrokenImage

    for index in range(len(source) - 1):
        try:
            return source.decode(index)
        except BrokenImage:
            continue
    return source.decode(len(source) - 1)
