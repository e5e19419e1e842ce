"""Learning from a teacher: its softened outputs, its attention, or both.

    L = (1 - alpha) CE + alpha T^2 KL(softmax(teacher / T) || softmax(student / T)) + beta sum_j term_j

Distillation (Hinton, Vinyals, Dean 2015): T = 4, alpha = 0.9. The source names it without printing a formula, as the
"cross entropy between softened distributions", which has the same gradient; T^2 keeps the size of that gradient as T
grows. Attention transfer (Zagoruyko, thesis, (6.1)): beta = 1e3, the terms of :mod:`edgetrain.nn.attention`, one per
group. With both, the source lowers beta during training, by a schedule that it does not print: here it stays.

The teacher runs before the student does, so its activations and the student's are never in memory together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgetrain.chain import Tapped
from edgetrain.errors import ModelError, UsageError
from edgetrain.train.objectives import CrossEntropy

TEMPERATURE, ALPHA, BETA = 4.0, 0.9, 1e3


@dataclass(frozen=True)
class Answers:
    """What a teacher makes of some images.

    Attributes:
        logits: (n, classes).
        targets: attention of each group as vectors of length 1, (n, elements).
    """

    logits: Tensor
    targets: tuple[Tensor, ...] = ()


class Answering(Protocol):
    """A teacher: one that runs (:class:`~edgetrain.train.teacher.Teacher`), or its stored answers."""

    def __call__(self, images: Tensor, indices: Tensor | None) -> Answers:
        """Its answers for ``images`` (n, c, h, w), which have ``indices`` (n,) in their source."""
        ...


@dataclass
class TeacherObjective:
    """The loss above.

    Attributes:
        teacher: asked before each part of a batch.
        alpha: weight of the softened outputs, 0..1; ``temperature`` softens them.
        beta: weight of the attention; not zero only for a student that is :class:`~edgetrain.chain.Tapped`.
        hard: the loss against the labels.

    Raises:
        UsageError: a number out of range.
    """

    teacher: Answering
    temperature: float = TEMPERATURE
    alpha: float = ALPHA
    beta: float = 0.0
    hard: CrossEntropy = field(default_factory=CrossEntropy)
    _answers: Answers | None = field(default=None, init=False, repr=False)
    _student: Tapped | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, value, good in (
            ("temperature", self.temperature, 0 < self.temperature < float("inf")),
            ("alpha", self.alpha, 0 <= self.alpha <= 1),
            ("beta", self.beta, 0 <= self.beta < float("inf")),
        ):
            if not good:
                expected = {"temperature": "above 0", "alpha": "from 0 to 1", "beta": "0 or more"}[name]
                raise UsageError(
                    found=f"{name} {value:g}", expected=f"a number {expected}", action=f"correct the {name}"
                )

    def __getstate__(self) -> dict[str, object]:
        """What it holds in the middle of a step is nobody's in another process."""
        return {**self.__dict__, "_answers": None, "_student": None}

    def prepare(self, images: Tensor, indices: Tensor | None, model: nn.Module) -> None:
        """Asks the teacher; see :class:`~edgetrain.train.objectives.Preparing`."""
        if isinstance(model, Tapped):
            model.release()  # the last targets go before the next ones come
        self._answers = self.teacher(images, indices)
        if not self.beta:
            return
        if not isinstance(model, Tapped):
            raise ModelError(
                found=f"attention transfer to {type(model).__name__}, which has no taps",
                expected="a network made by edgetrain.train.teacher.tapped_student",
                action="tap it before the plan is made, or set beta to 0",
            )
        self._student = model
        model.aim([target.to(images.dtype) for target in self._answers.targets])

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The mean loss, a scalar, of logits (n, classes) for ``labels`` (n)."""
        answers, self._answers = self._answers, None
        if answers is None:
            raise ModelError(
                found="a loss without the teacher's answers",
                expected="prepare() with the images of the batch before it",
                action="call prepare(images, None, model) before the network runs",
            )
        loss = self.hard(outputs, labels)
        if self.alpha:
            loss = (1 - self.alpha) * loss + self.alpha * softened_loss(outputs, answers.logits, self.temperature)
        if self._student is not None:
            loss = loss + self.beta * self._student.take_terms()
        return loss

    def rehearsal(self, outputs: Tensor) -> Tensor:
        """The loss of outputs (n, classes) for any labels and answers: what it takes, not what it is."""
        labels = torch.zeros(len(outputs), dtype=torch.long, device=outputs.device)
        loss = self.hard(outputs, labels)
        if self.alpha:
            loss = (1 - self.alpha) * loss + self.alpha * softened_loss(outputs, outputs.detach(), self.temperature)
        return loss


def softened_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))``, the mean over samples of logits (n, classes).

    Raises:
        ModelError: other classes.
    """
    if student.shape != teacher.shape:
        raise ModelError(
            found=f"a teacher with {teacher.shape[1]} outputs for a student with {student.shape[1]}",
            expected="the same classes",
            action="take a teacher that was trained on the same classes",
        )
    softened = F.log_softmax(student / temperature, dim=1)
    aim = F.log_softmax(teacher.to(student.dtype) / temperature, dim=1)
    return F.kl_div(softened, aim, reduction="batchmean", log_target=True) * temperature**2
