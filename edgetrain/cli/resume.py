"""``edgetrain resume``: a run that ended before its time goes on, on the CPU bit for bit as if it had not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgetrain.cli.train import CheckpointEvery, MaxTemp, PauseFile, run_training, show_result
from edgetrain.errors import UsageError


def resume(
    run: Annotated[Path, typer.Argument(help="Directory that edgetrain train --out wrote.", metavar="RUN")],
    checkpoint_every: CheckpointEvery = None,
    pause_file: PauseFile = None,
    max_temp: MaxTemp = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option(help="No progress on stderr.")] = False,
) -> None:
    """Go on with a run that was killed, stopped or lost its power, from its last good checkpoint."""
    import torch

    from edgetrain.cli.automatic_budget import memory_ledger
    from edgetrain.train.checkpoint import newest_checkpoint, plan_in
    from edgetrain.train.run_record import RunRecord

    record = RunRecord.read(run)
    training = record.training
    if training is None:
        raise UsageError(
            found=f"{run}, a run that edgetrain train did not start",
            expected="one that says how it was started",
            action="make the Trainer again in Python and call its resume",
        )
    torch.set_num_threads(training.threads)
    # the trainer warns of a damaged one; a run of an older version has its plan in plan.json alone
    plan = plan_in(newest_checkpoint(run / "checkpoints", warn=False))
    if record.finetuning is not None:
        from edgetrain.cli.finetuning import prepare_again, run_finetuning
        from edgetrain.train import Throttle

        run_finetuning(
            prepare_again(run, record, plan),
            out=run,
            ledger=memory_ledger(record.finetuning.device),
            budget_bytes=training.budget_bytes,
            resume=True,
            checkpoint_every=checkpoint_every or training.checkpoint_every,
            throttle=Throttle(pause_file=pause_file, max_celsius=max_temp),
            as_json=as_json,
            quiet=quiet,
        )
        return
    result = run_training(
        data=record.data,
        model=record.model,
        pooling=record.pooling,
        ledger=memory_ledger(None),
        budget_bytes=training.budget_bytes,
        epochs=training.epochs,
        batch_size=2,
        mode="planned",
        plan_file=None if plan is not None else run / "plan.json",
        plan=plan,
        sample_modules=training.sample_modules,
        freeze=training.freeze,
        image_size=None,
        learning_rate=training.learning_rate,
        objective=training.objective,
        limit_train=training.limit_train,
        limit_test=training.limit_test,
        seed=record.seed,
        checkpoint_every=checkpoint_every or training.checkpoint_every,
        pause_file=pause_file,
        max_temp=max_temp,
        out=run,
        tensorboard=training.tensorboard,
        resumed=record,
        quiet=quiet,
    )
    show_result(result, out=run, as_json=as_json)
