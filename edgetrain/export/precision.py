"""The same graph in float16 and in INT8.

float16: ONNX Runtime's converter (``onnxruntime.transformers.float16``); weights and arithmetic become float16, input
and output stay float32, so whoever calls the graph sees no difference.

INT8: ONNX Runtime's static quantisation, ``q = clip(round(x / s), -127, 127)``, written as QuantizeLinear and
DequantizeLinear around the layers that have weights. Scales come from the largest values that calibration images give,
one per output channel for weights. As TensorRT's builder needs it: zero points are zero (symmetric) and biases stay
float32. Additions, poolings and activations stay in float: a stream of residual sums loses most by rounding and costs
least.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from edgetrain.export.graph import INPUT, missing

if TYPE_CHECKING:
    from onnx import ModelProto

Precision = Literal["fp32", "fp16", "int8"]
CALIBRATION_BATCH = 32
_WEIGHTED = ["Conv", "ConvTranspose", "Gemm", "MatMul"]


def to_float16(model: ModelProto) -> ModelProto:
    """``model`` computing in float16, input and output float32; ``model`` itself is used up.

    Raises:
        MissingExtraError: onnxruntime is not installed.
    """
    try:
        from onnxruntime.transformers.float16 import convert_float_to_float16
        from onnxruntime.transformers.onnx_model import OnnxModel
    except ImportError as error:
        raise missing("onnxruntime") from error
    converted = OnnxModel(convert_float_to_float16(model, keep_io_types=True))
    converted.topological_sort()  # the converter puts its casts of the input at the end
    return converted.model


def to_int8(source: Path, target: Path, images: npt.NDArray[np.float32]) -> ModelProto:
    """The graph in ``source`` with INT8 weights and layer inputs, written to ``target``.

    Args:
        images: to calibrate with, (n, c, h, w).

    Raises:
        MissingExtraError: onnxruntime is not installed.
    """
    try:
        import onnx
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    except ImportError as error:
        raise missing("onnxruntime") from error
    size = onnx.load(str(source)).graph.input[0].type.tensor_type.shape.dim[0].dim_value or CALIBRATION_BATCH
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # it advises its own preparation of the graph, which folds once more
    try:
        quantize_static(
            str(source),
            str(target),
            _Reader(images, size),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=_WEIGHTED,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
        )
    finally:
        logging.root.setLevel(level)
    return onnx.load(str(target))


class _Reader:
    """Batches of the calibration images, as ONNX Runtime's ``CalibrationDataReader`` gives them.

    A graph of fixed batch gets whole batches; the last one is filled up with its last image.
    """

    def __init__(self, images: npt.NDArray[np.float32], size: int) -> None:
        self._batches = self._cut(images, size)

    def get_next(self) -> dict[str, npt.NDArray[np.float32]] | None:
        return next(self._batches, None)

    @staticmethod
    def _cut(images: npt.NDArray[np.float32], size: int) -> Iterator[dict[str, npt.NDArray[np.float32]]]:
        for start in range(0, len(images), size):
            part = images[start : start + size]
            yield {INPUT: np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])}
