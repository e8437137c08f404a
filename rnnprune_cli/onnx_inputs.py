"""What the inputs and outputs of an ONNX model look like, and which integers make sense in them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from rnnprune_cli.find import is_recurrent
from rnnprune_cli.graph import Walker, stored_tensor
from rnnprune_cli.model import Array, TensorSpec

_SEQUENCE_LENS = 4
_INITIAL_H = 5
# Ops that hand an integer on without changing it.
_PASSING = frozenset(
    {"Cast", "Reshape", "Unsqueeze", "Squeeze", "Transpose", "Flatten", "Slice", "Concat"}
    | {"Split", "Expand", "Tile"}
)


def describe_inputs(walker: Walker) -> tuple[TensorSpec, ...]:
    """Returns the inputs that a caller has to give, with integer ranges where the graph tells.

    An index into a constant table is bounded by its size, a value compared with constants has these
    as choices, and ``sequence_lens`` is marked as a length.
    """
    return tuple(
        _bounded(walker, value) for value in walker.model.graph.inputs if not value.is_initializer()
    )


def describe_outputs(model: ir.Model) -> tuple[TensorSpec, ...]:
    """Returns the outputs of a model."""
    return tuple(_spec(value) for value in model.graph.outputs)


def size_hints(walker: Walker) -> tuple[int, ...]:
    """Returns sizes that the graph insists on although its inputs are declared dynamic.

    Exporters bake the batch or length of their example into output shapes, Reshapes and initial
    states.
    """
    sizes: set[int] = set()
    for value in walker.model.graph.outputs:
        sizes.update(d for d in value.shape or () if isinstance(d, int))
    for instance in walker.instances():
        node = instance.node
        if node.op_type in ("Reshape", "Expand") and len(node.inputs) > 1:
            shape = _constant(walker, node.inputs[1])
            if shape is not None and shape.size <= 8:
                sizes.update(int(d) for d in shape.ravel())
        elif is_recurrent(node) or node.op_type in ("Loop", "Scan"):
            for source in node.inputs[_INITIAL_H if is_recurrent(node) else 0 :]:
                state = _constant(walker, source)
                if state is not None and state.ndim == 3:
                    sizes.add(state.shape[1])
    return tuple(sorted(s for s in sizes if 1 < s <= 4096))


def _spec(value: ir.Value) -> TensorSpec:
    dtype = np.dtype(object)
    if isinstance(value.type, ir.TensorType) and value.type.dtype != ir.DataType.STRING:
        dtype = value.type.dtype.numpy()
    shape = None
    if value.shape is not None:
        shape = tuple(d if isinstance(d, int) else d.value for d in value.shape)
    return TensorSpec(value.name or "", dtype, shape)


def _bounded(walker: Walker, value: ir.Value) -> TensorSpec:
    spec = _spec(value)
    maximum: int | None = None
    choices: list[int | float] = []
    is_length = False
    pending, seen = [value], set()
    while pending:
        current = pending.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        for use in walker.consumers(current):
            if use is None:
                continue
            node, index = use
            if node.op_type in _PASSING and (index == 0 or node.op_type == "Concat"):
                pending.extend(node.outputs)
            elif node.op_type == "Gather" and index == 1:
                size = _rows(walker, node)
                if size is not None:
                    maximum = min(size - 1, maximum) if maximum is not None else size - 1
            elif node.op_type == "OneHot" and index == 0:
                depth = _constant(walker, node.inputs[1])
                if depth is not None and depth.size == 1:
                    maximum = int(depth.ravel()[0]) - 1
            elif node.op_type in ("Equal", "Less", "Greater") and len(node.inputs) == 2:
                other = _constant(walker, node.inputs[1 - index])
                if other is not None and other.size == 1:
                    choices.append(other.ravel()[0].item())
            elif is_recurrent(node) and index == _SEQUENCE_LENS:
                is_length = True
    return TensorSpec(
        spec.name,
        spec.dtype,
        spec.shape,
        minimum=None if maximum is None else 0,
        maximum=maximum,
        choices=tuple(dict.fromkeys(choices)),
        is_length=is_length,
    )


def _constant(walker: Walker, value: ir.Value | None) -> Array | None:
    if value is None:
        return None
    tensor = stored_tensor(walker.origin(value, ())[0])
    return None if tensor is None else tensor.numpy()


def _rows(walker: Walker, gather: ir.Node) -> int | None:
    """Size of the axis that a Gather picks from, where the table is stored in the model."""
    data = gather.inputs[0]
    if data is None:
        return None
    tensor = stored_tensor(walker.origin(data, ())[0])
    if tensor is None:
        return None
    shape = tensor.shape.numpy()
    axis = gather.attributes.get_int("axis", 0) or 0
    return int(shape[axis]) if -len(shape) <= axis < len(shape) else None
