"""Which ONNX operators TensorRT's parser takes, by its version.

Source: the support matrix ``docs/operators.md`` of onnx/onnx-tensorrt, as it stood for TensorRT 8.4, 8.5 and 10.15
(rows marked ``Y``; read 2026-11). The table of 8.4 stands for 8.2, too: both read opset 13, and NVIDIA's notes name no
operator of a convolutional network that came between. Left out are operators for sequences of text or sound and those
that draw random numbers: nothing here writes them, so one in a graph is worth a finding. Between two versions the older
table holds, which may refuse an operator that the device knows, never the other way.
"""

from __future__ import annotations

import re

_FROM_8_2 = """
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast Ceil Celu Clip Concat
Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal
Erf Exp Expand EyeLike Flatten Floor Gather GatherElements GatherND Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool
Greater GreaterOrEqual HardSigmoid Identity If InstanceNormalization IsNaN LRN LeakyRelu Less LessOrEqual Log LogSoftmax
Loop LpNormalization LpPool MatMul Max MaxPool Mean Min Mul Neg Not Or PRelu Pad Pow QuantizeLinear Range ReduceL1
ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape
Resize Round ScatterElements ScatterND Selu Shape Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign
SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Unsqueeze Where Xor
"""
_FROM_8_5 = "GridSample HardSwish MeanVarianceNormalization Mod NonZero OneHot Reciprocal RoiAlign Shrink Trilu"
_FROM_10_15 = "CastLike DeformConv Gelu GroupNormalization Hardmax IsInf LayerNormalization Mish RMSNormalization"
_ADDED = {(8, 2): _FROM_8_2, (8, 5): _FROM_8_5, (10, 15): _FROM_10_15}


def parse_version(text: str) -> tuple[int, int]:
    """Major and minor number in ``8.5.2``; (0, 0) where there are none."""
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def known_operators(version: tuple[int, int]) -> frozenset[str]:
    """The operators that the parser of TensorRT ``version`` takes; those of 8.2 for anything older."""
    since = (names for added, names in _ADDED.items() if added <= max(version, (8, 2)))
    return frozenset(" ".join(since).split())
