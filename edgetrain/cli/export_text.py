"""An export as lines for a person."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgetrain.units import format_mib

if TYPE_CHECKING:
    from edgetrain.export.certificate import Certificate, Step
    from edgetrain.export.onnx import Export


def export_text(exported: Export, *, explain: bool) -> str:
    """The file, every comparison, the findings; with ``explain`` the folds and where each weight came from."""
    certificate = exported.certificate
    lines = [
        f"{exported.path}: {format_mib(exported.file_bytes)}, {certificate.precision}, "
        f"opset {certificate.opset} ({certificate.opset_reason})",
        f"compared on {len(certificate.images)} images: {certificate.image_source}",
        *(_step(step) for step in certificate.steps),
        f"folds: {len(certificate.folds_done)} done, {len(certificate.folds_skipped)} skipped",
    ]
    if explain:
        lines += _reasons(certificate)
    lines += [f"note: {finding.node}: {finding.reason}" for finding in certificate.findings]
    return "\n".join([*lines, f"certificate: {exported.certificate_path}"])


def _step(step: Step) -> str:
    line = (
        f"  {step.before} -> {step.after}, {step.evaluator}, {step.images} images: largest difference "
        f"{step.max_difference:.1e} of the largest logit (bound {step.bound:.2g}), mean {step.mean_difference:.1e}, "
        f"same class {step.top1_agreement:.1%}"
    )
    if step.accuracy_before is None:
        return line
    return f"{line}, right {step.accuracy_before:.1%} -> {step.accuracy_after:.1%}"


def _reasons(certificate: Certificate) -> list[str]:
    lines = []
    for word, folds in (("folded", certificate.folds_done), ("kept", certificate.folds_skipped)):
        lines += [f"  {word} {fold.kind} at {fold.where}: {fold.reason}" for fold in folds]
    return lines + [
        f"  {entry.initialiser or 'elsewhere'} <- {', '.join(entry.trained)}" for entry in certificate.refit
    ]
