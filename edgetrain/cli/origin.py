"""``--from RUN|CHECKPOINT|module:function``: the network that is adapted, with its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from edgetrain.chain.head import find_head, replace_head
from edgetrain.chain.trained import BatchNormMode, fix_batch_norm, train_only
from edgetrain.cli.model_argument import model_maker
from edgetrain.cli.trained import network_maker
from edgetrain.errors import UsageError
from edgetrain.train.checkpoint import load_weights, newest_checkpoint
from edgetrain.train.run_record import RunRecord

ImageShape = tuple[int, int, int]


@dataclass(frozen=True)
class Origin:
    """A network that was trained, or that a function of the user's makes.

    Attributes:
        source: what it came from, a path absolute.
        make: makes it, without the weights of the checkpoint.
        weights: checkpoint; None: the function's own.
        made_for: classes for which ``make`` makes it; ``new_head``: whether another head is put into it by then.
        classes: those that it tells apart, none where it embeds; None: unknown.
        input_shape: (c, h, w) with which it was trained; None: unknown.
        described: fields of a :class:`RunRecord` that say what it is.
    """

    source: str
    make: Callable[[], nn.Module]
    weights: Path | None
    made_for: int
    new_head: bool
    classes: tuple[str, ...] | None
    input_shape: ImageShape | None
    described: dict[str, Any]


@dataclass(frozen=True)
class Adapted:
    """Makes the network that is trained, in this process or another.

    Attributes:
        classes: for which the head gets fresh weights; None: it stays.
        trained, batch_norm: as :class:`edgetrain.train.run_record.Finetuning`.
    """

    make: Callable[[], nn.Module]
    weights: Path | None
    head: str
    classes: int | None
    trained: str
    batch_norm: BatchNormMode

    def __call__(self) -> nn.Module:
        model = self.make()
        if self.weights is not None and not any(p.is_meta for p in model.parameters()):
            load_weights(self.weights, model)
        if self.classes is not None:
            model = replace_head(model, self.head, self.classes)
        model = train_only(model, self.trained, head=self.head)
        return fix_batch_norm(model) if self.batch_norm == "fixed" else model


def find_origin(spec: str, *, classes: int, channels: int) -> Origin:
    """What ``--from`` names.

    Args:
        classes, channels: of the data; offered to a function of the user's.

    Raises:
        UsageError: nothing of the kind.
        StorageError: a run or a checkpoint that cannot be read.
    """
    path = Path(spec)
    if path.is_dir():
        return _of_run(path, newest_checkpoint(path / "checkpoints").path)
    if path.is_file():
        if path.suffix != ".safetensors" or not (path.parent.parent / "run.json").is_file():
            raise UsageError(
                found=f"--from {spec}",
                expected="a checkpoint in its run: RUN/checkpoints/last.safetensors, with RUN/run.json",
                action="name the directory of the run; weights of another origin come through --from module:function",
            )
        return _of_run(path.parent.parent, path)
    if ":" not in spec:
        raise UsageError(
            found=f"--from {spec}, which does not exist",
            expected="a run directory, a checkpoint in one, or module:function",
            action="edgetrain train --model NAME trains a network of the zoo from fresh weights",
        )
    make = model_maker(spec, num_classes=classes, in_channels=channels)
    return Origin(spec, make, None, classes, False, None, None, {"model": spec})


def _of_run(run: Path, checkpoint: Path) -> Origin:
    record = RunRecord.read(run)
    before = record.finetuning
    return Origin(
        str(checkpoint.resolve()),
        network_maker(record),
        checkpoint.resolve(),
        made_for=(record.embedding or len(record.classes)) if before is None else before.made_for,
        new_head=before is not None and before.new_head,
        classes=record.classes if record.embedding is None else (),
        input_shape=record.input_shape,
        described={"model": record.model, "pooling": record.pooling, "options": record.options},
    )


def fitted_shape(origin: Origin, *, channels: int, side: int) -> ImageShape:
    """(c, h, w) of the input of a network of which only its maker is known: the channels of its first convolution."""
    first = next((m.in_channels for m in origin.make().modules() if isinstance(m, nn.Conv2d)), channels)
    return (first if first in (1, 3) else channels), side, side


def head_of(origin: Origin, input_shape: ImageShape, classes: tuple[str, ...]) -> tuple[str, bool]:
    """Path of the layer that makes the logits, and whether another has to take its place for ``classes``."""
    model = origin.make()
    head = find_head(model, input_shape)
    if origin.classes is not None:
        return head, origin.classes != classes
    return head, next(model.get_submodule(head).parameters()).shape[0] != len(classes)
