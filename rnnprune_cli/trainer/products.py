"""Operators that multiply and add up: matrix products, convolutions, pooling.

TensorFlow's CPU kernels take images with the channels last, so values are turned around them.

Source of all semantics: the ONNX operator specification (onnx.ai/onnx/operators).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rnnprune_cli.trainer.call import Call, Operator, Unsupported, Value, dtype_of, rank, sizes, tf
from rnnprune_cli.trainer.elementwise import add


def _mat_mul(call: Call, a: Value, b: Value) -> Value:
    one, two = rank(a) == 1, rank(b) == 1
    left = tf.expand_dims(a, 0) if one else a
    right = tf.expand_dims(b, -1) if two else b
    if rank(left) > 2 and rank(right) == 2:  # one large product instead of a batch of them
        *outer, inner = sizes(left)
        flat = tf.matmul(tf.reshape(left, [-1, inner]), right)
        product = tf.reshape(flat, [*outer, sizes(right)[1]])
    else:
        product = tf.matmul(left, right)
    product = tf.squeeze(product, -1) if two else product
    return tf.squeeze(product, -1 if two else -2) if one else product


def _gemm(call: Call, a: Value, b: Value, c: Value = None) -> Value:
    product = tf.matmul(
        a, b, transpose_a=bool(call.get("transA", 0)), transpose_b=bool(call.get("transB", 0))
    )
    if (alpha := call.get("alpha", 1.0)) != 1:
        product = tf.cast(alpha, product.dtype) * product
    if c is None:
        return product
    beta = call.get("beta", 1.0)
    return add(product, c if beta == 1 else tf.cast(beta, product.dtype) * c)


def _einsum(call: Call, *inputs: Value) -> Value:
    return tf.einsum(call.get("equation"), *inputs)


def _spatial(call: Call, name: str, axes: int, default: int = 1) -> list[int]:
    return list(call.get(name, [default] * axes))


def _padding(
    call: Call, x: Value, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[tuple[Value, Value]]:
    """Returns what is added before and after each spatial axis, from pads or auto_pad.

    ``ceil_mode`` of pooling adds as much at the end as the last window needs; a window that would
    begin in what is added there is left out.
    """
    axes, auto = len(kernel), call.get("auto_pad", "NOTSET")
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
    shape = sizes(x)[2:]
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        around = []
        for k, stride in enumerate(strides):
            steps = -(-shape[k] // stride)
            total = _larger((steps - 1) * stride + reach[k] - shape[k], 0)
            small, large = total // 2, total - total // 2
            around.append((small, large) if auto == "SAME_UPPER" else (large, small))
        return around
    pads = [0] * (2 * axes) if auto == "VALID" else list(call.get("pads", [0] * (2 * axes)))
    around = list(zip(pads[:axes], pads[axes:], strict=True))
    if call.get("ceil_mode", 0):
        for k, (before, after) in enumerate(around):
            begins = shape[k] + before - 1  # where the last window may begin
            last = -(-(shape[k] + before + after - reach[k]) // strides[k]) * strides[k]
            last = _smaller(last, begins // strides[k] * strides[k])
            around[k] = (before, after + _larger(last + reach[k] - shape[k] - before - after, 0))
    return around


def _larger(a: Value, b: Value) -> Value:
    """The larger of two sizes, which may be integers or tensors."""
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else tf.maximum(a, b)


def _smaller(a: Value, b: Value) -> Value:
    return -_larger(-a, -b)


def _channels_last(x: Value) -> Value:
    return tf.transpose(x, [0, *range(2, rank(x)), 1])


def _channels_first(x: Value) -> Value:
    return tf.transpose(x, [0, rank(x) - 1, *range(1, rank(x) - 1)])


def _convolve(
    x: Value,
    w: Value,
    groups: int,
    strides: Sequence[int],
    dilations: Sequence[int],
    around: Sequence[tuple[Value, Value]],
) -> Value:
    """Convolves x ``[batch, channels, …]`` with w ``[outputs, channels / groups, …]``."""
    axes = rank(w) - 2
    if not 1 <= axes <= 3:
        raise Unsupported(f"{axes} spatial axes")
    x = tf.pad(_channels_last(x), [(0, 0), *around, (0, 0)])
    w = tf.transpose(w, [*range(2, axes + 2), 1, 0])  # […, channels / groups, outputs]
    apart = any(s > 1 for s in strides) and any(d > 1 for d in dilations)
    stride = [1] * axes if apart else list(strides)  # TensorFlow does not do both at once

    def one(part: Value, kernel: Value) -> Value:
        return tf.nn.convolution(part, kernel, stride, "VALID", dilations=list(dilations))

    channels = w.shape[-2]
    if groups == 1:
        y = one(x, w)
    elif channels == 1 and axes <= 2 and len(set(stride)) == 1:
        y = _depthwise(x, w, groups, stride, dilations)
    else:
        parts = zip(tf.split(x, groups, -1), tf.split(w, groups, -1), strict=True)
        y = tf.concat([one(part, kernel) for part, kernel in parts], -1)
    return _channels_first(_every(y, strides) if apart else y)


def _depthwise(
    x: Value, w: Value, groups: int, strides: Sequence[int], dilations: Sequence[int]
) -> Value:
    """A group for each channel: TensorFlow's own kernel, for images of one or two axes."""
    flat = rank(w) == 3
    if flat:
        x, w = x[:, None], w[None]
    height, width, _, outputs = sizes(w)
    w = tf.reshape(w, [height, width, groups, outputs // groups])
    dilation = [1, *dilations] if flat else list(dilations)
    y = tf.nn.depthwise_conv2d(x, w, [1, strides[0], strides[0], 1], "VALID", dilations=dilation)
    return y[:, 0] if flat else y


def _conv(call: Call, x: Value, w: Value, b: Value = None) -> Value:
    kernel = [int(n) for n in w.shape[2:]]
    strides = _spatial(call, "strides", len(kernel))
    dilations = _spatial(call, "dilations", len(kernel))
    around = _padding(call, x, kernel, strides, dilations)
    y = _convolve(x, w, call.get("group", 1), strides, dilations, around)
    return y if b is None else y + tf.reshape(b, [-1, *[1] * len(kernel)])


def _conv_transpose(call: Call, x: Value, w: Value, b: Value = None) -> Value:
    """A convolution of the input, with zeros between its elements, with the turned kernel."""
    kernel = [int(n) for n in w.shape[2:]]
    axes, groups = len(kernel), call.get("group", 1)
    strides, dilations = (_spatial(call, n, axes) for n in ("strides", "dilations"))
    extra = _spatial(call, "output_padding", axes, 0)
    reach = [d * (k - 1) for k, d in zip(kernel, dilations, strict=True)]
    auto = call.get("auto_pad", "NOTSET")
    pads = [0] * (2 * axes) if auto == "VALID" else list(call.get("pads", [0] * (2 * axes)))
    wanted = call.get("output_shape")
    shape = x.shape.as_list()[2:]
    if auto.startswith("SAME") or wanted is not None:
        for k in range(axes):
            if shape[k] is None:
                raise Unsupported("an output size along an axis of unknown size")
            size = shape[k] * strides[k] if wanted is None else wanted[-axes:][k]
            total = strides[k] * (shape[k] - 1) + extra[k] + reach[k] + 1 - size
            first = total // 2 if auto == "SAME_UPPER" else total - total // 2
            first = max(first, 0)  # a larger output gets its zeros at the end
            pads[k], pads[axes + k] = first, total - first
    spread = _channels_last(x)
    for k, stride in enumerate(strides):
        if stride > 1:
            spread = _spread(spread, k + 1, stride)
    # [inputs, outputs / groups, …] → [outputs, inputs / groups, …], turned around
    outputs = int(w.shape[1])
    turned = tf.reverse(w, list(range(2, axes + 2)))
    turned = tf.reshape(turned, [groups, -1, outputs, *kernel])
    turned = tf.transpose(turned, [0, 2, 1, *range(3, axes + 3)])
    turned = tf.reshape(turned, [groups * outputs, -1, *kernel])
    around = [(reach[k] - pads[k], reach[k] - pads[axes + k] + extra[k]) for k in range(axes)]
    cut = [(max(-s, 0), max(-e, 0)) for s, e in around]
    around = [(max(s, 0), max(e, 0)) for s, e in around]
    y = _convolve(_channels_first(spread), turned, groups, [1] * axes, dilations, around)
    inside = tuple(slice(s, -e or None) for s, e in [(0, 0), (0, 0), *cut])
    y = y[inside]
    return y if b is None else y + tf.reshape(b, [-1, *[1] * axes])


def _spread(x: Value, axis: int, stride: int) -> Value:
    """Puts ``stride - 1`` zeros between the elements along an axis."""
    shape = sizes(x)
    wide = tf.expand_dims(x, axis + 1)
    wide = tf.pad(wide, [(0, stride - 1 if k == axis + 1 else 0) for k in range(rank(wide))])
    flat = tf.reshape(wide, [*shape[:axis], shape[axis] * stride, *shape[axis + 1 :]])
    size = shape[axis] * stride - (stride - 1)
    inside = (*[slice(None)] * axis, slice(0, size))
    return flat[inside]


def _max_pool(call: Call, x: Value) -> Value:
    if call.outputs > 1:
        raise Unsupported("output 'Indices'")
    kernel = list(call.get("kernel_shape"))
    strides = _spatial(call, "strides", len(kernel))
    dilations = _spatial(call, "dilations", len(kernel))
    around = _padding(call, x, kernel, strides, dilations)
    dtype = dtype_of(x)
    low = -np.inf if dtype.kind == "f" else np.iinfo(dtype).min
    padded = tf.pad(_channels_last(x), [(0, 0), *around, (0, 0)], constant_values=low)
    return _channels_first(_pooled(padded, "MAX", kernel, strides, dilations))


def _average_pool(call: Call, x: Value) -> Value:
    """Padding counts only with ``count_include_pad``, what ``ceil_mode`` adds never."""
    kernel = list(call.get("kernel_shape"))
    strides = _spatial(call, "strides", len(kernel))
    dilations = _spatial(call, "dilations", len(kernel))
    around = _padding(call, x, kernel, strides, dilations)
    last = _channels_last(x)
    ones = tf.ones_like(last[..., :1])
    if call.get("count_include_pad", 0):
        given = list(call.get("pads", [0] * (2 * len(kernel))))
        own = list(zip(given[: len(kernel)], given[len(kernel) :], strict=True))
        if call.get("auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER"):
            own = around
        ones = tf.pad(ones, [(0, 0), *own, (0, 0)], constant_values=1.0)
        more = [(0, a[1] - o[1]) for a, o in zip(around, own, strict=True)]
        ones = tf.pad(ones, [(0, 0), *more, (0, 0)])
    else:
        ones = tf.pad(ones, [(0, 0), *around, (0, 0)])
    padded = tf.pad(last, [(0, 0), *around, (0, 0)])
    total, count = (_pooled(v, "AVG", kernel, strides, dilations) for v in (padded, ones))
    return _channels_first(total / count)


def _pooled(
    x: Value, kind: str, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> Value:
    apart = any(s > 1 for s in strides) and any(d > 1 for d in dilations)
    apart = apart or any(s > k for s, k in zip(strides, kernel, strict=True))
    stride = [1] * len(kernel) if apart else list(strides)
    y = tf.nn.pool(x, list(kernel), kind, stride, "VALID", dilations=list(dilations))
    return _every(y, strides) if apart else y


def _every(x: Value, strides: Sequence[int]) -> Value:
    """Picks every so manieth place along the axes after the first."""
    picked = tuple(slice(None, None, stride) for stride in (1, *strides))
    return x[picked]


OPERATORS: dict[str, Operator] = {
    "AveragePool": _average_pool,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Einsum": _einsum,
    "Gemm": _gemm,
    "MatMul": _mat_mul,
    "MaxPool": _max_pool,
}
