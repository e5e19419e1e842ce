"""What a run directory says of the network in it: ``run.json``.

A checkpoint holds numbers with names and no network. This file holds what is needed to make that network again, to
feed it, and to say what its logits mean. It is written when training begins.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgetrain.errors import StorageError
from edgetrain.files import write_atomically

NAME = "run.json"


ObjectiveKind = Literal["cross-entropy", "distillation", "attention-transfer", "triplet", "contrastive"]


class ObjectiveRecord(BaseModel):
    """What a run learns from.

    Attributes:
        teacher: directory of its run, absolute; ``teacher_outputs``: folder of its stored outputs, likewise.
        alpha, beta, margin: None: the objective's own.
        attention_map: over the channels, and the power: ``sum2``.
        embedding: width of the output of a network that embeds.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: ObjectiveKind = "cross-entropy"
    label_smoothing: float = Field(default=0.0, ge=0, le=1)
    teacher: str | None = None
    teacher_outputs: str | None = None
    temperature: float = Field(default=4.0, gt=0)
    alpha: float | None = Field(default=None, ge=0, le=1)
    beta: float | None = Field(default=None, ge=0)
    attention_map: str = Field(default="sum2", pattern="^(sum|max)[1-9]$")
    margin: float | None = Field(default=None, gt=0)
    embedding: int | None = Field(default=None, ge=1)

    @property
    def mapping(self) -> tuple[Literal["sum", "max"], int]:
        """Over the channels, and the power."""
        return ("max" if self.attention_map.startswith("max") else "sum"), int(self.attention_map[-1])


class Training(BaseModel):
    """How the command was called, as far as the plan and the rest of the record do not say it.

    Attributes:
        tensorboard: whether event files are written.
        snr_limit: as ``--snr-limit``; None: infinity, for which JSON has no number.
        threads: of torch; the sums in a step are grouped by them, so a run goes on bit for bit only with as many.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(ge=1)
    learning_rate: float | None
    budget_bytes: int | None
    sample_modules: str | None
    freeze: int = Field(ge=0)
    limit_train: int | None
    limit_test: int | None
    checkpoint_every: int | None
    objective: ObjectiveRecord = ObjectiveRecord()
    threads: int = Field(ge=1)
    tensorboard: bool = False
    snr_limit: float | None = Field(default=1e4, gt=0, allow_inf_nan=False)

    @property
    def snr_limit_or_infinity(self) -> float:
        """The least ratio of signal to noise as a number."""
        return math.inf if self.snr_limit is None else self.snr_limit


class Finetuning(BaseModel):
    """How ``edgetrain finetune`` was called, and what it made of the network that it was given.

    Attributes:
        source: what ``--from`` named; a path is absolute.
        made_for: classes for which the network is made, before its head is replaced.
        head: path of the layer that makes the logits; ``new_head``: whether another took its place.
        trained, batch_norm, balance, holdout: as ``--train``, ``--batch-norm``, ``--balance``, ``--holdout``.
        cutout: as ``--cutout``; runs of older versions had it.
        device: profile that was named, for which the result is exported; ``export``: whether it is.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    made_for: int = Field(ge=1)
    head: str
    new_head: bool
    trained: str
    batch_norm: Literal["live", "fixed"]
    balance: Literal["sampling", "root", "loss", "none"]
    holdout: float = Field(gt=0, lt=1)
    cutout: bool = True
    device: str | None
    export: bool


class RunRecord(BaseModel):
    """The network and data of a run.

    Attributes:
        model: name in the zoo, or ``module:function``.
        pooling: sequence of a network of the zoo, a letter for each; None: the network's own.
        options: further options of a network of the zoo, such as its width.
        data: data set, as given to ``edgetrain train``; a path is absolute.
        classes: their names, in the order of the logits.
        input_shape: (c, h, w).
        mean, std: per channel, by which the images 0..1 were normalised.
        seed: of the run.
        embedding: width of the output where that is an embedding; None: it has a logit for each class.
        training: what ``edgetrain resume`` needs besides; None: the run was started from Python.
        finetuning: where the network came from and what of it is trained; None: it was trained from fresh weights.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    model: str
    pooling: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    data: str
    classes: tuple[str, ...]
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    seed: int
    embedding: int | None = None
    training: Training | None = None
    finetuning: Finetuning | None = None

    def write(self, run_dir: Path) -> None:
        """Writes the record into ``run_dir``; raises StorageError where it cannot."""
        write_atomically(run_dir / NAME, (self.model_dump_json(indent=2) + "\n").encode())

    @classmethod
    def read(cls, run_dir: Path) -> RunRecord:
        """The record in ``run_dir``.

        Raises:
            StorageError: there is none, or it is damaged.
        """
        path = run_dir / NAME
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            reason = f"{error.errors()[0]['msg']}" if isinstance(error, ValidationError) else error.strerror or error
            raise StorageError(
                found=f"{path} cannot be read: {reason}",
                expected="the directory of a run of edgetrain train",
                action="name the directory that was given to --out; a run of an older version has no run.json",
            ) from error
