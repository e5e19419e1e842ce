"""The planned step in ONNX Runtime: equal to the executor, in the plan's order, on the state's own memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from train_steps import batches_of, exported, sgd, small, start_of, torch_steps, worst

import edgetrain
import edgetrain.lite
from edgetrain.errors import ModelError, StorageError
from edgetrain.export.train_step.optimizers import SGD
from edgetrain.lite.runtime import Session, onnxruntime

STEPS = 20


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("wide", "keep_all"),
        ("residual", "keep_all"),
        ("residual", "recompute"),
        ("irevnet", "invert"),
        ("hybrid", "invert_layerwise"),
        ("layerwise", "selective"),
    ],
)
def test_after_twenty_steps_the_state_is_that_of_the_executor(name: str, mode: Any, tmp_path: Path) -> None:
    """Relative difference in the Euclidean norm of each tensor; a small rate, at which float32 does not diverge."""
    model = small(name)
    plan = exported(model, mode, tmp_path / "step")
    run, before = edgetrain.lite.load(tmp_path / "step"), start_of(model)
    batches = batches_of(STEPS, 4, dtype=torch.float32)
    for images, labels in batches:
        run.step(images.numpy(), labels.numpy(), 1e-3)
    expected, _ = torch_steps(model, plan, batches, sgd(1e-3))
    assert worst(run.state, expected) < 1e-5
    assert worst(before, expected) > 1e-3


def test_overlapping_windows_add_their_gradients_up(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(3, stride=2, padding=1), nn.Flatten(), nn.Linear(128, 10)
    )
    plan = exported(model, "keep_all", tmp_path / "step", optimizer=SGD(0.0, 0.0, nesterov=False))
    run, ((images, labels),) = edgetrain.lite.load(tmp_path / "step"), batches_of(1, 4, dtype=torch.float32)
    run.step(images.numpy(), labels.numpy(), 1.0)
    expected, _ = torch_steps(model, plan, [(images, labels)], sgd(1.0, SGD(0.0, 0.0, nesterov=False)))
    assert worst(run.state, expected) < 1e-6


def test_nodes_run_in_the_order_of_the_plan(tmp_path: Path) -> None:
    """A recomputation that runs early keeps what the plan drops."""
    import onnx

    exported(small("residual"), "recompute", tmp_path / "step")
    path = tmp_path / "step" / "train_step.onnx"
    session = Session(path, profile=tmp_path / "profile")
    arrays = {name: np.ones(shape, dtype) for name, (shape, dtype) in session.inputs.items()}
    session.run(arrays, {name: np.ones(shape, dtype) for name, (shape, dtype) in session.outputs.items()})
    events = json.loads(Path(session.end_profiling()).read_text())
    ran = [e["name"].removesuffix("_kernel_time") for e in events if e["name"].endswith("_kernel_time")]
    assert ran == [node.name for node in onnx.load(path).graph.node]


def test_a_batch_of_another_size_is_refused_before_its_memory_is_used(tmp_path: Path) -> None:
    exported(small("residual"), "keep_all", tmp_path / "step")
    run, ((images, labels),) = edgetrain.lite.load(tmp_path / "step"), batches_of(1, 3, dtype=torch.float32)
    with pytest.raises(ModelError, match="images of shape"):
        run.step(images.numpy(), labels.numpy(), 1e-3)


def test_a_file_that_was_changed_is_refused(tmp_path: Path) -> None:
    exported(small("residual"), "keep_all", tmp_path / "step")
    graph = tmp_path / "step" / "train_step.onnx"
    graph.write_bytes(graph.read_bytes()[:-1])
    with pytest.raises(StorageError, match=r"train_step\.onnx is missing or not the one"):
        edgetrain.lite.load(tmp_path / "step")


def test_the_module_is_found_whichever_package_owns_it() -> None:
    assert hasattr(onnxruntime(), "InferenceSession")
