"""ONNX export of a network in evaluation mode, proved equal before the file gets its name.

The graph is written to a temporary name, checked, run by a real ONNX Runtime session on the given images and
compared with PyTorch; only then is it renamed. Batch norm is exported as it stands; folding comes later.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edgetrain.errors import ExportError, MissingExtraError

OPSET = 17
TOLERANCE = 1e-4
"""Largest accepted difference, relative to the largest logit: float32 sums in another order."""


@dataclass(frozen=True)
class Verification:
    """How the exported graph compares with PyTorch.

    Attributes:
        images: how many were compared.
        max_difference: largest absolute difference of a logit, relative to the largest logit.
        top1_agreement: part of the images with the same class, 0..1.
        file_bytes: size of the graph.
    """

    images: int
    max_difference: float
    top1_agreement: float
    file_bytes: int


def export_onnx(
    model: nn.Module, path: str | Path, *, input_shape: tuple[int, int, int], images: Tensor | None = None
) -> Verification:
    """Writes ``model`` in evaluation mode to ``path``: input ``images`` (n, c, h, w), output ``logits`` (n, classes).

    Args:
        input_shape: (c, h, w).
        images: what to compare on, (n, c, h, w); random numbers where absent.

    Raises:
        ExportError: the graph disagrees with PyTorch; no file is left under ``path``.
        MissingExtraError: onnx or onnxruntime is not installed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        if images is None:
            images = torch.randn((4, *input_shape), generator=torch.Generator().manual_seed(0))
        images = images[: len(images)].float().cpu()
        with torch.no_grad():
            expected = model(images.to(device)).cpu().numpy()
            _write(model.cpu(), images[:2], temporary)
        verification = _verify(temporary, images, expected)
        os.replace(temporary, path)
        return verification
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        model.to(device).train(was_training)


def _write(model: nn.Module, sample: Tensor, path: Path) -> None:
    try:
        import onnx
    except ImportError as error:
        raise _missing("onnx") from error
    with warnings.catch_warnings():
        # the graph writer of torch that reaches the opsets of older TensorRT releases is marked as deprecated
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (sample,),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
        )
    onnx.checker.check_model(str(path), full_check=True)


def _verify(path: Path, images: Tensor, expected: np.ndarray) -> Verification:
    try:
        import onnxruntime
    except ImportError as error:
        raise _missing("onnxruntime") from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (actual,) = session.run(["logits"], {"images": images.numpy()})
    scale = float(np.abs(expected).max()) or 1.0
    difference = float(np.abs(actual - expected).max()) / scale
    if not difference <= TOLERANCE:
        raise ExportError(
            found=f"the exported graph differs from PyTorch by {difference:.1e} of the largest logit",
            expected=f"at most {TOLERANCE:.0e} on {len(images)} images",
            action="report this model: no file was written",
        )
    agreement = float((actual.argmax(1) == expected.argmax(1)).mean())
    return Verification(len(images), difference, agreement, path.stat().st_size)


def _missing(package: str) -> MissingExtraError:
    return MissingExtraError(
        found=f"the package {package} is not installed",
        expected="it for an export to ONNX",
        action=f"run pip install {package}",
    )
