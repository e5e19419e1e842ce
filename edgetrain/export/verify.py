"""Two evaluations of the same network on the same images, compared.

    difference = |after - before| / max |before|          per logit, largest and mean over all images

The scale is the largest logit of all images, so that a bound means the same for every network. Each precision has a
bound of its own: in float32 the sums come in another order and nothing else, a float16 has 11 significant bits, an
INT8 tensor 255 steps between its largest values.

A graph is run by two programs that share no code: ONNX Runtime, which optimises it, and onnx's reference evaluator,
which computes each node as the standard spells it out, in numpy, on fewer images because it is slow.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgetrain.errors import ExportError
from edgetrain.export.corrected_operators import corrected_operators
from edgetrain.export.graph import INPUT, OUTPUT, missing, opset_of
from edgetrain.export.precision import Precision

if TYPE_CHECKING:
    from onnx import ModelProto

Logits = npt.NDArray[np.float32]
BOUNDS: dict[Precision, float] = {"fp32": 1e-5, "fp16": 2e-2, "int8": 0.25}
"""Largest accepted difference by precision."""
REFERENCE_IMAGES = 2
RUNTIME, REFERENCE, PYTORCH = "ONNX Runtime", "ONNX reference evaluator", "PyTorch"


@dataclass(frozen=True)
class Comparison:
    """What one step of an export changed.

    Attributes:
        before, after: the two forms of the network.
        evaluator: what ran ``after``.
        images: how many were compared.
        max_difference, mean_difference: of the logits, relative to the largest one before.
        top1_agreement: part of the images with the same class, 0..1.
        bound: largest accepted ``max_difference``.
        accuracy_before, accuracy_after: part of the images with the right class; None without labels.
    """

    before: str
    after: str
    evaluator: str
    images: int
    max_difference: float
    mean_difference: float
    top1_agreement: float
    bound: float
    accuracy_before: float | None = None
    accuracy_after: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the difference is a number within the bound."""
        return self.max_difference <= self.bound  # not for NaN


def compare(
    expected: Logits,
    actual: Logits,
    *,
    before: str,
    after: str,
    evaluator: str,
    bound: float,
    labels: npt.NDArray[np.int64] | None = None,
) -> Comparison:
    """Compares logits (n, classes); ``labels`` (n,)."""
    scale = float(np.abs(expected).max()) or 1.0
    difference = np.abs(actual.astype(np.float64) - expected) / scale
    classes = expected.argmax(1), actual.argmax(1)
    return Comparison(
        before=before,
        after=after,
        evaluator=evaluator,
        images=len(expected),
        max_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        top1_agreement=float((classes[0] == classes[1]).mean()),
        bound=bound,
        accuracy_before=None if labels is None else float((classes[0] == labels).mean()),
        accuracy_after=None if labels is None else float((classes[1] == labels).mean()),
    )


def check(comparison: Comparison) -> Comparison:
    """``comparison`` where it holds.

    Raises:
        ExportError: it does not.
    """
    if comparison.holds:
        return comparison
    raise ExportError(
        found=f"{comparison.after} in {comparison.evaluator} differs from {comparison.before} by "
        f"{comparison.max_difference:.1e} of the largest logit",
        expected=f"at most {comparison.bound:.0e} on {comparison.images} images",
        action="report this model: no file was written"
        if comparison.bound < BOUNDS["fp16"]
        else "export with a higher --precision: no file was written",
    )


def open_session(path: str | Path) -> Any:
    """An ONNX Runtime session on the CPU.

    Raises:
        ExportError: the file is no graph that it runs.
        MissingExtraError: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise missing("onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; its warnings are about initialisers that it drops itself
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the classes of its errors derive from Exception alone
        raise ExportError(
            found=f"ONNX Runtime {onnxruntime.__version__} refuses {path}: {str(error).strip().splitlines()[0]}",
            expected="a graph that it runs",
            action="check that the file is whole; a newer onnxruntime reads newer opsets",
        ) from error


def run_session(session: Any, pixels: npt.NDArray[np.float32]) -> Logits:
    """Logits (n, classes) of ``pixels`` (n, c, h, w), in batches of the graph's size where that is fixed.

    The graph has one input and one output, of any name.
    """
    given = session.get_inputs()[0]
    taken = pixels.astype(np.float16) if given.type == "tensor(float16)" else pixels
    size = given.shape[0]
    if not isinstance(size, int):
        return session.run(None, {given.name: taken})[0]
    parts = []
    for start in range(0, len(taken), size):
        part = taken[start : start + size]
        filled = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])  # (size, c, h, w)
        parts.append(session.run(None, {given.name: filled})[0][: len(part)])
    return np.concatenate(parts)


def run_reference(model: ModelProto, pixels: npt.NDArray[np.float32]) -> Logits:
    """Logits of ``pixels`` by onnx's reference evaluator; for a graph of fixed batch as many images as it takes."""
    from onnx.reference import ReferenceEvaluator

    size = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    taken = pixels if not size else np.concatenate([pixels, np.repeat(pixels[-1:], max(0, size - len(pixels)), 0)])
    with np.errstate(all="ignore"):
        evaluator = ReferenceEvaluator(model, new_ops=corrected_operators(opset_of(model)))
        results: Any = evaluator.run([OUTPUT], {INPUT: taken[: size or len(pixels)]})
    return results[0][: len(pixels)]
