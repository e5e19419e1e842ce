"""Small graphs of the zoo in the three precisions that an engine may have, for tests and for engine_table.py.

fp16 and INT8 come from ONNX Runtime's own converters. INT8 is what TensorRT for RTX takes: symmetric activations and
weights, a scale for each output channel, biases left in fp32.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import edgetrain

INPUT_SHAPE = (3, 32, 32)
MODELS: dict[str, dict[str, Any]] = {"resnet20": {}, "hybrid18": {"width": 16}}
"""Names and options of the networks that are built."""


def write_variant(name: str, precision: str, folder: Path) -> Path:
    """The graph of a network with fresh weights, seed 0, in ``folder``."""
    plain = folder / f"{name}-fp32.onnx"
    images = torch.randn((8, *INPUT_SHAPE), generator=torch.Generator().manual_seed(1))
    if not plain.exists():
        torch.manual_seed(0)
        model = edgetrain.create_model(name, num_classes=10, **MODELS[name])
        with torch.no_grad():
            model(images)  # running statistics that are not the fresh zeros and ones
        edgetrain.export_onnx(model, plain, input_shape=INPUT_SHAPE, images=images)
    path = folder / f"{name}-{precision}.onnx"
    if precision == "fp16":
        to_half(plain, path)
    elif precision == "int8":
        to_int8(plain, path, images)
    return path


def to_half(source: Path, path: Path) -> None:
    """The graph in half precision; its input and output stay in single."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weights below half precision's smallest number become that number
        model = convert_float_to_float16(onnx.load(str(source)), keep_io_types=True)
    onnx.save(model, str(path))


def to_int8(source: Path, path: Path, images: Tensor) -> None:
    """The graph with quantisation nodes, calibrated on ``images``."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Images(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._batches = iter([{"images": images.numpy().astype(np.float32)}])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._batches, None)

    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)  # it asks for a preparation that TensorRT does itself
    try:
        quantize_static(
            str(source),
            str(path),
            Images(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["Conv"],
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
        )
    finally:
        logging.getLogger().setLevel(level)
