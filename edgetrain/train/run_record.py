"""What a run directory says of the network in it: ``run.json``.

A checkpoint holds numbers with names and no network. This file holds what is needed to make that network again, to
feed it, and to say what its logits mean. It is written when training begins.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgetrain.errors import StorageError
from edgetrain.files import write_atomically

NAME = "run.json"


class Training(BaseModel):
    """How ``edgetrain train`` was called, as far as the plan and the rest of the record do not say it.

    Attributes:
        tensorboard: whether event files are written.
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
    threads: int = Field(ge=1)
    tensorboard: bool = False


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
        training: what ``edgetrain resume`` needs besides; None: the run was started from Python.
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
    training: Training | None = None

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
