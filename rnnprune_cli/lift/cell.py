"""Hand-written cells → LSTM, GRU and RNN operators over one step.

1. Write every value of a graph as a sum of products (:mod:`.algebra`).
2. Hold the sums against the three cells' equations (ONNX operators LSTM, GRU, RNN).
3. Tell the state from the input.
4. Replace what computes the new state.

The cells stay where they are: in a loop's body, in a branch, in an unrolled chain. Making one
operator of a whole loop or chain is for :mod:`.loop` and :mod:`.chain`.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from rnnprune_cli.layout import ONE, is_named, rank
from rnnprune_cli.lift.check import between
from rnnprune_cli.lift.context import Context, depends, known_rank, layer_name
from rnnprune_cli.lift.equations import NO_GATE, kernel, recognise
from rnnprune_cli.lift.weights import Cell, Earlier, attributes, split_state

MIN_OPSET_EXPAND = 8


def find_cells(graph: ir.Graph, context: Context) -> tuple[list[Cell], dict[str, str]]:
    """Finds the cells of one graph, not of the graphs inside it.

    Returns:
        The cells in graph order, and name → why something that looks like a cell is none.
    """
    cells: dict[int, Cell] = {}
    declined: dict[str, str] = {}
    earlier = Earlier({}, {}, set())
    for node in graph:
        if node.domain not in ("", "ai.onnx") or node.op_type not in _CLOSING:
            continue
        value = node.outputs[0]
        form = recognise(value, context)
        if form is None:
            continue
        bare = context.layout.bare(value)
        earlier.h_next[id(bare)] = (form, kernel(form), value)
        if form.cell_next is not None:
            earlier.c_next[id(context.layout.bare(form.cell_next))] = bare
        if form.op == "LSTM" or (
            form.op == "GRU" and (not form.from_zero or _is_multiplied(value))
        ):
            context.algebra.settle(value)
            if form.cell_next is not None:
                context.algebra.settle(form.cell_next)
        if form.from_zero:
            continue  # it is a cell if the next step is one
        found = split_state(form, value, context, earlier)
        if isinstance(found, Cell):
            reason = _fits(found, context)
            if reason is None:
                cells[id(value)] = found
                earlier.certain.add(id(form))
                first = _first_step(found, context, earlier)
                if first is not None:
                    cells.setdefault(id(first.h_next), first)
                continue
            found = reason
        if form.op != "RNN":
            declined[node.name or value.name or node.op_type] = found
    inside: set[str] = set()
    if any(each.op == "RNN" for each in cells.values()):
        others = (each for each in cells.values() if each.op != "RNN")
        inside.update(o for each in others for n in between(each, context)[0] for o in n.output)
    # A gate alone has the form of an RNN; Keras runs a masked cell once more, for its shape only.
    kept = [
        c for c in cells.values() if (c.op != "RNN" or c.h_next.name not in inside) and _is_used(c)
    ]
    return kept, declined


def _is_used(cell: Cell) -> bool:
    """Tells whether anything reads the values of the new state, not only their shape."""
    states = [v for v in (cell.h_next, cell.c_next) if v is not None]
    return any(v.is_graph_output() for v in states) or any(
        user.op_type != "Shape" for user in cell.h_next.consumers()
    )


def _is_multiplied(value: ir.Value) -> bool:
    """Tells whether a matrix is applied to a value: ``(1 - z) ∘ n`` alone is no new state."""
    pending = [value]
    while pending:
        for user in pending.pop().consumers():
            if user.op_type in ("MatMul", "Gemm"):
                return True
            if user.op_type in ("Squeeze", "Unsqueeze", "Identity", "Reshape"):
                pending.append(user.outputs[0])
    return False


def _first_step(cell: Cell, context: Context, earlier: Earlier) -> Cell | None:
    """Returns the cell whose new state is another's old one, if its own old state is zero.

    What is multiplied with zero may be gone; the other cell has those weights.
    """
    assert cell.h is not None
    known = earlier.h_next.get(id(context.layout.bare(cell.h)))
    if known is None:
        return None
    form, own, value = known
    if form.op == "RNN" == cell.op:
        if own == cell.kernel:
            if id(form) in earlier.certain:
                return None  # it is a cell already
            earlier.certain.add(id(form))
            before = split_state(form, value, context, earlier)
            return before if isinstance(before, Cell) and _fits(before, context) is None else None
        form = replace(form, from_zero=True)
    if not form.from_zero or form.op != cell.op or form.functions != cell.functions:
        return None
    if cell.c is not None and (
        form.cell_next is None
        or context.layout.bare(form.cell_next) is not context.layout.bare(cell.c)
    ):
        return None
    first = split_state(form, value, context, earlier)
    if not isinstance(first, Cell) or first.w.shape != cell.w.shape:
        return None
    hidden, gates = cell.hidden, len(form.gates)
    sums = [b.reshape(2, gates, hidden).sum(0) for b in (first.b, cell.b)]
    for k, each in enumerate(form.gates):
        if each is NO_GATE:
            continue
        rows = slice(k * hidden, (k + 1) * hidden)
        if not np.allclose(first.w[0, rows], cell.w[0, rows], rtol=1e-6, atol=1e-7):
            return None
        if not np.allclose(sums[0][k], sums[1][k], rtol=1e-5, atol=1e-6):
            return None
    whole = replace(
        first, w=cell.w, r=cell.r, b=cell.b, p=cell.p, linear_before_reset=cell.linear_before_reset
    )
    return whole if _fits(whole, context) is None else None


_CLOSING = frozenset(
    {"Mul", "Add", "Sub", "Sum", "Tanh", "Relu", "Sigmoid", "HardSigmoid", "Softsign", "Softplus"}
    | {"LeakyRelu", "ThresholdedRelu", "Elu", "Clip", "Min", "Max", "Div"}
)


def _fits(cell: Cell, context: Context) -> str | None:
    """Returns why an operator cannot stand for a cell, if it cannot."""
    values = [v for v in (*cell.x, cell.h, cell.c, cell.h_next, cell.c_next) if v is not None]
    for value in values:
        if value.dtype not in (ir.DataType.FLOAT, None):
            return f"its type is {value.dtype}, for which onnxruntime has no recurrent operators"
        if rank(value) is None:
            return f"the number of dimensions of '{value.name}' is not known"
    if 1 in (ranks := {rank(v) for v in values}) and len(ranks) > 1:
        return "one row of its state or input stands for a whole batch"
    rows = {_leading(v, context) for v in cell.x}
    if len(rows) > 1 or (len(cell.x) > 1 and None in next(iter(rows))):
        return "its inputs may have different sizes besides their last axis"
    if not all(_is_step(v, context) for v in values):
        leading = {_leading(v, context) for v in values}
        if len(leading) > 1 or None in next(iter(leading)):
            return "input and state have different sizes besides their last axis"
    for state in (cell.h, cell.c):
        sizes = set() if state is None else {context.rows(state), context.rows(cell.x[0])}
        if 1 in sizes and len(sizes) > 1:
            return "one row of its state or input stands for a whole batch"
    after = [v for v in (cell.h_next.producer(), cell.c_next and cell.c_next.producer()) if v]
    first = min(context.position(node) for node in after)
    for before in (*cell.x, cell.h, cell.c):
        maker = None if before is None else before.producer()
        late = maker is not None and context.position(maker) > first
        if before is not None and late and depends(before, after):
            return "its input depends on its new state"
    if context.opset < MIN_OPSET_EXPAND and any(
        state is not None and _may_be_fewer(state, cell.x[0], context) for state in (cell.h, cell.c)
    ):
        return f"opset {context.opset} cannot expand a state to the batch"
    if context.opset < 7:
        return f"opset {context.opset} has no recurrent operators for it (needs 7)"
    return None


def _is_step(value: ir.Value, context: Context) -> bool:
    """Tells whether a value is ``[·]``, ``[N, ·]`` or ``[1, N, ·]``."""
    return rank(value) in (1, 2) or (rank(value) == 3 and context.layout.is_one(value, 0))


def _may_be_fewer(state: ir.Value, x: ir.Value, context: Context) -> bool:
    """Tells whether a state's rows are named otherwise than an input's: it may be one for all."""
    rows = [context.layout.dimension(v, -2) for v in (state, x)]
    return rows[0] != rows[1] and all(size is not None and is_named(size) for size in rows)


def _leading(value: ir.Value, context: Context) -> tuple[object, ...]:
    sizes = [context.layout.dimension(value, k) for k in range(known_rank(value) - 1)]
    return tuple(None if s is None else tuple(sorted(s.items(), key=str)) for s in sizes)


def write(cell: Cell, context: Context) -> ir.Node:
    """Puts the operator in the place of what computed the new state.

    Returns:
        The operator.
    """
    before = cell.h_next.producer()
    assert before is not None and before.graph is not None
    name = context.unique(_name(cell, context))
    inputs_now = [context.current(v) for v in cell.x]
    x = inputs_now[0]
    if len(inputs_now) > 1:
        x = context.one(before, "Concat", inputs_now, axis=-1)

    def outward(value: ir.Value, columns: int) -> ir.Value:
        if (rank(value) or 0) < 3:
            return context.unsqueeze(before, value, [0] if rank(value) == 2 else [0, 1])
        if _is_step(value, context):
            return value
        return context.one(before, "Reshape", [value, context.ints(before, [1, -1, columns])])

    def inward(value: ir.Value, old: ir.Value) -> ir.Value:
        if (rank(old) or 0) < 3:
            return context.squeeze(before, value, [0] if rank(old) == 2 else [0, 1])
        if _is_step(old, context):
            return value
        shape = context.one(before, "Shape", [context.current(cell.h or cell.x[0])])
        head = context.slice(before, shape, 0, 0, known_rank(old) - 1)
        target = context.one(before, "Concat", [head, context.ints(before, [cell.hidden])], axis=0)
        for made in (shape, head, target):
            made.type = ir.TensorType(ir.DataType.INT64)
        return context.one(before, "Reshape", [value, target])

    def state(value: ir.Value | None) -> ir.Value | None:
        if value is None or (
            context.layout.is_zero(value)
            and context.layout.dimension(value, -2)
            in ({ONE: 1}, context.layout.dimension(cell.x[0], -2))
        ):
            return None
        new = outward(context.current(value), cell.hidden)
        fewer = _may_be_fewer(value, cell.x[0], context)
        return context.for_every_row(before, new, first) if fewer else new

    weights = [
        None
        if array is None or (role == "B" and not array.any())
        else context.constant(f"{name}/{role}", array)
        for role, array in (("W", cell.w), ("R", cell.r), ("B", cell.b), ("P", cell.p))
    ]
    if x.shape is None:
        x.shape = ir.Shape([None] * known_rank(cell.x[0]))
    first = outward(x, cell.w.shape[2])
    inputs = [first, *weights[:3], None, state(cell.h)]
    if cell.op == "LSTM":
        inputs += [state(cell.c), weights[3]]
    while inputs[-1] is None:
        inputs.pop()
    outputs = 3 if cell.op == "LSTM" else 2
    node = context.node(before, cell.op, inputs, outputs, name=name, **attributes(cell))
    for value, role in zip(node.outputs, ("Y", "Y_h", "Y_c"), strict=False):
        value.name = context.unique(f"{name}/{role}")
    replaced = [(cell.h_next, inward(node.outputs[1], cell.h_next))]
    if cell.c_next is not None:
        replaced.append((cell.c_next, inward(node.outputs[2], cell.c_next)))
    for old, new in replaced:
        context.replace(old, new)
    context.clean([old for old, _ in replaced])
    return node


def _name(cell: Cell, context: Context) -> str:
    """A name from the path that exporters give the loop, the values or the weights of a layer."""
    graph = cell.h_next.graph
    owner = None if graph is None else context.walker.owner(graph)
    if owner is not None and owner.op_type in ("Loop", "Scan"):
        name = layer_name(owner.name or "", cell.op)
        if name != layer_name("", cell.op):
            return name
    path = (cell.h_next.name or "").split(":")[0].rsplit("/", 1)
    if len(path) == 2 and path[0].strip("/"):
        return layer_name(path[0], cell.op)
    shared = os.path.commonprefix(sorted(filter(None, cell.weights)))  # noqa: RUF071
    return layer_name(re.sub(r"[./_]?([^./]*)$", "", shared), cell.op)
