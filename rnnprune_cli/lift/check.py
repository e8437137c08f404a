"""Holding a cell against the operator that is to stand for it, on random states and inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx_ir as ir

from rnnprune_cli.errors import RnnpruneError
from rnnprune_cli.layout import rank, static
from rnnprune_cli.lift.context import Context
from rnnprune_cli.lift.weights import Cell, attributes
from rnnprune_cli.model import Array, TensorSpec
from rnnprune_cli.runtime import OnnxRunner

TOLERANCE = 1e-5
"""Of the largest magnitude, or of 1 if that is more."""


def check(cell: Cell, context: Context, opset: int) -> str | None:
    """Runs a cell and its operator in onnxruntime on random states and inputs.

    Returns:
        Why they are not the same, or None.
    """
    states = {k: v for k, v in (("h", cell.h), ("c", cell.c)) if v is not None}
    given = _given(cell, context)
    nodes, constants = between(cell, context)
    outputs = [v for v in (cell.h_next, cell.c_next) if v is not None]
    names = [f"checked/{k}" for k in range(len(outputs))]
    nodes += [
        onnx.helper.make_node("Identity", [v.name or ""], [n])
        for v, n in zip(outputs, names, strict=True)
    ]
    rng = np.random.default_rng(0)
    shapes = {v.name or "": _sample_shape(v, cell, context) for v in given.values()}
    inputs = [
        onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in shapes.items()
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "cell",
        inputs,
        [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in names],
        [onnx.numpy_helper.from_array(a, n) for n, a in constants.items()],
    )
    written = run_graph(graph, opset)
    operator = run_graph(_operator(cell), opset)
    for refused in (written, operator):
        if isinstance(refused, str):
            return f"onnxruntime refuses to compare it: {refused}"
    assert not isinstance(written, str) and not isinstance(operator, str)
    for scale in (0.3, 1.0, 3.0):
        feed = {n: (scale * rng.standard_normal(s)).astype(np.float32) for n, s in shapes.items()}
        rows = {n: a.reshape(1, -1, a.shape[-1]) for n, a in feed.items()}

        def rows_of(value: ir.Value) -> Array:
            return rows[context.layout.bare(value).name or ""]  # noqa: B023

        own = {"x": np.concatenate([rows_of(v) for v in cell.x], axis=-1)}
        own |= {k: rows_of(v) for k, v in states.items()}
        expected = written(feed)
        found = operator(own)
        if isinstance(expected, str) or isinstance(found, str):
            return (
                f"onnxruntime cannot compare it: {expected if isinstance(expected, str) else found}"
            )
        for one, two in zip(expected, found, strict=True):
            worst = float(np.abs(one.reshape(two.shape) - two).max())
            if not worst <= TOLERANCE * max(1.0, float(np.abs(one).max())):
                return f"an {cell.op} operator in its place differs by {worst:.3g}"
    return None


def _sample_shape(value: ir.Value, cell: Cell, context: Context) -> list[int]:
    """A shape for random rows: the sizes that are fixed, three where they are not."""
    widths = {id(context.layout.bare(v)): v for v in (*cell.x, cell.h, cell.c) if v is not None}
    last = static(value, -1) or static(widths[id(value)], -1) or cell.hidden
    return [*_leading_sizes(value, cell, context), last]


def _leading_sizes(value: ir.Value, cell: Cell, context: Context) -> list[int]:
    """The sizes before the last one: fixed ones, and the batch of the cell for others."""
    known = (context.rows(v) for v in (*cell.x, cell.h, cell.c) if v is not None)
    rows = next((size for size in known if size is not None), 3)
    sizes = [static(value, k) for k in range((rank(value) or 1) - 1)]
    return [rows if size is None else size for size in sizes]


def _given(cell: Cell, context: Context) -> dict[int, ir.Value]:
    """Input and state of a cell: id without axes of size 1 → value."""
    values = [v for v in (*cell.x, cell.h, cell.c) if v is not None]
    return {id(v): v for v in map(context.layout.bare, values)}


def between(cell: Cell, context: Context) -> tuple[list[onnx.NodeProto], dict[str, Array]]:
    """The nodes that compute the new state from the old one and the input, and their constants."""
    given = _given(cell, context)
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, Array] = {}
    added: set[int] = set()
    done: set[str] = {v.name or "" for v in given.values()}
    pending: list[tuple[ir.Value, bool]] = [
        (v, False) for v in (cell.h_next, cell.c_next) if v is not None
    ]
    while pending:
        value, ready = pending.pop()
        node = value.producer()
        origin = context.layout.origin(value)
        if ready and origin is not value:  # through an unchanged value of a loop
            names = [origin.name or ""], [value.name or ""]
            nodes.append(onnx.helper.make_node("Identity", *names))
        elif ready and node is not None and id(node) not in added:
            added.add(id(node))
            nodes.append(ir.to_proto(node))
        if ready:
            continue
        if (value.name or "") in done:
            continue
        done.add(value.name or "")
        array = context.layout.constant(value)
        row = context.algebra.of(value) if array is None else None
        if row is not None and row.degree == 0:  # zeros of a size known at run time
            array = row.terms[()].coefficient if row.terms else np.zeros(1)
            array = array.astype(np.float32)
            if rank(value) and (last := static(value, -1)) is not None:
                array = np.broadcast_to(array, [*_leading_sizes(value, cell, context), last])
            elif array.size == 1:
                array = array.reshape(())
        if array is not None:
            constants[value.name or ""] = array
        elif origin is not value:
            pending += [(value, True), (origin, False)]
        elif node is not None:
            pending.append((value, True))
            pending.extend((v, False) for v in node.inputs if v is not None)
    return nodes, constants


def _operator(cell: Cell) -> onnx.GraphProto:
    """A graph with the operator alone."""
    states = [k for k, v in (("h", cell.h), ("c", cell.c)) if v is not None]
    constants = {"W": cell.w, "R": cell.r, "B": cell.b}
    inputs = ["x", "W", "R", "B", "", *states]
    if cell.p is not None:
        constants["P"] = cell.p
        inputs += [""] * (7 - len(inputs)) + ["P"]
    outputs = ["Y_h"] if cell.op != "LSTM" else ["Y_h", "Y_c"]
    node = onnx.helper.make_node(cell.op, inputs, ["", *outputs], **attributes(cell))
    info = onnx.helper.make_tensor_value_info
    return onnx.helper.make_graph(
        [node],
        "operator",
        [info(n, onnx.TensorProto.FLOAT, [1, None, None]) for n in ["x", *states]],
        [info(n, onnx.TensorProto.FLOAT, [1, None, None]) for n in outputs],
        [onnx.numpy_helper.from_array(a, n) for n, a in constants.items()],
    )


def run_graph(
    graph: onnx.GraphProto, opset: int
) -> Callable[[Mapping[str, Array]], list[Array] | str] | str:
    """Returns a function that runs a graph in onnxruntime, or why that refuses it."""
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10
    )
    names = [o.name for o in graph.output]
    specs = tuple(TensorSpec(n, np.dtype(np.float32), None) for n in names)
    try:
        runner = OnnxRunner(model.SerializeToString(), 1, (), specs)
    except RnnpruneError as error:
        return error.message

    def run(feed: Mapping[str, Array]) -> list[Array] | str:
        try:
            return runner.run(dict(feed))
        except RnnpruneError as error:
            return error.message

    return run
