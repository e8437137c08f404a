"""Small graphs on which rewriting loops and cells once went wrong, or nearly.

Where the idiom starts with LIFTED, all that is recurrent becomes operators and no loop is left;
with CELL ONLY, the loop stays and only its cell becomes an operator; with KEPT, nothing changes.
PROMISE stands before that where the mask is one of right padding in the feed, so that it may be
promised; what follows then holds under the promise. Expected outputs are those of onnxruntime for
the graph itself. Cells are those of `make_cells.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import onnx
from common import HERE, Case, write_cases
from make_cells import (
    IN,
    TWO,
    Array,
    Cell,
    Dims,
    Graph,
    H,
    Makers,
    N,
    T,
    Turn,
    backwards,
    documented,
    draw_cell,
    make,
    unrolled,
)
from make_handmade import Draw
from onnx import TensorProto, helper

LENGTHS = np.array([4, 7, 2])
PADDED = np.arange(T)[:, None, None] < LENGTHS[:, None]
"""A mask of right padding, `[T, N, 1]`."""
COLUMNS = np.array([2, 7, 4, 6, 3, 1])
"""A length for each unit."""
Flag = Callable[[Graph, str], str]
"""Emit, in a body and for its counter, the flag that is set where a step counts."""


# Builders


def row(size: int = H) -> Any:
    """A shape as a body declares it that does not name its batch."""
    return (None, size)


def begin(
    draw: Draw, *, steps: int | str = "T", batch: int | str = "N", rows: int = N
) -> tuple[Graph, Cell, str, str]:
    """Start a graph with a GRU cell: graph, cell, sequence and initial state."""
    g = Graph()
    sequence = g.feed("X", draw.x(T, rows, IN), steps, batch, IN)
    return g, draw_cell(draw, "GRU", TWO), sequence, g.feed("h0", draw.normal(rows, H), batch, H)


def run(
    g: Graph,
    cell: Cell,
    sequence: str,
    state: str,
    *,
    trip: str = "",
    flag: Flag | None = None,
    flag_first: bool = False,
    before: Callable[[Graph, str, str], str] | None = None,
    after: Callable[[Graph, str], str] | None = None,
    size: int = H,
) -> list[str]:
    """Emit a Loop over a sequence; give the last state and what is scanned out.

    Args:
        g: The graph.
        cell: What the body computes.
        sequence: What it reads an entry of in every step.
        state: The initial state.
        trip: The number of steps, if it is not that of the sequence.
        flag: Emit what chooses between the new and the old state.
        flag_first: Whether the body begins with that.
        before: Emit what is done to x, given the counter.
        after: Emit what is done to h before it is scanned out.
        size: Units of the cell.
    """

    def turn(b: Graph, counter: str, _go: str, names: list[str]) -> Turn:
        chosen = flag(b, counter) if flag and flag_first else ""
        x = b.gather(sequence, counter)
        new = cell.step(b, before(b, counter, x) if before else x, names)[0]
        if flag:
            new = b.op("Where", chosen or flag(b, counter), new, names[0])
        return [new], [after(b, new) if after else new], None

    trip = trip or g.gather(g.op("Shape", sequence), 0)
    return g.loop(trip, g.constant(True), [state], [row(size)], turn)


def give(g: Graph, results: Sequence[str], batch: int | str = "N", size: int = H) -> Graph:
    """Give the last state and, if it is there, what was scanned out."""
    g.give("h_last", results[0], None, batch, H)
    if len(results) > 1:
        g.give("Y", results[1], None, "S", batch, size)
    return g


# Lengths and masks


def counted(draw: Draw, *, lengths: Array, dims: Dims | None = None, before: bool = False) -> Graph:
    """A step counts where the counter is less than a length.

    Args:
        draw: Random numbers.
        lengths: What is fed.
        dims: Declared shape of it, unless it has one length for each row.
        before: Whether the body reads a sequence of one row before X.
    """
    g, cell, sequence, state = begin(draw)
    given = g.feed("lengths", lengths, *(("N",) if dims is None else dims))
    limit = g.unsqueeze(given, 1) if dims is None else given
    places = g.feed("P", draw.normal(T, 1, 2), "T", 1, 2) if before else ""

    def flag(b: Graph, counter: str) -> str:
        if before:
            b.op("ReduceSum", b.gather(places, counter), keepdims=0)
        if lengths.dtype.kind == "f":
            counter = b.op("Cast", counter, to=TensorProto.FLOAT)
        return b.op("Less", counter, limit)

    return give(g, run(g, cell, sequence, state, flag=flag, flag_first=before))


def take(sequence: str, b: Graph, counter: str) -> str:
    """Read the entry of a sequence at the counter."""
    return b.gather(sequence, counter)


def masked(draw: Draw, *, mask: Array, dims: Dims, first: bool = False) -> Graph:
    """A step counts where a mask of given shape says so, which may be read first."""
    g, cell, sequence, state = begin(draw)
    flag = partial(take, g.feed("mask", mask, *dims))
    return give(g, run(g, cell, sequence, state, flag=flag, flag_first=first))


def two_masks(draw: Draw) -> Graph:
    """PROMISE, LIFTED: two loops over the same sequence, each with a mask of its own."""
    g, _, sequence, state = begin(draw)
    for name, size in (("mask", H), ("other_mask", 4)):
        masks = g.feed(name, PADDED, "T", "N", 1)
        start = g.op("MatMul", state, g.constant(draw.normal(H, size)))
        cell = draw_cell(draw, "GRU", TWO, hidden=size)
        last = run(g, cell, sequence, start, flag=partial(take, masks), size=size)[0]
        g.give(f"{name}ed_last", last, None, "N", size)
    return g


def scan_mask_first(draw: Draw) -> Graph:
    """PROMISE, CELL ONLY: a mask of one row comes before the sequence in a Scan."""
    g, cell, sequence, state = begin(draw)
    masks = g.feed("mask", PADDED[:, :1], "T", 1, 1)
    flags = g.op("Cast", masks, to=TensorProto.FLOAT)

    def turn(b: Graph, names: list[str], pieces: list[str]) -> tuple[list[str], list[str]]:
        flag = b.op("Cast", pieces[0], to=TensorProto.BOOL)
        new = b.op("Where", flag, cell.step(b, pieces[1], names)[0], names[0])
        return [new], [new]

    shapes = [row(), (1, 1), row(IN)]
    return give(g, g.scan([state], [flags, sequence], shapes, turn))


def mask_reversed_hold(draw: Draw) -> Graph:
    """PROMISE, LIFTED: sequence and mask are reversed, so padding holds the initial state."""
    g, cell, sequence, state = begin(draw)
    masks = backwards(g, g.feed("mask", PADDED, "T", "N", 1))
    sequence = backwards(g, sequence)
    return give(g, run(g, cell, sequence, state, flag=partial(take, masks)))


def mask_backwards_hold(draw: Draw) -> Graph:
    """PROMISE, LIFTED: sequence and mask are read from their end on, with a state before."""
    g, cell, sequence, state = begin(draw)
    masks = g.feed("mask", PADDED, "T", "N", 1)
    length = g.gather(g.op("Shape", sequence), 0)
    last = g.op("Sub", length, g.constant(1))

    def turn(b: Graph, counter: str, _go: str, names: list[str]) -> Turn:
        place = b.op("Sub", last, counter)
        new = cell.step(b, b.gather(sequence, place), names)[0]
        new = b.op("Where", b.gather(masks, place), new, names[0])
        return [new], [new], None

    return give(g, g.loop(length, g.constant(True), [state], [row()], turn))


# What is read


def pos(draw: Draw) -> Graph:
    """CELL ONLY: one row of a position encoding is added to all rows of x."""
    g, cell, sequence, state = begin(draw, steps=T)
    places = g.constant(draw.normal(T, 1, IN))
    add = run(g, cell, sequence, state, before=lambda b, i, x: b.add(x, b.gather(places, i)))
    return give(g, add)


def split_rows(draw: Draw) -> Graph:
    """CELL ONLY: x is the sum of two rows of a sequence."""
    g = Graph()
    sequence = g.feed("X", draw.x(T, 2, IN), "T", 2, IN)
    state, cell = g.feed("h0", draw.normal(1, H)), draw_cell(draw, "GRU", TWO)

    def before(b: Graph, _: str, x: str) -> str:
        return b.add(*b.split(x, [1, 1], 0))

    return give(g, run(g, cell, sequence, state, before=before), 1)


def post_dense(draw: Draw) -> Graph:
    """LIFTED: a dense layer of h is scanned out, and the output keeps its declared shape."""
    g, cell, sequence, state = begin(draw)
    kernel = g.constant(draw.normal(H, 2))

    def after(b: Graph, h: str) -> str:
        return b.op("Relu", b.op("MatMul", h, kernel))

    return give(g, run(g, cell, sequence, state, after=after), size=2)


def plain(draw: Draw, batch: int | str = "N") -> Graph:
    """One Loop over a sequence; nothing else."""
    rows = batch if isinstance(batch, int) else N
    g, cell, sequence, state = begin(draw, batch=batch, rows=rows)
    return give(g, run(g, cell, sequence, state), batch)


# States


def one_row_state(g: Graph, draw: Draw) -> str:
    """Feed a state whose one row stands for a batch, by another name than that of the batch."""
    return g.feed("h0", draw.normal(1, H), "M", H)


def state_one_row(draw: Draw) -> Graph:
    """LIFTED: one row of a state stands for the whole batch of a Loop."""
    g = Graph()
    sequence = g.feed("X", draw.x(), "T", "N", IN)
    state, cell = one_row_state(g, draw), draw_cell(draw, "GRU", TWO)
    return give(g, run(g, cell, sequence, state))


def state_unknown_rank(draw: Draw) -> Graph:
    """LIFTED: only the body says how many axes the state has."""
    g, cell, sequence, state = begin(draw)
    shape = g.op("Compress", g.op("Shape", state), g.constant([True, True]), axis=0)
    return give(g, run(g, cell, sequence, g.op("Reshape", state, shape)))


def step(draw: Draw, opset: int) -> Graph:
    """One step whose state has one row where x has several."""
    g = Graph(opset)
    x, state = g.feed("x", draw.x(N, IN), "N", IN), one_row_state(g, draw)
    cell = draw_cell(draw, "GRU", replace(TWO, axis=1))
    return give(g, cell.step(g, x, [state]))


# Numbers of steps


def trip_bool(draw: Draw) -> Graph:
    """CELL ONLY: the number of steps went through bool, so it is 1."""
    g, cell, sequence, state = begin(draw)
    steps = g.gather(g.op("Shape", sequence), 0)
    one = g.op("Cast", g.op("Cast", steps, to=TensorProto.BOOL), to=TensorProto.INT64)
    return give(g, run(g, cell, sequence, state, trip=one))


def trip_zero(draw: Draw) -> Graph:
    """CELL ONLY: the loop never runs, so it gives the initial state."""
    g, cell, sequence, state = begin(draw)
    return give(g, run(g, cell, sequence, state, trip=g.constant(0))[:1])


def trip_less(draw: Draw) -> Graph:
    """CELL ONLY: one step less than the sequence has, which may be none."""
    g, cell, sequence, state = begin(draw)
    steps = g.op("Sub", g.gather(g.op("Shape", sequence), 0), g.constant(1))
    return give(g, run(g, cell, sequence, state, trip=steps))


# Several graphs or operators


def if_invariant(draw: Draw) -> Graph:
    """LIFTED: a Loop in an If hands on a value of the outer graph, unchanged."""
    g, cell, sequence, state = begin(draw)
    outer = g.op("Relu", g.feed("q", draw.normal(N, 2), "N", 2))
    chosen = g.feed("flag", np.array(True))

    def turn(b: Graph, counter: str, _go: str, names: list[str]) -> Turn:
        return [*cell.step(b, b.gather(sequence, counter), names[:1]), names[1]], [], None

    def then(b: Graph) -> list[str]:
        length = b.gather(b.op("Shape", sequence), 0)
        return b.loop(length, b.constant(True), [state, outer], [row(), row(2)], turn)

    h, q = g.branch(chosen, then, lambda b: [b.op("Neg", state), b.op("Neg", outer)])
    g.give("q_last", q, None, "N", 2)
    return give(g, [h])


def if_same_names(draw: Draw) -> Graph:
    """LIFTED: the loops of two branches have the same name."""
    g, cell, sequence, state = begin(draw)
    other = draw_cell(draw, "GRU", TWO)
    branches = [lambda b, each=each: run(b, each, sequence, state)[:1] for each in (cell, other)]
    return give(g, g.branch(g.feed("flag", np.array(True)), *branches))


def join_cycle3(draw: Draw) -> Graph:
    """LIFTED: joining one pair of directions makes the other impossible."""
    g, _, sequence, state = begin(draw)
    cells = [draw_cell(draw, "GRU", TWO, hidden=size) for size in (4, 3, 3, 4)]
    turned = backwards(g, sequence)
    starts = [g.constant(draw.normal(H, size)) for size in (4, 3)]
    wide, narrow = (g.op("MatMul", state, kernel) for kernel in starts)
    down, up = g.constant(draw.normal(4, 3)), g.constant(draw.normal(3, 4))
    ends = [run(g, cells[0], sequence, wide, size=4)[0]]
    ends.append(run(g, cells[1], sequence, g.op("MatMul", ends[0], down), size=3)[0])
    ends.append(run(g, cells[2], turned, narrow, size=3)[0])
    ends.append(run(g, cells[3], turned, g.op("MatMul", ends[2], up), size=4)[0])
    for i, (end, size) in enumerate(zip(ends, (4, 3, 3, 4), strict=True)):
        g.give(f"h{i}_last", end, None, "N", size)
    return g


def matmul_batch(draw: Draw) -> Graph:
    """KEPT: the product with one matrix is a sequence because its other operand is one."""
    g = Graph()
    left, right = g.feed("A", draw.x(1, N, 2), 1, "N", 2), g.feed("B", draw.x(T, 2, IN), "T", 2, IN)
    first, stored = g.op("MatMul", left, right), draw.weights("GRU", names="WR")
    weights = [g.constant(array) for array in stored.values()]
    state = g.feed("h0", draw.normal(1, N, H), 1, "N", H)
    outputs = []
    for x in (first, g.op("Neg", first)):
        y, state = g.ops("GRU", x, *weights, "", "", state, count=2, hidden_size=H)
        outputs.append(y)
    g.give("Y", outputs[0], None, "S", 1, "N", H)
    g.give("h_last", state, None, 1, "N", H)
    return g


# Networks without recurrence


def mlp(g: Graph, draw: Draw, x: str) -> str:
    """Two dense layers."""
    hidden = g.op("Relu", g.op("MatMul", x, g.constant(draw.normal(H, 8))))
    return g.op("MatMul", hidden, g.constant(draw.normal(8, H)))


def residual_mlp(draw: Draw) -> Graph:
    """KEPT: a residual block, whose output is as wide as its input."""
    g = Graph()
    x = g.feed("x", draw.x(N, H), "N", H)
    g.give("y", g.add(x, g.add(mlp(g, draw, x), g.constant(draw.normal(H)))), None, "N", H)
    return g


def skip_mlp(draw: Draw) -> Graph:
    """KEPT: a dense layer and two others beside it."""
    g = Graph()
    x = g.feed("x", draw.x(N, H), "N", H)
    skip = g.op("MatMul", x, g.constant(draw.normal(H, H)))
    g.give("y", g.op("Tanh", g.add(skip, mlp(g, draw, x))), None, "N", H)
    return g


def two_input_linear(draw: Draw) -> Graph:
    """KEPT: the sum of the products of two inputs."""
    g = Graph()
    inputs = [g.feed(name, draw.x(N, size), "N", size) for name, size in (("x", H), ("z", IN))]
    kernels = [g.constant(draw.normal(size, H)) for size in (H, IN)]
    products = [g.op("MatMul", *pair) for pair in zip(inputs, kernels, strict=True)]
    g.give("y", g.add(*products), None, "N", H)
    return g


def refine_loop(draw: Draw) -> Graph:
    """KEPT: a residual block that is applied three times by a Loop without a sequence."""
    g = Graph()
    x = g.feed("x", draw.x(N, H), "N", H)

    def turn(b: Graph, _counter: str, _go: str, names: list[str]) -> Turn:
        return [b.add(names[0], mlp(b, draw, names[0]))], [], None

    g.give("y", g.loop(g.constant(3), g.constant(True), [x], [("N", H)], turn)[0], None, "N", H)
    return g


# All of them

FUNCTIONS = (
    two_masks,
    scan_mask_first,
    mask_reversed_hold,
    mask_backwards_hold,
    pos,
    split_rows,
    post_dense,
    state_one_row,
    state_unknown_rank,
    trip_bool,
    trip_zero,
    trip_less,
    if_invariant,
    if_same_names,
    join_cycle3,
    matmul_batch,
    residual_mlp,
    skip_mlp,
    two_input_linear,
    refine_loop,
)
SHARED = PADDED[:, :1]
UNITS = np.broadcast_to(np.arange(T)[:, None, None] < COLUMNS, (T, N, H))
OLD = replace(TWO, axis=1)
TABLE: Makers = {
    "float_lengths": (
        "LIFTED: lengths have fractions, and a step that they begin counts.",
        partial(counted, lengths=np.array([2.5, 7.0, 3.2], np.float32)),
    ),
    "long_lengths": (
        "LIFTED: some lengths are larger than the number of steps.",
        partial(counted, lengths=np.array([9, 7, 12])),
    ),
    "lengths_first_pos": (
        "LIFTED: the body reads a sequence of one row before that of x.",
        partial(counted, lengths=LENGTHS, before=True),
    ),
    "scalar_length": (
        "CELL ONLY: one length, a scalar, is that of all rows.",
        partial(counted, lengths=np.array(3), dims=()),
    ),
    "one_length": (
        "CELL ONLY: one length, a matrix of one entry, is that of all rows.",
        partial(counted, lengths=np.array([[3]]), dims=(1, 1)),
    ),
    "unit_lengths": (
        "CELL ONLY: lengths are those of units, not of rows.",
        partial(counted, lengths=COLUMNS, dims=(H,)),
    ),
    "mask_shared": (
        "PROMISE, CELL ONLY: one row of a mask is that of all rows.",
        partial(masked, mask=SHARED, dims=("T", 1, 1)),
    ),
    "mask_shared_first": (
        "PROMISE, CELL ONLY: one row of a mask is that of all rows, and is read before x.",
        partial(masked, mask=SHARED, dims=("T", 1, 1), first=True),
    ),
    "mask_units": (
        "PROMISE, CELL ONLY: a mask has a flag for each unit.",
        partial(masked, mask=UNITS, dims=("T", "N", H)),
    ),
    "chain_reversed_opset9": (
        "LIFTED: a chain runs backwards where Slice has no step.",
        partial(unrolled, "GRU", OLD, start="input", gives="Yh", reverse=True, opset=9),
    ),
    "chain_ir3": (
        "LIFTED: IR version 3, where initializers must be inputs.",
        partial(unrolled, "GRU", OLD, start="input", gives="Yh", opset=8),
    ),
    "domain_aionnx": ("LIFTED: the opset is imported for the domain ai.onnx.", plain),
    "cell_one_row_state": (
        "LIFTED: one row of a state stands for the whole batch of a step.",
        partial(step, opset=18),
    ),
    "cell_named_opset7": (
        "KEPT: the same at an opset that has no Expand.",
        partial(step, opset=7),
    ),
}


def makers() -> Makers:
    """All graphs by name: idiom and maker."""
    batches: Makers = {
        f"static_batch_{n}": (f"LIFTED: the batch is {n}.", partial(plain, batch=n))
        for n in (1, 2, 4)
    }
    return TABLE | batches | documented(FUNCTIONS)


# Changes to finished models


def make_ir3(model: onnx.ModelProto) -> None:
    """Declare initializers as inputs, as IR version 3 demands."""
    model.ir_version = 3
    model.graph.input.extend(
        helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        for tensor in model.graph.initializer
    )


def name_domain(model: onnx.ModelProto) -> None:
    """Give the domain of the operators its long name."""
    model.opset_import[0].domain = "ai.onnx"


def name_loops(model: onnx.ModelProto) -> None:
    """Give the loops of all branches one name."""
    branches = (a.g for node in model.graph.node for a in node.attribute if a.HasField("g"))
    for loop in (node for g in branches for node in g.node if node.op_type == "Loop"):
        loop.name = "while"


CHANGES = {"chain_ir3": make_ir3, "domain_aionnx": name_domain, "if_same_names": name_loops}


def changed(case: Case) -> Case:
    """The case of a graph with its change, if it has one."""
    if case.name in CHANGES:
        CHANGES[case.name](case.model)
    return case


if __name__ == "__main__":
    made = (changed(make(name, *entry)) for name, entry in makers().items())
    write_cases(made, "make_edges.py", HERE / "edges")
