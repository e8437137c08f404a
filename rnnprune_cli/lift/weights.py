"""A recognised cell → the weights of its operator.

1. Tell the state from the input, among the values that the gates read.
2. Add up the matrices that each of them is multiplied with.
3. Put the gates in the operator's order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from rnnprune_cli.lift.algebra import (
    Function,
    Key,
    Leaf,
    Product,
)
from rnnprune_cli.lift.context import Context
from rnnprune_cli.lift.equations import Form, Gate, kernel, readings
from rnnprune_cli.model import Array, Op


@dataclass(frozen=True, eq=False)
class Cell:
    """A recognised cell with the weights of its operator.

    Attributes:
        op: The operator.
        hidden: Number of units.
        functions: ONNX's ``activations``.
        linear_before_reset: As in ONNX's GRU.
        x: The inputs, to be joined along the last axis; each ``[N, ·]``, or with axes of size 1
            before.
        h: State before. None: zero (the first step of a chain from which it was removed).
        c: LSTM: cell state before.
        h_next: State after.
        c_next: LSTM: cell state after.
        w: ``[1, gates · hidden, inputs]``.
        r: ``[1, gates · hidden, hidden]``.
        b: ``[1, 2 · gates · hidden]``.
        p: LSTM: ``[1, 3 · hidden]`` peepholes, or None.
        kernel: See :func:`kernel`.
        weights: Names of the initializers that it multiplies with.
    """

    op: Op
    hidden: int
    functions: tuple[Function, ...]
    linear_before_reset: bool
    x: tuple[ir.Value, ...]
    h: ir.Value | None
    c: ir.Value | None
    h_next: ir.Value
    c_next: ir.Value | None
    w: Array
    r: Array
    b: Array
    p: Array | None
    kernel: frozenset[Key]
    weights: tuple[str, ...]


class _NoCell(Exception):  # noqa: N818  an answer, not an error
    """Why a form is no cell."""


def split_state(form: Form, h_next: ir.Value, context: Context, earlier: Earlier) -> Cell | str:
    """Tells state from input and puts the weights together.

    Returns:
        The cell, or a sentence saying why it is none.
    """
    try:
        return _assembled(form, h_next, context, earlier)
    except _NoCell as reason:
        return str(reason)


def _assembled(form: Form, h_next: ir.Value, context: Context, earlier: Earlier) -> Cell:
    bare = context.layout.bare
    bases = _bases(form, context)
    state = form.state
    if state is None and not form.from_zero:
        state = _state(form, h_next, bases, context, earlier)
    taken = {id(bare(v)) for v in (state, form.reset_state) if v is not None}
    inputs = [v for k, v in bases.items() if k not in taken]
    if not inputs:
        raise _NoCell("it has no input besides its state")
    w, r, bias, inner_bias, peepholes = [], [], [], [], []
    for number, each in enumerate(form.gates):
        matrices = _gather(each, context)
        peepholes.append(_peephole(form, number, matrices, state, inputs, context))
        block, inside = _recurrent(form, number, matrices, state, context)
        r.append(block.T)
        w.append(_input_block(form, matrices, inputs, context).T)
        bias.append(np.broadcast_to(each.bias, form.hidden))
        inner_bias.append(np.broadcast_to(inside, form.hidden))
        if matrices:
            raise _NoCell("its gates read values that are neither input nor state")
    if not form.from_zero and not any(block.any() for block in r):
        raise _NoCell("its state does not enter its gates")
    p = None
    if form.op == "LSTM":
        peepholes[1] = form.output_peephole
        if any(one is not None for one in peepholes):
            three = [np.broadcast_to(0.0 if q is None else q, form.hidden) for q in peepholes[:3]]
            p = np.concatenate(three)[None].astype(np.float32)
    return Cell(
        form.op,
        form.hidden,
        form.functions,
        form.op == "GRU" and form.recurrent is not None,
        tuple(inputs),
        state,
        form.cell,
        h_next,
        form.cell_next,
        np.ascontiguousarray(np.concatenate(w)[None], np.float32),
        np.ascontiguousarray(np.concatenate(r)[None], np.float32),
        np.concatenate([*bias, *inner_bias])[None].astype(np.float32),
        p,
        kernel(form),
        tuple(t.factors[0].name for t in readings(form) if isinstance(t.factors[0], Product)),
    )


def _peephole(
    form: Form,
    number: int,
    matrices: dict[int, Array],
    state: ir.Value | None,
    inputs: list[ir.Value],
    context: Context,
) -> Array | None:
    """Takes out what a gate of an LSTM reads of the cell state: ``[hidden]``, or None."""
    if form.cell is None:
        return None
    bare = context.layout.bare
    key = id(bare(form.cell))
    elsewhere = {id(bare(v)) for v in (state, *inputs) if v is not None}
    if key not in matrices or key in elsewhere:
        return None
    diagonal = _diagonal(matrices.pop(key), form.hidden)
    if diagonal is None or number in (1, 3):
        raise _NoCell("its cell state enters a gate where no peephole is")
    return diagonal


def _recurrent(
    form: Form,
    number: int,
    matrices: dict[int, Array],
    state: ir.Value | None,
    context: Context,
) -> tuple[Array, Array]:
    """Takes out what a gate reads of the state: ``[hidden, hidden]``, and a bias within a reset."""
    found, bias = None, np.zeros(1)
    key = None if state is None else id(context.layout.bare(state))
    candidate = form.op == "GRU" and number == 2
    if candidate and key in matrices:
        raise _NoCell("its candidate reads the state past the reset gate")
    if candidate and form.reset_state is not None:
        found = matrices.pop(id(context.layout.bare(form.reset_state)), None)
    elif candidate and form.recurrent is not None:
        inner, bias = _gather(form.recurrent, context), form.recurrent.bias
        found = None if key is None else inner.pop(key, None)
        if inner:
            raise _NoCell("its reset gate multiplies more than the state")
    elif key is not None:
        found = matrices.pop(key, None)
    if found is None:
        found = np.zeros((form.hidden, form.hidden), np.float32)
    if found.shape != (form.hidden, form.hidden):
        raise _NoCell("its state has another width than its gates")
    return found, bias


def _input_block(
    form: Form, matrices: dict[int, Array], inputs: list[ir.Value], context: Context
) -> Array:
    """Takes out what a gate reads of the inputs: ``[inputs, hidden]``."""
    parts = []
    for value in inputs:
        width = _width(value, form, context)
        if width is None:
            raise _NoCell(f"the width of '{value.name}' is not known")
        missing = np.zeros((width, form.hidden), np.float32)
        matrix = matrices.pop(id(context.layout.bare(value)), missing)
        if matrix.shape != missing.shape:
            raise _NoCell(f"'{value.name}' enters its gates with different widths")
        parts.append(matrix)
    return np.concatenate(parts)


def _bases(form: Form, context: Context) -> dict[int, ir.Value]:
    """The values that the gates read: id without axes of size 1 → value."""
    found: dict[int, ir.Value] = {}
    for term in readings(form):
        factor = term.factors[0]
        assert isinstance(factor, Leaf | Product)
        bare = context.layout.bare(factor.value)
        on_cell = form.cell is not None and bare is context.layout.bare(form.cell)
        if on_cell and isinstance(factor, Leaf):
            continue  # a peephole
        found.setdefault(id(bare), factor.value)
    return found


def _width(value: ir.Value, form: Form, context: Context) -> int | None:
    for term in readings(form):
        factor = term.factors[0]
        assert isinstance(factor, Leaf | Product)
        if context.layout.bare(factor.value) is context.layout.bare(value):
            if isinstance(factor, Product):
                return int(factor.matrix.shape[0])
            last = factor.value.shape[-1] if factor.value.shape is not None else None
            return last if isinstance(last, int) else None
    return None


def _gather(each: Gate, context: Context) -> dict[int, Array]:
    """Adds up the matrices of each value: id without axes of size 1 → ``[columns, hidden]``."""
    found: dict[int, Array] = {}
    for term in (*each.products.values(), *each.columns.values()):
        factor = term.factors[0]
        if isinstance(factor, Product):
            matrix = factor.matrix
            if not (term.coefficient == 1).all():
                matrix = (matrix * term.coefficient).astype(matrix.dtype)
        else:
            assert isinstance(factor, Leaf) and factor.value.shape is not None
            matrix = np.zeros((int(factor.value.shape[-1]), factor.width), np.float32)  # type: ignore[arg-type]
            at = np.arange(factor.width)
            matrix[factor.start + at, at] = term.coefficient
        key = id(context.layout.bare(factor.value))
        found[key] = matrix if key not in found else found[key] + matrix
    return found


def _diagonal(matrix: Array, hidden: int) -> Array | None:
    if matrix.shape != (hidden, hidden):
        return None
    diagonal: Array = np.diagonal(matrix).copy()
    return diagonal if np.count_nonzero(matrix) == np.count_nonzero(diagonal) else None


@dataclass(frozen=True, eq=False)
class Earlier:
    """Candidates that come before in the same graph: how an unrolled chain shows."""

    h_next: dict[int, tuple[Form, frozenset[Key], ir.Value]]
    """id of a new state → its form, :func:`kernel`, and itself."""
    c_next: dict[int, ir.Value]
    """id of a new cell state → the hidden state of the same step."""
    certain: set[int]
    """id of every form whose result a later step of the same weights reads as its state."""


def _state(
    form: Form, h_next: ir.Value, bases: dict[int, ir.Value], context: Context, earlier: Earlier
) -> ir.Value:
    """Finds the state among the values that the gates of an LSTM or RNN read."""
    hidden = form.hidden
    wide = {k: v for k, v in bases.items() if _width(v, form, context) == hidden}
    if len(bases) < 2 or not wide:
        raise _NoCell("no value that its gates read is its state; something stands between them")
    if form.cell is not None:
        before = earlier.c_next.get(id(context.layout.bare(form.cell)))
        if before is not None and id(before) in wide:
            return wide[id(before)]
    own = kernel(form)
    for key, value in () if form.functions[0].name == "Affine" else wide.items():
        before_form = earlier.h_next.get(key)
        if before_form is not None and before_form[1] == own:
            return value
    for key, value in () if form.functions[0].name == "Affine" else wide.items():
        # The first step of a chain lacks the product with a state that is zero.
        before_form = earlier.h_next.get(key)
        if before_form is not None and before_form[0].op == form.op and before_form[1] < own:
            return value
    scores = {k: context.likeness(v, form.cell, h_next) for k, v in wide.items()}
    best = max(reversed(scores), key=lambda k: scores[k])  # of equals the later: x first, then h
    if form.op == "RNN" and id(form) not in earlier.certain:
        affine = form.functions[0].name == "Affine"
        by_matrix = {
            id(context.layout.bare(t.factors[0].value))
            for t in readings(form)
            if isinstance(t.factors[0], Product)
        }
        sums_up = affine and (best not in by_matrix or not context.in_loop(h_next))
        if scores[best] < context.SURE or sums_up:
            raise _NoCell("nothing shows which of its inputs is a state")
        if any(context.reads(v, wide[best]) for k, v in bases.items() if k != best):
            raise _NoCell("its input is made from its state")
    return wide[best]


_DEFAULTS: dict[Op, tuple[Function, ...]] = {
    "LSTM": (Function("Sigmoid"), Function("Tanh"), Function("Tanh")),
    "GRU": (Function("Sigmoid"), Function("Tanh")),
    "RNN": (Function("Tanh"),),
}


def attributes(cell: Cell) -> dict[str, Any]:
    """Returns the attributes of the operator that stands for a cell."""
    found: dict[str, Any] = {"hidden_size": cell.hidden}
    if cell.functions != _DEFAULTS[cell.op]:
        found["activations"] = [f.name for f in cell.functions]
        alphas = [f.alpha for f in cell.functions if f.alpha is not None]
        betas = [f.beta for f in cell.functions if f.beta is not None]
        if alphas:
            found["activation_alpha"] = alphas
        if betas:
            found["activation_beta"] = betas
    if cell.linear_before_reset:
        found["linear_before_reset"] = 1
    return found
