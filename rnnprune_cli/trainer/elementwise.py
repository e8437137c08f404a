"""Operators that work element by element.

Source of all semantics: the ONNX operator specification (onnx.ai/onnx/operators).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from rnnprune_cli.trainer.call import Call, Operator, Unsupported, Value, dtype_of, known, rank, tf


def simple(function: Callable[..., Any]) -> Operator:
    """Makes an operator of a function that needs nothing but the inputs."""
    return lambda call, *inputs: function(*inputs)


def _is_float(value: Value) -> bool:
    return dtype_of(value).kind == "f"


def add(a: Value, b: Value) -> Value:
    """Adds; a row ``[1, n]`` as ``[n]``.

    TensorFlow 2.21 fuses the sum of a product with a transposed matrix and a row into a kernel that
    then refuses the row's shape.
    """
    if _is_row(b) and rank(a) >= rank(b):
        return tf.add(a, tf.reshape(b, [-1]))
    if _is_row(a) and rank(b) >= rank(a):
        return tf.add(tf.reshape(a, [-1]), b)
    return tf.add(a, b)


def _is_row(x: Value) -> bool:
    shape = tf.TensorShape(x.shape)
    return bool(shape.rank and shape.rank > 1 and shape[:-1].num_elements() == 1)


def _divide(call: Call, a: Value, b: Value) -> Value:
    return tf.divide(a, b) if _is_float(a) else tf.truncatediv(a, b)


def _mod(call: Call, a: Value, b: Value) -> Value:
    if not call.get("fmod", 0):
        return tf.math.floormod(a, b)
    return tf.truncatemod(a, b)


def _power(call: Call, base: Value, exponent: Value) -> Value:
    """Powers; small whole exponents as products, whose gradient is defined everywhere."""
    if isinstance(exponent, np.ndarray) and exponent.size == 1 and exponent.item() in (1, 2, 3):
        shape = tf.ones(exponent.shape, base.dtype)
        return functools.reduce(tf.multiply, [base] * int(exponent.item())) * shape
    return tf.pow(base, tf.cast(exponent, base.dtype))


def _variadic(function: Callable[[Value, Value], Value]) -> Operator:
    return lambda call, *inputs: functools.reduce(function, inputs[1:], tf.identity(inputs[0]))


def _mean(call: Call, *inputs: Value) -> Value:
    return functools.reduce(tf.add, inputs) / len(inputs)


def _leaky_relu(x: Value, alpha: float) -> Value:
    return tf.where(x >= 0, x, alpha * x)


def _elu(x: Value, alpha: float) -> Value:
    # The exponential of what is not chosen must not overflow: its gradient would be NaN.
    return tf.where(x > 0, x, alpha * tf.math.expm1(tf.minimum(x, 0)))


def _hard_sigmoid(x: Value, alpha: float, beta: float) -> Value:
    return tf.clip_by_value(alpha * x + beta, 0.0, 1.0)


def _scaled_tanh(x: Value, alpha: float, beta: float) -> Value:
    return alpha * tf.tanh(beta * x)


def _thresholded_relu(x: Value, alpha: float) -> Value:
    return tf.where(x > alpha, x, tf.zeros_like(x))


def activation(name: str, alpha: float | None, beta: float | None) -> Callable[[Value], Value]:
    """Returns an activation of a recurrent operator.

    Args:
        name: As in the attribute ``activations``; case does not matter.
        alpha: Its first parameter; None for the default of the operator of that name.
        beta: Its second parameter.

    Raises:
        Unsupported: If there is no activation of that name.
    """
    lower = name.lower()
    if lower not in ACTIVATIONS:
        raise Unsupported(f"activation '{name}'")
    function, defaults = ACTIVATIONS[lower]
    given = [
        default if value is None else value
        for value, default in zip((alpha, beta), defaults, strict=False)
    ]
    return lambda x: function(x, *given)


ACTIVATIONS: dict[str, tuple[Callable[..., Value], tuple[float, ...]]] = {
    "sigmoid": (tf.sigmoid, ()),
    "tanh": (tf.tanh, ()),
    "relu": (tf.nn.relu, ()),
    "softsign": (tf.nn.softsign, ()),
    "softplus": (tf.math.softplus, ()),
    "leakyrelu": (_leaky_relu, (0.01,)),
    "thresholdedrelu": (_thresholded_relu, (0.0,)),  # as in onnxruntime; the operator has 1
    "elu": (_elu, (1.0,)),
    "scaledtanh": (_scaled_tanh, (1.0, 1.0)),
    "hardsigmoid": (_hard_sigmoid, (0.2, 0.5)),
    "affine": (lambda x, alpha, beta: alpha * x + beta, (1.0, 0.0)),
}
"""Lower-case name → function and the defaults of alpha and beta, as far as it has them."""


def _selu(call: Call, x: Value) -> Value:
    alpha = call.get("alpha", 1.6732632423543772)
    return call.get("gamma", 1.0507009873554805) * _elu(x, alpha)


def _celu(call: Call, x: Value) -> Value:
    alpha = call.get("alpha", 1.0)
    return tf.maximum(x, 0) + tf.minimum(alpha * tf.math.expm1(tf.minimum(x, 0) / alpha), 0)


def _shrink(call: Call, x: Value) -> Value:
    bias, limit = call.get("bias", 0.0), call.get("lambd", 0.5)
    zero = tf.zeros_like(x)
    return tf.where(x < -limit, x + bias, tf.where(x > limit, x - bias, zero))


def _hard_swish(call: Call, x: Value) -> Value:
    return x * _hard_sigmoid(x, 1 / 6, 0.5)


def _gelu(call: Call, x: Value) -> Value:
    return tf.nn.gelu(x, approximate=call.get("approximate", "none") == "tanh")


def _swish(call: Call, x: Value) -> Value:
    return x * tf.sigmoid(call.get("alpha", 1.0) * x)


def _mish(call: Call, x: Value) -> Value:
    return x * tf.tanh(tf.math.softplus(x))


def _clip(call: Call, x: Value, low: Value = None, high: Value = None) -> Value:
    """Attributes before opset 11, inputs since."""
    low, high = call.get("min", low), call.get("max", high)
    if low is not None:
        x = tf.maximum(x, tf.cast(low, x.dtype))
    return x if high is None else tf.minimum(x, tf.cast(high, x.dtype))


def _cast(call: Call, x: Value) -> Value:
    return _to(x, call.dtype(call.get("to")))


def _cast_like(call: Call, x: Value, like: Value) -> Value:
    return _to(x, dtype_of(like))


def _to(x: Value, dtype: np.dtype[Any]) -> Value:
    if dtype.kind not in "fiub":
        raise Unsupported(f"values of type {dtype}")
    return tf.cast(x, dtype)


def _dropout(call: Call, x: Value, ratio: Value = None, training: Value = None) -> Value:
    """At inference, the identity; a mask, where one is read, keeps everything."""
    if training is not None and known(training, "training modes").item():
        raise Unsupported("training_mode")
    return (x, tf.ones_like(x, tf.bool)) if call.outputs > 1 else x


def _is_inf(call: Call, x: Value) -> Value:
    positive, negative = call.get("detect_positive", 1), call.get("detect_negative", 1)
    found = tf.math.is_inf(x)
    if not positive:
        found &= x < 0
    return found if negative else found & (x > 0)


def _dequantize(call: Call, x: Value, scale: Value, zero: Value = None) -> Value:
    """``(x - zero) * scale``; along an axis if the scale is a vector."""
    if call.get("block_size", 0):
        raise Unsupported("blocks")
    if rank(scale) == 1 and rank(x) > 1:
        shape = [1] * rank(x)
        shape[call.get("axis", 1)] = -1
        scale = tf.reshape(scale, shape)
        zero = None if zero is None else tf.reshape(zero, shape)
    values = tf.cast(x, scale.dtype)
    return (values if zero is None else values - tf.cast(zero, scale.dtype)) * scale


def _where(call: Call, condition: Value, x: Value, y: Value) -> Value:
    return tf.where(condition, x, y)


def _identity(call: Call, x: Value) -> Value:
    return x


OPERATORS: dict[str, Operator] = {
    "Abs": simple(tf.abs),
    "Acos": simple(tf.acos),
    "Acosh": simple(tf.acosh),
    "Add": simple(add),
    "And": simple(tf.logical_and),
    "Asin": simple(tf.asin),
    "Asinh": simple(tf.asinh),
    "Atan": simple(tf.atan),
    "Atanh": simple(tf.atanh),
    "BitwiseAnd": simple(tf.bitwise.bitwise_and),
    "BitwiseNot": simple(tf.bitwise.invert),
    "BitwiseOr": simple(tf.bitwise.bitwise_or),
    "BitwiseXor": simple(tf.bitwise.bitwise_xor),
    "Cast": _cast,
    "CastLike": _cast_like,
    "Ceil": simple(tf.math.ceil),
    "Celu": _celu,
    "Clip": _clip,
    "Cos": simple(tf.cos),
    "Cosh": simple(tf.cosh),
    "DequantizeLinear": _dequantize,
    "Div": _divide,
    "Dropout": _dropout,
    "Elu": lambda call, x: _elu(x, call.get("alpha", 1.0)),
    "Equal": simple(tf.equal),
    "Erf": simple(tf.math.erf),
    "Exp": simple(tf.exp),
    "Floor": simple(tf.floor),
    "Gelu": _gelu,
    "Greater": simple(tf.greater),
    "GreaterOrEqual": simple(tf.greater_equal),
    "HardSigmoid": lambda call, x: _hard_sigmoid(x, call.get("alpha", 0.2), call.get("beta", 0.5)),
    "HardSwish": _hard_swish,
    "Identity": _identity,
    "IsInf": _is_inf,
    "IsNaN": simple(tf.math.is_nan),
    "LeakyRelu": lambda call, x: _leaky_relu(x, call.get("alpha", 0.01)),
    "Less": simple(tf.less),
    "LessOrEqual": simple(tf.less_equal),
    "Log": simple(tf.math.log),
    "Max": _variadic(tf.maximum),
    "Mean": _mean,
    "Min": _variadic(tf.minimum),
    "Mish": _mish,
    "Mod": _mod,
    "Mul": simple(tf.multiply),
    "Neg": simple(tf.negative),
    "Not": simple(tf.logical_not),
    "Or": simple(tf.logical_or),
    "PRelu": lambda call, x, slope: tf.where(x >= 0, x, slope * x),
    "Pow": _power,
    "Reciprocal": simple(tf.math.reciprocal),
    "Relu": simple(tf.nn.relu),
    "Round": simple(tf.round),
    "Selu": _selu,
    "Shrink": _shrink,
    "Sigmoid": simple(tf.sigmoid),
    "Sign": simple(tf.sign),
    "Sin": simple(tf.sin),
    "Sinh": simple(tf.sinh),
    "Softplus": simple(tf.math.softplus),
    "Softsign": simple(tf.nn.softsign),
    "Sqrt": simple(tf.sqrt),
    "Sub": simple(tf.subtract),
    "Sum": _variadic(tf.add),
    "Swish": _swish,
    "Tan": simple(tf.tan),
    "Tanh": simple(tf.tanh),
    "ThresholdedRelu": lambda call, x: _thresholded_relu(x, call.get("alpha", 1.0)),
    "Where": _where,
    "Xor": simple(tf.math.logical_xor),
}
