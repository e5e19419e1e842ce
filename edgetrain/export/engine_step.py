"""The last arrow of an export: from a verified graph to an engine, entered in the graph's certificate.

Where this machine has the engine's GPU the engine is run on the images of the certificate and compared with the graph;
elsewhere the certificate names the engine and its weights, and has no step for it: nothing is claimed that was not run.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from edgetrain.errors import ExportError
from edgetrain.export.certificate import Certificate, Step, certificate_path, describe_file
from edgetrain.export.engines.builders import cuda_capability
from edgetrain.export.engines.refit import refit_engine
from edgetrain.export.engines.report import EngineReport
from edgetrain.export.engines.run import run_engine
from edgetrain.export.proof import GRAPH
from edgetrain.export.tensorrt import build_engine
from edgetrain.export.verify import BOUNDS, Comparison, check
from edgetrain.files import write_atomically

if TYPE_CHECKING:
    from edgetrain.export.images import ImageSet
    from edgetrain.export.onnx import Export

ENGINE_BOUNDS = BOUNDS | {"fp32": 1e-3}
"""Largest accepted difference of an engine: its kernels may transform a convolution (Winograd), which rounds more."""


def engine_of(
    exported: Export, path: Path, *, batch: int | None, refittable: bool, images: ImageSet | None = None
) -> tuple[EngineReport, Certificate]:
    """Builds ``path`` from an exported graph, for the device and in the precision that the graph was exported for.

    Args:
        batch: largest batch of the engine; None: one image, or the graph's own.
        refittable: the engine takes new weights later.
        images: what to run it on, where its GPU is here.

    Raises:
        ExportError: as :func:`edgetrain.build_engine`; or the engine was run and disagrees, and is gone.
    """
    certificate = exported.certificate
    report = build_engine(
        exported.path, path, device=certificate.device, precision=certificate.precision, batch=batch, refit=refittable
    )
    return report, certify_engine(exported, report, images)


def refitted(exported: Export, engine: Path, images: ImageSet | None = None) -> tuple[EngineReport, Certificate]:
    """Gives an engine the weights of an exported graph; raises as :func:`edgetrain.export.refit_engine`."""
    report = refit_engine(engine, exported.path)
    return report, certify_engine(exported, report, images)


def certify_engine(exported: Export, report: EngineReport, images: ImageSet | None) -> Certificate:
    """The certificate of ``exported`` with the engine in it, also written beside the engine.

    Raises:
        ExportError: the engine was run and disagrees with the graph; it is deleted.
    """
    steps: list[Step] = []
    if images is not None and cuda_capability() == report.compute_capability:
        comparison = _run(exported, report, images)
        try:
            steps.append(Step(**asdict(check(comparison))))
        except ExportError:
            report.path.unlink()
            raise
    certificate = exported.certificate.with_engine(
        describe_file(report.path), steps=steps, weight_names=report.weight_names
    )
    for path in {certificate_path(exported.path), certificate_path(report.path)}:
        write_atomically(path, certificate.to_json().encode())
    return certificate


def _run(exported: Export, report: EngineReport, images: ImageSet) -> Comparison:
    found = run_engine(report.path, images.pixels, onnx=exported.path).comparison
    assert found is not None  # a graph was given
    return Comparison(
        before=f"{report.precision} {GRAPH}",
        after="engine",
        evaluator=f"{report.builder} {report.version}",
        images=found.images,
        max_difference=found.max_difference,
        mean_difference=found.mean_difference,
        top1_agreement=found.top1_agreement,
        bound=ENGINE_BOUNDS[report.precision],
    )
