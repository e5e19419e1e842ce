"""An engine read back into a process, only where it can run.

Deserialising without a CUDA device is never tried: one release returns nothing, another ends the process. So the
device is asked for first, then whether it is the chip and the release that the engine was built for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgetrain.errors import ExportError, MissingExtraError
from edgetrain.export.engines.builders import Builder, capability_text, cuda_capability, installed_builder
from edgetrain.export.engines.log import BuildLog, last_errors
from edgetrain.export.engines.report import EngineReport


def loadable(report: EngineReport, *, command: str) -> Builder:
    """The TensorRT that reads this engine here.

    Args:
        command: what to run on the device where this machine cannot.

    Raises:
        ExportError: no CUDA device, another chip, or another release than the engine's.
        MissingExtraError: the TensorRT that built it is not installed.
    """
    here = cuda_capability()
    wanted = report.compute_capability
    if here != wanted:
        found = "no CUDA device" if here is None else f"a GPU of compute capability {capability_text(here)}"
        raise ExportError(
            found=f"this machine has {found}",
            expected=f"one of compute capability {capability_text(wanted)}, for which {report.path.name} was built",
            action=f"copy it with {report.path.name}.json to the device and run there:\n{command}",
        )
    builder = installed_builder(report.builder)
    if builder is None:
        raise MissingExtraError(
            found=f"{report.builder} is not installed",
            expected=f"it in version {report.version}, which built {report.path.name}",
            action="install it (on a Jetson it comes with JetPack)",
        )
    if builder.version != report.version:
        raise ExportError(
            found=f"{report.path.name} was built by {report.builder} {report.version}, here is {builder.version}",
            expected="the same release: engines are not portable between releases",
            action="build the engine again here with edgetrain.build_engine",
        )
    return builder


def load_engine(builder: Builder, path: Path, log: BuildLog) -> Any:
    """The engine in ``path``; call :func:`loadable` before.

    Raises:
        ExportError: the runtime refuses it.
    """
    engine = builder.module.Runtime(log).deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise ExportError(
            found=f"{builder.name} {builder.version} does not load {path.name}: {last_errors(log)}",
            expected="an engine that was built for this GPU by this release",
            action="build it again here with edgetrain.build_engine",
        )
    return engine
