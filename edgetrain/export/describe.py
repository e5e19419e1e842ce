"""What an exported graph says of itself, and which of its weights came from which trained numbers."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from edgetrain.export.certificate import Refit
from edgetrain.export.graph import missing, plain_name
from edgetrain.export.images import NORMALISE, Normalisation

if TYPE_CHECKING:
    from onnx import ModelProto

    from edgetrain.export.fold import Plain


@dataclass(frozen=True)
class About:
    """What the graph says of itself besides what an export knows.

    Attributes:
        name: of the network.
        classes: their names, in the order of the logits.
        plan: JSON of the plan it was trained by; the graph holds its digest.
        normalisation: which the graph computes first; None: the images come as the network takes them.
    """

    name: str | None = None
    classes: tuple[str, ...] = ()
    plan: str | None = None
    normalisation: Normalisation | None = None


def refit_map(plain: Plain, graph: ModelProto) -> tuple[Refit, ...]:
    """For every number of the folded module that was trained: where it came from, and its name in ``graph``."""
    held = {initialiser.name for initialiser in graph.graph.initializer}
    entries = []
    for name, origins in plain.origins.items():
        sources = tuple(plain_name(origin) for origin in origins if not origin.startswith(NORMALISE))
        if not sources or name.endswith("num_batches_tracked"):
            continue
        own = plain_name(name)
        found = next((form for form in (own, f"{own}_quantized") if form in held), None)
        entries.append(Refit(trained=sources, initialiser=found))
    return tuple(entries)


def metadata(about: About, shape: tuple[int, int, int], opset: int, precision: str) -> dict[str, str]:
    """What the file itself says, as text; lists as JSON."""
    normalisation = about.normalisation
    entries = {
        "model": about.name or "",
        "classes": json.dumps(about.classes),
        "input": f"images: float32 (n, {', '.join(map(str, shape))}), "
        + ("as the network was trained on" if normalisation is None else "0..1, normalised by the graph"),
        "normalisation": "" if normalisation is None else json.dumps(asdict(normalisation)),
        "plan_sha256": text_digest(about.plan) or "",
        "precision": precision,
        "opset": str(opset),
    }
    return entries | {f"version.{name}": version for name, version in versions().items()}


def text_digest(text: str | None) -> str | None:
    """SHA-256 of ``text`` in hexadecimal; None of None."""
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def versions() -> dict[str, str]:
    """Of the packages that take part in an export; raises MissingExtraError where one is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        import onnxruntime

        onnx_version = version("onnx")
    except (ImportError, PackageNotFoundError) as error:
        raise missing(error.name or "onnx") from error
    from edgetrain import __version__

    return {
        "edgetrain": __version__,
        "torch": torch.__version__,
        "onnx": onnx_version,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
    }
