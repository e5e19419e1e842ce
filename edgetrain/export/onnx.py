"""ONNX export: folded, checked, proved equal on images, and only then given its name.

    training module -> (normalisation in front) -> folded -> ONNX -> fp16 or INT8

Every arrow is a comparison on the same images; the graph is run by ONNX Runtime and by onnx's reference evaluator
(:mod:`edgetrain.export.verify`). All is written beside the target under a temporary name. When every comparison holds
and the lint finds no error, the graph is renamed, and after it the certificate.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from torch import Tensor, nn

from edgetrain.errors import UsageError, near_matches
from edgetrain.export.certificate import (
    Certificate,
    FindingEntry,
    FoldEntry,
    Image,
    Step,
    certificate_path,
    describe_file,
    state_digest,
)
from edgetrain.export.classifier import WITHOUT_PRODUCT
from edgetrain.export.describe import About, metadata, refit_map, text_digest, versions
from edgetrain.export.evaluation import evaluating, logits_of, rounding_of
from edgetrain.export.fold import Fold, FoldReport, fold
from edgetrain.export.graph import set_metadata, write_graph
from edgetrain.export.images import ImageSet, as_image_set, with_normalisation
from edgetrain.export.lint import Finding, lint, refuse_errors
from edgetrain.export.opset import choose_opset
from edgetrain.export.precision import Precision, to_float16, to_int8
from edgetrain.export.proof import FOLDED, GRAPH, TRAINED, Proof
from edgetrain.export.verify import PYTORCH, RUNTIME
from edgetrain.profiles import load_profile

if TYPE_CHECKING:
    from onnx import ModelProto


@dataclass(frozen=True)
class Export:
    """An exported graph and its certificate, whose last step compares it with the training module."""

    path: Path
    certificate: Certificate

    @property
    def certificate_path(self) -> Path:
        """Where the certificate is."""
        return certificate_path(self.path)

    @property
    def images(self) -> int:
        """How many were compared."""
        return self.certificate.steps[-1].images

    @property
    def max_difference(self) -> float:
        """Largest difference of a logit from the training module's, relative to its largest."""
        return self.certificate.steps[-1].max_difference

    @property
    def top1_agreement(self) -> float:
        """Part of the images with the training module's class, 0..1."""
        return self.certificate.steps[-1].top1_agreement

    @property
    def file_bytes(self) -> int:
        """Size of the graph."""
        return self.certificate.onnx.size_bytes


def export_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    input_shape: tuple[int, int, int],
    images: Tensor | ImageSet | None = None,
    device: str | None = None,
    precision: Precision = "fp32",
    batch_size: int | None = None,
    calibration: Tensor | ImageSet | None = None,
    about: About | None = None,
) -> Export:
    """Writes ``model`` in evaluation mode to ``path``: input ``images`` (n, c, h, w), output ``logits`` (n, classes).

    ``model`` itself is left as it is. The certificate lies beside ``path``.

    Args:
        input_shape: (c, h, w).
        images: what to compare on, (n, c, h, w), on the scale 0..1 where ``about`` has a normalisation; four of random
            numbers where absent.
        device: a profile; decides opset and what the lint knows of the target.
        batch_size: fixed; None leaves it open.
        calibration: images for the scales of INT8; those to compare on where absent.
        about: name, classes, plan and normalisation.

    Raises:
        ExportError: the graph disagrees with PyTorch or would not run on the device; nothing is left under ``path``.
        MissingExtraError: onnx or onnxruntime is not installed.
        ModelError: the network does not take such images, or gives no logits.
        UsageError: an unknown precision or device, or images of another shape.
    """
    path, about = Path(path), about or About()
    if precision not in get_args(Precision):
        known = list(get_args(Precision))
        raise UsageError(
            found=f"precision {precision}", expected="one of " + ", ".join(known), action=near_matches(precision, known)
        )
    profile = None if device is None else load_profile(device)
    opset = choose_opset(profile)
    shown = as_image_set(images, input_shape)
    tuned = shown if calibration is None else as_image_set(calibration, input_shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    with evaluating(model), tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        whole = with_normalisation(model, about.normalisation)
        trained = logits_of(whole, shown.pixels)
        plain = fold(whole)
        folded = logits_of(plain, shown.pixels)
        first = Path(folder) / "fp32.onnx"
        graph = write_graph(
            plain,
            shown.pixels[:2],
            first,
            opset=opset.version,
            batch_size=batch_size,
            without_product=profile is not None and profile.compute_capability_pair == WITHOUT_PRODUCT,
        )
        proof = Proof(shown, partial(rounding_of, whole, shown.pixels, trained))
        proof.step(trained, folded, before=TRAINED, after=FOLDED, evaluator=PYTORCH, precision="fp32")
        exact = proof.graph(first, graph, folded, before=FOLDED, precision="fp32")
        last, final = first, exact
        if precision != "fp32":
            last = Path(folder) / f"{precision}.onnx"
            graph = _converted(graph, first, last, precision, tuned)
            final = proof.graph(last, graph, exact, before="fp32 " + GRAPH, precision=precision)
        proof.step(trained, final, before=TRAINED, after=GRAPH, evaluator=RUNTIME, precision=precision)
        findings = (*_fixed_decisions(plain.report), *lint(graph, profile))
        refuse_errors(findings)
        set_metadata(graph, metadata(about, input_shape, opset.version, precision))
        _save(graph, last)
        certificate = Certificate(
            versions=versions(),
            model=about.name or type(model).__name__,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            state_sha256=state_digest(model),
            plan_sha256=text_digest(about.plan),
            classes=about.classes,
            input_shape=input_shape,
            mean=None if about.normalisation is None else about.normalisation.mean,
            std=None if about.normalisation is None else about.normalisation.std,
            device=device,
            opset=opset.version,
            opset_reason=opset.reason,
            precision=precision,
            batch_size=batch_size,
            image_source=shown.source,
            images=tuple(
                Image(name=name, sha256=digest) for name, digest in zip(shown.names, shown.digests(), strict=True)
            ),
            calibration_source=tuned.source if precision == "int8" else None,
            folds_done=_folds(plain.report.done),
            folds_skipped=_folds(plain.report.skipped),
            findings=tuple(FindingEntry(rule=f.rule, node=f.node, reason=f.reason) for f in findings),
            steps=tuple(Step(**asdict(comparison)) for comparison in proof.comparisons),
            refit=refit_map(plain, graph),
            onnx=describe_file(last, name=path.name),
        )
        text = Path(folder) / "certificate.json"
        text.write_text(certificate.to_json(), encoding="utf-8")
        certificate_path(path).unlink(missing_ok=True)  # never one beside a graph that it is not of
        os.replace(last, path)
        os.replace(text, certificate_path(path))
        return Export(path, certificate)


def _converted(graph: ModelProto, source: Path, target: Path, precision: Precision, tuned: ImageSet) -> ModelProto:
    if precision == "int8":
        return to_int8(source, target, tuned.pixels.numpy())
    converted = to_float16(graph)
    _save(converted, target)
    return converted


def _save(graph: ModelProto, path: Path) -> None:
    import onnx

    onnx.save(graph, str(path))


def _fixed_decisions(report: FoldReport) -> list[Finding]:
    """What stays whole is recorded as it ran once: what it decides by values is fixed in the graph."""
    return [
        Finding(
            "structure",
            "note",
            fold.where,
            f"stays whole and is written as it ran once; what it decides by values is fixed ({fold.reason})",
        )
        for fold in report.skipped
        if fold.kind == "structure"
    ]


def _folds(folds: Sequence[Fold]) -> tuple[FoldEntry, ...]:
    return tuple(FoldEntry.model_validate(entry, from_attributes=True) for entry in folds)
