"""Operators for onnx's reference evaluator, where that of onnx 1.17 lacks the version that the standard has.

- BatchNormalization-9 with one output is inference (ONNX, Changelog.md); the evaluator takes it for training, as its
  ``momentum`` has a default.
- DequantizeLinear-10 and -13 are missing: ``y = (x - zero point) * scale``, the scale of one number or along ``axis``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def corrected_operators(opset: int) -> list[Any]:
    """Classes to pass to the evaluator as ``new_ops`` for a graph of ``opset``."""
    from onnx.reference.op_run import OpRun

    class BatchNormalization(OpRun):
        op_domain = ""

        def _run(
            self, x: Array, scale: Array, bias: Array, mean: Array, var: Array, epsilon: float, **other: Any
        ) -> tuple[Array]:
            s, b, m, v = (_along(value, x, 1) for value in (scale, bias, mean, var))
            return ((s * (x - m) / np.sqrt(v + epsilon) + b).astype(x.dtype),)

    class DequantizeLinear(OpRun):
        op_domain = ""

        def _run(self, x: Array, scale: Array, zero: Array | None = None, axis: int = 1, **other: Any) -> tuple[Array]:
            shifted = x.astype(np.int32) - (0 if zero is None else _along(zero.astype(np.int32), x, axis))
            return ((shifted * _along(scale, x, axis)).astype(scale.dtype),)

    return [BatchNormalization] * (opset < 14) + [DequantizeLinear] * (opset < 19)


def _along(values: Array, x: Array, axis: int) -> Array:
    """``values`` (k,) along ``axis`` of ``x``; a single number as it is."""
    if values.size == 1:
        return values.reshape(())
    shape = [1] * x.ndim
    shape[axis] = -1
    return values.reshape(shape)
