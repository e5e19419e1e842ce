"""What a run records: a step, an epoch, and where it stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MemoryKind = Literal["out of memory", "memory pressure"]


@dataclass(frozen=True)
class StepRecord:
    """One training step.

    Attributes:
        loss: mean over the batch.
        accuracy: mean over the epoch so far, 0..1.
        images_per_second: over the epoch so far.
        learning_rate: of this step.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    accuracy: float
    images_per_second: float
    learning_rate: float = 0.0


@dataclass(frozen=True)
class EpochRecord:
    """One epoch.

    Attributes:
        loss: mean training loss.
        accuracy: training accuracy, 0..1.
        test_accuracy: None where no test data was given.
        seconds: of training; evaluation, checkpoints and waiting left out.
    """

    epoch: int
    loss: float
    accuracy: float
    test_accuracy: float | None
    images_per_second: float
    seconds: float


@dataclass(frozen=True)
class MemoryEvent:
    """The run went on with a smaller plan.

    Attributes:
        kind: ``"out of memory"``: a step failed and began again; ``"memory pressure"``: the system was short of memory.
        epoch: epochs done; ``step``, steps done in all epochs: those that follow run by the smaller plan.
        reason: what the failed allocation said, or which reading passed which limit.
        before_bytes: predicted peak of the plan until then; None where it was made without costs.
        after_bytes: of the plan since.
    """

    kind: MemoryKind
    epoch: int
    step: int
    reason: str
    before_bytes: int | None
    after_bytes: int | None


@dataclass
class Position:
    """Where a run stands between two steps.

    Attributes:
        epoch: epochs done.
        step: steps done, in all epochs.
        batch: batches done of the next epoch, those left out because they are broken included.
        seen, correct, loss_sum, seconds: of the next epoch so far.
    """

    epoch: int = 0
    step: int = 0
    batch: int = 0
    seen: int = 0
    correct: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0

    def after_epoch(self) -> Position:
        """At the start of the epoch that follows."""
        return Position(epoch=self.epoch + 1, step=self.step)
