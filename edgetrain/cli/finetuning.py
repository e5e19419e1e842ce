"""What ``edgetrain finetune`` does, as values: data, network and choices to a job, and the job to its result."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from edgetrain.cli.export import run_export
from edgetrain.cli.finetune_text import class_table, price_table, print_wide
from edgetrain.cli.objective_options import set_up
from edgetrain.cli.origin import Adapted, Origin, find_origin, fitted_shape, head_of
from edgetrain.cli.train import PLANNED, default_image_size, first_image, read_plan, show_result
from edgetrain.cli.trained import network_maker
from edgetrain.cli.training import Job, run_job
from edgetrain.errors import EdgetrainError, UsageError
from edgetrain.files import write_atomically
from edgetrain.planner import Plan, UniformMode
from edgetrain.targets.ledger import Ledger
from edgetrain.train import Recipe, Throttle
from edgetrain.train.data import channel_statistics, open_divided
from edgetrain.train.data.balance import Balance, balancing_weights
from edgetrain.train.data.holdout import Divided
from edgetrain.train.metrics import Confusion, confusion
from edgetrain.train.prices import Price, offered_choices, prices
from edgetrain.train.run_record import Finetuning, ObjectiveRecord, RunRecord, Training
from edgetrain.units import format_mib

_DRAWN: dict[str, Balance] = {"sampling": "equal", "root": "root"}
"""``--balance`` -> how the classes are drawn."""

_COARSE = 2.0
"""Reduction from which details are worth a word."""

OBJECTIVES = ("cross-entropy", "distillation", "attention-transfer")


@dataclass(frozen=True)
class Finetune:
    """A fine-tuning run that is ready to begin, or to go on.

    Attributes:
        divided: its images.
        prices: of what may be trained.
    """

    job: Job
    divided: Divided
    prices: list[Price]

    @property
    def how(self) -> Finetuning:
        """What of the network is trained."""
        assert self.job.record.finetuning is not None
        return self.job.record.finetuning


def prepare(
    *,
    data: str,
    source: str,
    out: Path,
    budget_bytes: int | None,
    device: str | None,
    trained: str,
    batch_norm: str,
    balance: str,
    holdout: float,
    cutout: bool,
    epochs: int,
    batch_size: int,
    mode: str,
    snr_limit: float,
    image_size: int | None,
    learning_rate: float | None,
    seed: int,
    checkpoint_every: int | None,
    export: bool,
    objective: ObjectiveRecord,
) -> Finetune:
    """What ``edgetrain finetune`` was asked for, checked and ready to run; the options as there."""
    _check_objective(objective, trained, out)
    divided = open_divided(data, holdout=holdout, seed=seed)
    classes, channels = tuple(divided.train.classes), divided.train.channels
    origin = find_origin(source, classes=len(classes), channels=channels)
    _check_apart(origin, out)
    torch.manual_seed(seed)
    shape = origin.input_shape or fitted_shape(origin, channels=channels, side=default_image_size(divided.train))
    shape = shape if image_size is None else (shape[0], image_size, image_size)
    head, new_head = head_of(origin, shape, classes)
    batch_size = min(batch_size, len(divided.train))
    mean, std = channel_statistics(divided.train, shape, seed=seed)
    record = RunRecord(
        **origin.described,
        data=data if data == "digits" else str(Path(data).resolve()),
        classes=classes,
        input_shape=shape,
        mean=tuple(map(float, mean)),
        std=tuple(map(float, std)),
        seed=seed,
        training=Training(
            epochs=epochs,
            learning_rate=learning_rate,
            budget_bytes=budget_bytes,
            sample_modules=None,
            freeze=0,
            limit_train=None,
            limit_test=None,
            checkpoint_every=checkpoint_every,
            objective=objective,
            threads=torch.get_num_threads(),
            snr_limit=snr_limit if math.isfinite(snr_limit) else None,
        ),
        finetuning=Finetuning(
            source=origin.source,
            made_for=origin.made_for,
            head=head,
            new_head=new_head or origin.new_head,
            trained=trained,
            batch_norm=cast(Any, batch_norm),
            balance=cast(Any, balance),
            holdout=holdout,
            cutout=cutout,
            device=device,
            export=export,
        ),
    )

    def adapted(choice: str) -> Adapted:
        fresh = len(classes) if new_head else None
        return Adapted(origin.make, origin.weights, head, fresh, choice, cast(Any, batch_norm))

    chosen = None if mode == PLANNED else cast(UniformMode, mode)
    job = _job(record, adapted(trained), divided, chosen=chosen, batch_size=batch_size)
    return Finetune(job, divided, _prices(adapted, origin.make, job))


def prepare_again(run: Path, record: RunRecord, plan: Plan | None) -> Finetune:
    """The fine-tuning run in ``run``, ready to go on by ``plan``; None: by that in ``plan.json``."""
    assert record.finetuning is not None
    how = record.finetuning
    divided = open_divided(record.data, holdout=how.holdout, seed=record.seed)
    network = network_maker(record)

    def adapted(choice: str) -> Adapted:
        return Adapted(network, None, how.head, None, choice, how.batch_norm)

    if plan is None:
        plan = read_plan(run / "plan.json", channels=record.input_shape[0], images=len(divided.train))
    job = _job(record, adapted(how.trained), divided, chosen=plan, batch_size=plan.input_shape[0])
    return Finetune(job, divided, _prices(adapted, network, job))


def _prices(adapted: Callable[[str], Adapted], network: Callable[[], nn.Module], job: Job) -> list[Price]:
    """Of what may be trained of ``network``, what was chosen among it."""
    assert job.record.finetuning is not None
    offered = offered_choices(network(), job.record.finetuning.trained)
    return prices(
        lambda choice: adapted(choice)(),
        offered,
        input_shape=job.record.input_shape,
        recipe=job.recipe,
        snr_limit=job.snr_limit,
    )


def announce(run: Finetune, *, budget_bytes: int | None, reserve_bytes: int | None) -> None:
    """Prints on stderr what is going to happen, and what else could at which price."""
    job, how, divided = run.job, run.how, run.divided
    record = job.record
    shape = "x".join(map(str, record.input_shape))
    held_out = f", {how.holdout:.0%} of each class held out" if divided.held_out else ""
    head = f"new head {how.head} for {len(record.classes)} classes" if how.new_head else f"head {how.head} kept"
    reserve = "" if reserve_bytes is None else f" (available now, less a reserve of {format_mib(reserve_bytes)})"
    assert record.training is not None
    learned = record.training.objective
    teacher: list[str] = []
    if learned.teacher is not None and job.setup is not None:
        beside = format_mib(job.setup.guest.standing_bytes)
        teacher = [f"{learned.name} from {learned.teacher}, which takes {beside} beside a step"]
    budget = "no budget" if budget_bytes is None else f"budget {format_mib(budget_bytes)}{reserve}"
    print_wide(
        f"{record.model} from {how.source}: {head}",
        f"{len(divided.train)} images to train on, {len(divided.test)} to test on{held_out}; {budget}",
        *teacher,
        _reduction(divided, record.input_shape),
        f"a step of {job.recipe.batch_size} images of {shape}, batch norm {how.batch_norm}, takes:",
        price_table(run.prices, chosen=how.trained, budget_bytes=budget_bytes),
        stderr=True,
    )


def _reduction(divided: Divided, input_shape: tuple[int, int, int]) -> str:
    """What becomes of the details of the photographs, told by the first of them."""
    height, width = first_image(divided.train).shape[:2]
    factor = max(height / input_shape[1], width / input_shape[2])
    told = f"a photograph of {width}x{height} pixels becomes {input_shape[2]}x{input_shape[1]}"
    if factor < _COARSE:
        return told
    return f"{told}: details of less than {factor:.0f} pixels are lost, --image-size N keeps more"


def run_finetuning(
    run: Finetune,
    *,
    out: Path,
    ledger: Ledger,
    budget_bytes: int | None,
    resume: bool,
    checkpoint_every: int | None,
    throttle: Throttle,
    as_json: bool,
    quiet: bool,
    live: bool = False,
) -> None:
    """Trains, evaluates, exports, and prints the result; options as of ``edgetrain finetune``.

    Raises:
        ExportError: the network cannot be exported; the run and its result are complete all the same.
    """
    job, how = run.job, run.how
    assert job.record.training is not None
    done, outcome = run_job(
        job,
        ledger=ledger,
        budget_bytes=budget_bytes,
        out=out,
        resume=resume,
        checkpoint_every=checkpoint_every,
        throttle=throttle,
        quiet=quiet,
        live=live,
    )
    tested = job.test_batches()
    assert tested is not None
    found = confusion(done.model, tested, job.record.classes, device=_device())
    exported, failure = _export(out, how) if how.export else (None, None)
    result = {
        "model": job.record.model,
        "pooling": job.record.pooling,
        "mode": job.chosen if isinstance(job.chosen, str) else "planned",
        "finetuning": how.model_dump(),
        "objective": job.record.training.objective.name,
        "images": {"train": len(run.divided.train), "test": len(run.divided.test), "held_out": run.divided.held_out},
        "choices": [asdict(price) for price in run.prices],
        "planned_bytes": None if done.plan.costed is None else done.plan.costed.peak_bytes,
        **outcome,
        **found.to_dict(),
        "export": None if exported is None else str(exported),
    }
    write_atomically(out / "result.json", json.dumps(result).encode())
    _show(result, found, out=out, as_json=as_json)
    if failure is not None:
        raise failure


def _show(result: dict[str, Any], found: Confusion, *, out: Path, as_json: bool) -> None:
    show_result(result, out=out, as_json=as_json)
    if as_json:
        return
    print_wide(class_table(found), f"accuracy {found.accuracy:.2%}, macro-F1 {found.macro_f1:.2%}")
    if result["export"] is not None:
        print_wide(f"exported to {result['export']}")


def _job(
    record: RunRecord, make: Adapted, divided: Divided, *, chosen: UniformMode | Plan | None, batch_size: int
) -> Job:
    assert record.training is not None
    assert record.finetuning is not None
    training, balance = record.training, record.finetuning.balance
    setup = set_up(
        training.objective,
        make_model=make,
        source=divided.train,
        input_shape=record.input_shape,
        batch_size=batch_size,
        statistics=(record.mean, record.std),
        seed=record.seed,
        device=_device(),
        class_weights=balancing_weights(divided.train.labels, len(record.classes)) if balance == "loss" else None,
    )
    return Job(
        setup.make_model,
        record,
        Recipe(epochs=training.epochs, batch_size=batch_size, peak_rate=training.learning_rate, seed=record.seed),
        divided.train,
        divided.test,
        chosen,
        setup=setup,
        balanced=_DRAWN.get(balance),
        cutout=record.finetuning.cutout,
    )


def _export(out: Path, how: Finetuning) -> tuple[Path | None, EdgetrainError | None]:
    """The graph in the run directory, or why there is none."""
    try:
        exported, _ = run_export(
            run=out,
            model=None,
            input_shape="",
            num_classes=0,
            device=how.device,
            precision="fp32",
            batch=None,
            images=64,
            out=out / "export" / "model.onnx",
        )
    except EdgetrainError as error:
        return None, error
    return exported.path, None


def _check_apart(origin: Origin, out: Path) -> None:
    if origin.weights is not None and origin.weights.is_relative_to(out.resolve()):
        raise UsageError(
            found=f"--out {out}, the run that --from names",
            expected="another directory: a new run removes the checkpoints of the one that was there",
            action="name another directory",
        )


def _check_objective(objective: ObjectiveRecord, trained: str, out: Path) -> None:
    if objective.name not in OBJECTIVES:
        raise UsageError(
            found=f"--objective {objective.name} with edgetrain finetune, which trains a logit for each class",
            expected="one of " + ", ".join(OBJECTIVES),
            action=f"train a network that embeds with edgetrain train --objective {objective.name}",
        )
    if objective.name == "attention-transfer" and trained == "head":
        raise UsageError(
            found="--objective attention-transfer with --train head",
            expected="something to train below the head: no attention changes with the head alone",
            action="pass --train last:K, or --objective distillation",
        )
    if objective.teacher is not None and Path(objective.teacher) == out.resolve():
        raise UsageError(
            found=f"--out {out}, the run of the teacher",
            expected="another directory: a new run removes the checkpoints of the one that was there",
            action="name another directory",
        )


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
