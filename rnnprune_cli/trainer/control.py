"""If, Loop and Scan.

Source of all semantics: the ONNX operator specification (onnx.ai/onnx/operators).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir

from rnnprune_cli.trainer.call import Call, Operator, Unsupported, Value, is_known, tf

_ENDLESS = (1 << 31) - 1


def _tensors(values: Sequence[Value]) -> list[Value]:
    return [tf.convert_to_tensor(value) for value in values]


def _if(call: Call, condition: Value) -> list[Value]:
    then, other = call.get("then_branch"), call.get("else_branch")
    if is_known(condition):
        return call.run(then if condition.item() else other, [])

    def results(branch: ir.Graph) -> Callable[[], dict[int, Value]]:
        return lambda: dict(enumerate(_tensors(call.run(branch, []))))

    found = tf.cond(tf.reshape(condition, []), results(then), results(other))
    return [found[k] for k in range(len(found))]


def _loop(call: Call, trips: Value = None, condition: Value = None, *carried: Value) -> list[Value]:
    """Runs the body while the condition holds, at most ``trips`` times.

    The number of axes of carried values must stay; their sizes may change.
    """
    body = call.get("body")
    limit = _ENDLESS if trips is None else tf.cast(tf.reshape(trips, []), tf.int32)
    if is_known(trips):
        limit = int(min(trips.item(), _ENDLESS))
    going = True if condition is None else tf.reshape(condition, [])

    def run(t: Value, states: Sequence[Value]) -> tuple[Value, list[Value], list[Value]]:
        goes_on, *rest = call.run(body, [tf.cast(t, tf.int64), tf.constant(True), *states])
        return tf.reshape(goes_on, []), rest[: len(carried)], rest[len(carried) :]

    count = len(body.outputs) - 1 - len(carried)
    return _iterate(call, run, limit, going, list(carried), count)


def _iterate(
    call: Call,
    run: Callable[[Value, Sequence[Value]], tuple[Value, list[Value], list[Value]]],
    limit: Value,
    going: Value,
    carried: list[Value],
    count: int,
) -> list[Value]:
    """Repeats a body.

    Args:
        call: The node.
        run: ``(iteration, states) → whether to go on, states, what is collected``.
        limit: Most iterations.
        going: Whether there is a first one.
        carried: Initial states.
        count: How many values are collected.

    Returns:
        The last states and what was collected, stacked on a new first axis.
    """
    states = _tensors(carried)
    kinds = _collected(call, count)
    arrays = [
        tf.TensorArray(dtype, 0, dynamic_size=True, infer_shape=False, element_shape=shape)
        for dtype, shape in kinds
    ]

    def body(t: Value, _: Value, states: list[Value], arrays: list[Value]) -> tuple[Any, ...]:
        goes_on, new, made = run(t, states)
        written = [a.write(t, m) for a, m in zip(arrays, made, strict=True)]
        return t + 1, tf.convert_to_tensor(goes_on), _tensors(new), written

    loose = [tf.TensorShape([None] * s.shape.rank) if s.shape.rank else s.shape for s in states]
    scalar = tf.TensorShape([])
    _, _, states, arrays = tf.while_loop(
        lambda t, goes_on, *_: goes_on & (t < limit),
        body,
        (tf.constant(0), tf.convert_to_tensor(going), states, arrays),
        shape_invariants=(scalar, scalar, loose, [tf.TensorShape(None)] * count),
    )
    return [*states, *(array.stack() for array in arrays)]


def _collected(call: Call, count: int) -> list[tuple[Any, Any]]:
    """Returns type and shape of what each iteration adds to the collected values."""
    body = call.get("body")
    kinds = []
    for value in list(body.outputs)[len(body.outputs) - count :]:
        if value.dtype is None:
            raise Unsupported(f"a collected value '{value.name}' of unknown type")
        dtype = call.dtype(value.dtype.value)
        dims = (
            None
            if value.shape is None
            else [d if isinstance(d, int) else None for d in value.shape]
        )
        kinds.append((dtype, tf.TensorShape(dims)))
    return kinds


def _scan(call: Call, *inputs: Value) -> list[Value]:
    """Runs the body once for each slice of the scanned inputs."""
    if call.opset < 9:
        raise Unsupported("the batches of opset 8")
    body, scanned = call.get("body"), call.get("num_scan_inputs")
    carried, given = list(inputs[: len(inputs) - scanned]), inputs[len(inputs) - scanned :]
    axes = call.get("scan_input_axes", [0] * scanned)
    backward = call.get("scan_input_directions", [0] * scanned)
    arrays = [
        _first_axis(tf.convert_to_tensor(x), axis, bool(back))
        for x, axis, back in zip(given, axes, backward, strict=True)
    ]
    steps = tf.shape(arrays[0])[0]
    count = len(body.outputs) - len(carried)

    def run(t: Value, states: Sequence[Value]) -> tuple[Value, list[Value], list[Value]]:
        made = call.run(body, [*states, *(array[t] for array in arrays)])
        return True, made[: len(carried)], made[len(carried) :]

    found = _iterate(call, run, steps, True, carried, count)
    states, collected = found[: len(carried)], found[len(carried) :]
    out_axes = call.get("scan_output_axes", [0] * count)
    out_backward = call.get("scan_output_directions", [0] * count)
    for k, (axis, back) in enumerate(zip(out_axes, out_backward, strict=True)):
        value = tf.reverse(collected[k], [0]) if back else collected[k]
        order = list(range(1, value.shape.rank))
        order.insert(axis + value.shape.rank if axis < 0 else axis, 0)
        collected[k] = tf.transpose(value, order) if axis else value
    return [*states, *collected]


def _first_axis(x: Value, axis: int, backward: bool) -> Value:
    axis = axis + x.shape.rank if axis < 0 else axis
    order = [axis, *(k for k in range(x.shape.rank) if k != axis)]
    x = tf.transpose(x, order) if axis else x
    return tf.reverse(x, [0]) if backward else x


OPERATORS: dict[str, Operator] = {"If": _if, "Loop": _loop, "Scan": _scan}
