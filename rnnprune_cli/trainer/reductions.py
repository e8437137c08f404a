"""Operators along axes: reductions, softmax, normalisation.

Source of all semantics: the ONNX operator specification (onnx.ai/onnx/operators).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rnnprune_cli.trainer.call import (
    Call,
    Operator,
    Unsupported,
    Value,
    axis_of,
    integers,
    rank,
    sizes,
    tf,
)

Reduction = Callable[[Value, "list[int] | None", bool], Value]


def _reduced(function: Reduction) -> Operator:
    """Makes an operator whose axes are an attribute (earlier opsets) or the second input."""

    def operator(call: Call, x: Value, axes: Value = None) -> Value:
        given = call.get("axes") if axes is None else integers(axes, "axes")
        if not given and call.get("noop_with_empty_axes", 0):
            given = []
        elif not given:
            given = None
        return function(x, None if given is None else list(given), bool(call.get("keepdims", 1)))

    return operator


def _l2(x: Value, axes: list[int] | None, keep: bool) -> Value:
    return tf.sqrt(tf.reduce_sum(tf.square(x), axes, keep))


def _arg(function: Callable[..., Value]) -> Operator:
    def operator(call: Call, x: Value) -> Value:
        axis = axis_of(call.get("axis", 0), rank(x))
        if call.get("select_last_index", 0):
            size = tf.cast(sizes(x)[axis], tf.int64)
            found = size - 1 - function(tf.reverse(x, [axis]), axis)
        else:
            found = function(x, axis)
        return tf.expand_dims(found, axis) if call.get("keepdims", 1) else found

    return operator


def _softmax(function: Callable[..., Value]) -> Operator:
    """Before opset 13 over all axes from ``axis`` on together, since then over that axis."""

    def operator(call: Call, x: Value) -> Value:
        if call.opset >= 13:
            return function(x, call.get("axis", -1))
        axis = axis_of(call.get("axis", 1), rank(x))
        if axis == rank(x) - 1:
            return function(x, -1)
        shape = sizes(x)
        return tf.reshape(function(tf.reshape(x, [*shape[:axis], -1]), -1), shape)

    return operator


def _hardmax(x: Value, axis: int) -> Value:
    size = sizes(x)[axis]
    return tf.one_hot(tf.argmax(x, axis), size, axis=axis, dtype=x.dtype)


def _moments(x: Value, axes: Sequence[int]) -> tuple[Value, Value]:
    mean = tf.reduce_mean(x, axes, True)
    return mean, tf.reduce_mean(tf.square(x - mean), axes, True)


def _layer_normalization(call: Call, x: Value, scale: Value, bias: Value = None) -> Value:
    axes = list(range(axis_of(call.get("axis", -1), rank(x)), rank(x)))
    mean, variance = _moments(x, axes)
    inverse = tf.math.rsqrt(variance + call.get("epsilon", 1e-5))
    y = (x - mean) * inverse * scale
    y = y if bias is None else y + bias
    return (y, mean, inverse)[: call.outputs] if call.outputs > 1 else y


def _rms_normalization(call: Call, x: Value, scale: Value) -> Value:
    axes = list(range(axis_of(call.get("axis", -1), rank(x)), rank(x)))
    square = tf.reduce_mean(tf.square(x), axes, True)
    return x * tf.math.rsqrt(square + call.get("epsilon", 1e-5)) * scale


def _by_channel(x: Value, vector: Value) -> Value:
    """Shapes a value for each channel so that it multiplies ``[batch, channels, …]``."""
    return tf.reshape(vector, [-1, *[1] * (rank(x) - 2)])


def _instance_normalization(call: Call, x: Value, scale: Value, bias: Value) -> Value:
    mean, variance = _moments(x, list(range(2, rank(x))))
    y = (x - mean) * tf.math.rsqrt(variance + call.get("epsilon", 1e-5))
    return y * _by_channel(x, scale) + _by_channel(x, bias)


def _group_normalization(call: Call, x: Value, scale: Value, bias: Value) -> Value:
    """Scale and bias by group before opset 21, by channel since."""
    groups, shape = call.get("num_groups"), sizes(x)
    grouped = tf.reshape(x, [shape[0], groups, -1])
    mean, variance = _moments(grouped, [2])
    y = (grouped - mean) * tf.math.rsqrt(variance + call.get("epsilon", 1e-5))
    if call.opset < 21:
        return tf.reshape(y * scale[:, None] + bias[:, None], shape)
    return tf.reshape(y, shape) * _by_channel(x, scale) + _by_channel(x, bias)


def _batch_normalization(
    call: Call, x: Value, scale: Value, bias: Value, mean: Value, variance: Value
) -> Value:
    """As at inference: with the stored mean and variance."""
    if call.get("training_mode", 0):
        raise Unsupported("training_mode=1")
    factor = scale * tf.math.rsqrt(variance + call.get("epsilon", 1e-5))
    return x * _by_channel(x, factor) + _by_channel(x, bias - mean * factor)


def _lp_normalization(call: Call, x: Value) -> Value:
    axis = call.get("axis", -1)
    norm = tf.reduce_sum(tf.abs(x), axis, True) if call.get("p", 2) == 1 else _l2(x, [axis], True)
    return tf.math.divide_no_nan(x, norm)


def _mean_variance_normalization(call: Call, x: Value) -> Value:
    mean, variance = _moments(x, list(call.get("axes", (0, 2, 3))))
    return (x - mean) / (tf.sqrt(variance) + 1e-9)


def _global(function: Callable[..., Value]) -> Operator:
    return lambda call, x: function(x, list(range(2, rank(x))), True)


OPERATORS: dict[str, Operator] = {
    "ArgMax": _arg(tf.argmax),
    "ArgMin": _arg(tf.argmin),
    "BatchNormalization": _batch_normalization,
    "GlobalAveragePool": _global(tf.reduce_mean),
    "GlobalMaxPool": _global(tf.reduce_max),
    "GroupNormalization": _group_normalization,
    "Hardmax": _softmax(_hardmax),
    "InstanceNormalization": _instance_normalization,
    "LayerNormalization": _layer_normalization,
    "LogSoftmax": _softmax(tf.nn.log_softmax),
    "LpNormalization": _lp_normalization,
    "MeanVarianceNormalization": _mean_variance_normalization,
    "RMSNormalization": _rms_normalization,
    "ReduceL1": _reduced(lambda x, axes, keep: tf.reduce_sum(tf.abs(x), axes, keep)),
    "ReduceL2": _reduced(_l2),
    "ReduceLogSum": _reduced(lambda x, axes, keep: tf.math.log(tf.reduce_sum(x, axes, keep))),
    "ReduceLogSumExp": _reduced(tf.reduce_logsumexp),
    "ReduceMax": _reduced(tf.reduce_max),
    "ReduceMean": _reduced(tf.reduce_mean),
    "ReduceMin": _reduced(tf.reduce_min),
    "ReduceProd": _reduced(tf.reduce_prod),
    "ReduceSum": _reduced(tf.reduce_sum),
    "ReduceSumSquare": _reduced(lambda x, axes, keep: tf.reduce_sum(tf.square(x), axes, keep)),
    "Softmax": _softmax(tf.nn.softmax),
}
