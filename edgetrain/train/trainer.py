"""The training loop: plan executed, metrics recorded, state saved so that the run can go on from it bit for bit."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgetrain.chain import SampledNetwork, Tapped
from edgetrain.errors import TrainingError
from edgetrain.files import write_atomically
from edgetrain.planner import Plan
from edgetrain.runtime import wrap
from edgetrain.train.callbacks import Callback
from edgetrain.train.checkpoint import (
    DAMAGED,
    LAST,
    PREVIOUS,
    Progress,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from edgetrain.train.evaluation import evaluate
from edgetrain.train.guard import Guard, Switch, return_freed
from edgetrain.train.objectives import CrossEntropy, Grouping, Objective, Preparing
from edgetrain.train.passes import Batch, Batches, Pass
from edgetrain.train.random_state import RandomState, generators_of
from edgetrain.train.recipe import Recipe
from edgetrain.train.records import EpochRecord, MemoryEvent, Position, StepRecord
from edgetrain.train.run_record import RunRecord
from edgetrain.train.step_start import StepStart
from edgetrain.train.stopping import InterruptedRunError, Stop, StopAskedError
from edgetrain.train.throttle import Throttle

RECALIBRATION_BATCHES = 32
"""Most training batches over which the statistics of a network trained with sampled modules are averaged."""


class Trainer:
    """Trains ``model`` as ``plan`` says and writes a run directory.

    Of a :class:`SampledNetwork` every step runs another draw, that of its number. After each epoch the whole network is
    recalibrated and evaluated; after the last one sampling ends, and the state saved is that of a plain network.

    A run that ended before its time goes on with :meth:`resume` of a trainer made with the same arguments: on the CPU
    with as many threads, bit for bit as if it had not ended.

    Args:
        model: any module, for which ``plan`` was made.
        run_dir: gets ``plan.json``, ``metrics.jsonl`` and ``checkpoints/``.
        recipe: optimiser, schedule, epochs.
        objective: the loss; None: cross-entropy.
        record: what the network is, written to ``run.json`` there.
        device: where to train.
        callbacks: get the news of the run, in this order.
        checkpoint_every: steps after which the state is saved, besides the end of each epoch; None: only there.
        throttle: when to wait between steps.
        guard: what happens where memory runs out; None: smaller plans are made for this model when that happens.

    Attributes:
        model: the module being trained, of a sampled one the whole network, of a tapped one that without taps.
        plan: of the steps that follow; a smaller one than that given where memory ran out.
        history: one record per finished epoch.
        events: one per time that memory was short.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        *,
        run_dir: str | Path,
        recipe: Recipe | None = None,
        objective: Objective | None = None,
        record: RunRecord | None = None,
        device: str | torch.device = "cpu",
        callbacks: Sequence[Callback] = (),
        checkpoint_every: int | None = None,
        throttle: Throttle | None = None,
        guard: Guard | None = None,
    ) -> None:
        self._sampled = model if isinstance(model, SampledNetwork) else None
        model = model.to(device)
        self.model = model.model if isinstance(model, SampledNetwork | Tapped) else model
        self.plan = plan
        self.run_dir = Path(run_dir)
        self._record = record
        self.recipe = recipe or Recipe(batch_size=plan.input_shape[0])
        self.objective = objective or CrossEntropy()
        self.device = torch.device(device)
        self.history: list[EpochRecord] = []
        self.events: list[MemoryEvent] = []
        self._callbacks = tuple(callbacks)
        self._checkpoint_every = checkpoint_every
        self._throttle = throttle or Throttle()
        make_optimizer = self.recipe.optimizer_for(self.model)
        self._guard = guard or Guard.of(model, make_optimizer, device, objective=self.objective)
        self._switch: Switch | None = None
        self._net = wrap(model, plan, optimizer=make_optimizer)
        # those of the blocks, which the plan steps in the backward pass, or one that steps after it
        self._optimizers: list[torch.optim.Optimizer] = list(self._net.optimizers.values())
        self._last = None if self._optimizers else make_optimizer(self._trained())
        self._optimizers += [] if self._last is None else [self._last]
        self._begin = StepStart(self._net, self._optimizers)
        self._position = Position()
        self._start = RandomState.capture()

    @property
    def checkpoint(self) -> Path:
        """Where the last state is."""
        return self.run_dir / "checkpoints" / LAST

    def fit(self, batches: Batches, test_batches: Iterable[Batch] | None = None) -> list[EpochRecord]:
        """Trains for ``recipe.epochs`` and gives a record per epoch; a run that was in ``run_dir`` is gone.

        Args:
            batches: training data; ``set_epoch`` is called where it exists.
            test_batches: evaluated after every epoch.

        Raises:
            TrainingError: the loss is not a number; the last good state is kept.
            StorageError: the run directory cannot be written.
            InterruptedRunError: Ctrl-C or SIGTERM.
            BudgetError: memory ran out with the smallest plan.
        """
        for name in (LAST, PREVIOUS, DAMAGED):
            self.checkpoint.with_name(name).unlink(missing_ok=True)
        if self._record is not None:
            self._record.write(self.run_dir)
        self._write_plan()
        self._write_metrics()
        self._start = RandomState.capture(*generators_of(batches))
        self._save(self._start)
        return self._run(batches, test_batches, now=None)

    def resume(self, batches: Batches, test_batches: Iterable[Batch] | None = None) -> list[EpochRecord]:
        """Goes on from the newest good checkpoint in ``run_dir``; a record per epoch, those done before included.

        Args:
            batches, test_batches: of the same data in the same order as before. What has random state of its own keeps
                it only where it is the generator of a DataLoader or of its sampler.

        Raises:
            StorageError: there is no checkpoint that can be read, or it is of another model.
            TrainingError, InterruptedRunError, BudgetError: as :meth:`fit`.
        """
        now = self._load()
        self._write_plan()
        self._write_metrics()
        return self._run(batches, test_batches, now=now)

    def _load(self) -> RandomState:
        """Goes back to the newest good checkpoint, its plan included; gives the random states there."""
        file = newest_checkpoint(self.checkpoint.parent)
        for optimizer in self._optimizers:
            optimizer.state.clear()  # there is not always room for both
        progress = load_checkpoint(file, self.model, self._optimizers)
        if file.path != self.checkpoint and self.checkpoint.exists():  # must not become the previous one
            self.checkpoint.replace(self.checkpoint.with_name(DAMAGED))
        if progress.plan is not None:
            self._use(progress.plan)
        self._position, self._start = progress.position, progress.start
        self.history, self.events = list(progress.history), list(progress.events)
        return progress.now

    def _run(
        self, batches: Batches, test_batches: Iterable[Batch] | None, *, now: RandomState | None
    ) -> list[EpochRecord]:
        with Stop() as stop:
            for callback in self._callbacks:
                callback.on_start(self._position.epoch * len(batches) + self._position.batch)
            while self._position.epoch < self.recipe.epochs:
                epoch = self._position.epoch + 1
                if hasattr(batches, "set_epoch"):
                    batches.set_epoch(epoch)
                try:
                    self._train_epoch(batches, stop, now)
                    shortage = None
                except Exception as error:
                    shortage = self._guard.shortage(error)
                    if shortage is None:
                        raise
                if shortage is not None:  # outside the handler, so that the failed step's tensors are gone
                    now = self._go_back(shortage)
                    continue
                now = None
                record = self._evaluated(batches, test_batches, stop)
                self._check_weights()
                self.history.append(record)
                self._write_metrics()
                for callback in self._callbacks:
                    callback.on_epoch(record)
                self._position = self._position.after_epoch()
                self._start = RandomState.capture(*generators_of(batches))
                self._save(self._start)
                if stop.asked is not None and epoch < self.recipe.epochs:
                    raise InterruptedRunError(self.checkpoint, stop.asked)
        return self.history

    def _save(self, now: RandomState) -> None:
        progress = Progress(self._position, tuple(self.history), self._start, now, self.plan, tuple(self.events))
        save_checkpoint(self.checkpoint, self.model, self._optimizers, progress=progress)
        for callback in self._callbacks:
            callback.on_checkpoint(self.checkpoint)

    def _train_epoch(self, batches: Batches, stop: Stop, now: RandomState | None) -> None:
        """Trains to the end of the epoch of the position, from where that is."""
        self._net.train()
        position, epoch, per_epoch = self._position, self._position.epoch + 1, len(batches)
        one_pass = Pass(batches, first=position.batch, start=self._start, now=now)
        self._begin.mark()
        self._switch_if_due()
        began = time.perf_counter() - position.seconds
        for images, labels in one_pass:
            indices = one_pass.indices
            loss, hits = self._guard.threads.call(
                functools.partial(self._train_step, images.to(self.device), labels.to(self.device), indices, per_epoch)
            )
            position.batch = one_pass.done
            position.seen += len(labels)
            position.correct += hits
            position.loss_sum += loss * len(labels)
            position.seconds = time.perf_counter() - began
            done = StepRecord(
                epoch,
                self.recipe.epochs,
                position.batch,
                per_epoch,
                loss,
                position.correct / position.seen,
                position.seen / position.seconds,
                self._optimizers[0].param_groups[0]["lr"],
            )
            for callback in self._callbacks:
                callback.on_step(done)
            self._between_steps(stop)
            self._begin.mark()
            self._switch_if_due()
            began = time.perf_counter() - position.seconds

    def _go_back(self, reason: str) -> RandomState:
        """To the start of the step that ran out of memory, or to the checkpoint from which it is reached again.

        The plan changes where that step starts, not before: what is repeated gives what it gave. Where the repetition
        runs out of memory too, the change comes there.

        Returns:
            The random states there.
        """
        step = self._position.step
        self._begin.clear()
        if self._switch is None:
            smaller = self._guard.after_failure(self.plan, step=step, reason=reason)
            self._switch = Switch("out of memory", step, reason, smaller)
        else:
            self._guard.make_room()
            self._switch = replace(self._switch, step=min(step, self._switch.step))
        if not self._begin.updated:
            return self._begin.restore()
        return self._load()

    def _switch_if_due(self) -> None:
        """Goes on by another plan where it is time to, and saves: a resumed run must do the same."""
        switch = self._switch or self._pressed()
        if switch is None or self._position.step < switch.step:
            return
        self._switch = None
        self.events.append(switch.event(self._position, self.plan))
        self._use(switch.plan)
        self._write_plan()
        self._write_metrics()
        self._save(RandomState.capture())
        for callback in self._callbacks:
            callback.on_memory(self.events[-1])

    def _pressed(self) -> Switch | None:
        """A smaller plan where the system is short of memory."""
        reason, warning = self._guard.pressure(), self._guard.warning()
        if warning is not None:
            for callback in self._callbacks:
                callback.on_warning(warning)
        if reason is None:
            return None
        return_freed()
        smaller = self._guard.next_plan(self.plan)
        if smaller is None:
            return None
        return Switch("memory pressure", self._position.step, reason, smaller)

    def _use(self, plan: Plan) -> None:
        self._net.follow(plan)
        self.plan = plan

    def _write_plan(self) -> None:
        write_atomically(self.run_dir / "plan.json", self.plan.to_json().encode())

    def _between_steps(self, stop: Stop) -> None:
        """Waits, saves, stops, each where it is time to."""

        def tell(reason: str | None) -> None:
            for callback in self._callbacks:
                callback.on_wait(reason)

        self._throttle.wait(stopped=lambda: stop.asked is not None, tell=tell)
        if stop.asked is not None or (self._checkpoint_every and self._position.step % self._checkpoint_every == 0):
            self._check_weights()
            self._save(RandomState.capture())
        if stop.asked is not None:
            raise InterruptedRunError(self.checkpoint, stop.asked)

    def _evaluated(self, batches: Batches, test_batches: Iterable[Batch] | None, stop: Stop) -> EpochRecord:
        """The record of the epoch whose steps are done. Evaluation has no state: after a stop it is done again."""
        position, now = self._position, RandomState.capture()
        if self._sampled is not None:  # evaluation changes its statistics
            self._check_weights()
            self._save(now)
        try:
            with self._whole(batches, stop, last=position.epoch + 1 == self.recipe.epochs):
                accuracy = None
                if test_batches is not None:
                    accuracy = self._accuracy(test_batches, stop, now)
        except StopAskedError:
            assert stop.asked is not None
            if self._sampled is None:
                self._check_weights()
                self._save(now)
            raise InterruptedRunError(self.checkpoint, stop.asked) from None
        seen = max(position.seen, 1)
        rate = position.seen / position.seconds if position.seconds else 0.0
        return EpochRecord(
            position.epoch + 1, position.loss_sum / seen, position.correct / seen, accuracy, rate, position.seconds
        )

    def _accuracy(self, test_batches: Iterable[Batch], stop: Stop, now: RandomState) -> float | None:
        """On the test data; where memory runs out once more, in parts half as large."""
        if isinstance(self.objective, Grouping):
            measure = functools.partial(self.objective.accuracy, self.model, device=self.device)
            return self._guard.threads.call(functools.partial(measure, stop.watched(test_batches)))
        part_size: int | None = None
        while True:
            try:
                return self._guard.threads.call(
                    functools.partial(
                        evaluate, self.model, stop.watched(test_batches), device=self.device, part_size=part_size
                    )
                )
            except Exception as error:
                if part_size == 1 or self._guard.shortage(error) is None:
                    raise
            part_size = (part_size or self.plan.input_shape[0]) // 2
            self._guard.make_room()
            now.restore()

    def _whole(self, batches: Batches, stop: Stop, *, last: bool) -> contextlib.AbstractContextManager[object]:
        """Inside, the model is one to evaluate; it stays so after the last epoch."""
        if self._sampled is None:
            return contextlib.nullcontext()
        some = (
            part.to(self.device)
            for images, _ in stop.watched(itertools.islice(batches, RECALIBRATION_BATCHES))
            for part in images.split(-(-len(images) // self.plan.micro_batches))
        )
        if last:
            self._sampled.finish(some)
            return contextlib.nullcontext()
        self._sampled.recalibrate(some)
        return self._sampled.whole()

    def _train_step(self, images: Tensor, labels: Tensor, indices: Tensor | None, per_epoch: int) -> tuple[float, int]:
        position = self._position
        if self._sampled is not None:
            self._sampled.draw(position.step)  # all parts of a batch run the same modules
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.rate(position.step, self.recipe.epochs * per_epoch)
        value, hits = 0.0, 0
        together = self.objective.group if isinstance(self.objective, Grouping) else 1
        part = -(-len(labels) // (self.plan.micro_batches * together)) * together
        for start in range(0, len(labels), part):
            some_images, some_labels = images[start : start + part], labels[start : start + part]
            if isinstance(self.objective, Preparing):
                some_indices = None if indices is None else indices[start : start + part]
                self.objective.prepare(some_images, some_indices, self._net.model)
            logits = self._net(some_images)
            # the parts' gradients add up to that of the batch's mean loss
            loss = self.objective(logits, some_labels) * (len(some_labels) / len(labels))
            value += float(loss.detach())
            if not math.isfinite(value):
                raise TrainingError(
                    found=f"the loss is {value} at step {position.step + 1} (epoch {position.epoch + 1})",
                    expected="a finite loss",
                    action=f"lower the learning rate; the last good state is in {self.checkpoint}",
                )
            loss.backward()
            hits += self._correct(logits.detach(), some_labels)
        if self._last is not None:
            self._last.step()
            self._last.zero_grad(set_to_none=True)
        position.step += 1
        return value, hits

    def _correct(self, outputs: Tensor, labels: Tensor) -> int:
        if isinstance(self.objective, Grouping):
            return self.objective.correct(outputs, labels)
        return int((outputs.argmax(1) == labels).sum())

    def _trained(self) -> list[nn.Parameter] | list[dict[str, Any]]:
        if self._sampled is not None:
            return self._sampled.parameter_groups()
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _check_weights(self) -> None:
        """The loss is made before the update: after the last step it tells nothing of the weights."""
        for name, value in self.model.state_dict().items():
            if value.is_floating_point() and value.numel() and not _is_finite(value):
                raise TrainingError(
                    found=f"{name} is not finite after step {self._position.step} (epoch {self._position.epoch + 1})",
                    expected="finite weights",
                    action=f"lower the learning rate; the last good state is in {self.checkpoint}",
                )

    def _write_metrics(self) -> None:
        for name, records in (("metrics.jsonl", self.history), ("events.jsonl", self.events)):
            lines = "".join(json.dumps(asdict(record)) + "\n" for record in records)
            write_atomically(self.run_dir / name, lines.encode())


def _is_finite(value: Tensor) -> bool:
    """Whether no element is infinite or not a number, found without a temporary."""
    low, high = torch.aminmax(value)
    return math.isfinite(low) and math.isfinite(high)
