"""Small runs in float64 that run out of memory at a place one can name, and the same runs without that."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted_runs import left
from programs import Closed
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from edgetrain.nn import ChannelPool, CouplingLayer, HybridBlock, ReversibleBlock
from edgetrain.planner import Plan, schedule, uniform_plan
from edgetrain.runtime.executor import Execution
from edgetrain.runtime.program import Fetch, Free, Instruction, Offload, Program
from edgetrain.targets import select_target
from edgetrain.train import Callback, Recipe, StepRecord, Trainer
from edgetrain.train.guard import Guard

SHAPE, BATCH, STEPS, EPOCHS = (3, 8, 8), 6, 3, 2
FAILED_STEP = 4
"""Of 1 to 6: in the second epoch, with state of the optimiser, and no checkpoint of its own before it."""


def stateful(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.Dropout(0.3))


def network() -> nn.Sequential:
    return nn.Sequential(
        Closed(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        Closed(stateful(8), nn.ReLU()),
        ReversibleBlock(stateful(4), CouplingLayer(4)),
        HybridBlock(8),
        ChannelPool(),
        Closed(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)),
    )


def plans(*, update_in_backward: bool) -> tuple[Plan, Plan]:
    """One with instructions of many kinds, and one to fall back on."""
    modes = ("store", "recompute", "invert", "invert_layerwise", "store", "store")
    like = [uniform(mode, update_in_backward=update_in_backward) for mode in ("recompute", "invert_layerwise")]
    program = schedule(like[0].program.names, like[0].program.shapes, modes, update_in_backward=update_in_backward)
    return Plan(modes, modes, _offloading(program)), like[1]


def uniform(mode: Any, *, update_in_backward: bool) -> Plan:
    return uniform_plan(
        network().double(), mode, input_shape=SHAPE, batch_size=BATCH, update_in_backward=update_in_backward
    )


def _offloading(program: Program) -> Program:
    """z[1] goes to the host between the passes."""
    steps: list[Instruction] = []
    for step in program.instructions:
        if getattr(step, "block", None) == 1 and step.op == "backward":
            steps.append(Fetch(1))
        steps.append(step)
        if getattr(step, "block", None) == 1 and step.op == "forward":
            steps.append(Offload(1))
    assert Free(0) in steps
    return Program(program.names, program.shapes, tuple(steps))


class Losses(Callback):
    """By step; a step that is repeated must give what it gave.

    Args:
        tolerance: relative, where it is repeated by another plan.
    """

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.found: dict[tuple[int, int], float] = {}

    def on_step(self, record: StepRecord) -> None:
        place = (record.epoch, record.step)
        assert math.isclose(self.found.setdefault(place, record.loss), record.loss, rel_tol=self.tolerance)


class Switching(Callback):
    """Goes on with ``plan`` after ``steps`` steps, without anything having happened."""

    def __init__(self, plan: Plan, steps: int) -> None:
        self.plan, self.left = plan, steps

    def on_step(self, record: StepRecord) -> None:
        self.left -= 1
        if self.left == 0:
            self.trainer._use(self.plan)

    trainer: Trainer


def train(
    folder: Path,
    plan: Plan,
    *callbacks: Callback,
    smaller: list[Plan],
    tolerance: float = 0.0,
    gauge: Any = None,
) -> tuple[Trainer, Losses]:
    """A run of six steps."""
    torch.manual_seed(1)
    losses = Losses(tolerance)
    trainer = Trainer(
        network().double(),
        plan,
        run_dir=folder,
        recipe=Recipe(epochs=EPOCHS, batch_size=BATCH, peak_rate=0.1),
        callbacks=[losses, *callbacks],
        guard=Guard(select_target("cpu"), lambda _: smaller, gauge=gauge),
    )
    for callback in callbacks:
        callback.trainer = trainer  # type: ignore[attr-defined]
    x = torch.randn(BATCH * STEPS, *SHAPE, dtype=torch.float64)
    data = TensorDataset(x, torch.arange(BATCH * STEPS) % 5)
    trainer.fit(DataLoader(data, BATCH, shuffle=True), DataLoader(data, BATCH))
    return trainer, losses


def end(trainer: Trainer) -> dict[str, bytes]:
    """Weights, running statistics, optimiser, random states."""
    tensors, _ = left(trainer.checkpoint)
    return {name: value.numpy().tobytes() for name, value in tensors.items()}


Fail = Callable[[], None]


def out_of_memory() -> None:
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")


def fail_at(patch: pytest.MonkeyPatch, place: int, when: str, *, step: int, fail: Fail = out_of_memory) -> list[int]:
    """Makes instruction ``place`` of training step ``step`` (1, ...) fail once, ``when``: before or after its work.

    Returns:
        A list that is filled when it has.
    """
    run, begin, seen, failed = Execution._run, Execution.forward, [0], []

    def counted(self: Execution, x: Tensor) -> Tensor:
        seen[0] += 1
        return begin(self, x)

    def checked(self: Execution, instruction: Instruction) -> None:
        here = seen[0] == step and not failed and self._program.instructions[place] is instruction
        if here and when == "before":
            failed.append(place)
            fail()
        run(self, instruction)
        if here and when == "after":
            failed.append(place)
            fail()

    patch.setattr(Execution, "forward", counted)
    patch.setattr(Execution, "_run", checked)
    return failed


def fail_in_update(patch: pytest.MonkeyPatch, *, call: int, fail: Fail = out_of_memory) -> list[int]:
    """Makes call ``call`` (1, ...) of an optimiser's step fail once, when a part of its parameters is changed."""
    step, calls, failed = torch.optim.SGD.step, [0], []

    def halfway(self: torch.optim.SGD) -> None:
        calls[0] += 1
        if calls[0] != call:
            step(self)
            return
        failed.append(call)
        first = self.param_groups[0]["params"][0]
        with torch.no_grad():
            first.sub_(first.grad, alpha=0.1)
            self.state[first]["momentum_buffer"] = first.grad.clone()
        fail()

    hooked = torch.optim.Optimizer.profile_hook_step(halfway)
    patch.setattr(torch.optim.SGD, "step", hooked)
    return failed
