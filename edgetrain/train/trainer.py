"""The training loop: plan executed, metrics recorded, state saved after every epoch."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgetrain.chain import SampledNetwork
from edgetrain.errors import EdgetrainError, TrainingError
from edgetrain.files import write_atomically
from edgetrain.planner import Plan
from edgetrain.runtime import wrap
from edgetrain.train.checkpoint import save_checkpoint
from edgetrain.train.recipe import Recipe
from edgetrain.train.run_record import RunRecord

Batch = tuple[Tensor, Tensor]

RECALIBRATION_BATCHES = 32
"""Most training batches over which the statistics of a network trained with sampled modules are averaged."""


class Batches(Protocol):
    """Whatever gives batches ``(images (n, c, h, w), labels (n,))``: a Loader or a torch DataLoader."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class StepRecord:
    """One training step.

    Attributes:
        loss: mean over the batch.
        accuracy: mean over the epoch so far, 0..1.
        images_per_second: over the epoch so far.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    accuracy: float
    images_per_second: float


@dataclass(frozen=True)
class EpochRecord:
    """One epoch.

    Attributes:
        loss: mean training loss.
        accuracy: training accuracy, 0..1.
        test_accuracy: None where no test data was given.
        seconds: of training, evaluation left out.
    """

    epoch: int
    loss: float
    accuracy: float
    test_accuracy: float | None
    images_per_second: float
    seconds: float


class InterruptedRunError(EdgetrainError):
    """Ctrl-C: the step was finished and the state saved."""

    exit_code = 130

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(
            found="Ctrl-C",
            expected="the run to end by itself",
            action=f"nothing is lost: the step was finished and the state saved in {checkpoint}",
        )
        self.checkpoint = checkpoint


class Trainer:
    """Trains ``model`` as ``plan`` says and writes a run directory.

    Of a :class:`SampledNetwork` every step runs another draw, that of its number. After each epoch the whole network is
    recalibrated and evaluated; after the last one sampling ends, and the state saved is that of a plain network.

    Args:
        model: any module, for which ``plan`` was made.
        run_dir: gets ``plan.json``, ``metrics.jsonl`` and ``checkpoints/last.safetensors``.
        recipe: optimiser, schedule, epochs.
        record: what the network is, written to ``run.json`` there.
        device: where to train.
        on_step: called after every step, for progress bars.

    Attributes:
        model: the module being trained, of a sampled one the whole network.
        history: one record per finished epoch.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        *,
        run_dir: str | Path,
        recipe: Recipe | None = None,
        record: RunRecord | None = None,
        device: str | torch.device = "cpu",
        on_step: Callable[[StepRecord], None] | None = None,
    ) -> None:
        self._sampled = model if isinstance(model, SampledNetwork) else None
        self.model = model.to(device) if self._sampled is None else self._sampled.to(device).model
        self.plan = plan
        self.run_dir = Path(run_dir)
        self._record = record
        self.recipe = recipe or Recipe(batch_size=plan.input_shape[0])
        self.device = torch.device(device)
        self.history: list[EpochRecord] = []
        self._on_step = on_step
        make_optimizer = self.recipe.optimizer_for(self.model)
        self._net = wrap(model, plan, optimizer=make_optimizer)
        # those of the blocks, which the plan steps in the backward pass, or one that steps after it
        self._optimizers: list[torch.optim.Optimizer] = list(self._net.optimizers.values())
        self._last = None if self._optimizers else make_optimizer(self._trained())
        self._optimizers += [] if self._last is None else [self._last]
        self._step = 0

    @property
    def checkpoint(self) -> Path:
        """Where the last good state is."""
        return self.run_dir / "checkpoints" / "last.safetensors"

    def fit(self, batches: Batches, test_batches: Iterable[Batch] | None = None) -> list[EpochRecord]:
        """Trains for ``recipe.epochs`` and gives a record per epoch.

        Args:
            batches: training data; ``set_epoch`` is called where it exists.
            test_batches: evaluated after every epoch.

        Raises:
            TrainingError: the loss is not a number; the state of the epoch before is kept.
            StorageError: the run directory cannot be written.
            InterruptedRunError: Ctrl-C.
        """
        if self._record is not None:
            self._record.write(self.run_dir)
        write_atomically(self.run_dir / "plan.json", self.plan.to_json().encode())
        write_atomically(self.run_dir / "metrics.jsonl", b"")
        self.save(epoch=0)
        with _FinishStep() as interrupt:
            for epoch in range(1, self.recipe.epochs + 1):
                if hasattr(batches, "set_epoch"):
                    batches.set_epoch(epoch)
                record = self._train_epoch(epoch, batches, test_batches, interrupt)
                self._check_weights(epoch)
                self.history.append(record)
                self._write_metrics()
                self.save(epoch=epoch)
                if interrupt.asked and epoch < self.recipe.epochs:
                    raise InterruptedRunError(self.checkpoint)
        return self.history

    def save(self, *, epoch: int) -> None:
        """Writes the state to :attr:`checkpoint`.

        Raises:
            StorageError: the disk is full or refuses; the state saved before is intact.
        """
        save_checkpoint(self.checkpoint, self.model, self._optimizers, epoch=epoch, step=self._step)

    def _train_epoch(
        self, epoch: int, batches: Batches, test_batches: Iterable[Batch] | None, interrupt: _FinishStep
    ) -> EpochRecord:
        self._net.train()
        per_epoch = len(batches)
        total = self.recipe.epochs * per_epoch
        seen, correct, loss_sum, start = 0, 0, 0.0, time.perf_counter()
        for k, (images, labels) in enumerate(batches):
            loss, hits = self._train_step(images.to(self.device), labels.to(self.device), total, epoch)
            seen, correct, loss_sum = seen + len(labels), correct + hits, loss_sum + loss * len(labels)
            if self._on_step is not None:
                rate = seen / (time.perf_counter() - start)
                self._on_step(StepRecord(epoch, self.recipe.epochs, k + 1, per_epoch, loss, correct / seen, rate))
            if interrupt.asked:
                self.save(epoch=epoch - 1)
                raise InterruptedRunError(self.checkpoint)
        seconds = time.perf_counter() - start
        with self._whole(batches, last=epoch == self.recipe.epochs):
            test_accuracy = None if test_batches is None else evaluate(self.model, test_batches, device=self.device)
        return EpochRecord(
            epoch, loss_sum / max(seen, 1), correct / max(seen, 1), test_accuracy, seen / seconds, seconds
        )

    def _whole(self, batches: Batches, *, last: bool) -> contextlib.AbstractContextManager[object]:
        """Inside, the model is one to evaluate; it stays so after the last epoch."""
        if self._sampled is None:
            return contextlib.nullcontext()
        some = (
            part.to(self.device)
            for images, _ in itertools.islice(batches, RECALIBRATION_BATCHES)
            for part in images.split(-(-len(images) // self.plan.micro_batches))
        )
        if last:
            self._sampled.finish(some)
            return contextlib.nullcontext()
        self._sampled.recalibrate(some)
        return self._sampled.whole()

    def _train_step(self, images: Tensor, labels: Tensor, total: int, epoch: int) -> tuple[float, int]:
        if self._sampled is not None:
            self._sampled.draw(self._step)  # all parts of a batch run the same modules
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.rate(self._step, total)
        value, hits = 0.0, 0
        part = -(-len(labels) // self.plan.micro_batches)
        for some_images, some_labels in zip(images.split(part), labels.split(part), strict=True):
            logits = self._net(some_images)
            # the parts' gradients add up to that of the batch's mean loss
            loss = F.cross_entropy(logits, some_labels) * (len(some_labels) / len(labels))
            value += float(loss.detach())
            if not math.isfinite(value):
                raise TrainingError(
                    found=f"the loss is {value} at step {self._step + 1} (epoch {epoch})",
                    expected="a finite loss",
                    action=f"lower the learning rate; the state of the epoch before is in {self.checkpoint}",
                )
            loss.backward()
            hits += int((logits.detach().argmax(1) == some_labels).sum())
        if self._last is not None:
            self._last.step()
            self._last.zero_grad(set_to_none=True)
        self._step += 1
        return value, hits

    def _trained(self) -> list[nn.Parameter] | list[dict[str, Any]]:
        if self._sampled is not None:
            return self._sampled.parameter_groups()
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _check_weights(self, epoch: int) -> None:
        """The loss is made before the update: after the last step of an epoch it tells nothing of the weights."""
        for name, value in self.model.state_dict().items():
            if value.is_floating_point() and value.numel() and not _is_finite(value):
                raise TrainingError(
                    found=f"{name} is not finite after step {self._step} (epoch {epoch})",
                    expected="finite weights",
                    action=f"lower the learning rate; the state of the epoch before is in {self.checkpoint}",
                )

    def _write_metrics(self) -> None:
        lines = "".join(json.dumps(asdict(record)) + "\n" for record in self.history)
        write_atomically(self.run_dir / "metrics.jsonl", lines.encode())


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], *, device: str | torch.device = "cpu") -> float:
    """Accuracy of ``model`` in evaluation mode over ``batches``, 0..1; its mode is put back afterwards."""
    was_training = model.training
    model.eval()
    seen = correct = 0
    try:
        for images, labels in batches:
            correct += int((model(images.to(device)).argmax(1).cpu() == labels).sum())
            seen += len(labels)
    finally:
        model.train(was_training)
    return correct / max(seen, 1)


def _is_finite(value: Tensor) -> bool:
    """Whether no element is infinite or not a number, found without a temporary."""
    low, high = torch.aminmax(value)
    return math.isfinite(low) and math.isfinite(high)


class _FinishStep(contextlib.AbstractContextManager["_FinishStep"]):
    """Turns the first Ctrl-C into a wish that the loop can honour after the step; the second one is immediate."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None
        self._main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> _FinishStep:
        if self._main:
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._main:
            signal.signal(signal.SIGINT, self._before)

    def _ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
