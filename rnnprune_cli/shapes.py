"""Shapes of all values of a model, in loops and branches too.

``onnx.shape_inference`` does not see initializers of an outer graph from within a branch or body,
and stops there. What it leaves open is worked out node by node, with its own rules for each
operator.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir

from rnnprune_cli.graph import stored_tensor

_MAX_ELEMENTS = 64
"""Constants up to this size are shown to the rules: axes, sizes, target shapes."""


def complete(model: ir.Model) -> None:
    """Sets the types and shapes that a model's values do not state, where they follow.

    Args:
        model: The model, after ``onnx.shape_inference``; it has no functions.
    """
    versions = {
        "" if domain == "ai.onnx" else domain: version
        for domain, version in model.opset_imports.items()
    }
    _graph(model.graph, versions)


def _graph(graph: ir.Graph, versions: dict[str, int]) -> None:
    for node in graph:
        bodies = [
            a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH
        ]
        if node.op_type in ("Loop", "Scan") and bodies:
            _enter(node, bodies[0])
        for body in bodies:
            _graph(body, versions)
        if bodies:
            _leave(node, bodies)
        elif any(_is_vague(value) or value.type is None for value in node.outputs):
            _node(node, versions)


def _node(node: ir.Node, versions: dict[str, int]) -> None:
    domain = "" if node.domain == "ai.onnx" else node.domain
    if domain not in versions or not onnx.defs.has(node.op_type, versions[domain], domain):
        return
    if node.op_type == "SequenceAt":
        _element(node)
        return
    types: dict[str, onnx.TypeProto] = {}
    data: dict[str, onnx.TensorProto] = {}
    for value in node.inputs:
        if value is None:
            continue
        if value.type is None or not isinstance(value.type, ir.TensorType):
            return
        types[value.name or ""] = _type(value)
        tensor = stored_tensor(_made(value))
        if tensor is not None and tensor.size <= _MAX_ELEMENTS:
            data[value.name or ""] = onnx.numpy_helper.from_array(tensor.numpy(), value.name)
    schema = onnx.defs.get_schema(node.op_type, versions[domain], domain)
    try:
        found = onnx.shape_inference.infer_node_outputs(
            schema,
            ir.to_proto(node),
            types,
            data,
            opset_imports=[onnx.helper.make_opsetid(d, v) for d, v in versions.items()],
        )
    except Exception:  # unrelated types where a node contradicts its inputs
        return
    target = node.inputs[_TARGETS[node.op_type]] if node.op_type in _TARGETS else None
    sizes = None if target is None else _sizes(target)
    if sizes is not None and node.op_type == "ConstantOfShape":
        node.outputs[0].shape = ir.Shape(sizes)
    for value in node.outputs:
        inferred = found.get(value.name or "")
        if inferred is None or not inferred.HasField("tensor_type"):
            continue
        tensor_type = inferred.tensor_type
        if value.type is None and tensor_type.elem_type:
            value.type = ir.TensorType(ir.DataType(tensor_type.elem_type))
        if _is_vague(value) and tensor_type.HasField("shape"):
            value.shape = ir.Shape(
                [
                    d.dim_value if d.HasField("dim_value") else d.dim_param or None
                    for d in tensor_type.shape.dim
                ]
            )
    if sizes is not None and node.op_type == "Reshape" and node.outputs[0].shape is None:
        node.outputs[0].shape = ir.Shape([k if k is not None and k > 0 else None for k in sizes])


_TARGETS = {"ConstantOfShape": 0, "Reshape": 1}
"""Operator → its input that holds the sizes of its output."""


def _is_vague(value: ir.Value) -> bool:
    """Tells whether a shape names no size: exporters get even the number of axes wrong then."""
    shape = value.shape
    return shape is None or (len(shape) > 0 and not any(isinstance(d, int) for d in shape))


def _sizes(value: ir.Value) -> list[int | None] | None:
    """Returns what is known of the elements of a shape that is put together at run time."""
    value = _made(value)
    tensor, node = stored_tensor(value), value.producer()
    if tensor is not None:
        return (
            [int(k) for k in tensor.numpy().reshape(-1)] if tensor.size <= _MAX_ELEMENTS else None
        )
    if node is not None and node.op_type == "Cast" and node.inputs[0] is not None:
        return _sizes(node.inputs[0])
    if node is not None and node.op_type == "Concat":
        parts = [None if v is None else _sizes(v) for v in node.inputs]
        return None if None in parts else [k for part in parts for k in part or []]
    length = value.shape[0] if value.shape is not None and len(value.shape) == 1 else None
    return [None] * length if isinstance(length, int) and length <= _MAX_ELEMENTS else None


def _element(node: ir.Node) -> None:
    """An element of what SplitToSequence made of a tensor has all axes but one of it."""
    listed = node.inputs[0]
    split = None if listed is None else _made(listed).producer()
    source = split.inputs[0] if split is not None and split.op_type == "SplitToSequence" else None
    if split is None or source is None or source.shape is None:
        return
    axis = (split.attributes.get_int("axis", 0) or 0) % len(source.shape)
    node.outputs[0].type = source.type
    if not split.attributes.get_int("keepdims", 1):
        node.outputs[0].shape = ir.Shape([d for k, d in enumerate(source.shape) if k != axis])


def _made(value: ir.Value) -> ir.Value:
    """Follows a value through Identity nodes."""
    node = value.producer()
    while node is not None and node.op_type == "Identity" and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def _type(value: ir.Value) -> onnx.TypeProto:
    shape = None
    if value.shape is not None:
        shape = [d if isinstance(d, int) else d.value for d in value.shape]
    assert isinstance(value.type, ir.TensorType)
    return onnx.helper.make_tensor_type_proto(value.type.dtype.value, shape)


def _enter(node: ir.Node, body: ir.Graph) -> None:
    """Gives a body's inputs what is known from outside."""
    inputs = list(node.inputs)
    if node.op_type == "Loop":
        for value, dtype in zip(
            body.inputs[:2], (ir.DataType.INT64, ir.DataType.BOOL), strict=True
        ):
            value.type = value.type or ir.TensorType(dtype)
            value.shape = ir.Shape([]) if value.shape is None else value.shape
        for before, outer in zip(body.inputs[2:], inputs[2:], strict=False):
            _hand_on(before, outer)
        return
    scanned = node.attributes.get_int("num_scan_inputs", 0) or 0
    states = len(inputs) - scanned
    axes = list(node.attributes.get_ints("scan_input_axes", ()) or [0] * scanned)
    for k, (before, outer) in enumerate(zip(body.inputs, inputs, strict=False)):
        if k < states:
            _hand_on(before, outer)
        elif outer is not None:
            before.type = before.type or outer.type
            if before.shape is None and outer.shape is not None:
                axis = axes[k - states] % max(len(outer.shape), 1)
                before.shape = ir.Shape([d for j, d in enumerate(outer.shape) if j != axis])


def _hand_on(before: ir.Value, outer: ir.Value | None) -> None:
    """A carried value keeps its type and rank; only its last size is taken to stay."""
    if outer is None:
        return
    before.type = before.type or outer.type
    if outer.shape is None or not len(outer.shape):
        return
    if before.shape is None:
        before.shape = ir.Shape([d if d == 1 else None for d in outer.shape[:-1]] + [None])
    if len(before.shape) == len(outer.shape) and not isinstance(before.shape[-1], int):
        before.shape = ir.Shape([*before.shape[:-1], outer.shape[-1]])


def _steps(node: ir.Node, states: int) -> int | None:
    """Returns how many steps a Scan takes, if that is a fixed number."""
    scanned = node.inputs[states]
    axes = list(node.attributes.get_ints("scan_input_axes", ()))
    size = None if scanned is None or not scanned.shape else scanned.shape[axes[0] if axes else 0]
    return size if isinstance(size, int) else None


def _leave(node: ir.Node, bodies: list[ir.Graph]) -> None:
    """Gives a node's outputs what is known from inside."""
    if node.op_type == "If":
        for outputs in zip(node.outputs, *(b.outputs for b in bodies), strict=False):
            value, *results = outputs
            value.type = value.type or results[0].type
            shapes = [r.shape for r in results if r.shape is not None]
            if value.shape is None and len({len(s) for s in shapes}) == 1 and len(shapes) > 1:
                value.shape = ir.Shape(
                    [
                        d[0] if isinstance(d[0], int) and len(set(d)) == 1 else None
                        for d in zip(*shapes, strict=True)
                    ]
                )
        return
    if node.op_type not in ("Loop", "Scan"):
        return
    skip = 1 if node.op_type == "Loop" else 0
    scanned = node.attributes.get_int("num_scan_inputs", 0) or 0
    states = len(node.inputs) - (2 if skip else scanned)
    axes = list(node.attributes.get_ints("scan_output_axes", ()))
    steps = None if skip else _steps(node, states)
    for k, (value, result) in enumerate(
        zip(node.outputs, list(bodies[0].outputs)[skip:], strict=False)
    ):
        value.type = value.type or result.type
        if _is_vague(value) and result.shape is not None:
            sizes = list(result.shape)
            if k >= states:
                axis = axes[k - states] if axes else 0
                axis += len(sizes) + 1 if axis < 0 else 0
                value.shape = ir.Shape([*sizes[:axis], steps, *sizes[axis:]])
            else:
                value.shape = ir.Shape(sizes)
