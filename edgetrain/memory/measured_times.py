"""Seconds of every instruction, measured on this machine.

Every kind of block runs every instruction that it allows, on random data, through the executor's own code
(:mod:`edgetrain.memory.stopwatch`). After a warm-up, rounds over all kinds follow until the time is up, and the least
of each instruction's times counts: whatever else runs on the machine only ever adds to them. Where it took a tenth of
the processors' time or more, the result says so.

A block that is timed alone finds other pages and caches than one in a step: sixty convolutions of 16 channels took 1.5
times as long alone. So where three steps that keep everything fit into the memory and half of the time, they are timed
too, and all seconds but the optimiser's are multiplied by what makes the sum of a step's instructions come out right.

The batch is that of the step unless it does not fit, or would not leave time for the warm-up and a round. Then it is
the largest that does, 16 at least where they fit, and the seconds of all instructions but the optimiser's are continued
in proportion to it. That counts what an operator takes whatever its size once per small batch: the sum comes out high.
"""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from edgetrain.chain import Chain, chain_of
from edgetrain.errors import UsageError
from edgetrain.memory.fingerprint import fingerprint
from edgetrain.memory.measure import measure_peak, muted
from edgetrain.memory.step import Loss, OptimizerFactory, classification_loss, optimizer_factory
from edgetrain.memory.stopwatch import (
    Clock,
    Sample,
    Step,
    Stopwatch,
    copy_rate,
    head_seconds,
    keep_all_seconds,
    sequences,
)
from edgetrain.memory.times import BlockTimes, Times
from edgetrain.nn.invertible import Invertible
from edgetrain.nn.layouts import with_channels_last
from edgetrain.runtime.offload import can_be_rounded
from edgetrain.targets import select_target
from edgetrain.targets.other_work import others_share, processor_ticks

MEASURED = "measured on this machine"
_QUIET = 0.1  # part of the processors' time, above which what is measured depends on who else runs
_FEW = 4  # samples of the first pass, which finds how large a batch can be
_LEAST = 16  # samples that are worth the time: with fewer, torch takes other algorithms for convolutions on a CPU
_ROUNDS = 1, 12  # at least and at most, after the warm-up
_STEPS = 3, 8  # whole ones
_STEPS_SHARE = 0.5  # of the time, on top of it
_MEMORY_SHARE = 0.5  # of what is available


@dataclass
class _Kind:
    """Blocks that are equal in structure and shapes.

    Attributes:
        i: the first of them.
        seconds: least of each instruction, such as ``backward_saved``.
        x: its input, ``y`` its output.
    """

    i: int
    todo: list[list[Step]]
    update: Callable[[int], None]
    x: Sample
    y: Sample
    seconds: dict[str, float] = field(default_factory=dict)


def measured_times(
    model: nn.Module | Callable[[], nn.Module],
    *,
    input_shape: tuple[int, ...],
    batch_size: int,
    optimizer: str | OptimizerFactory | None = "sgd",
    dtype: torch.dtype = torch.float32,
    loss: Loss = classification_loss,
    budget_s: float = 5.0,
    memory_bytes: int | None = None,
    clock: Clock = time.perf_counter,
    channels_last: bool = False,
    step_ratio: float | None = None,
) -> Times:
    """What every instruction takes on the device that the model is on.

    Args:
        model: a module, or a function that makes one. Nothing of it changes: a copy runs.
        input_shape: of one sample, (c, h, w).
        batch_size: samples of the step whose times are wanted.
        optimizer: a name of :data:`edgetrain.memory.OPTIMIZERS`, a function of the parameters, or None.
        dtype: of weights and batch.
        loss: from the model's output.
        budget_s: seconds to spend, about, and up to half as much on whole steps. Exceeded where two runs of 16 samples
            take longer.
        memory_bytes: to spend; None: half of what the device has available.
        clock: what is read around an instruction. ``time.process_time`` where the machine is busy with other work:
            processor seconds, which are seconds of a step on a CPU with one thread.
        channels_last: of Programs whose z[0] has its channels last.
        step_ratio: of other times of the same model, with which these are to be compared; 1 where those have none. No
            whole step is timed then.

    Returns:
        Seconds; ``source`` names the share of the processors that other work took, where that was a tenth or more.

    Raises:
        UsageError: an unknown optimiser, or a batch of nobody.
        ModelError: the model does not take the input.
    """
    if batch_size < 1:
        raise UsageError(found=f"a batch of {batch_size}", expected="one sample at least", action="pass batch_size=1")
    began, ticks = time.perf_counter(), processor_ticks()
    original = model if isinstance(model, nn.Module) else model()
    device = next((p.device for p in original.parameters()), torch.device("cpu"))
    if memory_bytes is None:
        probe = select_target("cuda" if device.type == "cuda" else "cpu").probe()
        memory_bytes = int(_MEMORY_SHARE * probe.available_bytes)
    factory = None if optimizer is None else optimizer_factory(optimizer)
    with _random_state_kept(device), torch.no_grad():

        def batch_of(samples: int) -> Sample:
            images = torch.empty(samples, *input_shape, dtype=dtype, device=device)
            return Sample.of(with_channels_last(images) if channels_last else images)

        course = _Course(chain_of(copy.deepcopy(original).to(dtype).train()), factory, loss, clock)
        course.begin(batch_of(min(_FEW, batch_size)))
        course.begin(batch_of(course.largest_batch(batch_size, memory_bytes, budget_s)))
        course.measure(until=began + budget_s)
        if step_ratio is None:
            course.measure_whole(memory_bytes, _STEPS_SHARE * budget_s)
        else:
            course.step_ratio = step_ratio
        times = course.times(batch_size, source=_source(others_share(ticks, processor_ticks())))
        return replace(times, channels_last=channels_last)


class _Course:
    """Every kind of block of a chain, at one batch size after another."""

    def __init__(self, chain: Chain, optimizer: OptimizerFactory | None, loss: Loss, clock: Clock) -> None:
        self._chain, self._loss, self._clock = chain, loss, clock
        self._prints = [fingerprint(block.module, i) for i, block in enumerate(chain.blocks)]
        self._updates: list[Callable[[int], None] | None] = []
        owned = set[nn.Parameter]()
        for block in chain.blocks:
            # as a wrapped model does: each parameter belongs to the first block that has it
            parameters = [p for p in block.module.parameters() if p.requires_grad and p not in owned]
            owned.update(parameters)
            self._updates.append(_updater(optimizer, parameters) if optimizer is not None and parameters else None)
        self._kinds: list[_Kind] = []
        self._of_block: list[_Kind] = []
        self._head = 0.0
        self._bytes_per_sample: int | None = None
        self.step_ratio: float | None = None

    def begin(self, batch: Sample) -> None:
        """Runs everything once from ``batch``, block after block, and forgets what was measured before."""
        self._chain.shapes(batch.shape)  # blocks that need a size find it here
        kinds: dict[Any, _Kind] = {}
        self._of_block, x = [], batch
        for i, block in enumerate(self._chain.blocks):
            overwritten = i + 1 < len(self._chain.blocks) and isinstance(self._chain.blocks[i + 1].module, Invertible)
            key = self._prints[i], i == 0, overwritten, x, self._updates[i] is None
            if key not in kinds:
                update = self._updates[i]
                todo = sequences(block, i, update=update is not None)
                kinds[key] = _Kind(i, todo, update or _no_update, x, x)
                self._run(kinds[key])
            self._of_block.append(kinds[key])
            x = kinds[key].y
        self._kinds = list(kinds.values())
        self._head = head_seconds(x, self._loss, self._clock)

    def largest_batch(self, batch_size: int, memory_bytes: int, seconds: float) -> int:
        """Samples of which every block fits into ``memory_bytes`` and all can be run twice in ``seconds``."""
        few = self._kinds[0].x.shape[0]
        if few == batch_size:
            return few
        fitting, spent = batch_size, 0.0
        per_kind: dict[int, int] = {}
        for kind in self._kinds:
            began = time.perf_counter()
            self._run(kind)  # the second time: without the loading of code
            spent += time.perf_counter() - began
            parameters = list(self._chain.blocks[kind.i].module.parameters())
            weights = sum(p.nbytes for p in parameters)
            gradients = sum(p.nbytes for p in parameters if p.requires_grad)
            run = functools.partial(self._run, kind)  # first as the setup: what a module holds is replaced
            with muted():  # the profiler warns of blocks that were there before
                need = measure_peak(run, setup=run, device=kind.x.device).allocator_peak_bytes
            least = 2 * (kind.x.nbytes + kind.y.nbytes)  # beside large gradients the rest does not show
            per_kind[id(kind)] = max(least, need - gradients) // few
            fitting = min(fitting, (memory_bytes - 2 * weights) // max(1, per_kind[id(kind)]))
        self._bytes_per_sample = sum(per_kind[id(kind)] for kind in self._of_block)
        quick = int(few * seconds / ((1 + _ROUNDS[0]) * spent)) if spent else batch_size
        return max(few, min(batch_size, fitting, max(quick, _LEAST)))

    def measure(self, *, until: float) -> None:
        """Rounds over all kinds."""
        for done in range(_ROUNDS[1]):
            if done >= _ROUNDS[0] and time.perf_counter() > until:
                break
            for kind in self._kinds:
                self._run(kind)
            self._head = min(self._head, head_seconds(self._of_block[-1].y, self._loss, self._clock))

    def measure_whole(self, memory_bytes: int, seconds: float) -> None:
        """Three to eight steps that keep everything, unless three take longer than ``seconds``.

        What the blocks need one by one must fit into ``memory_bytes`` at once, with gradients, the optimiser's state
        and the loss.
        """
        x, blocks = self._of_block[0].x, self._chain.blocks
        parameters = {p for block in blocks for p in block.module.parameters()}
        alone = self._seconds_alone
        if self._bytes_per_sample is None or not 0 < _STEPS[0] * alone <= seconds:
            return
        weights, logits = sum(p.nbytes for p in parameters), self._of_block[-1].y.nbytes
        if x.shape[0] * self._bytes_per_sample + 4 * (weights + logits) > memory_bytes:
            return
        if not any(p.requires_grad for p in parameters):
            return
        until, taken = time.perf_counter() + seconds, list[float]()
        while len(taken) < _STEPS[0] or (len(taken) < _STEPS[1] and time.perf_counter() < until):
            taken.append(keep_all_seconds(blocks, x, self._loss, self._clock))
        self.step_ratio = min(taken) / alone

    @property
    def _seconds_alone(self) -> float:
        """Of a step that keeps everything, by its instructions."""
        return self._head + sum(kind.seconds["forward_all"] + kind.seconds["backward_saved"] for kind in self._of_block)

    def times(self, batch_size: int, *, source: str) -> Times:
        """What was found, continued to ``batch_size``."""
        samples = [self._of_block[0].x, *(kind.y for kind in self._of_block)]
        scale = batch_size / samples[0].shape[0] * (self.step_ratio or 1.0)
        largest = max(samples, key=lambda sample: sample.nbytes)
        roundable = [sample for sample in samples if can_be_rounded(sample.dtype)]
        rounded = max(roundable, key=lambda sample: sample.nbytes, default=None)
        return Times(
            blocks=tuple(_block_times(kind.seconds, scale) for kind in self._of_block),
            head=self._head * scale,
            copy_bytes_per_s=copy_rate(largest, "host", self._clock),
            rounding_bytes_per_s=math.inf if rounded is None else copy_rate(rounded, "bfloat16", self._clock),
            source=source,
            shapes=self._chain.shapes((batch_size, *samples[0].shape[1:])),
            element_bytes=tuple(sample.dtype.itemsize for sample in samples),
            step_ratio=self.step_ratio,
        )

    def _run(self, kind: _Kind) -> None:
        for sequence in kind.todo:
            stopwatch = Stopwatch(self._chain.blocks, kind.i, update=kind.update, clock=self._clock)
            taken, y = stopwatch.time(sequence, kind.x)
            if sequence is kind.todo[0]:  # what an exact block computes in place is laid out row by row
                kind.y = y
            for step, seconds in zip(sequence, taken, strict=True):
                name = _name(step)
                kind.seconds[name] = min(seconds, kind.seconds.get(name, seconds))


def _source(others: float | None) -> str:
    """Where the times come from, with a warning if other work took ``others`` of the processors meanwhile."""
    if others is None or others < _QUIET:
        return MEASURED
    return f"{MEASURED} while other work took {others:.0%} of its processors: too long, measure again when it is idle"


def _name(step: Step) -> str:
    detail = getattr(step, "keep", getattr(step, "how", ""))
    return f"{step.op}_{detail}" if detail else step.op


def _block_times(seconds: dict[str, float], scale: float) -> BlockTimes:
    def scaled(name: str) -> float | None:
        return seconds[name] * scale if name in seconds else None

    from_input, in_place = scaled("forward_input"), scaled("forward_nothing")
    forward = in_place if from_input is None else from_input
    assert forward is not None
    return BlockTimes(
        forward=forward,
        forward_all=seconds["forward_all"] * scale,
        backward_saved=seconds["backward_saved"] * scale,
        backward_recompute=scaled("backward_recompute"),
        backward_invert=scaled("backward_invert"),
        backward_invert_layerwise=scaled("backward_invert_layerwise"),
        update=seconds.get("update", 0.0),
        forward_in_place=in_place,
        forward_products=scaled("forward_products"),
        backward_selective=scaled("backward_selective"),
        forward_products_only=scaled("forward_products_only"),
        backward_invert_selective=scaled("backward_invert_selective"),
        forward_all_products=scaled("forward_all_products"),
        backward_selective_all=scaled("backward_selective_all"),
    )


def _updater(optimizer: OptimizerFactory, parameters: list[nn.Parameter]) -> Callable[[int], None]:
    stepper = optimizer(parameters)
    for group in stepper.param_groups:
        if "lr" in group:
            group["lr"] = 0.0  # gradients of random data would drive the weights out of range

    def update(_: int) -> None:
        stepper.step()
        stepper.zero_grad(set_to_none=True)

    return update


def _no_update(_: int) -> None:
    return None


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
