"""A run directory as a trained network, with real images to show it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgetrain.chain.head import replace_head
from edgetrain.cli.model_argument import model_maker
from edgetrain.errors import DataError, StorageError, UsageError
from edgetrain.export.describe import About
from edgetrain.export.images import ImageSet, Normalisation, as_image_set
from edgetrain.models import create_model
from edgetrain.planner.plans import plan_text
from edgetrain.train.checkpoint import load_weights, newest_checkpoint
from edgetrain.train.data import BrokenImage, Source, Split, open_divided, open_source
from edgetrain.train.data.reduced import decode_fitted
from edgetrain.train.data.subset import limited
from edgetrain.train.run_record import RunRecord


@dataclass(frozen=True)
class TrainedRun:
    """What a run directory holds: the network with its weights, and what is known of it.

    Attributes:
        checkpoint: where the weights are from; ``epoch``, ``step``: how many were done by then.
    """

    model: nn.Module
    record: RunRecord
    about: About
    checkpoint: Path
    epoch: int
    step: int


def load_run(run_dir: Path) -> TrainedRun:
    """The network that ``edgetrain train`` left in ``run_dir``.

    Raises:
        StorageError: a file of the run is missing, damaged, or of another network.
        UsageError: it samples modules and has not ended.
    """
    record = RunRecord.read(run_dir)
    make = network_maker(record)
    checkpoint = newest_checkpoint(run_dir / "checkpoints")
    _check_size(make, checkpoint.path, may_look_at_weights=":" in record.model)
    model = make()
    done = load_weights(checkpoint.path, model)
    _check_whole(run_dir, record, done["epoch"])
    plan = run_dir / "plan.json"
    about = About(
        name=record.model,
        classes=record.classes if record.embedding is None else (),
        plan=plan_text(plan) if plan.exists() else None,
        normalisation=Normalisation(record.mean, record.std),
    )
    return TrainedRun(model, record, about, checkpoint.path, **done)


def network_maker(record: RunRecord) -> Callable[[], nn.Module]:
    """A function that makes the network of a run with fresh weights.

    Raises:
        UsageError: nothing is called as its model is.
    """
    finetuning, channels = record.finetuning, record.input_shape[0]
    classes = record.embedding or (len(record.classes) if finetuning is None else finetuning.made_for)
    make = model_maker(record.model, num_classes=classes, in_channels=channels, pooling=record.pooling)
    if record.options:
        make = functools.partial(create_model, record.model, classes, in_channels=channels, **record.options)
    if finetuning is None or not finetuning.new_head:
        return make
    return functools.partial(_with_head, make, finetuning.head, len(record.classes))


def run_source(record: RunRecord, split: Split, *, limit: int | None = None) -> Source:
    """The images that a run is trained or tested on, ``limit`` of them as its ``--limit-train`` or ``--limit-test``.

    Raises:
        DataError: they are not there any more, or there is no such split.
    """
    if record.finetuning is None:
        return open_source(record.data, split=split, limit=limit, seed=record.seed)
    divided = open_divided(record.data, holdout=record.finetuning.holdout, seed=record.seed)
    return limited(divided.train if split == "train" else divided.test, limit, seed=record.seed)


def _with_head(make: Callable[[], nn.Module], head: str, classes: int) -> nn.Module:
    return replace_head(make(), head, classes)


def _check_size(make: Callable[[], nn.Module], checkpoint: Path, *, may_look_at_weights: bool) -> None:
    """Refuses, before any memory is taken, a network with more weights than the checkpoint has bytes.

    Raises:
        StorageError: with how many there are.
    """
    state = torch.get_rng_state()
    try:
        with torch.device("meta"):
            weights = f"{(count := sum(parameter.numel() for parameter in make().parameters())):,}"
        too_many = count > checkpoint.stat().st_size
    except (NotImplementedError, RuntimeError):  # more than can be counted, or a function that looks at its weights
        weights, too_many = "uncountable", not may_look_at_weights
    finally:
        torch.set_rng_state(state)
    if too_many:
        raise StorageError(
            found=f"a run whose network has {weights} weights, and a checkpoint of {checkpoint.stat().st_size:,} bytes",
            expected="the checkpoint of that network",
            action="train again: run.json was changed, or belongs to another run",
        )


def _check_whole(run_dir: Path, record: RunRecord, epoch: int) -> None:
    """Refuses a network that is still sampled: its modules are scaled, and its statistics taken again, at the end."""
    training = record.training
    if training is not None and training.sample_modules is not None and epoch < training.epochs:
        raise UsageError(
            found=f"{run_dir}, which samples modules and stands at epoch {epoch} of {training.epochs}",
            expected="the whole network, which there is when the run has ended",
            action=f"edgetrain resume {run_dir}",
        )


def run_images(record: RunRecord, *, split: Split, count: int) -> ImageSet:
    """``count`` images of the run's data on the scale 0..1, the same ones every time; random numbers where they
    cannot be reached, which :attr:`ImageSet.source` then says with the reason.
    """
    try:
        source = run_source(record, split)
    except DataError as error:
        if split == "test" and error.found.endswith("has no test split"):
            return run_images(record, split="train", count=count)
        made_up = as_image_set(None, record.input_shape)
        return ImageSet(made_up.pixels, made_up.names, f"{made_up.source} ({error.found})")
    pixels, names, labels = [], [], []
    for index in np.random.default_rng(0).permutation(len(source)).tolist():
        try:
            image = decode_fitted(source, index, record.input_shape)  # (h, w, c)
        except BrokenImage:
            continue
        pixels.append(torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32) / 255))  # (c, h, w)
        names.append(f"{source.name} {split} {index}")
        labels.append(int(source.labels[index]))
        if len(pixels) == count:
            break
    known = torch.tensor(labels) if record.embedding is None else None  # an embedding's largest element is no class
    return ImageSet(torch.stack(pixels), tuple(names), f"{source.name}, {split} split", known)
