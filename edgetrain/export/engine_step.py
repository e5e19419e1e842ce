"""The last arrow of an export: from a verified graph to an engine, entered in the graph's certificate.

Where this machine has the engine's GPU the engine is run on the images of the certificate and compared with the graph;
elsewhere the certificate names the engine and its weights, and has no step for it: nothing is claimed that was not run.
As with a graph, an engine gets its name, or takes the place of an older one, only when the comparison holds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgetrain.export.certificate import Certificate, Step, certificate_path, describe_file
from edgetrain.export.engines.builders import cuda_capability
from edgetrain.export.engines.refit import refit_engine
from edgetrain.export.engines.report import EngineReport, write_engine
from edgetrain.export.engines.run import compare_engine, run_engine
from edgetrain.export.tensorrt import build_engine
from edgetrain.export.verify import check
from edgetrain.files import write_atomically

if TYPE_CHECKING:
    from edgetrain.export.images import ImageSet
    from edgetrain.export.onnx import Export


def engine_of(
    exported: Export, path: Path, *, batch: int | None, refittable: bool, images: ImageSet | None = None
) -> tuple[EngineReport, Certificate]:
    """Builds ``path`` from an exported graph, for the device and in the precision that the graph was exported for.

    Args:
        batch: largest batch of the engine; None: one image, or the graph's own.
        refittable: the engine takes new weights later.
        images: what to run it on, where its GPU is here.

    Raises:
        ExportError: as :func:`edgetrain.build_engine`; or the engine was run and disagrees. Nothing is left of it.
    """
    graph, asked = exported.path, exported.certificate

    def build(target: Path) -> EngineReport:
        return build_engine(
            graph, target, device=asked.device, precision=asked.precision, batch=batch, refit=refittable
        )

    return _certified(exported, path, build, images)


def refitted(
    exported: Export, engine: Path, path: Path, images: ImageSet | None = None
) -> tuple[EngineReport, Certificate]:
    """``engine`` with the weights of an exported graph, written to ``path``, which may be ``engine`` itself.

    Raises:
        ExportError: as :func:`edgetrain.export.refit_engine`; or the result was run and disagrees. ``path`` is as it
            was.
    """
    return _certified(exported, path, lambda target: refit_engine(engine, exported.path, target), images)


def _certified(
    exported: Export, path: Path, make: Callable[[Path], EngineReport], images: ImageSet | None
) -> tuple[EngineReport, Certificate]:
    """The engine that ``make`` writes, at ``path`` once it has been compared, entered in the certificate."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        made = make(Path(folder) / path.name)
        steps = _steps(exported, made, images)
        report = replace(made, path=path)
        write_engine(made.path.read_bytes(), report)
    certificate = exported.certificate.with_engine(describe_file(path), steps=steps, weight_names=report.weight_names)
    for target in {certificate_path(exported.path), certificate_path(path)}:
        write_atomically(target, certificate.to_json().encode())
    return report, certificate


def _steps(exported: Export, report: EngineReport, images: ImageSet | None) -> list[Step]:
    """The comparison of the engine with its graph; none where its GPU is not here."""
    if images is None or cuda_capability() != report.compute_capability:
        return []
    logits = run_engine(report.path, images.pixels).logits
    return [Step(**asdict(check(compare_engine(report, logits, images, onnx=exported.path))))]
