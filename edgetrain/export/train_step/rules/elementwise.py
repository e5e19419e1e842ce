"""Operators on each element, with numpy's repetition of dimensions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgetrain.export.train_step.graph import Value
from edgetrain.export.train_step.recorder import Recorder, Rule, dtype_of, rule


def _shape(*values: Value) -> tuple[int, ...]:
    return tuple(np.broadcast_shapes(*(value.shape for value in values)))


def binary(r: Recorder, operator: str, a: Value, b: Value, dtype: Any = None) -> Value:
    """A node of two operands."""
    return r.graph.node(operator, [a, b], _shape(a, b), dtype)


def unary(r: Recorder, operator: str, a: Value, **attributes: Any) -> Value:
    """A node of one operand."""
    return r.graph.node(operator, [a], a.shape, **attributes)


def _arithmetic(operator: str) -> Rule:
    def apply(r: Recorder, out: Tensor, a: Any, b: Any, *, alpha: Any = 1) -> Value:
        dtype = dtype_of(out)
        if dtype == np.bool_:
            return binary(r, {"Mul": "And", "Add": "Or"}[operator], r.number(a, dtype), r.number(b, dtype))
        second = r.number(b, dtype)
        if alpha != 1:
            second = binary(r, "Mul", second, r.number(alpha, dtype))
        return binary(r, operator, r.number(a, dtype), second)

    return apply


rule("add")(_arithmetic("Add"))
rule("sub")(_arithmetic("Sub"))
rule("mul")(_arithmetic("Mul"))


@rule("rsub")
def _rsub(r: Recorder, out: Tensor, a: Any, b: Any, alpha: Any = 1) -> Any:
    return _arithmetic("Sub")(r, out, b, a) if alpha == 1 else _arithmetic("Sub")(r, out, b, a, alpha=alpha)


@rule("div")
def _div(r: Recorder, out: Tensor, a: Any, b: Any, *, rounding_mode: str | None = None) -> Value:
    dtype = dtype_of(out)
    quotient = binary(r, "Div", r.number(a, dtype), r.number(b, dtype))
    if rounding_mode is None or (not out.dtype.is_floating_point and rounding_mode == "trunc"):
        return quotient
    if not out.dtype.is_floating_point:  # what is divided here are indices, which are not negative
        return quotient
    return unary(r, "Floor", quotient) if rounding_mode == "floor" else _truncated(r, quotient)


def _truncated(r: Recorder, value: Value) -> Value:
    size = unary(r, "Floor", unary(r, "Abs", value))
    return binary(r, "Mul", unary(r, "Sign", value), size)


@rule("remainder")
def _remainder(r: Recorder, out: Tensor, a: Any, b: Any) -> Value:
    dtype = dtype_of(out)
    operands = [r.number(a, dtype), r.number(b, dtype)]
    if not out.dtype.is_floating_point:
        return r.graph.node("Mod", operands, _shape(*operands))
    whole = unary(r, "Floor", binary(r, "Div", *operands))
    return binary(r, "Sub", operands[0], binary(r, "Mul", whole, operands[1]))


def _one(operator: str) -> Rule:
    return lambda r, out, a: unary(r, operator, r.number(a, dtype_of(out)))


for _name, _operator in {
    "neg": "Neg",
    "abs": "Abs",
    "sqrt": "Sqrt",
    "reciprocal": "Reciprocal",
    "exp": "Exp",
    "log": "Log",
    "sign": "Sign",
    "round": "Round",
    "floor": "Floor",
    "relu": "Relu",
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
    "erf": "Erf",
    "logical_not": "Not",
}.items():
    rule(_name)(_one(_operator))


@rule("square")
def _square(r: Recorder, out: Tensor, a: Tensor) -> Value:
    value = r.value(a)
    return binary(r, "Mul", value, value)


@rule("rsqrt")
def _rsqrt(r: Recorder, out: Tensor, a: Tensor) -> Value:
    return unary(r, "Reciprocal", unary(r, "Sqrt", r.value(a)))


@rule("pow")
def _pow(r: Recorder, out: Tensor, a: Any, b: Any) -> Value:
    dtype = dtype_of(out)
    return binary(r, "Pow", r.number(a, dtype), r.number(b, dtype))


@rule("clamp")
def _clamp(r: Recorder, out: Tensor, a: Tensor, min: Any = None, max: Any = None) -> Value:
    dtype = dtype_of(out)
    bounds = [None if bound is None else r.number(bound, dtype) for bound in (min, max)]
    value = r.number(a, dtype)
    if bounds[0] is not None:
        value = binary(r, "Max", value, bounds[0])
    return value if bounds[1] is None else binary(r, "Min", value, bounds[1])


@rule("clamp_min")
def _clamp_min(r: Recorder, out: Tensor, a: Tensor, min: Any) -> Value:
    return _clamp(r, out, a, min=min)


@rule("clamp_max")
def _clamp_max(r: Recorder, out: Tensor, a: Tensor, max: Any) -> Value:
    return _clamp(r, out, a, max=max)


@rule("hardtanh")
def _hardtanh(r: Recorder, out: Tensor, a: Tensor, min_val: float = -1, max_val: float = 1) -> Value:
    return _clamp(r, out, a, min=min_val, max=max_val)


rule("maximum")(lambda r, out, a, b: binary(r, "Max", r.number(a, dtype_of(out)), r.number(b, dtype_of(out))))
rule("minimum")(lambda r, out, a, b: binary(r, "Min", r.number(a, dtype_of(out)), r.number(b, dtype_of(out))))


@rule("leaky_relu")
def _leaky_relu(r: Recorder, out: Tensor, a: Tensor, negative_slope: float = 0.01) -> Value:
    """ONNX's LeakyRelu is slower in ONNX Runtime, and has its slope in float32."""
    value = r.value(a)
    scaled = binary(r, "Mul", value, r.number(negative_slope, value.dtype))
    return binary(r, "Max" if negative_slope <= 1 else "Min", value, scaled)


@rule("leaky_relu_backward")
def _leaky_relu_backward(
    r: Recorder, out: Tensor, dy: Tensor, x: Tensor, negative_slope: float, self_is_result: bool
) -> Value:
    if not 0 <= negative_slope <= 1:
        raise NotImplementedError(f"a leaky ReLU of slope {negative_slope}, which is not within 0 and 1")
    return _where_positive(r, x, r.value(dy), r.number(negative_slope, dtype_of(out)))


def _where_positive(r: Recorder, x: Tensor, dy: Value, otherwise: Value) -> Value:
    """``dy`` where x is positive, elsewhere times ``otherwise``, 0 to 1; ONNX Runtime's Where is slow."""
    positive = r.graph.cast(_compared(r, "Greater", x, 0), dy.dtype)
    return binary(r, "Mul", dy, binary(r, "Max", positive, otherwise))


@rule("threshold_backward")
def _threshold_backward(r: Recorder, out: Tensor, dy: Tensor, x: Tensor, threshold: float) -> Value:
    kept = r.graph.cast(_compared(r, "Greater", x, threshold), dtype_of(out))
    return binary(r, "Mul", r.value(dy), kept)


@rule("hardtanh_backward")
def _hardtanh_backward(r: Recorder, out: Tensor, dy: Tensor, x: Tensor, min_val: float, max_val: float) -> Value:
    inside = binary(r, "And", _compared(r, "Greater", x, min_val), _compared(r, "Less", x, max_val))
    return binary(r, "Mul", r.value(dy), r.graph.cast(inside, dtype_of(out)))


@rule("sigmoid_backward")
def _sigmoid_backward(r: Recorder, out: Tensor, dy: Tensor, y: Tensor) -> Value:
    value = r.value(y)
    slope = binary(r, "Mul", value, binary(r, "Sub", r.number(1, value.dtype), value))
    return binary(r, "Mul", r.value(dy), slope)


@rule("tanh_backward")
def _tanh_backward(r: Recorder, out: Tensor, dy: Tensor, y: Tensor) -> Value:
    value = r.value(y)
    slope = binary(r, "Sub", r.number(1, value.dtype), binary(r, "Mul", value, value))
    return binary(r, "Mul", r.value(dy), slope)


def _compared(r: Recorder, operator: str, a: Tensor, b: Any) -> Value:
    """ONNX Runtime compares no bytes, so they are widened."""
    dtype = dtype_of(torch.empty(0, dtype=torch.result_type(a, b)))
    if dtype.itemsize == 1 and dtype != np.bool_:
        dtype = np.dtype(np.int32)
    return binary(r, operator, r.number(a, dtype), r.number(b, dtype), np.bool_)


for _name, _operator in {
    "eq": "Equal",
    "gt": "Greater",
    "lt": "Less",
    "ge": "GreaterOrEqual",
    "le": "LessOrEqual",
}.items():
    rule(_name)(lambda r, out, a, b, _operator=_operator: _compared(r, _operator, a, b))
rule("ne")(lambda r, out, a, b: unary(r, "Not", _compared(r, "Equal", a, b)))


@rule("where")
def _where(r: Recorder, out: Tensor, condition: Tensor, a: Any, b: Any) -> Value:
    dtype = dtype_of(out)
    operands = [r.value(condition), r.number(a, dtype), r.number(b, dtype)]
    return r.graph.node("Where", operands, _shape(*operands), dtype)


@rule("masked_fill")
def _masked_fill(r: Recorder, out: Tensor, a: Tensor, mask: Tensor, value: Any) -> Value:
    return _where(r, out, mask, value, a)


@rule("bitwise_and", "logical_and")
def _and(r: Recorder, out: Tensor, a: Tensor, b: Tensor) -> Value:
    return binary(r, "And", r.number(a, np.bool_), r.number(b, np.bool_))


@rule("lerp")
def _lerp(r: Recorder, out: Tensor, a: Tensor, b: Tensor, weight: Any) -> Value:
    dtype = dtype_of(out)
    first = r.number(a, dtype)
    return binary(
        r, "Add", first, binary(r, "Mul", binary(r, "Sub", r.number(b, dtype), first), r.number(weight, dtype))
    )


@rule("addcmul")
def _addcmul(r: Recorder, out: Tensor, a: Tensor, b: Tensor, c: Tensor, *, value: Any = 1) -> Value:
    dtype = dtype_of(out)
    product = binary(r, "Mul", r.number(b, dtype), r.number(c, dtype))
    if value != 1:
        product = binary(r, "Mul", product, r.number(value, dtype))
    return binary(r, "Add", r.number(a, dtype), product)
