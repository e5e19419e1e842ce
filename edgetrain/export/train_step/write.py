"""``edgetrain export RUN --format train-step``: a directory from which ``edgetrain.lite`` trains without PyTorch.

| file | holds |
|---|---|
| ``train_step.onnx`` | the planned step: images, labels, learning rate, state in; new state, loss, hits out |
| ``accumulate.onnx``, ``update.onnx`` | in its place where the plan has micro-batches: a part; the update |
| ``eval.onnx`` | images and state in, logits out |
| ``inference.onnx`` | the folded network; pixels 0..1 in, logits out |
| ``fold.onnx`` | state in, the weights of the folded network out |
| ``state.safetensors`` | weights and buffers to begin with; whatever else the state has begins with zeros |
| ``plan.json`` | the plan that the graph follows |
| ``manifest.json`` | names, shapes, digests, recipe: all that a runner has to know |
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from edgetrain.errors import ExportError, ModelError
from edgetrain.export.images import Normalisation
from edgetrain.export.train_step.inference import make_inference
from edgetrain.export.train_step.optimizers import SGD, OptimizerSpec
from edgetrain.export.train_step.record import (
    GRADIENT,
    OPTIMIZER,
    StepGraph,
    record_evaluation,
    record_step,
    record_update,
    state_of,
)
from edgetrain.files import file_sha256, write_atomically
from edgetrain.planner import Plan
from edgetrain.runtime import Fetch, Offload
from edgetrain.train.objectives import CrossEntropy, Objective
from edgetrain.train.recipe import Recipe
from edgetrain.train.tensor_file import write_tensor_file

FORMAT_VERSION = 1
MANIFEST, STATE, PLAN, EVALUATION = "manifest.json", "state.safetensors", "plan.json", "eval.onnx"
STEP, ACCUMULATE, UPDATE = "train_step.onnx", "accumulate.onnx", "update.onnx"
INFERENCE, FOLDING = "inference.onnx", "fold.onnx"


@dataclass(frozen=True)
class Data:
    """What the images of a run are.

    Attributes:
        classes: in the order of the logits.
        mean, std: per channel on the scale 0..1.
        seed: of the order and the augmentation.
    """

    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    seed: int = 0


@dataclass(frozen=True)
class TrainStepExport:
    """What was written.

    Attributes:
        nodes: of each graph, by its file.
        manifest: as it stands in the file.
    """

    path: Path
    nodes: dict[str, int]
    manifest: dict[str, Any]

    def __str__(self) -> str:
        graphs = ", ".join(f"{name} ({count} nodes)" for name, count in self.nodes.items())
        text = f"{self.path}: {graphs}, opset {self.manifest['opset']}, {self.manifest['optimizer']['name']}"
        refused = self.manifest["inference"].get("refused")
        return text if refused is None else f"{text}\nno inference model: {refused}"


def export_train_step(
    model: nn.Module,
    plan: Plan,
    path: str | Path,
    *,
    data: Data,
    recipe: Recipe | None = None,
    objective: Objective | None = None,
    optimizer: OptimizerSpec | None = None,
    name: str = "",
    opset: int = 17,
) -> TrainStepExport:
    """Writes the training step of ``plan`` into the directory ``path``; it is whole or absent.

    Where the folds of the network cannot be written down, the manifest says why and the rest is written.

    Args:
        model: for which ``plan`` was made, with the weights to begin with; left alone.
        recipe: epochs and learning rates of the runs to come; one of the plan's batch size where absent.
        objective: the loss; cross-entropy where absent.
        optimizer: SGD with the recipe's momentum and weight decay where absent.
        name: of the network, for people.

    Raises:
        ExportError: an operator of the step has no counterpart in ONNX, or the plan moves activations elsewhere.
    """
    path = Path(path)
    n, *shape = plan.input_shape
    recipe = recipe or Recipe(batch_size=n)
    optimizer = optimizer or SGD(recipe.momentum, recipe.weight_decay)
    _check_no_other_memory(plan)
    graphs = _graphs(model, plan, objective or CrossEntropy(), optimizer, opset)
    graphs[EVALUATION] = record_evaluation(model, (n // plan.micro_batches, *shape), opset=opset)
    state = state_of(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        target = Path(folder) / "whole"
        target.mkdir()
        inference = _inference(model, graphs, data, (shape[0], shape[1], shape[2]), opset, target)
        files, nodes = {}, {}
        for file, graph in graphs.items():
            onnx = graph.graph.model(file.removesuffix(".onnx"))
            write_atomically(target / file, onnx.SerializeToString())
            nodes[file] = len(onnx.graph.node)
            files[file] = {"reads": graph.reads, "writes": graph.writes, "sha256": file_sha256(target / file)}
        plain = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        write_tensor_file(target / STATE, plain, {})
        text = plan.to_json()
        write_atomically(target / PLAN, text.encode())
        manifest = {
            "version": FORMAT_VERSION,
            "model": name or type(model).__name__,
            "classes": data.classes,
            "mean": data.mean,
            "std": data.std,
            "seed": data.seed,
            "input_shape": shape,
            "batch_size": n,
            "micro_batches": plan.micro_batches,
            "opset": opset,
            "epochs": recipe.epochs,
            "peak_rate": recipe.highest_rate,
            "warmup": recipe.warmup,
            "optimizer": {"name": optimizer.name, "counts": optimizer.counts, **_settings(optimizer)},
            "plan_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "zeros": _zeros(graphs, state),
            "state": {"file": STATE, "sha256": file_sha256(target / STATE)},
            "graphs": files,
            "inference": inference,
        }
        write_atomically(target / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
        if path.exists():
            _replace(path, target)
        else:
            target.rename(path)
    return TrainStepExport(path, nodes, json.loads(json.dumps(manifest)))


def _graphs(
    model: nn.Module, plan: Plan, objective: Objective, optimizer: OptimizerSpec, opset: int
) -> dict[str, StepGraph]:
    if plan.micro_batches == 1:
        return {STEP: record_step(model, plan, objective=objective, optimizer=optimizer, opset=opset)}
    return {
        ACCUMULATE: record_step(model, plan, objective=objective, optimizer=None, opset=opset),
        UPDATE: record_update(model, optimizer=optimizer, opset=opset),
    }


def _inference(
    model: nn.Module,
    graphs: dict[str, StepGraph],
    data: Data,
    shape: tuple[int, int, int],
    opset: int,
    target: Path,
) -> dict[str, Any]:
    """Writes the folded network into ``target`` and adds the graph of its weights; gives what the manifest says."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        try:
            made = make_inference(model, shape, Normalisation(data.mean, data.std), opset=opset, folder=Path(folder))
        except (ExportError, ModelError) as error:
            return {"refused": error.found}
    graphs[FOLDING] = made.folding
    write_atomically(target / INFERENCE, made.model)
    digest = file_sha256(target / INFERENCE)
    return {"file": INFERENCE, "sha256": digest, "offsets": made.offsets, "bound": made.bound}


def _zeros(graphs: dict[str, StepGraph], state: dict[str, Any]) -> dict[str, Sequence[int]]:
    """Shapes of what the graphs read and the file of the state does not hold."""
    shapes: dict[str, Sequence[int]] = {}
    for graph in graphs.values():
        for name in graph.reads:
            if name.startswith(GRADIENT):
                shapes[name] = list(state[f"model.{name.removeprefix(GRADIENT)}"].shape)
            elif name.startswith(OPTIMIZER):
                parameter = name.removeprefix(OPTIMIZER).rpartition(".")[0]
                shapes[name] = list(state[f"model.{parameter}"].shape)
    return shapes


def _settings(optimizer: OptimizerSpec) -> dict[str, Any]:
    known = {"name", "counts", "keys"}
    values = asdict(optimizer)  # type: ignore[call-overload]
    return {field.name: values[field.name] for field in fields(optimizer) if field.name not in known}  # type: ignore[arg-type]


def _check_no_other_memory(plan: Plan) -> None:
    for step in plan.program.instructions:
        if isinstance(step, Offload | Fetch):
            raise ExportError(
                found=f"a plan that moves activations to another memory ({step.op} z[{step.index}])",
                expected="one that keeps, recomputes or inverts them: a graph knows one memory",
                action="make a plan without offloading, such as edgetrain plan without --offload",
            )


def _replace(path: Path, new: Path) -> None:
    """Puts the directory ``new`` in the place of an earlier export."""
    if not (path / MANIFEST).exists() and any(path.iterdir()):
        raise ExportError(
            found=f"{path} holds something else",
            expected="an empty or absent directory, or an earlier export",
            action="pass another --out",
        )
    old = new.with_name("old")
    path.rename(old)
    new.rename(path)
    shutil.rmtree(old)
