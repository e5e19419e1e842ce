"""The certificate of an export: what was compared with what, on which images, and which weight came from where.

It lies beside the file as ``NAME.certificate.json`` and is read by programs: a schema with a version, digests of every
file and of the training state, the difference at each step, the folds, and the refit map. Whoever builds an engine
from the graph adds its steps, its file and its weight names with :meth:`Certificate.with_engine`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from edgetrain.errors import StorageError
from edgetrain.export.precision import Precision
from edgetrain.files import file_sha256


class Entry(BaseModel):
    """A part of a certificate; a misspelt key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Step(Entry):
    """One comparison, see :class:`edgetrain.export.verify.Comparison`."""

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


class Image(Entry):
    """An image that was compared: SHA-256 of its float32 pixels as the graph takes them."""

    name: str
    sha256: str


class File(Entry):
    """A file beside the certificate."""

    name: str
    sha256: str
    size_bytes: int


class FoldEntry(Entry):
    """A fold that was done, or skipped for a reason."""

    kind: str
    where: str
    reason: str


class FindingEntry(Entry):
    """What the graph lint said."""

    rule: str
    node: str
    reason: str


class Refit(Entry):
    """Where trained numbers are.

    Attributes:
        trained: names in the training module's state that went into the weight.
        initialiser: its name in the graph; None where the graph holds it in another form.
        engine_weight: its name in the engine, filled in by whoever builds it.
    """

    trained: tuple[str, ...]
    initialiser: str | None
    engine_weight: str | None = None


class Certificate(Entry):
    """All that is known of one export; ``str`` of a digest is hexadecimal SHA-256."""

    version: Literal[1] = 1
    versions: dict[str, str]
    model: str
    parameters: int
    state_sha256: str
    plan_sha256: str | None
    classes: tuple[str, ...]
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    device: str | None
    opset: int
    opset_reason: str
    precision: Precision
    batch_size: int | None
    image_source: str
    images: tuple[Image, ...]
    calibration_source: str | None
    folds_done: tuple[FoldEntry, ...]
    folds_skipped: tuple[FoldEntry, ...]
    findings: tuple[FindingEntry, ...]
    steps: tuple[Step, ...]
    refit: tuple[Refit, ...]
    onnx: File
    engine: File | None = None

    def to_json(self) -> str:
        """As text; :meth:`from_json` gives an equal certificate."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Certificate:
        """The certificate in ``text``.

        Raises:
            StorageError: it is none, or of another version.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            raise StorageError(
                found=f"no certificate: {'.'.join(map(str, first['loc'])) or 'JSON'}: {first['msg']}",
                expected="the JSON that an export writes, version 1",
                action="export the network again",
            ) from error

    def with_engine(
        self, engine: File, *, steps: Iterable[Step] = (), weight_names: Mapping[str, str] | None = None
    ) -> Certificate:
        """This certificate with an engine built from the graph.

        Args:
            steps: comparisons of the engine, if it was run.
            weight_names: initialiser -> name of the engine's weight.
        """
        names = weight_names or {}
        refit = tuple(
            entry.model_copy(update={"engine_weight": names.get(entry.initialiser or "")}) for entry in self.refit
        )
        return self.model_copy(update={"engine": engine, "steps": (*self.steps, *steps), "refit": refit})


def certificate_path(path: Path) -> Path:
    """Where the certificate of the file ``path`` lies."""
    return path.with_suffix(".certificate.json")


def describe_file(path: Path, *, name: str | None = None) -> File:
    """Name, digest and size of ``path``, under the ``name`` that it will get."""
    return File(name=name or path.name, sha256=file_sha256(path), size_bytes=path.stat().st_size)


def state_digest(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of the state of ``model``, in the order of the names."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
