"""How operators hand labels on: layout, element by element, reductions, normalisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from rnnprune_cli.coupling.classes import IntArray
from rnnprune_cli.graph import input_of
from rnnprune_cli.layout import ONE, Linear, number, product

if TYPE_CHECKING:
    from rnnprune_cli.coupling import Coupling

Rule = Callable[["Coupling", ir.Node], None]


def only_first(c: Coupling, node: ir.Node) -> tuple[ir.Value, IntArray, int] | None:
    """Returns the first input and its labels; blocks if another input has labels."""
    value = node.inputs[0] if node.inputs else None
    labels = c.of(value)
    if value is None or labels is None or any(c.of(v) is not None for v in node.inputs[1:]):
        c.block(node, "units reach it where it takes no data")
        return None
    return value, labels.array, labels.axis


def of_first(rule: Callable[[Coupling, ir.Node, IntArray, int], None]) -> Rule:
    """Makes a rule of one that looks at the labels of the first input and their unit axis only."""

    def checked(c: Coupling, node: ir.Node) -> None:
        found = only_first(c, node)
        if found is not None:
            rule(c, node, found[1], found[2])

    return checked


def same(c: Coupling, node: ir.Node) -> None:
    """The output has the input's shape, and each element depends on one."""
    if (found := only_first(c, node)) is not None:
        for output in node.outputs:
            c.give(output, found[1], found[2], node)


def nothing(c: Coupling, node: ir.Node) -> None:
    """The output is a size, which the rewrite keeps as it was."""


def elementwise(c: Coupling, node: ir.Node) -> None:
    """Operands are broadcast against each other."""
    ranks = [c.rank(v) for v in node.inputs if v is not None]
    known = [(k, found) for k, v in enumerate(node.inputs) if (found := c.of(v)) is not None]
    if None in ranks:
        c.block(node, "the number of axes of an operand is not known")
        return
    ndim = max(r for r in ranks if r is not None)
    aligned = [
        (
            found.array.reshape((1,) * (ndim - found.array.ndim) + found.array.shape),
            found.axis + ndim - found.array.ndim,
        )
        for _, found in known
    ]
    axis = aligned[0][1]
    sizes = {array.shape[own] for array, own in aligned}
    if any(own != axis for _, own in aligned) or len(sizes) > 1:
        c.block(node, "units meet here along different axes")
        return
    joint: IntArray = aligned[0][0]
    for array, _ in aligned[1:]:
        c.classes.join(joint, array)
        joint = np.broadcast_to(joint, np.broadcast_shapes(joint.shape, array.shape))
    for index, value in enumerate(node.inputs):
        if value is None or c.of(value) is not None:
            continue
        joint = meets(c, node, index, value, joint, axis)
    for output in node.outputs:
        c.give(output, joint, axis, node)


def meets(
    c: Coupling, node: ir.Node, index: int, value: ir.Value, array: IntArray, axis: int
) -> IntArray:
    """Cuts an operand without labels that is broadcast against labels, if it is that long.

    Returns:
        The labels, tied along axes that the operand has only one place for.
    """
    own = c.rank(value)
    if own is None:
        c.block(node, "the number of axes of an operand is not known", labels=array)
        return array
    place = axis - array.ndim + own
    if place < 0:
        return array
    size = c.size(value, place)
    if size == 1:
        return array
    if size != array.shape[axis]:
        c.block(node, "the size of an operand along the units is not known", labels=array)
        return array
    if c.constant(value) is None:
        # Every place along another axis would need a selection of its own.
        for other in range(array.ndim):
            if other != axis and array.shape[other] > 1:
                inner = other - array.ndim + own
                if inner < 0 or c.size(value, inner) != array.shape[other]:
                    array = c.tied(array, other)
    shape = array.shape
    if any(shape[k] != 1 for k in range(array.ndim - own)):
        # The constant gets the axes that tell the units apart.
        c.cut(node, index, array, axis, "element")
    else:
        c.cut(node, index, array.reshape(shape[array.ndim - own :]), place, "element")
    return array


def transpose(c: Coupling, node: ir.Node) -> None:
    """Moves axes."""
    if (found := only_first(c, node)) is not None:
        _, array, axis = found
        order = list(node.attributes.get_ints("perm", ()) or range(array.ndim)[::-1])
        c.give(node.outputs[0], array.transpose(order), order.index(axis), node)


def squeeze(c: Coupling, node: ir.Node) -> None:
    """Drops axes of size 1."""
    found = only_first(c, node)
    if found is None:
        return
    value, array, axis = found
    axes = c.layout.axes(node, array.ndim)
    if axes is None:
        sizes = [c.size(value, k) for k in range(array.ndim)]
        if None in sizes or len(node.inputs) > 1:
            c.block(node, "its axes are not known")
            return
        axes = [k for k, size in enumerate(sizes) if size == 1]
    if any(array.shape[k] != 1 for k in axes):
        c.block(node, "it drops an axis of units")
        return
    c.give(
        node.outputs[0], np.squeeze(array, tuple(axes)), axis - sum(k < axis for k in axes), node
    )


@of_first
def unsqueeze(c: Coupling, node: ir.Node, array: IntArray, axis: int) -> None:
    """Adds axes of size 1."""
    count = len(node.attributes.get_ints("axes", ())) or (
        0 if (given := c.layout.constant_ints(input_of(node, 1))) is None else len(given)
    )
    axes = c.layout.axes(node, array.ndim + count)
    if axes is None or not count:
        c.block(node, "its axes are not known")
        return
    new = np.expand_dims(array, tuple(axes))
    left = [k for k in range(new.ndim) if k not in axes]
    c.give(node.outputs[0], new, left[axis], node)


def reshape(c: Coupling, node: ir.Node) -> None:
    """Splits and joins axes; those of units must be taken apart and put together whole."""
    found = only_first(c, node)
    if found is None:
        return
    value, array, axis = found
    before = [c.layout.dimension(value, k) or {("unknown", k): 1} for k in range(array.ndim)]
    before = [number(n) if n > 1 else size for n, size in zip(array.shape, before, strict=True)]
    after = target_sizes(c, node, value, before)
    if after is None:
        c.block(node, "its target shape is not known")
        return
    moved = _reshaped(c, array, axis, before, after) or _wrapped(c, array, axis, after)
    if moved is None:
        c.block(node, "it mixes units with another axis")
        return
    c.give(node.outputs[0], moved[0], moved[1], node)


def target_sizes(
    c: Coupling, node: ir.Node, value: ir.Value, before: list[Linear]
) -> list[Linear] | None:
    """Returns the sizes that a Reshape or Flatten makes; an unknown one is a symbol of its own."""
    output = node.outputs[0]
    if node.op_type == "Flatten":
        at = node.attributes.get_int("axis", 1) or 0
        at += len(before) if at < 0 else 0
        return [product(before[:at]), product(before[at:])]
    sizes = c.layout.reshaped(node, before)
    if sizes is None:
        ndim = c.rank(output)
        if ndim is None:
            return None
        sizes = [c.layout.dimension(output, k) for k in range(ndim)]
    return [{("output", k): 1} if size is None else size for k, size in enumerate(sizes)]


def _reshaped(
    c: Coupling, array: IntArray, axis: int, before: list[Linear], after: list[Linear]
) -> tuple[IntArray, int] | None:
    """Follows labels through a Reshape; None where units and others are mixed."""
    full: list[int] = []
    shape: list[int] = []
    unit: tuple[int, ...] = ()
    for old, new in _parts(before, after):
        for k in old if axis in old else ():
            # Elements of an axis behind stand between units; theirs must stay side by side.
            if k > axis and array.shape[k] > 1:
                array = c.tied(array, k)
        inner = [array.shape[k] for k in old]
        if max(inner, default=1) == 1:
            full += inner
            shape += [1] * len(new)
            continue
        if len(old) > 1 or len(new) > 1:
            sizes = [
                [side[k].get(ONE, 0) for k in axes] for side, axes in ((before, old), (after, new))
            ]
            if any(set(before[k]) - {ONE} for k in old) or any(set(after[k]) - {ONE} for k in new):
                return None
            inner, made = sizes
        else:
            made = inner
        if axis in old:
            unit = tuple(range(len(shape), len(shape) + len(new)))
        full += inner
        shape += made
    result = np.broadcast_to(array, full).reshape(shape)
    # The axis that becomes shorter is the last along which the labels differ.
    for k in reversed(unit):
        if result.shape[k] > 1 and (np.diff(result, axis=k) != 0).any():
            return result, k
    return None


def _wrapped(
    c: Coupling, array: IntArray, axis: int, after: list[Linear]
) -> tuple[IntArray, int] | None:
    """Follows units through a Reshape that puts rows of the last axis side by side, or parts them.

    Where the last axis becomes a multiple as long, or a part, its places are those of the units
    over and over, whatever becomes of the axes before.
    """
    last = after[-1] if after else {}
    size, old = last.get(ONE, 0), array.shape[-1]
    if axis != array.ndim - 1 or set(last) != {ONE} or size < 1 or (size % old and old % size):
        return None
    row = c.tie(array, axis)
    if size < old:
        row = c.tie(row.reshape(-1, size), 1)
    shape = (*[1] * (len(after) - 1), size)
    return np.resize(row, shape), len(after) - 1


def _parts(before: list[Linear], after: list[Linear]) -> list[tuple[range, range]]:
    """Takes the axes before and after a Reshape apart into runs that hold the same elements.

    1. Equal sizes at the left end are the same axes.
    2. From the right, the fewest axes are taken whose sizes have equal products.
    3. What cannot be taken apart is one run.
    """
    head = 0
    while head < min(len(before), len(after)) and before[head] == after[head]:
        head += 1
    runs: list[tuple[range, range]] = []
    ends = (len(before), len(after))
    while max(ends) > head:
        starts = _run(before, after, ends, head)
        if starts is None:
            runs.append((range(head, ends[0]), range(head, ends[1])))
            break
        runs.append((range(starts[0], ends[0]), range(starts[1], ends[1])))
        ends = starts
    return [(range(k, k + 1), range(k, k + 1)) for k in range(head)] + runs[::-1]


def _run(
    before: list[Linear], after: list[Linear], ends: tuple[int, int], head: int
) -> tuple[int, int] | None:
    """Returns where the last run begins, before and after; None if it cannot be told."""
    starts = [(i, j) for i in range(head, ends[0]) for j in range(head, ends[1])]
    for i, j in sorted(starts, key=sum, reverse=True):
        if product(before[i : ends[0]]) == product(after[j : ends[1]]) != {}:
            return i, j
    return None


@of_first
def slice_(c: Coupling, node: ir.Node, array: IntArray, axis: int) -> None:
    """Takes a part of some axes."""
    bounds = c.layout.slice_bounds(node)
    if bounds is None:
        axes = None if len(node.inputs) < 4 else c.layout.constant_ints(node.inputs[3])
        if axes is None or any(array.shape[k] > 1 for k in axes):
            c.block(node, "its bounds are not known")
            return
        bounds = {}
    for k, (start, end, step) in bounds.items():
        if array.shape[k] > 1:
            places = np.arange(array.shape[k])[start:end:step]
            if k % array.ndim == axis and len(places) < array.shape[k]:
                array = c.alike(array, axis)
            array = np.take(array, places, k)
    if array.shape[axis] == 0:
        return  # it takes no unit
    if 0 in array.shape:
        c.block(node, "it takes nothing")
        return
    c.give(node.outputs[0], array, axis, node)


@of_first
def gather(c: Coupling, node: ir.Node, array: IntArray, axis: int) -> None:
    """Picks places along an axis."""
    at = (node.attributes.get_int("axis", 0) or 0) % array.ndim
    indices = node.inputs[1]
    count = None if indices is None else c.rank(indices)
    if count is None:
        c.block(node, "the number of axes of its indices is not known")
        return
    if array.shape[at] > 1:
        picked = c.layout.constant_ints(indices) if count < 2 else None
        if picked is None and at != axis:
            array = c.tied(array, at)
        elif picked is None:
            c.block(node, "it picks units by indices that are not known")
            return
        elif at == axis and count == 0:
            c.block(node, "it picks one unit")
            return
        else:
            if at == axis:
                array = c.alike(array, axis)
            array = np.take(array, picked, at)
    if array.shape[at] == 1:
        shape = (*array.shape[:at], *[1] * count, *array.shape[at + 1 :])
        array = array.reshape(shape)
    c.give(node.outputs[0], array, axis + (count - 1 if at < axis else 0), node)


@of_first
def gather_elements(c: Coupling, node: ir.Node, array: IntArray, axis: int) -> None:
    """Picks places along one axis, others for each place along the others."""
    at = (node.attributes.get_int("axis", 0) or 0) % array.ndim
    if at == axis:
        c.block(node, "it picks units by indices")
        return
    if array.shape[at] > 1:
        array = c.tied(array, at)
    indices = node.inputs[1]
    if indices is not None and c.size(indices, axis) != array.shape[axis]:
        c.block(node, "it picks some units only")
        return
    array = c.along(array, axis, array.ndim, axis)
    c.operand(node, 1, array, axis)
    c.give(node.outputs[0], array, axis, node)


@of_first
def gather_nd(c: Coupling, node: ir.Node, array: IntArray, axis: int) -> None:
    """Picks whole slices of the last axes."""
    batch = node.attributes.get_int("batch_dims", 0) or 0
    indices = node.inputs[1]
    count = None if indices is None else c.rank(indices)
    width = None if indices is None or count is None else c.size(indices, count - 1)
    if count is None or width is None or axis < batch + width:
        c.block(node, "it picks units by indices")
        return
    ndim = array.ndim + count - 1 - width - batch
    to = ndim - (array.ndim - axis)
    c.give(node.outputs[0], c.along(array, axis, ndim, to), to, node)


@of_first
def split(c: Coupling, node: ir.Node, array: IntArray, axis: int) -> None:
    """Takes an axis apart."""
    at = (node.attributes.get_int("axis", 0) or 0) % array.ndim
    if array.shape[at] == 1:
        for output in node.outputs:
            c.give(output, array, axis, node)
        return
    sizes = split_sizes(c, node, array.shape[at])
    if sizes is None:
        c.block(node, "the sizes of its parts are not known")
        return
    if at == axis:
        array = c.alike(array, axis)
    for output, part in zip(node.outputs, np.split(array, np.cumsum(sizes)[:-1], at), strict=True):
        if part.size:
            c.give(output, part, axis, node)


def split_sizes(c: Coupling, node: ir.Node, total: int) -> list[int] | None:
    """Returns the sizes of the parts of a Split."""
    given = list(node.attributes.get_ints("split", ())) or None
    if given is None and input_of(node, 1) is not None:
        given = c.layout.constant_ints(node.inputs[1])
        if given is None:
            return None
    if given is None:
        size = -(-total // len(node.outputs))
        ends = np.minimum(np.arange(len(node.outputs) + 1) * size, total)
        given = [int(k) for k in np.diff(ends)]
    return given if sum(given) == total and len(given) == len(node.outputs) else None


def concat(c: Coupling, node: ir.Node) -> None:
    """Puts values side by side."""
    known = [found for v in node.inputs if (found := c.of(v)) is not None]
    ndim, axis = known[0].array.ndim, known[0].axis
    at = (node.attributes.get_int("axis", 0) or 0) % ndim
    if any(found.axis != axis or found.array.ndim != ndim for found in known):
        c.block(node, "units meet here along different axes")
        return
    arrays: list[IntArray] = []
    for index, value in enumerate(node.inputs):
        assert value is not None
        labels = c.of(value)
        if labels is not None:
            arrays.append(labels.array)
            continue
        if at != axis:
            # Beside units, along another axis: it has a place for every unit, too.
            like = c.along(known[0].array, axis, ndim, axis)
            c.cut(node, index, like, axis, "element")
            arrays.append(like)
            continue
        size = c.size(value, at)
        if size is None:
            c.block(node, "the size of what it puts beside the units is not known")
            return
        shape = [1] * ndim
        shape[at] = size
        own = c.unlabelled(node, index, size).reshape(shape)
        c.cut(node, index, own, axis, "element")
        arrays.append(own)
    if at != axis:
        arrays = _stacked(c, node, arrays, at)
    shape = list(np.broadcast_shapes(*([*a.shape[:at], 1, *a.shape[at + 1 :]] for a in arrays)))
    full = [np.broadcast_to(a, [*shape[:at], a.shape[at], *shape[at + 1 :]]) for a in arrays]
    c.give(node.outputs[0], np.concatenate(full, at), axis, node)


def _stacked(c: Coupling, node: ir.Node, arrays: list[IntArray], at: int) -> list[IntArray]:
    """Makes labels as long as their values along an axis, or ties them where that is not known."""
    sizes = [c.size(v, at) if v is not None else None for v in node.inputs]
    if None not in sizes:
        shapes = [
            [*a.shape[:at], size, *a.shape[at + 1 :]] for a, size in zip(arrays, sizes, strict=True)
        ]
        return [np.broadcast_to(a, s) for a, s in zip(arrays, shapes, strict=True)]
    tied = [c.tied(a, at) if a.shape[at] > 1 else a for a in arrays]
    for other in tied[1:]:
        c.classes.join(tied[0], other)
    return [tied[0]]


@of_first
def expand(c: Coupling, node: ir.Node, array: IntArray, axis: int) -> None:
    """Repeats along axes of size 1, and adds axes in front."""
    target = node.inputs[1]
    count = None if target is None else c.size(target, 0)
    if count is None:
        c.block(node, "its target shape is not known")
        return
    more = max(count - array.ndim, 0)
    c.give(node.outputs[0], array.reshape((1,) * more + array.shape), axis + more, node)


@of_first
def tile(c: Coupling, node: ir.Node, array: IntArray, axis: int) -> None:
    """Repeats along axes."""
    repeats = c.layout.integers(node.inputs[1]) if node.inputs[1] is not None else None
    times = [r.get(ONE, 0) if set(r) <= {ONE} else 0 for r in repeats or []]
    if len(times) != array.ndim or any(
        n > 1 and k < 1 for n, k in zip(array.shape, times, strict=True)
    ):
        c.block(node, "it repeats units a number of times that is not known")
        return
    repeated = np.tile(array, [k if n > 1 else 1 for n, k in zip(array.shape, times, strict=True)])
    c.give(node.outputs[0], repeated, axis, node)


@of_first
def pad(c: Coupling, node: ir.Node, array: IntArray, axis: int) -> None:
    """Adds places at the ends of axes."""
    pads: list[int] | None = list(
        node.attributes.get_ints("pads", ()) or node.attributes.get_ints("paddings", ())
    )
    if not pads:
        pads = c.layout.constant_ints(input_of(node, 1))
    axes = list(range(array.ndim))
    if input_of(node, 3) is not None:
        given = c.layout.constant_ints(node.inputs[3])
        axes = [] if given is None else [k % array.ndim for k in given]
    if pads is None or len(pads) != 2 * len(axes):
        c.block(node, "what it adds is not known")
        return
    ends = dict(zip(axes, zip(pads[: len(axes)], pads[len(axes) :], strict=True), strict=True))
    if ends.get(axis, (0, 0)) != (0, 0):
        c.block(node, "it adds places to the units")
        return
    for k, amount in ends.items():
        if amount != (0, 0) and array.shape[k] > 1:
            array = c.tied(array, k)
    c.give(node.outputs[0], array, axis, node)


@of_first
def reduce(c: Coupling, node: ir.Node, array: IntArray, axis: int) -> None:
    """Reduces axes to one place each."""
    if node.op_type in ("ArgMax", "ArgMin"):
        axes: list[int] | None = [(node.attributes.get_int("axis", 0) or 0) % array.ndim]
    else:
        axes = c.layout.axes(node, array.ndim)
    if axes is None:
        if input_of(node, 1) is not None:
            c.block(node, "its axes are not known")
            return
        keeps = node.attributes.get_int("noop_with_empty_axes", 0)
        axes = [] if keeps else list(range(array.ndim))
    if axis in axes:
        if node.op_type == "ReduceSum":
            c.adds_up(node, 0)
        elif node.op_type in INEXACT:
            c.normalises(node, INEXACT[node.op_type])
        else:
            c.block(node, "it works along the units")
        return
    for k in axes:
        if array.shape[k] > 1:
            array = c.tied(array, k)
    if not node.attributes.get_int("keepdims", 1):
        array = np.squeeze(array, tuple(axes))
        axis -= sum(k < axis for k in axes)
    for output in node.outputs:
        c.give(output, array, axis, node)


@of_first
def along_axis(c: Coupling, node: ir.Node, array: IntArray, axis: int) -> None:
    """Works along one axis, place by place along the others (Softmax from opset 13, CumSum)."""
    if node.op_type == "CumSum":
        given = c.layout.constant_ints(node.inputs[1])
        at = None if given is None or len(given) != 1 else given[0]
    else:
        last = c.opset >= 13 or node.op_type == "LpNormalization"
        at = node.attributes.get_int("axis", -1 if last else 1)
    if at is None:
        c.block(node, "its axis is not known")
        return
    at %= array.ndim
    every = (
        [at]
        if c.opset >= 13 or node.op_type in ("CumSum", "LpNormalization")
        else [*range(at, array.ndim)]
    )
    if axis in every and node.op_type in INEXACT:
        if not c.normalises(node, INEXACT[node.op_type]):
            return
    elif axis in every:
        c.block(node, "it works along the units")
        return
    for k in every:
        if k != axis and array.shape[k] > 1:
            array = c.tied(array, k)
    c.give(node.outputs[0], array, axis, node)


@of_first
def layer_normalization(c: Coupling, node: ir.Node, array: IntArray, axis: int) -> None:
    """Normalises over the last axes, then scales each place."""
    at = (node.attributes.get_int("axis", -1) or 0) % array.ndim
    if axis >= at and not c.normalises(node, INEXACT[node.op_type]):
        return
    for k in range(at, array.ndim):
        if k != axis and array.shape[k] > 1:
            array = c.tied(array, k)
    for index in range(1, len(node.inputs)):
        if node.inputs[index] is not None and axis >= at:
            array = meets(c, node, index, node.inputs[index], array, axis)  # type: ignore[arg-type]
    c.give(node.outputs[0], array, axis, node)
    for output in node.outputs[1:]:
        if output.uses() or output.is_graph_output():
            c.block(node, "its mean is read")


@of_first
def by_channel(c: Coupling, node: ir.Node, array: IntArray, axis: int) -> None:
    """Treats every channel, the second axis, with constants of its own."""
    whole = node.attributes.get_int("training_mode", 0) or not node.attributes.get_int("spatial", 1)
    if whole or any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
        c.block(node, "it is in training mode, or normalises each place by itself")
        return
    if axis == 1:
        vector = c.tie(array, axis)
        array = c.along(array, axis, array.ndim, axis)
        for index in range(1, len(node.inputs)):
            c.operand(node, index, vector, 0)
    elif node.op_type != "BatchNormalization":
        c.block(node, "it normalises over the units")
        return
    elif array.shape[1] > 1:
        array = c.tied(array, 1)
    c.give(node.outputs[0], array, axis, node)


@of_first
def pool(c: Coupling, node: ir.Node, array: IntArray, axis: int) -> None:
    """Reduces or slides over the axes from the third on."""
    if axis > 1 and node.op_type in INEXACT:
        c.normalises(node, INEXACT[node.op_type])
        return
    if axis > 1:
        c.block(node, "it slides over the units")
        return
    if any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
        c.block(node, "its indices count through all channels")
        return
    for k in range(2, array.ndim):
        if array.shape[k] > 1:
            array = c.tied(array, k)
    c.give(node.outputs[0], array, axis, node)


@of_first
def reverse_sequence(c: Coupling, node: ir.Node, array: IntArray, axis: int) -> None:
    """Reverses each sequence of a batch."""
    axes = [node.attributes.get_int("batch_axis", 1), node.attributes.get_int("time_axis", 0)]
    if axis in axes:
        c.block(node, "it works along the units")
        return
    for k in axes:
        if k is not None and array.shape[k] > 1:
            array = c.tied(array, k)
    c.give(node.outputs[0], array, axis, node)


_SAME = [
    "Abs",
    "Acos",
    "Acosh",
    "Asin",
    "Asinh",
    "Atan",
    "Atanh",
    "BitwiseNot",
    "Cast",
    "Ceil",
    "Celu",
    "Cos",
    "Cosh",
    "Elu",
    "Erf",
    "Exp",
    "Floor",
    "Gelu",
    "HardSigmoid",
    "HardSwish",
    "Identity",
    "IsInf",
    "IsNaN",
    "LeakyRelu",
    "Log",
    "Mish",
    "Neg",
    "Not",
    "Reciprocal",
    "Relu",
    "Round",
    "Selu",
    "Shrink",
    "Sigmoid",
    "Sign",
    "Sin",
    "Sinh",
    "Softplus",
    "Softsign",
    "Sqrt",
    "Swish",
    "Tan",
    "Tanh",
    "ThresholdedRelu",
    "Clip",
    "Dropout",
    "CastLike",
]
_ELEMENTWISE = [
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Pow",
    "Mod",
    "Max",
    "Min",
    "Mean",
    "Sum",
    "Where",
    "PRelu",
    "And",
    "Or",
    "Xor",
    "Equal",
    "Greater",
    "Less",
    "GreaterOrEqual",
    "LessOrEqual",
    "BitwiseAnd",
    "BitwiseOr",
    "BitwiseXor",
]
_REDUCTIONS = [
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSum",
    "ReduceSumSquare",
    "ArgMax",
    "ArgMin",
]
_POOLS = ["AveragePool", "MaxPool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"]

_MOVING = [
    *("Transpose", "Squeeze", "Unsqueeze", "Reshape", "Flatten", "Slice", "Gather", "GatherND"),
    *("GatherElements", "Split", "Concat", "Expand", "Tile", "Pad", "ReverseSequence"),
]

IN_PLACE = frozenset({*_SAME, *_ELEMENTWISE, *_MOVING})
"""Operators whose output elements are made of one element of each input."""

INEXACT = {
    "LayerNormalization": "it normalises",
    "Softmax": "it normalises",
    "LogSoftmax": "it normalises",
    "LpNormalization": "it normalises",
    "ReduceMean": "it takes the mean",
    "ReduceMax": "it takes the largest",
    "ReduceMin": "it takes the smallest",
    "ReduceSumSquare": "it takes the sum of squares",
    "ReduceL1": "it takes a norm",
    "ReduceL2": "it takes a norm",
    "GlobalAveragePool": "it takes the mean",
    "GlobalMaxPool": "it takes the largest",
}
"""Operators over units after which the units that stay are others → what they do."""

RULES: dict[str, Rule] = {
    **dict.fromkeys(_SAME, same),
    **dict.fromkeys(_ELEMENTWISE, elementwise),
    **dict.fromkeys(_REDUCTIONS, reduce),
    **dict.fromkeys(_POOLS, pool),
    "Shape": nothing,
    "Transpose": transpose,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Reshape": reshape,
    "Flatten": reshape,
    "Slice": slice_,
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "Split": split,
    "Concat": concat,
    "Expand": expand,
    "Tile": tile,
    "Pad": pad,
    "Softmax": along_axis,
    "LogSoftmax": along_axis,
    "LpNormalization": along_axis,
    "CumSum": along_axis,
    "LayerNormalization": layer_normalization,
    "BatchNormalization": by_channel,
    "InstanceNormalization": by_channel,
    "ReverseSequence": reverse_sequence,
}
