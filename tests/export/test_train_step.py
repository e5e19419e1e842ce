"""The planned step as a graph against the executor, in float64 by ONNX's own reference implementation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn
from train_steps import SHAPE, State, batches_of, graph_steps, sgd, small, start_of, torch_steps, worst

import edgetrain
from edgetrain.errors import ExportError
from edgetrain.export.train_step.optimizers import SGD, AdamW
from edgetrain.export.train_step.record import StepGraph, record_step, record_update
from edgetrain.train.objectives import CrossEntropy
from edgetrain.train.recipe import Recipe

RATE = 0.05
EXACT = 1e-10


def reference(graph: StepGraph) -> Any:
    """Runs ``graph`` in NumPy."""
    model = graph.graph.model("step")
    evaluator = ReferenceEvaluator(model)
    names = [output.name for output in model.graph.output]
    return lambda given: dict(zip(names, evaluator.run(None, given), strict=True))


def recorded(model: nn.Module, plan: Any, **options: Any) -> StepGraph:
    settings = {"objective": CrossEntropy(), "optimizer": SGD(), "opset": 17, "dtype": torch.float64, **options}
    return record_step(model, plan, **settings)


CASES = [
    ("hybrid", "keep_all"),
    ("hybrid", "recompute"),
    ("hybrid", "invert"),
    ("hybrid", "invert_layerwise"),
    ("layerwise", "invert_layerwise"),
    ("irevnet", "invert"),
    ("irevnet", "invert_selective"),
    ("residual", "keep_all"),
    ("residual", "selective"),
    ("residual", "recompute"),
    ("wide", "recompute"),
]


@pytest.mark.parametrize("update_in_backward", [False, True])
@pytest.mark.parametrize(("name", "mode"), CASES)
def test_two_steps_leave_the_state_that_the_executor_leaves(name: str, mode: Any, update_in_backward: bool) -> None:
    """Running statistics among it, which a plan must not move twice; the second step has momentum."""
    model = small(name).double()
    plan = edgetrain.uniform_plan(model, mode, input_shape=SHAPE, batch_size=3, update_in_backward=update_in_backward)
    graph, start, batches = recorded(model, plan), start_of(model), batches_of(2, 3)
    found, losses = graph_steps(graph, reference(graph), start, batches, rate=RATE)
    expected, true_losses = torch_steps(model, plan, batches, sgd(RATE))
    assert worst(found, expected) < EXACT
    assert np.allclose(losses, true_losses, rtol=EXACT)
    assert worst(found, start) > 1e-3  # something was trained


@pytest.mark.parametrize("mode", ["keep_all", "invert_layerwise"])
def test_gradients_are_those_of_finite_differences(mode: Any) -> None:
    model = small("hybrid").double()
    plan = edgetrain.uniform_plan(model, mode, input_shape=SHAPE, batch_size=2)
    graph = recorded(model, plan, optimizer=SGD(momentum=0.0, weight_decay=0.0))
    run, ((images, labels),) = reference(graph), batches_of(1, 2)
    state = start_of(model)

    def loss(changed: State) -> float:
        return float(run(changed | given)["loss"])

    given = {"images": images.numpy(), "labels": labels.numpy(), "learning_rate": np.array(1.0)}
    after = run(state | given)
    random = np.random.default_rng(0)
    for name in ("model.stem.weight", "model.stage1.0.f.layer0.conv.f.weight", "model.stage2.0.g.layer1.norm.weight"):
        gradient = state[name] - after[f"new.{name}"]
        direction = random.standard_normal(gradient.shape)
        step = 1e-5
        up, down = (loss(state | {name: state[name] + sign * step * direction}) for sign in (1, -1))
        assert (up - down) / (2 * step) == pytest.approx(float((gradient * direction).sum()), rel=1e-6, abs=1e-9)


def test_micro_batches_are_two_graphs() -> None:
    """Gradients of the parts are added up, then the optimiser steps once."""
    model = small("hybrid").double()
    plan = edgetrain.uniform_plan(model, "invert", input_shape=SHAPE, batch_size=2)
    plan = replace(plan, micro_batches=2)
    part = recorded(model, plan, optimizer=None)
    update = record_update(model, optimizer=SGD(), opset=17, dtype=torch.float64)
    state = start_of(model)
    shapes = {value.name: value.shape for graph in (part, update) for value in graph.graph.inputs}
    state |= {name: np.zeros(shapes[name]) for name in (*part.reads, *update.reads) if name not in state}
    ((images, labels),) = batches_of(1, 4)
    for some, truth in zip(images.chunk(2), labels.chunk(2), strict=True):
        found = reference(part)({n: state[n] for n in part.reads} | {"images": some.numpy(), "labels": truth.numpy()})
        state |= {name: found[f"new.{name}"] for name in part.writes}
    found = reference(update)({name: state[name] for name in update.reads} | {"learning_rate": np.array(RATE)})
    state |= {name: found[f"new.{name}"] for name in update.writes}
    expected, _ = torch_steps(model, plan, [(images, labels)], sgd(RATE))
    assert worst(state, expected) < EXACT


def test_adamw_is_that_of_pytorch() -> None:
    model = small("residual").double()
    plan = edgetrain.uniform_plan(model, "keep_all", input_shape=SHAPE, batch_size=3)
    graph, start, batches = recorded(model, plan, optimizer=AdamW()), start_of(model), batches_of(3, 3)
    found, _ = graph_steps(graph, reference(graph), start, batches, rate=1e-3, counts=True)
    expected, _ = torch_steps(model, plan, batches, lambda p: torch.optim.AdamW(p, lr=1e-3))
    assert worst(found, expected) < EXACT


def test_what_is_frozen_is_read_and_never_written() -> None:
    model = edgetrain.freeze(small("irevnet").double(), 2)
    plan = edgetrain.uniform_plan(model, "invert", input_shape=SHAPE, batch_size=3)
    graph, start, batches = recorded(model, plan), start_of(model), batches_of(2, 3)
    found, _ = graph_steps(graph, reference(graph), start, batches, rate=RATE)
    expected, _ = torch_steps(model, plan, batches, sgd(RATE))
    assert worst(found, expected) < EXACT
    assert not [name for name in graph.writes if "stem" in name or "stage1" in name]


def test_weight_decay_leaves_alone_what_a_module_spares() -> None:
    model = small("irevnet", dirac=True).double()
    plan = edgetrain.uniform_plan(model, "invert", input_shape=SHAPE, batch_size=3)
    graph = recorded(model, plan, optimizer=SGD(weight_decay=0.3))
    start, batches = start_of(model), batches_of(1, 3)
    found, _ = graph_steps(graph, reference(graph), start, batches, rate=RATE)
    recipe = Recipe(weight_decay=0.3)

    def make(parameters: Any) -> torch.optim.Optimizer:
        optimizer = recipe.optimizer_for(model)(parameters)
        for group in optimizer.param_groups:
            group["lr"] = RATE
        return optimizer

    expected, _ = torch_steps(model, plan, batches, make)
    assert worst(found, expected) < EXACT


def test_only_standard_operators_and_the_convolutions_of_the_plan() -> None:
    """Recomputing shows in the graph: nothing has been found to be common."""
    model = small("residual")
    counts = {}
    for mode in ("keep_all", "recompute"):
        plan = edgetrain.uniform_plan(model, mode, input_shape=SHAPE, batch_size=3)  # type: ignore[arg-type]
        graph = recorded(model, plan, dtype=torch.float32).graph.model("step")
        onnx.checker.check_model(graph, full_check=True)  # infers every shape and compares
        assert {node.domain for node in graph.graph.node} == {""}
        counts[mode] = sum(node.op_type == "Conv" for node in graph.graph.node)
    assert counts["recompute"] >= counts["keep_all"] + 2  # those of the residual block at least


def test_an_operator_without_counterpart_is_named_with_its_block() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10), nn.Dropout(0.5))
    plan = edgetrain.uniform_plan(model, "keep_all", input_shape=SHAPE, batch_size=3)
    with pytest.raises(ExportError) as caught:
        recorded(model, plan)
    assert "bernoulli" in caught.value.found or "dropout" in caught.value.found
    assert "forward 2" in caught.value.found
