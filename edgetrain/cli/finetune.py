"""``edgetrain finetune``: a trained network and some photographs; an adapted network, evaluated and exported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from edgetrain.cli import objective_options
from edgetrain.cli.train import (
    DEFAULT_SNR_LIMIT,
    PLANNED,
    CheckpointEvery,
    MaxTemp,
    PauseFile,
    SnrLimit,
    check_mode,
    check_rate,
    check_snr_limit,
)
from edgetrain.errors import UsageError, near_matches


def finetune(
    data: Annotated[str, typer.Option(help="Folder or file of images and labels, or 'digits'.")],
    source: Annotated[
        str,
        typer.Option(
            "--from", help="Run directory, checkpoint in one, or module:function.", metavar="RUN|CHECKPOINT|M:F"
        ),
    ],
    budget: Annotated[
        str, typer.Option(help="Hard memory cap, like 400MiB; auto: what is available, less a reserve; none: no cap.")
    ] = "auto",
    device: Annotated[
        str | None, typer.Option(help="Device profile: bounds --budget auto, and the graph is exported for it.")
    ] = None,
    trained: Annotated[
        str, typer.Option("--train", help="What is trained: all, last:K (blocks), head, or bias-norm.")
    ] = "all",
    batch_norm: Annotated[
        str, typer.Option(help="live: statistics of each batch; fixed: the learned ones, unchanged.")
    ] = "live",
    balance: Annotated[
        str,
        typer.Option(help="Rare classes: sampling (drawn as often), root (by the root of their number), loss, none."),
    ] = "root",
    holdout: Annotated[
        float, typer.Option(help="Part of each class to test on, where the data have no test split.")
    ] = 0.2,
    cutout: Annotated[
        bool, typer.Option(help="Set a square of each training image to the mean: it may cover what is looked for.")
    ] = False,
    epochs: Annotated[int, typer.Option(min=1)] = 30,
    batch_size: Annotated[int, typer.Option(min=2)] = 32,
    mode: Annotated[str, typer.Option(help="planned, or one mode for all blocks, as of edgetrain train.")] = PLANNED,
    snr_limit: SnrLimit = DEFAULT_SNR_LIMIT,
    objective: Annotated[
        str, typer.Option(help="cross-entropy, distillation or attention-transfer, from --teacher.")
    ] = "cross-entropy",
    label_smoothing: objective_options.LabelSmoothing = 0.0,
    teacher: objective_options.TeacherRun = None,
    teacher_outputs: objective_options.TeacherOutputs = None,
    temperature: objective_options.Temperature = None,
    alpha: objective_options.Alpha = None,
    beta: objective_options.Beta = None,
    attention_map: objective_options.AttentionMap = None,
    image_size: Annotated[int | None, typer.Option(min=8, help="Side in pixels; default: that of the run.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak rate; default 0.4 per 512 samples.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    checkpoint_every: CheckpointEvery = None,
    pause_file: PauseFile = None,
    max_temp: MaxTemp = None,
    export: Annotated[bool, typer.Option(help="Write OUT/export/model.onnx at the end.")] = True,
    out: Annotated[Path, typer.Option(help="Run directory.")] = Path("runs/finetuned"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option(help="No progress on stderr.")] = False,
    live: Annotated[
        bool, typer.Option("--live", help="A chart of memory against the budget on stderr, where it is a terminal.")
    ] = False,
) -> None:
    """Adapt a trained network to your images inside a hard memory cap, evaluate it and export it."""
    check_mode(mode)
    check_snr_limit(snr_limit)
    check_rate(learning_rate)
    _check_choice("--batch-norm", batch_norm, ["live", "fixed"])
    _check_choice("--balance", balance, ["sampling", "root", "loss", "none"])
    learned = objective_options.objective_record(
        objective,
        label_smoothing=label_smoothing,
        teacher=teacher,
        teacher_outputs=teacher_outputs,
        temperature=temperature,
        alpha=alpha,
        beta=beta,
        attention_map=attention_map,
    )
    from edgetrain.cli.automatic_budget import memory_ledger, parse_budget
    from edgetrain.cli.finetuning import announce, prepare, run_finetuning
    from edgetrain.cli.training import check_display
    from edgetrain.train import Throttle

    check_display(live=live, quiet=quiet)
    throttle = Throttle(pause_file=pause_file, max_celsius=max_temp)
    ledger = memory_ledger(device)
    budget_bytes, reserve_bytes = parse_budget(budget, ledger, device)
    prepared = prepare(
        data=data,
        source=source,
        out=out,
        budget_bytes=budget_bytes,
        device=device,
        trained=trained,
        batch_norm=batch_norm,
        balance=balance,
        holdout=holdout,
        cutout=cutout,
        epochs=epochs,
        batch_size=batch_size,
        mode=mode,
        snr_limit=snr_limit,
        image_size=image_size,
        learning_rate=learning_rate,
        seed=seed,
        checkpoint_every=checkpoint_every,
        export=export,
        objective=learned,
    )
    if not quiet:
        announce(prepared, budget_bytes=budget_bytes, reserve_bytes=reserve_bytes)
    run_finetuning(
        prepared,
        out=out,
        ledger=replace(ledger, reserve_bytes=reserve_bytes),
        budget_bytes=budget_bytes,
        resume=False,
        checkpoint_every=checkpoint_every,
        throttle=throttle,
        as_json=as_json,
        quiet=quiet,
        live=live,
    )


def _check_choice(option: str, value: str, known: list[str]) -> None:
    if value not in known:
        raise UsageError(
            found=f"{option} {value}", expected="one of " + ", ".join(known), action=near_matches(value, known)
        )
