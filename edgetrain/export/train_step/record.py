"""A plan's training step as a graph: the Program is executed on tensors without data, and what it does is written down.

The graph is what the executor does, instruction by instruction: no second description of the layers' gradients exists
that could differ from the first. Nodes stand in the order in which they ran. A runtime that keeps that order frees each
value after its last reader, which is never later than the executor would.

What is temporary is the whole batch's where the executor walks through slices of it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgetrain.chain import Block, chain_of
from edgetrain.chain.fakes import NeedsDataError, fake_like, fake_mode
from edgetrain.errors import ExportError, ModelError
from edgetrain.export.train_step import rules
from edgetrain.export.train_step.graph import Graph, Value
from edgetrain.export.train_step.optimizers import OptimizerSpec, Step
from edgetrain.export.train_step.recorder import Recorder, dtype_of
from edgetrain.export.train_step.rules.elementwise import binary
from edgetrain.nn.slices import whole_batch
from edgetrain.planner import Plan
from edgetrain.runtime import Execution, Instruction
from edgetrain.runtime.program import describe
from edgetrain.train.objectives import Objective
from edgetrain.train.recipe import undecayed_parameters

assert rules  # importing them makes the operators known

NEW = "new."
"""What a value's name begins with after the step."""
GRADIENT = "gradient."
MODEL, BUFFER, OPTIMIZER = "model.", "buffer.", "optimizer."
"""What names of the state begin with, as in a checkpoint."""


@dataclass(frozen=True)
class StepGraph:
    """A graph and what it takes and gives besides the batch.

    Attributes:
        graph: with inputs ``images``, ``labels`` and the names of ``reads``, and outputs ``loss``, ``correct`` and, for
            each name of ``writes``, ``new.`` and the name.
        reads: state that it takes.
        writes: state that it changes.
    """

    graph: Graph
    reads: tuple[str, ...]
    writes: tuple[str, ...]


@dataclass
class _Fake:
    """The network without data, with the names that its tensors have in a checkpoint."""

    model: nn.Module
    names: dict[str, Tensor]
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)


def record_step(
    model: nn.Module,
    plan: Plan,
    *,
    objective: Objective,
    optimizer: OptimizerSpec | None,
    opset: int,
    dtype: torch.dtype = torch.float32,
) -> StepGraph:
    """The graph of one step, of one micro-batch where the plan has several.

    Args:
        model: for which ``plan`` was made; left alone.
        optimizer: steps in the graph; None: the gradients are added to ``gradient.NAME``, of the parameters' shapes.

    Raises:
        ExportError: an operator has no counterpart; names it and the instruction.
    """
    graph, fake = Graph(opset), fake_network(model, dtype)
    recorder = Recorder(graph)
    program = replace(plan.program, channels_last=False)  # a graph knows no layouts
    n = program.shapes[0][0]
    with torch.random.fork_rng(devices=[]), fake_mode(), whole_batch():
        images, labels = torch.empty(program.shapes[0], dtype=dtype), torch.empty(n, dtype=torch.long)
        recorder.bind(images, graph.input("images", images.shape, dtype_of(images)))
        recorder.bind(labels, graph.input("labels", labels.shape, np.int64))
        stepper = _Stepper(recorder, fake, optimizer, undecayed_of(model))
        _bind_state(recorder, fake)
        stepper.declare(dtype_of(images))
        blocks = chain_of(fake.model).blocks
        execution = _Recorded(recorder, program, blocks, update=lambda i: stepper.step(blocks[i].module.parameters()))
        with recorder, saying_where(recorder):
            loss, correct = _run(recorder, execution, images, labels, objective, plan.micro_batches)
            with recorder.doing("update"):
                stepper.step(fake.model.parameters())
        graph.output("loss", loss)
        graph.output("correct", correct)
        writes = _changed(recorder, fake, stepper)
    reads = [*fake.names, *stepper.reads]
    for name, value in writes.items():
        graph.output(NEW + name, value)
    return StepGraph(graph, tuple(reads), tuple(writes))


def record_update(
    model: nn.Module, *, optimizer: OptimizerSpec, opset: int, dtype: torch.dtype = torch.float32
) -> StepGraph:
    """The graph that steps ``optimizer`` with the gradients ``gradient.NAME``, which several parts have added up."""
    graph, fake = Graph(opset), fake_network(model, dtype)
    recorder = Recorder(graph)
    with fake_mode():
        stepper = _Stepper(recorder, fake, optimizer, undecayed_of(model))
        names = {MODEL + name for name, p in fake.parameters.items() if p.requires_grad}
        _bind_state(recorder, fake, only=names)
        stepper.declare(dtype_of(torch.empty(0, dtype=dtype)))
        for name, parameter in fake.parameters.items():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
                kind = dtype_of(parameter)
                recorder.bind(parameter.grad, graph.input(GRADIENT + name, parameter.shape, kind))
        with recorder:
            stepper.step(fake.model.parameters())
        writes = _changed(recorder, fake, stepper)
    reads = [*sorted(names), *stepper.reads, *(GRADIENT + name[len(MODEL) :] for name in sorted(names))]
    for name, value in writes.items():
        graph.output(NEW + name, value)
    return StepGraph(graph, tuple(reads), tuple(writes))


def record_evaluation(
    model: nn.Module, shape: Sequence[int], *, opset: int, dtype: torch.dtype = torch.float32
) -> StepGraph:
    """The graph of the network in evaluation mode, for batches of ``shape``: output ``logits``."""
    graph, fake = Graph(opset), fake_network(model, dtype)
    recorder = Recorder(graph)
    fake.model.eval()
    with torch.random.fork_rng(devices=[]), fake_mode(), whole_batch(), torch.no_grad():
        images = torch.empty(tuple(shape), dtype=dtype)
        recorder.bind(images, graph.input("images", images.shape, dtype_of(images)))
        _bind_state(recorder, fake)
        with recorder, saying_where(recorder), recorder.doing("evaluation"):
            logits = fake.model(images)
        graph.output("logits", recorder.value(logits))
    return StepGraph(graph, tuple(fake.names), ())


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by the names that they have in a checkpoint."""
    state = model.state_dict(keep_vars=True)
    others = {BUFFER + name: value for name, value in model.named_buffers() if name not in state}
    return {MODEL + name: value for name, value in state.items()} | others


def undecayed_of(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that weight decay leaves alone."""
    spared = undecayed_parameters(model)
    return frozenset(name for name, parameter in model.named_parameters() if parameter in spared)


def fake_network(model: nn.Module, dtype: torch.dtype) -> _Fake:
    """``model`` without data."""
    memo: dict[int, Any] = {}
    with fake_mode():
        for module in model.modules():
            held = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
            for tensor in held:
                if isinstance(tensor, Tensor) and id(tensor) not in memo:
                    kind = dtype if tensor.is_floating_point() else None
                    like = fake_like(tensor.detach(), kind)
                    memo[id(tensor)] = (
                        nn.Parameter(like, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else like
                    )
    fake = copy.deepcopy(model, memo).train()
    return _Fake(fake, state_of(fake), dict(fake.named_parameters()))


class _Recorded(Execution):
    """Tells the recorder which instruction runs."""

    def __init__(self, recorder: Recorder, program: Any, blocks: Sequence[Block], **arguments: Any) -> None:
        super().__init__(program, blocks, **arguments)
        self._recorder = recorder
        self._number = 0

    def _run(self, step: Instruction) -> None:
        with self._recorder.doing(f"{self._number:03d} {describe(step)}"):
            super()._run(step)
        self._number += 1


class _Stepper:
    """Steps the optimiser, or hands out the gradients."""

    def __init__(
        self,
        recorder: Recorder,
        fake: _Fake,
        optimizer: OptimizerSpec | None,
        undecayed: frozenset[str],
    ) -> None:
        self._recorder, self._fake, self._optimizer = recorder, fake, optimizer
        self._undecayed = undecayed
        self._shared: Step | None = None
        self._before: dict[str, Value] = {}
        self.after: dict[str, Value] = {}

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the state that is not the network's."""
        return tuple(self._before)

    def declare(self, dtype: Any) -> None:
        """The inputs."""
        graph, optimizer = self._recorder.graph, self._optimizer
        trained = {name: p for name, p in self._fake.parameters.items() if p.requires_grad}
        if optimizer is None:
            for name, parameter in trained.items():
                self._before[GRADIENT + name] = graph.input(GRADIENT + name, parameter.shape, dtype)
            return
        rate = graph.input("learning_rate", (), dtype)
        number = graph.input("step", (), dtype) if optimizer.counts else None
        self._shared = Step(self._recorder, rate, number)
        for name, parameter in trained.items():
            for key in optimizer.keys:
                full = f"{OPTIMIZER}{name}.{key}"
                self._before[full] = graph.input(full, parameter.shape, dtype)

    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        """Uses up the gradients of ``parameters``."""
        names = {id(parameter): name for name, parameter in self._fake.parameters.items()}
        for parameter in parameters:
            if parameter.grad is None:
                continue
            name = names[id(parameter)]
            gradient = self._recorder.value(parameter.grad)
            parameter.grad = None
            self._step_one(name, parameter, gradient)

    def _step_one(self, name: str, parameter: nn.Parameter, gradient: Value) -> None:
        recorder = self._recorder
        if self._optimizer is None:
            before = self._before[GRADIENT + name]
            self.after[GRADIENT + name] = binary(recorder, "Add", before, gradient)
            return
        assert self._shared is not None
        keys = {key: f"{OPTIMIZER}{name}.{key}" for key in self._optimizer.keys}
        state = {key: self._before[full] for key, full in keys.items()}
        decayed = name not in self._undecayed
        new = self._optimizer.update(self._shared, recorder.value(parameter), gradient, state, decayed=decayed)
        recorder.bind(parameter.detach(), new.weight)
        self.after |= {full: new.state[key] for key, full in keys.items()}


def _run(
    recorder: Recorder,
    execution: Execution,
    images: Tensor,
    labels: Tensor,
    objective: Objective,
    micro_batches: int,
) -> tuple[Value, Value]:
    """Loss and number of correct answers."""
    with torch.no_grad():
        logits = execution.forward(images)
    with recorder.doing("loss"), torch.enable_grad():
        outputs = logits.detach().requires_grad_()
        loss = objective(outputs, labels) / micro_batches
        (dy,) = torch.autograd.grad(loss, outputs)
        with torch.no_grad():
            correct = (logits.argmax(1) == labels).sum()
        found = recorder.value(loss.detach()), recorder.value(correct)
        del loss, outputs, logits
    execution.backward(dy)
    return found


def _bind_state(recorder: Recorder, fake: _Fake, *, only: set[str] | None = None) -> None:
    bound: dict[int, str] = {}
    for name, tensor in fake.names.items():
        if only is not None and name not in only:
            continue
        address = tensor.untyped_storage()._cdata
        if address in bound:
            raise ModelError(
                found=f"{name} and {bound[address]} in one memory",
                expected="a tensor of its own for each name of the state",
                action="tie weights by calling one module twice",
            )
        bound[address] = name
        recorder.bind(tensor.detach(), recorder.graph.input(name, tensor.shape, dtype_of(tensor)))


def _changed(recorder: Recorder, fake: _Fake, stepper: _Stepper) -> dict[str, Value]:
    """What the step has made of the state, where it has changed it."""
    after = {}
    for name, tensor in fake.names.items():
        value = recorder.known(tensor.detach())
        if value is not None and value.name != name:
            after[name] = value
    return after | stepper.after


@contextlib.contextmanager
def saying_where(recorder: Recorder) -> Iterator[None]:
    """Inside, what fails for want of data is an ExportError that says where."""
    try:
        yield
    except NeedsDataError as error:
        raise ExportError(
            found=f"{recorder.where} decides by the values of its data ({error})",
            expected="a step whose operators depend on shapes alone",
            action="train this network with edgetrain train",
        ) from error
