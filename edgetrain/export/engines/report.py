"""What is known of an engine, kept in a JSON file next to it: ``model.engine`` has ``model.engine.json``.

An engine is a sealed file: without a GPU nothing can be asked of it. So what it was built from, for which chip and
by which release stands beside it, with the digests of both files; running and refitting read it first.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetrain.errors import StorageError
from edgetrain.export.engines.batch import Batch
from edgetrain.export.engines.builders import Capability, capability_text
from edgetrain.export.engines.graph import TensorInfo
from edgetrain.export.precision import Precision
from edgetrain.files import file_sha256, write_atomically
from edgetrain.units import format_mib

FORMAT_VERSION = 1


@dataclass(frozen=True)
class EngineReport:
    """An engine and how it was built. Sizes in bytes; None: the builder did not say.

    Attributes:
        path: of the engine.
        builder: import name of the TensorRT that built it; version: its release.
        device: name of the profile it was built for; None: for no named device.
        compute_capability: of the chip it runs on.
        precision: of weights and activations.
        batch: samples at once that it takes; None: the graph's fixed batch.
        workspace_limit_bytes: what the builder was allowed for the scratch of a kernel.
        activation_bytes: device memory for activations, scratch included; weights_bytes: for weights; scratch_bytes:
            for the scratch of the kernels.
        engine_bytes: size of the file.
        layers: of the network that the builder read, before it joins them.
        seconds: that the build took.
        refittable: whether :func:`edgetrain.export.refit_engine` can give it new weights.
        weight_names: by ONNX initialiser, what the engine calls it; empty where it cannot be refitted.
        inputs: as in the graph; outputs: the same.
        onnx: name of the graph's file; onnx_sha256: its digest; structure_sha256: the graph's without its weights.
        engine_sha256: of the file.
        versions: of the packages that took part.
        notes: what a person should know of it.
    """

    path: Path
    builder: str
    version: str
    device: str | None
    compute_capability: Capability
    precision: Precision
    batch: Batch | None
    workspace_limit_bytes: int | None
    activation_bytes: int | None
    weights_bytes: int | None
    scratch_bytes: int | None
    engine_bytes: int
    layers: int
    seconds: float
    refittable: bool
    weight_names: dict[str, str]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    onnx: str
    onnx_sha256: str
    structure_sha256: str
    engine_sha256: str
    versions: dict[str, str]
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """One document; :func:`read_report` reads it."""
        fields = dataclasses.asdict(self)
        del fields["path"]  # it stands next to the engine, wherever both are copied
        return json.dumps({"format": FORMAT_VERSION, **fields}, indent=1) + "\n"

    def __str__(self) -> str:
        """A few lines for a person."""
        sizes = [("workspace limit", self.workspace_limit_bytes), ("activations", self.activation_bytes)]
        sizes += [("weights", self.weights_bytes), ("scratch", self.scratch_bytes)]
        told = ", ".join(f"{name} {format_mib(size)}" for name, size in sizes if size is not None)
        lines = [
            f"{self.path}: {format_mib(self.engine_bytes)}, {self.precision}, {self.layers} layers, "
            f"compute capability {capability_text(self.compute_capability)}",
            f"built by {self.builder} {self.version} in {self.seconds:.1f} s; {told}",
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def report_path(engine: Path) -> Path:
    """Where the report of ``engine`` stands."""
    return engine.with_name(f"{engine.name}.json")


def write_engine(content: bytes | memoryview, report: EngineReport) -> None:
    """Writes the engine and its report, each whole or not at all; the report last.

    Raises:
        StorageError: the disk is full or refuses.
    """
    report_path(report.path).unlink(missing_ok=True)  # never an old report beside a new engine
    write_atomically(report.path, [content])
    write_atomically(report_path(report.path), report.to_json().encode())


def read_report(engine: str | Path) -> EngineReport:
    """The report of an engine, which is there and is the one that the report is about.

    Raises:
        StorageError: engine or report is missing or damaged, or they do not belong together.
    """
    engine = Path(engine)
    try:
        fields = json.loads(report_path(engine).read_text(encoding="utf-8"))
        digest = file_sha256(engine)
        if fields.pop("format") != FORMAT_VERSION:
            raise ValueError("another format")
        report = EngineReport(path=engine, **_typed(fields))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            found=f"{engine} and {report_path(engine).name} cannot be read ({error})",
            expected="an engine and the report that edgetrain wrote next to it",
            action="copy both files, or build the engine with edgetrain.build_engine",
        ) from error
    if digest != report.engine_sha256:
        raise StorageError(
            found=f"{engine} is not the file that {report_path(engine).name} describes",
            expected=f"an engine with SHA-256 {report.engine_sha256[:12]}..., found {digest[:12]}...",
            action="copy both files again, or build the engine again",
        )
    return report


def _typed(fields: dict[str, Any]) -> dict[str, Any]:
    """Lists and tables of JSON as the tuples and values they were."""
    for name in ("inputs", "outputs"):
        fields[name] = tuple(
            TensorInfo(tensor["name"], tensor["dtype"], tuple(tensor["shape"])) for tensor in fields[name]
        )
    fields["batch"] = None if fields["batch"] is None else Batch(**fields["batch"])
    return {**fields, "compute_capability": tuple(fields["compute_capability"]), "notes": tuple(fields["notes"])}
