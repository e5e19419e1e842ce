"""Steps of small networks, in PyTorch and as graphs: what the tests of the exported step compare."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import networks
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edgetrain
from edgetrain.export.train_step.optimizers import SGD
from edgetrain.export.train_step.record import StepGraph, state_of
from edgetrain.export.train_step.write import Data, export_train_step
from edgetrain.planner import Plan

SHAPE = (3, 8, 8)
DATA = Data(tuple("0123456789"), (0.5,) * 3, (0.25,) * 3)
State = dict[str, np.ndarray[Any, Any]]
MakeOptimizer = Callable[[Any], torch.optim.Optimizer]


def small(name: str, **options: Any) -> nn.Module:
    """A network of a few hundred weights."""
    torch.manual_seed(0)
    if name == "hybrid":
        return edgetrain.models.hybrid(width=8, blocks=(1, 1), pooling=("channel",), **options)
    if name == "layerwise":
        return edgetrain.models.layerwise(width=8, blocks=(2, 1, 1), pooling=("channel", "batch"), **options)
    if name == "irevnet":
        return edgetrain.models.irevnet(width=8, blocks=(1, 1), pooling=("channel",), **options)
    if name == "residual":
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            networks.Residual(8),
            nn.MaxPool2d(2),  # of overlapping windows the reference evaluator gives wrong positions
            nn.Conv2d(8, 8, 2, padding=1, dilation=2, groups=4, bias=False),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(8, 10),
        )
    if name == "wide":  # more filters than pixels, with strides, groups and a bias
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(8, 48, 3, stride=2, padding=1),  # groups besides: the reference evaluator fails at the gradient
            nn.LeakyReLU(0.1),
            nn.Conv2d(48, 24, 3, padding=1, groups=2, bias=False),
            nn.Conv2d(24, 24, 2, padding=2, dilation=2),
            nn.Flatten(),
            nn.Linear(24 * 16, 10),
        )
    return edgetrain.create_model(name, num_classes=10)


def torch_steps(
    model: nn.Module, plan: Plan, batches: list[tuple[Tensor, Tensor]], make: MakeOptimizer
) -> tuple[State, list[float]]:
    """The state of ``model`` after a step on each of ``batches``, and the losses."""
    net = edgetrain.wrap(model.train(), plan, optimizer=make)
    last = None if net.optimizers else make([p for p in model.parameters() if p.requires_grad])
    losses = []
    for images, labels in batches:
        for some, truth in zip(images.chunk(plan.micro_batches), labels.chunk(plan.micro_batches), strict=True):
            loss = F.cross_entropy(net(some), truth) / plan.micro_batches
            loss.backward()
            losses.append(float(loss.detach()))
        if last is not None:
            last.step()
            last.zero_grad()
    return {name: value.detach().numpy() for name, value in state_of(model).items()}, losses


def graph_steps(
    graph: StepGraph,
    run: Callable[[State], State],
    start: State,
    batches: list[tuple[Tensor, Tensor]],
    *,
    rate: float,
    counts: bool = False,
) -> tuple[State, list[float]]:
    """The same with a graph and whatever runs it."""
    inputs = {value.name: value for value in graph.graph.inputs}
    state = {name: start.get(name, np.zeros(inputs[name].shape, inputs[name].dtype)) for name in graph.reads}
    losses = []
    for number, (images, labels) in enumerate(batches):
        given = {"images": images.numpy(), "labels": labels.numpy()}
        given["learning_rate"] = np.array(rate, images.numpy().dtype)
        if counts:
            given["step"] = np.array(number + 1, images.numpy().dtype)
        found = run({**state, **given})
        state |= {name: found[f"new.{name}"] for name in graph.writes}
        losses.append(float(found["loss"]))
    return state, losses


def start_of(model: nn.Module) -> State:
    return {name: value.detach().numpy().copy() for name, value in state_of(model).items()}


def batches_of(count: int, n: int, shape: tuple[int, ...] = SHAPE, dtype: Any = torch.float64) -> list[Any]:
    """The same every time."""
    random = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, *shape, dtype=dtype, generator=random), torch.randint(0, 10, (n,), generator=random))
        for _ in range(count)
    ]


def sgd(rate: float, optimizer: SGD | None = None) -> MakeOptimizer:
    """PyTorch's optimiser of the same settings."""
    o = optimizer or SGD()
    return lambda parameters: torch.optim.SGD(
        parameters, lr=rate, momentum=o.momentum, nesterov=o.nesterov, weight_decay=o.weight_decay
    )


def worst(found: State, expected: State) -> float:
    """Largest relative difference of a tensor of ``expected``, in the Euclidean norm."""
    return max(
        float(np.linalg.norm(found[name] - value) / max(np.linalg.norm(value), 1e-12))
        for name, value in expected.items()
        if name in found
    )


def exported(model: nn.Module, mode: Any, path: Path, *, n: int = 4, **options: Any) -> Any:
    """Writes the step of a uniform plan of ``n`` samples to ``path``; gives the plan."""
    plan = edgetrain.uniform_plan(model, mode, input_shape=SHAPE, batch_size=n)
    export_train_step(model, plan, path, data=DATA, **options)
    return plan
