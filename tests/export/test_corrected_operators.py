"""The operators that stand in for those of onnx's reference evaluator, against PyTorch and the formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

from edgetrain.export.verify import run_reference


def graph(kind: str, source: np.ndarray, opset: int, *constants: np.ndarray, **attributes: int | float) -> ModelProto:
    """One node from ``images`` and constants to ``logits``."""
    names = [f"c{k}" for k in range(len(constants))]
    node = helper.make_node(kind, ["images", *names], ["logits"], **attributes)
    images = helper.make_tensor_value_info("images", helper.np_dtype_to_tensor_dtype(source.dtype), source.shape)
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, source.shape)
    held = [numpy_helper.from_array(value, name) for value, name in zip(constants, names, strict=True)]
    made = helper.make_graph([node], kind, [images], [logits], held)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


@pytest.mark.parametrize("opset", [13, 17])
def test_batch_norm_is_inference(opset: int):
    rng = np.random.default_rng(0)
    x, (a, b, c) = rng.random((2, 3, 4, 4), dtype=np.float32), rng.random((3, 3), dtype=np.float32)
    model = graph("BatchNormalization", x, opset, a, b, c, c + 1, epsilon=1e-3, momentum=0.9)
    tensors = [torch.from_numpy(value) for value in (x, c, c + 1, a, b)]
    expected = torch.nn.functional.batch_norm(*tensors, training=False, eps=1e-3)
    np.testing.assert_allclose(run_reference(model, x), expected.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("opset", [13, 17, 19])
@pytest.mark.parametrize("axis", [0, 1])
def test_dequantisation_along_an_axis(opset: int, axis: int):
    x = np.random.default_rng(1).integers(-127, 128, (3, 3, 2), dtype=np.int8)
    scale = np.array([0.5, 0.25, 2], np.float32)
    model = graph("DequantizeLinear", x, opset, scale, np.zeros(3, np.int8), axis=axis)
    shape = (3, 1, 1) if axis == 0 else (1, 3, 1)
    np.testing.assert_array_equal(run_reference(model, x), x * scale.reshape(shape))
