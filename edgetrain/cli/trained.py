"""A run directory as a trained network, with real images to show it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgetrain.cli.model_argument import model_maker
from edgetrain.errors import DataError
from edgetrain.export.describe import About
from edgetrain.export.images import ImageSet, Normalisation, as_image_set
from edgetrain.models import create_model
from edgetrain.train.checkpoint import load_weights, newest_checkpoint
from edgetrain.train.data import BrokenImage, Split, open_source
from edgetrain.train.data.fit import fit_image
from edgetrain.train.run_record import RunRecord


@dataclass(frozen=True)
class TrainedRun:
    """What a run directory holds: the network with its weights, and what is known of it."""

    model: nn.Module
    record: RunRecord
    about: About


def load_run(run_dir: Path) -> TrainedRun:
    """The network that ``edgetrain train`` left in ``run_dir``.

    Raises:
        StorageError: a file of the run is missing, damaged, or of another network.
    """
    record = RunRecord.read(run_dir)
    classes, channels = record.embedding or len(record.classes), record.input_shape[0]
    make = model_maker(record.model, num_classes=classes, in_channels=channels, pooling=record.pooling)
    if record.options:
        make = functools.partial(create_model, record.model, classes, in_channels=channels, **record.options)
    model = make()
    load_weights(newest_checkpoint(run_dir / "checkpoints").path, model)
    plan = run_dir / "plan.json"
    about = About(
        name=record.model,
        classes=record.classes if record.embedding is None else (),
        plan=plan.read_text(encoding="utf-8") if plan.exists() else None,
        normalisation=Normalisation(record.mean, record.std),
    )
    return TrainedRun(model, record, about)


def run_images(record: RunRecord, *, split: Split, count: int) -> ImageSet:
    """``count`` images of the run's data on the scale 0..1, the same ones every time; random numbers where they
    cannot be reached, which :attr:`ImageSet.source` then says with the reason.
    """
    try:
        source = open_source(record.data, split=split)
    except DataError as error:
        if split == "test" and error.found.endswith("has no test split"):
            return run_images(record, split="train", count=count)
        made_up = as_image_set(None, record.input_shape)
        return ImageSet(made_up.pixels, made_up.names, f"{made_up.source} ({error.found})")
    pixels, names, labels = [], [], []
    for index in np.random.default_rng(0).permutation(len(source)).tolist():
        try:
            image = fit_image(source.decode(index), record.input_shape)  # (h, w, c)
        except BrokenImage:
            continue
        pixels.append(torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32) / 255))  # (c, h, w)
        names.append(f"{source.name} {split} {index}")
        labels.append(int(source.labels[index]))
        if len(pixels) == count:
            break
    known = torch.tensor(labels) if record.embedding is None else None  # an embedding's largest element is no class
    return ImageSet(torch.stack(pixels), tuple(names), f"{source.name}, {split} split", known)
