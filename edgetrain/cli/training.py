"""What ``train``, ``finetune`` and ``resume`` share: data, network and recipe to a run inside a cap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgetrain.cli.finetune_text import print_wide
from edgetrain.cli.ledger_text import ledger_table
from edgetrain.cli.objective_options import ObjectiveSetup
from edgetrain.cli.progress import training_display
from edgetrain.errors import UsageError
from edgetrain.planner import SNR_LIMIT, Plan, UniformMode
from edgetrain.targets.ledger import Ledger
from edgetrain.targets.pressure import PressureGauge
from edgetrain.train import Recipe, Throttle
from edgetrain.train.capped import CappedRun, Watch, train_capped
from edgetrain.train.data import Loader, Source, decoding_bytes, sample_images
from edgetrain.train.data.balance import Balance
from edgetrain.train.run_record import RunRecord
from edgetrain.train.tensorboard import with_tensorboard
from edgetrain.train.trial import EVALUATION_BATCH_SIZE


@dataclass(frozen=True)
class Job:
    """A run that is ready to begin.

    Attributes:
        make_model: makes the network.
        record: its input, normalisation, classes and seed.
        source: training images; ``test_source``: None for none.
        chosen: a mode for all blocks or a plan; None: the fastest plan that fits.
        setup: what is learnt; None: cross-entropy.
        balanced: how rare classes are drawn more often; None: they are not.
        cutout: whether augmentation sets a square of each image to the mean.
    """

    make_model: Callable[[], nn.Module]
    record: RunRecord
    recipe: Recipe
    source: Source
    test_source: Source | None
    chosen: UniformMode | Plan | None
    update_in_backward: bool = False
    setup: ObjectiveSetup | None = None
    balanced: Balance | None = None
    cutout: bool = True

    @property
    def snr_limit(self) -> float:
        """Least ratio of signal to noise of what a plan inverts."""
        training = self.record.training
        return SNR_LIMIT if training is None else training.snr_limit_or_infinity

    def batches(self) -> Loader:
        """The training data."""
        return self._loader(self.source, self.recipe.batch_size, training=True)

    def test_batches(self) -> Loader | None:
        """The test data."""
        if self.test_source is None:
            return None
        return self._loader(self.test_source, min(self.recipe.batch_size, EVALUATION_BATCH_SIZE), training=False)

    def _loader(self, source: Source, batch_size: int, *, training: bool) -> Loader:
        setup = self.setup if training else None
        return Loader(
            source,
            batch_size=batch_size,
            image_size=self.record.input_shape,
            augment=training and (setup is None or setup.augment),
            shuffle=training,
            seed=self.record.seed,
            drop_last=training,
            mean=self.record.mean,
            std=self.record.std,
            order=None if setup is None else setup.order,
            balanced=self.balanced if training else None,
            cutout=self.cutout,
        )


def run_job(
    job: Job,
    *,
    ledger: Ledger,
    budget_bytes: int | None,
    out: Path,
    resume: bool,
    checkpoint_every: int | None,
    throttle: Throttle,
    quiet: bool,
    live: bool = False,
) -> tuple[CappedRun, dict[str, Any]]:
    """Runs ``job`` into the directory ``out``; what it gave, also as the part of the result that all commands print.

    Args:
        ledger: the memory of this machine, without the run.
        resume: go on with the run that is there.
    """
    record = job.record
    ledger = _with_run(ledger, job, budget_bytes)
    if not quiet:
        print_wide(ledger_table(ledger), stderr=True)
    loaders: list[Loader] = []

    def make_batches() -> tuple[Loader, Loader | None]:
        if job.setup is not None:
            job.setup.start()
        training, testing = job.batches(), job.test_batches()
        loaders.extend(loader for loader in (training, testing) if loader is not None)
        return training, testing

    sample = None
    if job.chosen is None:
        sample = sample_images(job.source, record.input_shape, record.mean, record.std, seed=record.seed)
    (out / "result.json").unlink(missing_ok=True)  # of an earlier run
    with training_display(budget_bytes=budget_bytes, quiet=quiet, live=live) as progress:
        watch: Watch = progress.watch
        if record.training is not None and record.training.tensorboard:
            watch = with_tensorboard(watch, out / "tensorboard", budget_bytes=budget_bytes)
        run = train_capped(
            job.make_model,
            make_batches,
            mode=job.chosen,
            sample=sample,
            update_in_backward=job.update_in_backward,
            snr_limit=job.snr_limit,
            input_shape=record.input_shape,
            recipe=job.recipe,
            objective=None if job.setup is None else job.setup.objective,
            guest=None if job.setup is None else job.setup.guest,
            run_dir=out,
            record=record,
            budget_bytes=budget_bytes,
            decoding_bytes=ledger.decoding_bytes or 0,
            device="cuda" if torch.cuda.is_available() else "cpu",
            resume=resume,
            watch=watch,
            checkpoint_every=checkpoint_every,
            throttle=throttle,
            gauge=PressureGauge(),
        )
    return run, {
        "predicted_step_seconds": None if run.plan.costed is None else run.plan.costed.step_seconds,
        "step_seconds": job.recipe.batch_size / run.history[-1].images_per_second,
        "classes": list(record.classes),
        "input_shape": list(record.input_shape),
        "batch_size": job.recipe.batch_size,
        "seed": record.seed,
        "history": [asdict(epoch) for epoch in run.history],
        "events": [asdict(event) for event in run.events],
        "peak_bytes": run.peak_bytes,
        "file_bytes": run.file_bytes,
        "budget_bytes": run.budget_bytes,
        "memory": asdict(ledger),
        "broken_images": len({path for loader in loaders for path, _ in loader.broken}),
        "checkpoint": str(run.checkpoint),
        "normalisation": {"mean": list(record.mean), "std": list(record.std)},
    }


def _with_run(ledger: Ledger, job: Job, budget_bytes: int | None) -> Ledger:
    """The ledger with what the run takes beside its step."""
    channels, height, width = job.record.input_shape
    pixels = job.recipe.batch_size * channels * height * width
    sources = [source for source in (job.source, job.test_source) if source is not None]
    guest = None if job.setup is None else job.setup.guest
    return replace(
        ledger,
        loader_bytes=4 * pixels + pixels,  # float32, and the next one in uint8
        decoding_bytes=max(decoding_bytes(source, job.record.input_shape) for source in sources),
        teacher_bytes=guest.standing_bytes if guest is not None and guest.standing_bytes else None,
        budget_bytes=budget_bytes,
    )


def check_display(*, live: bool, quiet: bool) -> None:
    """Raises UsageError where progress is asked for in two ways."""
    if live and quiet:
        raise UsageError(
            found="--live with --quiet",
            expected="one of them: a live view is progress",
            action="leave --quiet out; where stderr is no terminal, --live draws nothing but the plain progress",
        )
