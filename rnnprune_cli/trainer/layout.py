"""Operators that move, pick, repeat and make elements.

Source of all semantics: the ONNX operator specification (onnx.ai/onnx/operators).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rnnprune_cli.model import Array
from rnnprune_cli.trainer.call import (
    Call,
    Operator,
    Unsupported,
    Value,
    axis_of,
    dtype_of,
    integers,
    is_known,
    rank,
    sizes,
    tf,
)

_LIMIT = (1 << 31) - 1
"""Bounds of slices beyond any size; TensorFlow's own arithmetic on larger ones could overflow."""


def _constant(call: Call) -> Array:
    (name, value), *rest = call.attributes.items()
    if rest or name not in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        raise Unsupported(f"attribute '{name}'")
    if name == "value":
        array = value.numpy()
    else:
        array = np.array(value, np.float32 if "float" in name else np.int64)
    return np.asarray(array, call.real(array.dtype)) if array.dtype.kind == "f" else array


def _shape(call: Call, x: Value) -> Value:
    part = slice(call.get("start", 0), call.get("end", None))
    x = tf.convert_to_tensor(x)
    if x.shape.rank is not None:
        static = x.shape.as_list()[part]
        if None not in static:
            return np.array(static, np.int64)
    return tf.shape(x, tf.int64)[part]


def _size(call: Call, x: Value) -> Value:
    static = tf.convert_to_tensor(x).shape.num_elements()
    return tf.size(x, tf.int64) if static is None else np.array(static, np.int64)


def _reshape(call: Call, x: Value, shape: Value) -> Value:
    if not is_known(shape):
        if not call.get("allowzero", 0):
            count = shape.shape[0]
            own = tf.shape(x, tf.int64)
            padded = tf.concat([own, tf.ones_like(shape)], 0)[:count]
            shape = tf.where(shape == 0, padded, shape)
        return tf.reshape(x, shape)
    wanted: list[Any] = integers(shape, "sizes")
    if not call.get("allowzero", 0) and 0 in wanted:
        own = sizes(x)
        wanted = [own[k] if n == 0 else n for k, n in enumerate(wanted)]
    return tf.reshape(x, wanted)


def _flatten(call: Call, x: Value) -> Value:
    axis, own = axis_of(call.get("axis", 1), rank(x)), sizes(x)
    rows = _product(own[:axis])
    return tf.reshape(x, [rows, _product(own[axis:])])


def _product(factors: Sequence[Any]) -> Value:
    result: Any = 1
    for factor in factors:
        result = result * factor
    return result


def _axes(call: Call, axes: Value) -> list[int] | None:
    """Axes from the attribute (before opset 13) or the input."""
    if axes is not None:
        return integers(axes, "axes")
    return list(call.get("axes")) if "axes" in call.attributes else None


def _squeeze(call: Call, x: Value, axes: Value = None) -> Value:
    return tf.squeeze(x, _axes(call, axes))


def _unsqueeze(call: Call, x: Value, axes: Value = None) -> Value:
    given = _axes(call, axes) or []
    total = rank(x) + len(given)
    for axis in sorted(axis_of(a, total) for a in given):
        x = tf.expand_dims(x, axis)
    return x


def _transpose(call: Call, x: Value) -> Value:
    return tf.transpose(x, call.get("perm"))


def _concat(call: Call, *inputs: Value) -> Value:
    return tf.concat(inputs, call.get("axis"))


def _split(call: Call, x: Value, parts: Value = None) -> list[Value]:
    axis = axis_of(call.get("axis", 0), rank(x))
    given = call.get("split") if parts is None else integers(parts, "sizes of parts")
    if given is None:
        count = call.get("num_outputs", call.outputs)
        whole = sizes(x)[axis]
        size = -(-whole // count)
        given = [size] * (count - 1) + [whole - size * (count - 1)]
    return list(tf.split(x, tf.stack(list(given)), axis, len(given)))


def _slice(
    call: Call, x: Value, starts: Value = None, ends: Value = None, axes: Value = None,
    steps: Value = None,
) -> Value:  # fmt: skip
    """Attributes before opset 10, inputs since."""
    if starts is None:
        starts, ends = np.array(call.get("starts")), np.array(call.get("ends"))
    count = rank(x)
    dims = _axes(call, axes)
    if dims is None:
        dims = list(range(sizes(starts)[0]))
    strides = [1] * len(dims) if steps is None else integers(steps, "steps")
    begin: list[Any] = [0] * count
    end: list[Any] = [0] * count
    stride = [1] * count
    untouched = (1 << count) - 1
    for k, axis in enumerate(axis_of(a, count) for a in dims):
        begin[axis], end[axis] = (_bound(b, k) for b in (starts, ends))
        stride[axis] = strides[k]
        untouched &= ~(1 << axis)
    return tf.strided_slice(
        x,
        tf.stack(begin),
        tf.stack(end),
        tf.constant(stride, tf.stack(begin).dtype),
        begin_mask=untouched,
        end_mask=untouched,
    )


def _bound(bounds: Value, k: int) -> Value:
    if is_known(bounds):
        return int(np.clip(bounds.reshape(-1)[k], -_LIMIT, _LIMIT))
    return tf.cast(tf.clip_by_value(bounds[k], -_LIMIT, _LIMIT), tf.int32)


def _wrapped(indices: Value, size: Value) -> Value:
    """Returns indices, of which negative ones count from the end, counted from the front."""
    if is_known(indices) and (indices >= 0).all():
        return indices
    return tf.where(indices < 0, indices + tf.cast(size, indices.dtype), indices)


def _gather(call: Call, x: Value, indices: Value) -> Value:
    axis = axis_of(call.get("axis", 0), rank(x))
    return tf.gather(x, _wrapped(indices, sizes(x)[axis]), axis=axis)


def _places(indices: Value, axis: int) -> Value:
    """Turns indices along one axis into full indices, ``[*indices.shape, axes]``."""
    ranges = [tf.range(tf.cast(n, indices.dtype)) for n in sizes(indices)]
    grid = tf.meshgrid(*ranges, indexing="ij")
    grid[axis] = tf.convert_to_tensor(indices)
    return tf.stack(grid, -1)


def _gather_elements(call: Call, x: Value, indices: Value) -> Value:
    axis = axis_of(call.get("axis", 0), rank(x))
    return tf.gather_nd(x, _places(_wrapped(indices, sizes(x)[axis]), axis))


def _all_wrapped(x: Value, indices: Value, batch: int = 0) -> Value:
    depth = tf.convert_to_tensor(indices).shape[-1]
    shape = tf.cast(tf.shape(x)[batch : batch + depth], indices.dtype)
    return tf.where(indices < 0, indices + shape, indices)


def _gather_nd(call: Call, x: Value, indices: Value) -> Value:
    batch = call.get("batch_dims", 0)
    return tf.gather_nd(x, _all_wrapped(x, indices, batch), batch_dims=batch)


_SCATTER = {
    "none": tf.tensor_scatter_nd_update,
    "add": tf.tensor_scatter_nd_add,
    "max": tf.tensor_scatter_nd_max,
    "min": tf.tensor_scatter_nd_min,
}


def _scattered(call: Call, x: Value, places: Value, updates: Value) -> Value:
    reduction = call.get("reduction", "none")
    if reduction not in _SCATTER:
        raise Unsupported(f"reduction '{reduction}'")
    return _SCATTER[reduction](x, places, updates)


def _scatter_elements(call: Call, x: Value, indices: Value, updates: Value) -> Value:
    axis = axis_of(call.get("axis", 0), rank(x))
    return _scattered(call, x, _places(_wrapped(indices, sizes(x)[axis]), axis), updates)


def _scatter_nd(call: Call, x: Value, indices: Value, updates: Value) -> Value:
    return _scattered(call, x, _all_wrapped(x, indices), updates)


def _expand(call: Call, x: Value, shape: Value) -> Value:
    own = tf.convert_to_tensor(x).shape
    if is_known(shape) and own.is_fully_defined():
        return tf.broadcast_to(x, np.broadcast_shapes(tuple(own), tuple(shape.tolist())))
    given = tf.cast(shape, tf.int32)
    if own.num_elements() == 1 and given.shape.rank and (given.shape[0] or 0) >= own.rank:
        return tf.broadcast_to(x, given)  # converters know no BroadcastArgs
    return tf.broadcast_to(x, tf.broadcast_dynamic_shape(tf.shape(x), given))


def _tile(call: Call, x: Value, repeats: Value) -> Value:
    return tf.tile(x, repeats)


def _pad(
    call: Call, x: Value, pads: Value = None, value: Value = None, axes: Value = None
) -> Value:
    """Attributes before opset 11, inputs since; negative pads cut."""
    mode, count = call.get("mode", "constant"), rank(x)
    if pads is None:
        pads, value = np.array(call.get("pads")), call.get("value", 0.0)
    dims = list(range(count))
    if axes is not None:
        dims = [axis_of(a, count) for a in integers(axes, "axes")]
    if not is_known(pads):
        if mode != "constant" or len(dims) < count:
            raise Unsupported("pads that depend on the data")
        filler = tf.cast(0 if value is None else value, x.dtype)
        return tf.pad(x, tf.transpose(tf.reshape(pads, [2, count])), constant_values=filler)
    around = np.zeros((count, 2), int)
    around[dims] = np.reshape(pads, (2, len(dims))).T
    cut = np.minimum(around, 0)
    if cut.any():
        ends = [None if e == 0 else int(e) for e in cut[:, 1]]
        x = x[tuple(slice(-int(s), e) for s, e in zip(cut[:, 0], ends, strict=True))]
    around = np.maximum(around, 0)
    if mode == "constant":
        filler = tf.cast(0 if value is None else tf.reshape(value, []), x.dtype)
        return tf.pad(x, around, constant_values=filler)
    if mode not in ("reflect", "edge", "wrap"):
        raise Unsupported(f"mode '{mode}'")
    for axis in np.flatnonzero(around.any(axis=1)):
        size = sizes(x)[axis]
        places = tf.range(-int(around[axis, 0]), size + int(around[axis, 1]))
        if mode == "wrap":
            places = tf.math.floormod(places, size)
        elif mode == "edge":
            places = tf.clip_by_value(places, 0, size - 1)
        else:  # 0 1 2 3 2 1 0 1 …
            period = tf.maximum(2 * size - 2, 1)
            places = tf.math.floormod(places, period)
            places = tf.minimum(places, period - places)
        x = tf.gather(x, places, axis=int(axis))
    return x


def _constant_of_shape(call: Call, shape: Value) -> Value:
    tensor = call.get("value")
    value = np.zeros(1, np.float32) if tensor is None else tensor.numpy()
    dtype = call.real(value.dtype) if value.dtype.kind == "f" else value.dtype
    return tf.fill(shape, tf.constant(value.reshape(()), dtype))


def _eye_like(call: Call, x: Value) -> Value:
    rows, columns = sizes(x)
    dtype = call.dtype(call.get("dtype")) if "dtype" in call.attributes else dtype_of(x)
    offset = call.get("k", 0)
    place = tf.range(columns)[None] - tf.range(rows)[:, None]
    return tf.cast(place == offset, dtype)


def _range(call: Call, start: Value, limit: Value, delta: Value) -> Value:
    return tf.range(*(tf.reshape(v, []) for v in (start, limit, delta)))


def _one_hot(call: Call, indices: Value, depth: Value, values: Value) -> Value:
    count = tf.cast(tf.reshape(depth, []), tf.int64)
    places = _wrapped(tf.cast(indices, tf.int64), count)
    axis = axis_of(call.get("axis", -1), rank(indices) + 1)
    hot = tf.one_hot(places, tf.cast(count, tf.int32), True, False, axis, tf.bool)
    return tf.where(hot, values[1], values[0])


def _non_zero(call: Call, x: Value) -> Value:
    return tf.transpose(tf.where(tf.cast(x, tf.bool)))


def _compress(call: Call, x: Value, condition: Value) -> Value:
    axis = call.get("axis")
    if axis is None:
        x, axis = tf.reshape(x, [-1]), 0
    places = tf.reshape(tf.where(condition), [-1])
    return tf.gather(x, places, axis=axis_of(axis, rank(x)))


def _reverse_sequence(call: Call, x: Value, lengths: Value) -> Value:
    return tf.reverse_sequence(x, lengths, call.get("time_axis", 0), call.get("batch_axis", 1))


def _trilu(call: Call, x: Value, k: Value = None) -> Value:
    """Zero elsewhere, even where there were NaN or infinite values."""
    offset = 0 if k is None else tf.cast(tf.reshape(k, []), tf.int32)
    *_, rows, columns = sizes(x)
    place = tf.range(columns)[None] - tf.range(rows)[:, None]
    kept = place >= offset if call.get("upper", 1) else place <= offset
    return tf.where(kept, x, tf.zeros_like(x))


def _depth_to_space(call: Call, x: Value) -> Value:
    n, c, h, w = sizes(x)
    b = call.get("blocksize")
    if call.get("mode", "DCR") == "DCR":
        parts, order = [n, b, b, c // (b * b), h, w], [0, 3, 4, 1, 5, 2]
    else:
        parts, order = [n, c // (b * b), b, b, h, w], [0, 1, 4, 2, 5, 3]
    return tf.reshape(tf.transpose(tf.reshape(x, parts), order), [n, c // (b * b), h * b, w * b])


def _space_to_depth(call: Call, x: Value) -> Value:
    n, c, h, w = sizes(x)
    b = call.get("blocksize")
    split = tf.reshape(x, [n, c, h // b, b, w // b, b])
    order = [0, 3, 5, 1, 2, 4] if call.get("mode", "DCR") == "DCR" else [0, 1, 3, 5, 2, 4]
    return tf.reshape(tf.transpose(split, order), [n, c * b * b, h // b, w // b])


def _top_k(call: Call, x: Value, k: Value = None) -> tuple[Value, Value]:
    axis = axis_of(call.get("axis", -1), rank(x))
    order = [a for a in range(rank(x)) if a != axis] + [axis]
    count = call.get("k") if k is None else tf.cast(tf.reshape(k, []), tf.int32)
    moved = tf.transpose(x, order)
    sign = 1 if call.get("largest", 1) else -1
    values, places = tf.math.top_k(sign * moved, count, sorted=True)
    back = [order.index(a) for a in range(rank(x))]
    return tf.transpose(sign * values, back), tf.transpose(tf.cast(places, tf.int64), back)


def _cum_sum(call: Call, x: Value, axis: Value) -> Value:
    along = integers(axis, "axes")[0]
    exclusive, reverse = bool(call.get("exclusive", 0)), bool(call.get("reverse", 0))
    return tf.cumsum(x, along, exclusive, reverse)


OPERATORS: dict[str, Operator] = {
    "Compress": _compress,
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "CumSum": _cum_sum,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "EyeLike": _eye_like,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "NonZero": _non_zero,
    "OneHot": _one_hot,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "ReverseSequence": _reverse_sequence,
    "Scatter": _scatter_elements,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "TopK": _top_k,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
}
