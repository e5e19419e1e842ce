"""Artifacts for ONNX Runtime's own training: training, evaluation and optimiser model, checkpoint, manifest.

    training module -> (normalisation in front) -> forward graph -> lint -> artifacts -> loss and gradients compared

ONNX Runtime derives the backward pass from the forward graph by automatic differentiation and stores every activation:
no plan applies. Two known shapes of graphs give wrong gradients without a word, so the lint refuses them
(:mod:`edgetrain.export.training_lint`), and the artifacts get their name only after a step of theirs has given the loss
and, for every parameter, the gradient that PyTorch gives in float64. :class:`edgetrain.ort_steps.OrtSteps` runs them.

The optimisers are those that ONNX Runtime has: AdamW, set to torch's definition (its own default is another), and SGD
without momentum.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgetrain.chain.freezing import is_frozen
from edgetrain.errors import ExportError, UsageError, near_matches
from edgetrain.export.certificate import describe_file
from edgetrain.export.describe import About, text_digest, versions
from edgetrain.export.evaluation import evaluating, logits_of
from edgetrain.export.graph import plain_name, require_onnx
from edgetrain.export.images import ImageSet, as_image_set, with_normalisation
from edgetrain.export.lint import refuse_errors
from edgetrain.export.opset import DEFAULT
from edgetrain.export.training_graph import write_training_graph
from edgetrain.export.training_lint import lint_training
from edgetrain.ort_steps import CHECKPOINT, EVAL, MANIFEST, OPTIMIZER, TRAINING, OrtSteps, training_api
from edgetrain.train.recipe import undecayed_parameters

if TYPE_CHECKING:
    from onnx import ModelProto

Optimizer = Literal["adamw", "sgd"]

BOUND = 1e-4
"""Largest accepted distance of a gradient from float64's, relative to its length. ONNX Runtime's and PyTorch's float32
are both within 1e-5 on most; batch norms behind few values lose more, and then four times PyTorch's own loss counts."""
_COMPARED = 8  # images
_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # torch.optim.AdamW


@dataclass(frozen=True)
class OrtTraining:
    """Artifacts that were written.

    Attributes:
        folder: where they are.
        loss_difference: of the training model's loss from PyTorch's in float64, relative.
        gradient_difference: of the gradient that is furthest from PyTorch's in float64, relative to its length.
        gradient_name: the parameter that it is of.
        logits_difference: of the evaluation model's logits from PyTorch's, relative to the largest.
        parameters: how many numbers are trained.
    """

    folder: Path
    loss_difference: float
    gradient_difference: float
    gradient_name: str
    logits_difference: float
    parameters: int


def export_ort_training(
    model: nn.Module,
    folder: str | Path,
    *,
    input_shape: tuple[int, int, int],
    images: Tensor | ImageSet | None = None,
    batch_size: int | None = None,
    optimizer: Optimizer = "adamw",
    weight_decay: float = 0.0,
    about: About | None = None,
) -> OrtTraining:
    """Writes ``model`` as training artifacts to ``folder``, in place of what was there; ``model`` is left as it is.

    Inputs are ``images`` (n, c, h, w) and ``labels`` (n,) int64, outputs the mean cross-entropy and ``logits``
    (n, classes). Trained is what has ``requires_grad``; running statistics move in the checkpoint.

    Args:
        input_shape: (c, h, w).
        images: to compare on, as for :func:`edgetrain.export_onnx`.
        batch_size: fixed; None leaves it open.
        weight_decay: of AdamW, on every parameter.
        about: name, classes and normalisation.

    Raises:
        ExportError: an operator without a gradient, or a gradient that is not PyTorch's; ``folder`` is as it was.
        MissingExtraError: onnx or onnxruntime-training is not installed.
        ModelError: the network does not take such images, or gives no logits.
        UsageError: an unknown optimiser, or weight decay where the network or the optimiser allows none.
    """
    folder, about = Path(folder), about or About()
    require_onnx()
    training_api()
    _check_optimizer(model, optimizer, weight_decay)
    shown = as_image_set(images, input_shape).first(_COMPARED)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with evaluating(model), tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as work:
        whole = with_normalisation(model, about.normalisation)
        logits_of(whole, shown.pixels)  # says what is wrong where it does not take them
        graph = write_training_graph(
            whole, shown.pixels, Path(work) / "forward.onnx", opset=DEFAULT, batch_size=batch_size
        )
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        _check_present(model, graph, trained)
        held = [name for name in model.state_dict() if name not in trained]
        refuse_errors(
            lint_training(graph, trained),
            expected="a graph that ONNX Runtime derives right gradients of",
            action="replace the layers named, or train with edgetrain train, which takes any",
        )
        written = Path(work) / "artifacts"
        written.mkdir()
        _write_artifacts(graph, written, trained, held, optimizer=optimizer, weight_decay=weight_decay)
        (written / MANIFEST).write_text("{}", encoding="utf-8")  # the runner reads one
        checks = _checked(whole, written, shown, batch_size)
        manifest = {
            "format": "ort-training",
            "versions": versions(),
            "model": about.name or type(model).__name__,
            "classes": list(about.classes),
            "input_shape": list(input_shape),
            "normalisation": None if about.normalisation is None else asdict(about.normalisation),
            "batch_size": batch_size,
            "opset": DEFAULT,
            "optimizer": {"name": optimizer, "weight_decay": weight_decay},
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "plan_sha256": text_digest(about.plan),
            "image_source": shown.source,
            "checks": checks,
            "files": {
                name: describe_file(written / name, name=name).sha256
                for name in (TRAINING, EVAL, OPTIMIZER, CHECKPOINT)
            },
        }
        (written / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        _put(written, folder, aside=Path(work) / "before")
    return OrtTraining(folder, **checks, parameters=int(str(manifest["parameters"])))


def _check_optimizer(model: nn.Module, optimizer: str, weight_decay: float) -> None:
    known = list(get_args(Optimizer))
    if optimizer not in known:
        raise UsageError(
            found=f"optimizer {optimizer}", expected="one of " + ", ".join(known), action=near_matches(optimizer, known)
        )
    if weight_decay and (optimizer == "sgd" or undecayed_parameters(model)):
        raise UsageError(
            found=f"weight decay {weight_decay} "
            + ("with sgd" if optimizer == "sgd" else "for a network with parameters that must not decay"),
            expected="none: ONNX Runtime's optimisers know one setting for all parameters, and SGD none",
            action="leave it out",
        )


def _write_artifacts(
    graph: ModelProto, folder: Path, trained: list[str], held: list[str], *, optimizer: Optimizer, weight_decay: float
) -> None:
    """The four artifacts; raises ExportError where ONNX Runtime refuses."""
    import onnx

    present = {initialiser.name for initialiser in graph.graph.initializer}
    with warnings.catch_warnings(), _without_its_log():
        warnings.simplefilter("ignore")  # onnxruntime.training warns of what it does not find
        from onnxruntime.training import artifacts

        try:
            artifacts.generate_artifacts(
                graph,
                requires_grad=[name for name in trained if name in present],
                frozen_params=[name for name in held if name in present],
                loss=artifacts.LossType.CrossEntropyLoss,
                optimizer=artifacts.OptimType.AdamW if optimizer == "adamw" else artifacts.OptimType.SGD,
                artifact_directory=str(folder),
                additional_output_names=[value.name for value in graph.graph.output],
            )
        except Exception as error:  # its bindings raise RuntimeError and bare Exceptions
            raise ExportError(
                found=f"ONNX Runtime cannot derive the gradients: {str(error).strip().splitlines()[-1][-300:]}",
                expected="a graph that it takes",
                action="replace the layer named, or train with edgetrain train",
            ) from error
    evaluated = onnx.load(str(folder / EVAL))
    for node in evaluated.graph.node:  # in evaluation there are no new running statistics; the model would not load
        if node.op_type == "BatchNormalization":
            del node.output[1:]
    onnx.save(evaluated, str(folder / EVAL))
    if optimizer == "adamw":
        _as_in_torch(folder / OPTIMIZER, weight_decay)


def _as_in_torch(path: Path, weight_decay: float) -> None:
    """Sets AdamW to torch's definition: decay before the step, bias correction inside the root, epsilon after it."""
    import onnx

    model = onnx.load(str(path))
    (node,) = (node for node in model.graph.node if node.op_type == "AdamWOptimizer")
    wanted = {"alpha": _BETAS[0], "beta": _BETAS[1], "epsilon": _EPSILON, "weight_decay": weight_decay}
    del node.attribute[:]
    node.attribute.extend(onnx.helper.make_attribute(name, float(value)) for name, value in wanted.items())
    node.attribute.extend(onnx.helper.make_attribute(*flag) for flag in (("adam_mode", 0), ("correct_bias", 1)))
    onnx.save(model, str(path))


def _check_present(model: nn.Module, graph: ModelProto, trained: list[str]) -> None:
    """Raises ExportError where scale and shift of a batch norm that stays in evaluation mode are to be trained."""
    present = {initialiser.name for initialiser in graph.graph.initializer}
    fixed = {name for name, module in model.named_modules() if is_frozen(module)}
    lost = [name for name in trained if name not in present and name.rpartition(".")[0] in fixed]
    if lost:
        raise ExportError(
            found=f"{lost[0]}, which is trained, of a batch norm by running statistics",
            expected="batch norms by those of the batch, or nothing of them to train: ONNX Runtime knows no other",
            action="fine-tune with --batch-norm live, or with --train head or last:K, or export --format train-step",
        )


def _checked(whole: nn.Module, folder: Path, shown: ImageSet, batch_size: int | None) -> dict[str, Any]:
    """Loss, gradients and logits of the artifacts against PyTorch's; raises ExportError where they differ."""
    pixels = shown.pixels
    if len(pixels) < (batch_size or 2):  # a batch norm over one value has no variance
        pixels = pixels.repeat(-(-(batch_size or 2) // len(pixels)), 1, 1, 1)
    pixels = pixels[:batch_size]
    labels = torch.arange(len(pixels)) % logits_of(whole, pixels).shape[1]
    reference, exact = _gradients(whole, pixels, labels, torch.float64)
    _, single = _gradients(whole, pixels, labels, torch.float32)
    steps = OrtSteps(folder)
    expected = logits_of(whole, pixels)
    _, evaluated = steps.evaluate(pixels.numpy(), labels.numpy())
    logits_difference = float(np.abs(evaluated - expected).max() / np.abs(expected).max())
    loss, _ = steps.gradients(pixels.numpy(), labels.numpy())
    worst, worst_name = 0.0, ""
    for name, gradient in exact.items():
        # a gradient that is nothing but rounding is compared with the longest one's
        length = max(float(gradient.norm()), 1e-6 * max(float(other.norm()) for other in exact.values()))
        distance = float((torch.from_numpy(steps.gradient(name)).double() - gradient).norm()) / length
        own = float((single[name].double() - gradient).norm()) / length
        if distance > max(BOUND, 4 * own):
            raise _wrong(f"the gradient of {name}", distance, max(BOUND, 4 * own))
        if distance >= worst:
            worst, worst_name = distance, name
    loss_difference = abs(loss - reference) / max(abs(reference), 1e-12)
    for what, difference in (("the loss", loss_difference), ("the logits of the evaluation model", logits_difference)):
        if difference > BOUND:
            raise _wrong(what, difference, BOUND)
    return {
        "loss_difference": loss_difference,
        "gradient_difference": worst,
        "gradient_name": worst_name,
        "logits_difference": logits_difference,
    }


def _gradients(model: nn.Module, pixels: Tensor, labels: Tensor, dtype: torch.dtype) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients in training mode, by the parameters' names in the network alone."""
    copied = copy.deepcopy(model).to(dtype).train()
    loss = F.cross_entropy(copied(pixels.to(dtype)), labels)
    loss.backward()
    found = {plain_name(name): p.grad for name, p in copied.named_parameters() if p.grad is not None}
    return float(loss.detach()), found


def _wrong(what: str, difference: float, bound: float) -> ExportError:
    return ExportError(
        found=f"{what} is {difference:.1e} from PyTorch's",
        expected=f"at most {bound:.1e}",
        action="train with edgetrain train, and report the network: the lint should have refused it",
    )


def _put(written: Path, folder: Path, *, aside: Path) -> None:
    """Renames ``written`` to ``folder``; what was there goes to ``aside``."""
    if folder.is_dir() and not folder.is_symlink() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise UsageError(
            found=f"{folder}, a folder with something else in it",
            expected="a new folder, or one with training artifacts",
            action="name another --out",
        )
    if folder.exists():
        os.replace(folder, aside)
    os.replace(written, folder)
    shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def _without_its_log() -> Iterator[None]:
    """Without the lines that the gradient builder writes to file 2; no switch of 1.19.2 turns them off."""
    kept = os.dup(2)
    silent = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(silent, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(silent)
