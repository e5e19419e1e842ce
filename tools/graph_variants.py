"""Small graphs of the zoo in the three precisions that an engine may have, for tests and for engine_table.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import edgetrain
from edgetrain.export.precision import Precision

INPUT_SHAPE = (3, 32, 32)
MODELS: dict[str, dict[str, Any]] = {"resnet20": {}, "hybrid18": {"width": 16}}
"""Names and options of the networks that are built."""


def write_variant(name: str, precision: Precision, folder: Path) -> Path:
    """The graph of a network with fresh weights, seed 0, in ``folder``; INT8 is calibrated on random images."""
    torch.manual_seed(0)
    model = edgetrain.create_model(name, num_classes=10, **MODELS[name])
    images = torch.randn((8, *INPUT_SHAPE), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(images)  # running statistics that are not the fresh zeros and ones
    path = folder / f"{name}-{precision}.onnx"
    edgetrain.export_onnx(model, path, input_shape=INPUT_SHAPE, images=images, precision=precision)
    return path
