"""Hand-written cells → LSTM, GRU and RNN operators over one step.

1. Write every value of a graph as a sum of products (:mod:`.algebra`).
2. Hold the sums against the three cells' equations (ONNX operators LSTM, GRU, RNN).
3. Tell the state from the input.
4. Replace what computes the new state.

The cells stay where they are: in a loop's body, in a branch, in an unrolled chain. Making one
operator of a whole loop or chain is for :mod:`.loop` and :mod:`.chain`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_ir as ir

from rnnprune_cli.errors import RnnpruneError
from rnnprune_cli.lift.algebra import (
    Activation,
    Expression,
    Function,
    Key,
    Leaf,
    Product,
    Term,
)
from rnnprune_cli.lift.context import Context, known_rank, layer_name, static
from rnnprune_cli.lift.layout import rank
from rnnprune_cli.model import Array, Op, TensorSpec
from rnnprune_cli.runtime import OnnxRunner

TANH, SIGMOID = Function("Tanh"), Function("Sigmoid")


@dataclass(frozen=True, eq=False)
class Gate:
    """An affine function of values: ``Σ value · matrix + Σ value ∘ diagonal + bias``.

    Attributes:
        products: Key of a product → the term.
        columns: Key of a leaf → the term.
        bias: ``[1]`` or ``[hidden]``, float64.
        rest: Every other term.
    """

    products: dict[Key, Term]
    columns: dict[Key, Term]
    bias: Array
    rest: dict[Key, Term]

    def negated(self) -> Gate:
        """Returns the function with the opposite sign."""
        return Gate(
            {k: replace(t, coefficient=-t.coefficient) for k, t in self.products.items()},
            {k: replace(t, coefficient=-t.coefficient) for k, t in self.columns.items()},
            -self.bias,
            {k: replace(t, coefficient=-t.coefficient) for k, t in self.rest.items()},
        )


NO_GATE = Gate({}, {}, np.zeros(1), {})


def gate(expression: Expression) -> Gate:
    """Takes a sum apart."""
    found = Gate({}, {}, np.zeros(1), {})
    bias = found.bias
    for key, term in expression.terms.items():
        if not term.factors:
            bias = term.coefficient
        elif len(term.factors) > 1 or isinstance(term.factors[0], Activation):
            found.rest[key] = term
        elif isinstance(term.factors[0], Leaf):
            found.columns[key] = term
        else:
            found.products[key] = term
    return replace(found, bias=bias)


@dataclass(frozen=True, eq=False)
class Form:
    """What a value was recognised as, before state and input are told apart.

    Attributes:
        op: The operator.
        gates: In ONNX's order: LSTM i, o, f, c; GRU z, r, h; RNN i.
        functions: ONNX's ``activations``.
        state: GRU: the state before. None: any of the values that the gates read.
        cell: LSTM: the cell state before.
        cell_next: LSTM: the value of the cell state after.
        recurrent: GRU: products of the state that the reset gate multiplies, with their bias;
            None where the reset gate multiplies the state itself.
        reset_state: GRU: the value ``r ∘ h``.
        output_peephole: LSTM: coefficients of the new cell state in the output gate.
        from_zero: The state before is zero, and what it is multiplied with is gone.
    """

    op: Op
    gates: tuple[Gate, ...]
    functions: tuple[Function, ...]
    hidden: int
    state: ir.Value | None = None
    cell: ir.Value | None = None
    cell_next: ir.Value | None = None
    recurrent: Gate | None = None
    reset_state: ir.Value | None = None
    output_peephole: Array | None = None
    from_zero: bool = False


def recognise(value: ir.Value, context: Context) -> Form | None:
    """Returns the cell whose new hidden state a value is, if it is one."""
    expression = context.algebra.of(value)
    if expression is None or not expression.terms:
        return None
    degrees = sorted(len(term.factors) for term in expression.terms.values())
    if degrees == [2]:
        return _lstm(expression)
    if degrees == [1, 2, 2]:
        return _gru(expression, context)
    if degrees == [1, 2]:
        return _gru_from_zero(expression)
    if degrees and degrees[-1] == 1:
        return _rnn(expression)
    return None


def _lstm(expression: Expression) -> Form | None:
    """``h' = o ∘ g(c')``, ``c' = f ∘ c + i ∘ g``."""
    (term,) = expression.terms.values()
    if not term.is_one():
        return None
    one, other = term.factors
    for o, out in ((one, other), (other, one)):
        if not (isinstance(o, Activation) and isinstance(out, Activation)) or out.source is None:
            continue
        products = _cell_update(out.argument)
        if products is None:
            continue
        forget, cell, pair = products
        same = [k for k in (0, 1) if pair[k].function == o.function]
        if (forget is not None and forget.function != o.function) or not same:
            continue
        i, g = pair[same[0]], pair[1 - same[0]]
        output = gate(o.argument)
        peephole = _multiple(output.rest, out.argument)
        if output.rest and peephole is None:
            continue
        f = NO_GATE if forget is None else gate(forget.argument)
        gates = (gate(i.argument), replace(output, rest={}), f, gate(g.argument))
        if any(each.rest for each in gates):
            continue
        functions = (o.function, g.function, out.function)
        return Form(
            "LSTM",
            gates,
            functions,
            expression.width,
            cell=cell,
            cell_next=out.source,
            output_peephole=peephole,
            from_zero=cell is None,
        )
    return None


def _cell_update(
    expression: Expression,
) -> tuple[Activation | None, ir.Value | None, tuple[Activation, Activation]] | None:
    """Returns f, c and (i, g) of ``f ∘ c + i ∘ g``; no f and c where there is only ``i ∘ g``."""
    terms = list(expression.terms.values())
    if len(terms) == 1 and len(terms[0].factors) == 2 and terms[0].is_one():
        one, other = terms[0].factors
        if isinstance(one, Activation) and isinstance(other, Activation):
            return None, None, (one, other)
    if len(terms) != 2 or not all(len(t.factors) == 2 and t.is_one() for t in terms):
        return None
    for kept, new in (terms, terms[::-1]):
        state = next((f for f in kept.factors if _is_whole(f)), None)
        forget = next((f for f in kept.factors if isinstance(f, Activation)), None)
        one, other = new.factors
        if (
            isinstance(state, Leaf)
            and forget is not None
            and isinstance(one, Activation)
            and isinstance(other, Activation)
        ):
            return forget, state.value, (one, other)
    return None


def _is_whole(factor: object) -> bool:
    return isinstance(factor, Leaf) and factor.start == 0 and factor.value.shape is not None and (
        factor.value.shape[-1] == factor.width
    )


def _multiple(rest: Mapping[Key, Term], of: Expression) -> Array | None:
    """Returns p where the terms are ``p ∘`` a sum, or None."""
    if not rest or rest.keys() != of.terms.keys():
        return None
    first, *others = (rest[k].coefficient / of.terms[k].coefficient for k in rest)
    return first if all(np.allclose(first, other, rtol=1e-6) for other in others) else None


def _gru(expression: Expression, context: Context) -> Form | None:
    """``h' = (1 - z) ∘ n + z ∘ h``, or with 1 - z in place of z."""
    (alone,) = (t for t in expression.terms.values() if len(t.factors) == 1)
    pairs = [t for t in expression.terms.values() if len(t.factors) == 2]
    if not alone.is_one():
        return None
    # One of the two products has the factor that stands alone, with the opposite sign.
    single = alone.factors[0]
    minus = next((t for t in pairs if t.is_one(-1) and single.key in _keys(t)), None)
    plus = next((t for t in pairs if t.is_one() and t is not minus), None)
    if minus is None or plus is None:
        return None
    z = next(f for f in minus.factors if f.key != single.key) if len(set(_keys(minus))) == 2 else None
    other = next((f for f in plus.factors if z is not None and f.key != z.key), None)
    if not isinstance(z, Activation) or other is None or z.key not in _keys(plus):
        return None
    update = gate(z.argument)
    if _is_whole(single) and isinstance(other, Activation):
        # (1 - z) ∘ h + z ∘ n
        if not z.function.odd_about_half():
            return None
        state, new, update = single, other, update.negated()
    elif _is_whole(other) and isinstance(single, Activation):
        state, new = other, single
    else:
        return None
    assert isinstance(state, Leaf) and isinstance(new, Activation)
    if update.rest:
        return None
    candidate = gate(new.argument)
    form = Form("GRU", (), (z.function, new.function), expression.width, state=state.value)
    if candidate.rest:
        return _reset_after(form, update, candidate)
    return _reset_before(form, update, candidate, context)


def _gru_from_zero(expression: Expression) -> Form | None:
    """``h' = (1 - z) ∘ n``, or with 1 - z in place of z."""
    (alone,) = (t for t in expression.terms.values() if len(t.factors) == 1)
    (pair,) = (t for t in expression.terms.values() if len(t.factors) == 2)
    new = alone.factors[0]
    z = next((f for f in pair.factors if f.key != new.key), None)
    if not (alone.is_one() and pair.is_one(-1) and new.key in _keys(pair)):
        return None
    if not isinstance(z, Activation) or not isinstance(new, Activation):
        return None
    update, candidate = gate(z.argument), gate(new.argument)
    form = Form("GRU", (), (z.function, new.function), expression.width, from_zero=True)
    if update.rest:
        return None
    if candidate.rest:
        return _reset_after(form, update, candidate)
    return replace(form, gates=(update, NO_GATE, candidate))


def _keys(term: Term) -> list[Key]:
    return [factor.key for factor in term.factors]


def _reset_after(form: Form, update: Gate, candidate: Gate) -> Form | None:
    """``n = g(x · W + r ∘ (h · R + b))``."""
    resets: dict[Key, Activation] = {}
    products: dict[Key, Term] = {}
    bias = np.zeros(1)
    for term in candidate.rest.values():
        gates = [f for f in term.factors if isinstance(f, Activation)]
        others = [f for f in term.factors if not isinstance(f, Activation)]
        if len(gates) != 1 or len(others) > 1:
            return None
        resets[gates[0].key] = gates[0]
        if not others:
            bias = term.coefficient
        elif isinstance(others[0], Product):
            products[others[0].key] = Term(term.coefficient, (others[0],))
        else:
            return None
    if len(resets) != 1 or not (products or form.from_zero):
        return None
    (reset,) = resets.values()
    r = gate(reset.argument)
    if r.rest or reset.function != form.functions[0]:
        return None
    recurrent = Gate(products, {}, bias, {})
    return replace(form, gates=(update, r, replace(candidate, rest={})), recurrent=recurrent)


def _reset_before(form: Form, update: Gate, candidate: Gate, context: Context) -> Form | None:
    """``n = g(x · W + (r ∘ h) · R)``."""
    assert form.state is not None
    for term in candidate.products.values():
        product = term.factors[0]
        assert isinstance(product, Product)
        inner = context.algebra.of(product.value)
        if inner is None or len(inner.terms) != 1:
            continue
        (pair,) = inner.terms.values()
        if len(pair.factors) != 2 or not pair.is_one():
            continue
        leaf = next((f for f in pair.factors if _is_whole(f)), None)
        reset = next((f for f in pair.factors if isinstance(f, Activation)), None)
        if not isinstance(leaf, Leaf) or reset is None:
            continue
        if context.layout.bare(leaf.value) is not context.layout.bare(form.state):
            continue
        r = gate(reset.argument)
        if r.rest or reset.function != form.functions[0]:
            continue
        gates = (update, r, candidate)
        return replace(form, gates=gates, reset_state=product.value)
    return None


def _rnn(expression: Expression) -> Form | None:
    """``h' = f(x · W + h · R + b)``."""
    terms = list(expression.terms.values())
    if len(terms) > 1 or not isinstance(terms[0].factors[0], Activation):
        only = gate(expression)
        if only.rest or len(only.products) < 1 or len(only.products) + len(only.columns) < 2:
            return None
        return Form("RNN", (only,), (Function("Affine", 1.0, 0.0),), expression.width)
    (term,), (factor,) = terms, terms[0].factors
    if not isinstance(factor, Activation) or not term.is_one():
        return None
    only = gate(factor.argument)
    if only.rest or not (only.products or only.columns):
        return None
    return Form("RNN", (only,), (factor.function,), expression.width)


# State and input


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


def split_state(form: Form, h_next: ir.Value, context: Context, earlier: Earlier) -> Cell | str:
    """Tells state from input and puts the weights together.

    Returns:
        The cell, or a sentence saying why it is none.
    """
    bases = _bases(form, context)
    hidden = form.hidden
    state = form.state
    if state is None and not form.from_zero:
        found = _state(form, h_next, bases, context, earlier)
        if isinstance(found, str):
            return found
        state = found
    key = 0 if state is None else id(context.layout.bare(state))
    inputs = [v for k, v in bases.items() if k != key]
    if not inputs:
        return "it has no input besides its state"
    if form.reset_state is not None:
        skip = id(context.layout.bare(form.reset_state))
        inputs = [v for v in inputs if id(context.layout.bare(v)) != skip]
    if not inputs:
        return "it has no input besides its state"
    blocks_w, blocks_r, bias_w, bias_r = [], [], [], []
    peepholes: list[Array | None] = []
    cell = None if form.cell is None else id(context.layout.bare(form.cell))
    for number, each in enumerate(form.gates):
        gathered = _gather(each, context)
        last = form.op == "GRU" and number == 2
        peepholes.append(None)
        if cell is not None and cell in gathered and cell != key and cell not in {
            id(context.layout.bare(v)) for v in inputs
        }:
            diagonal = _diagonal(gathered.pop(cell), hidden)
            if diagonal is None or number in (1, 3):
                return "its cell state enters a gate where no peephole is"
            peepholes[-1] = diagonal
        if last and form.reset_state is not None:
            if key in gathered:
                return "its candidate reads the state past the reset gate"
            key_r = id(context.layout.bare(form.reset_state))
            recurrent = gathered.pop(key_r, None)
        elif last and form.recurrent is not None:
            if key in gathered:
                return "its candidate reads the state past the reset gate"
            inner = _gather(form.recurrent, context)
            recurrent = inner.pop(key, None)
            if inner:
                return "its reset gate multiplies more than the state"
        elif form.from_zero:
            recurrent = None
        else:
            recurrent = gathered.pop(key, None)
        parts = []
        for v in inputs:
            width = _width(v, form, context)
            if width is None:
                return f"the width of '{v.name}' is not known"
            matrix = gathered.pop(id(context.layout.bare(v)), np.zeros((width, hidden), np.float32))
            if matrix.shape != (width, hidden):
                return f"'{v.name}' enters its gates with different widths"
            parts.append(matrix)
        if gathered:
            return "its gates read values that are neither input nor state"
        if recurrent is None:
            recurrent = np.zeros((hidden, hidden), np.float32)
        if recurrent.shape != (hidden, hidden):
            return "its state has another width than its gates"
        blocks_w.append(np.concatenate(parts).T)
        blocks_r.append(recurrent.T)
        bias_w.append(np.broadcast_to(each.bias, hidden))
        inside = form.recurrent.bias if last and form.recurrent is not None else np.zeros(1)
        bias_r.append(np.broadcast_to(inside, hidden))
    if not form.from_zero and not any(block.any() for block in blocks_r):
        return "its state does not enter its gates"
    p = None
    if form.op == "LSTM":
        peepholes[1] = form.output_peephole
        if any(one is not None for one in peepholes[:3]):
            p = np.stack(
                [np.broadcast_to(0.0 if q is None else q, hidden) for q in peepholes[:3]]
            )
            p = p.reshape(1, -1).astype(np.float32)
    return Cell(
        form.op,
        hidden,
        form.functions,
        form.op == "GRU" and form.recurrent is not None,
        tuple(inputs),
        state,
        form.cell,
        h_next,
        form.cell_next,
        np.ascontiguousarray(np.concatenate(blocks_w)[None], np.float32),
        np.ascontiguousarray(np.concatenate(blocks_r)[None], np.float32),
        np.concatenate([*bias_w, *bias_r])[None].astype(np.float32),
        p,
        kernel(form),
    )


def _terms(form: Form) -> Iterable[Term]:
    for each in (*form.gates, *([] if form.recurrent is None else [form.recurrent])):
        yield from each.products.values()
        yield from each.columns.values()


def _bases(form: Form, context: Context) -> dict[int, ir.Value]:
    """The values that the gates read: id without axes of size 1 → value."""
    found: dict[int, ir.Value] = {}
    for term in _terms(form):
        factor = term.factors[0]
        assert isinstance(factor, Leaf | Product)
        bare = context.layout.bare(factor.value)
        if form.cell is not None and isinstance(factor, Leaf):
            if bare is context.layout.bare(form.cell):
                continue  # a peephole
        found.setdefault(id(bare), factor.value)
    return found


def _width(value: ir.Value, form: Form, context: Context) -> int | None:
    for term in _terms(form):
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


def kernel(form: Form) -> frozenset[Key]:
    """Names the constant matrices of a cell: equal for the steps of an unrolled chain."""
    return frozenset(
        term.factors[0].key[2:] for term in _terms(form) if isinstance(term.factors[0], Product)
    )


def _state(
    form: Form, h_next: ir.Value, bases: dict[int, ir.Value], context: Context, earlier: Earlier
) -> ir.Value | str:
    """Finds the state among the values that the gates of an LSTM or RNN read."""
    hidden = form.hidden
    wide = {k: v for k, v in bases.items() if _width(v, form, context) == hidden}
    if len(bases) < 2 or not wide:
        return "its gates read no state"
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
    if form.op == "RNN" and scores[best] < context.SURE and id(form) not in earlier.certain:
        return "nothing shows which of its inputs is a state"
    return wide[best]


# Writing


def find_cells(graph: ir.Graph, context: Context) -> tuple[list[Cell], dict[str, str]]:
    """Finds the cells of one graph, not of the graphs inside it.

    Returns:
        The cells in graph order, and name → why something that looks like a cell is none.
    """
    cells: list[Cell] = []
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
        if form.op == "LSTM" or (form.op == "GRU" and (not form.from_zero or _is_multiplied(value))):
            context.algebra.settle(value)
            if form.cell_next is not None:
                context.algebra.settle(form.cell_next)
        if form.from_zero:
            continue  # it is a cell if the next step is one
        found = split_state(form, value, context, earlier)
        if isinstance(found, Cell):
            reason = _fits(found, context)
            if reason is None:
                cells.append(found)
                earlier.certain.add(id(form))
                first = _first_step(found, context, earlier)
                if first is not None:
                    cells.append(first)
                continue
            found = reason
        if form.op != "RNN":
            declined[node.name or value.name or node.op_type] = found
    inside = {
        name
        for each in cells
        if each.op != "RNN"
        for node_proto in _between(each, context)[0]
        for name in node_proto.output
    }
    # A gate alone has the form of an RNN; Keras runs a masked cell once more, for its shape only.
    cells = [
        c for c in cells if (c.op != "RNN" or c.h_next.name not in inside) and _is_used(c, inside)
    ]
    return cells, declined


def _is_used(cell: Cell, inside: Container[str]) -> bool:
    """Tells whether anything reads the values of a cell's states, not only their shapes."""
    states = [v for v in (cell.h_next, cell.c_next) if v is not None]
    return any(
        value.is_graph_output()
        or any(
            user.op_type != "Shape" and user.outputs[0].name not in inside
            for user in value.consumers()
        )
        for value in states
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
        if rank(value) == 1:
            return "it has no batch axis"
    if len({rank(v) for v in cell.x}) > 1:
        return "its inputs have different numbers of dimensions"
    if not all(_is_step(v, context) for v in values):
        leading = {_leading(v, context) for v in values}
        if len(leading) > 1 or None in next(iter(leading)):
            return "input and state have different sizes besides their last axis"
    for state in (cell.h, cell.c):
        if state is not None and static(state, -2) == 1 and static(cell.x[0], -2) != 1:
            return "one state stands for a whole batch"
    if context.opset < 7:
        return f"opset {context.opset} has no recurrent operators for it (needs 7)"
    return None


def _is_step(value: ir.Value, context: Context) -> bool:
    """Tells whether a value is ``[N, ·]`` or ``[1, N, ·]``."""
    return rank(value) == 2 or (rank(value) == 3 and context.layout.is_one(value, 0))


def _leading(value: ir.Value, context: Context) -> tuple[object, ...]:
    sizes = [context.layout.dimension(value, k) for k in range(known_rank(value) - 1)]
    return tuple(None if s is None else tuple(sorted(s.items(), key=str)) for s in sizes)


_DEFAULTS: dict[Op, tuple[Function, ...]] = {
    "LSTM": (SIGMOID, TANH, TANH),
    "GRU": (SIGMOID, TANH),
    "RNN": (TANH,),
}


def attributes(cell: Cell) -> dict[str, int | list[float] | list[str]]:
    """Returns the attributes of the operator that stands for a cell."""
    found: dict[str, int | list[float] | list[str]] = {"hidden_size": cell.hidden}
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


def write(cell: Cell, context: Context) -> ir.Node:
    """Puts the operator in the place of what computed the new state.

    Returns:
        The operator.
    """
    before = cell.h_next.producer()
    assert before is not None and before.graph is not None
    name = context.unique(_name(cell))
    inputs_now = [context.current(v) for v in cell.x]
    x = inputs_now[0]
    if len(inputs_now) > 1:
        x = context.one(before, "Concat", inputs_now, axis=-1)

    def outward(value: ir.Value, columns: int) -> ir.Value:
        if rank(value) == 2:
            return context.unsqueeze(before, value, [0])
        if _is_step(value, context):
            return value
        return context.one(before, "Reshape", [value, context.ints(before, [1, -1, columns])])

    def inward(value: ir.Value, old: ir.Value) -> ir.Value:
        if rank(old) == 2:
            return context.squeeze(before, value, [0])
        if _is_step(old, context):
            return value
        shape = context.one(before, "Shape", [context.current(cell.h or cell.x[0])])
        head = context.slice(before, shape, 0, 0, known_rank(old) - 1)
        target = context.one(before, "Concat", [head, context.ints(before, [cell.hidden])], axis=0)
        for made in (shape, head, target):
            made.type = ir.TensorType(ir.DataType.INT64)
        return context.one(before, "Reshape", [value, target])

    def state(value: ir.Value | None) -> ir.Value | None:
        if value is None or context.layout.is_zero(value):
            return None
        return outward(context.current(value), cell.hidden)

    weights = [
        None if array is None or (role == "B" and not array.any())
        else context.constant(f"{name}/{role}", array)
        for role, array in (("W", cell.w), ("R", cell.r), ("B", cell.b), ("P", cell.p))
    ]
    if x.shape is None:
        x.shape = ir.Shape([None] * known_rank(cell.x[0]))
    inputs = [outward(x, cell.w.shape[2]), *weights[:3], None, state(cell.h)]
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


def _name(cell: Cell) -> str:
    """A name from the path that exporters give the values of a layer."""
    path = (cell.h_next.name or "").split(":")[0].rsplit("/", 1)
    return layer_name(path[0] if len(path) == 2 else "", cell.op)


# Checking


def check(cell: Cell, context: Context, opset: int) -> str | None:
    """Runs a cell and its operator in onnxruntime on random states and inputs.

    Returns:
        Why they are not the same, or None.
    """
    states = {k: v for k, v in (("h", cell.h), ("c", cell.c)) if v is not None}
    given = _given(cell, context)
    nodes, constants = _between(cell, context)
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
    if isinstance(written, str) or isinstance(operator, str):
        return f"onnxruntime refuses to compare it: {written if isinstance(written, str) else operator}"
    for scale in (0.3, 1.0, 3.0):
        feed = {
            n: (scale * rng.standard_normal(s)).astype(np.float32) for n, s in shapes.items()
        }
        rows = {n: a.reshape(1, -1, a.shape[-1]) for n, a in feed.items()}

        def rows_of(value: ir.Value) -> Array:
            return rows[context.layout.bare(value).name or ""]  # noqa: B023

        own = {"x": np.concatenate([rows_of(v) for v in cell.x], axis=-1)}
        own |= {k: rows_of(v) for k, v in states.items()}
        expected = written(feed)
        found = operator(own)
        if isinstance(expected, str) or isinstance(found, str):
            return f"onnxruntime cannot compare it: {expected if isinstance(expected, str) else found}"
        for one, two in zip(expected, found, strict=True):
            worst = float(np.abs(one.reshape(two.shape) - two).max())
            if not worst <= TOLERANCE * max(1.0, float(np.abs(one).max())):
                return f"an {cell.op} operator in its place differs by {worst:.3g}"
    return None


TOLERANCE = 1e-5


def _sample_shape(value: ir.Value, cell: Cell, context: Context) -> list[int]:
    """A shape for random rows: the sizes that are fixed, three where they are not."""
    widths = {id(context.layout.bare(v)): v for v in (*cell.x, cell.h, cell.c) if v is not None}
    last = static(value, -1) or static(widths[id(value)], -1) or cell.hidden
    sizes = [static(value, k) for k in range(known_rank(value) - 1)]
    return [3 if size is None else size for size in sizes] + [last]


def _given(cell: Cell, context: Context) -> dict[int, ir.Value]:
    """Input and state of a cell: id without axes of size 1 → value."""
    values = [v for v in (*cell.x, cell.h, cell.c) if v is not None]
    return {id(v): v for v in map(context.layout.bare, values)}


def _between(cell: Cell, context: Context) -> tuple[list[onnx.NodeProto], dict[str, Array]]:
    """The nodes that compute the new state from the old one and the input, and their constants."""
    given = _given(cell, context)
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, Array] = {}
    done: set[str] = {v.name or "" for v in given.values()}
    pending: list[tuple[ir.Value, bool]] = [
        (v, False) for v in (cell.h_next, cell.c_next) if v is not None
    ]
    while pending:
        value, ready = pending.pop()
        node = value.producer()
        if ready and node is not None:
            if not any(set(node_output_names(node)) & set(p.output) for p in nodes):
                nodes.append(ir.to_proto(node))
            continue
        if (value.name or "") in done:
            continue
        done.add(value.name or "")
        array = context.layout.constant(value)
        origin = context.layout.origin(value)
        row = context.algebra.of(value) if array is None else None
        if row is not None and row.degree == 0:  # zeros of a size known at run time
            array = row.terms[()].coefficient if row.terms else np.zeros(1)
            sizes = [static(value, k) for k in range(rank(value) or 1)]
            shape = [3 if size is None else size for size in sizes]
            array = np.broadcast_to(array.astype(np.float32), shape)
        if array is not None:
            constants[value.name or ""] = array
        elif origin is not value:  # through an unchanged value of a loop
            pending.append((origin, False))
            nodes.append(onnx.helper.make_node("Identity", [origin.name or ""], [value.name or ""]))
        elif node is not None:
            pending.append((value, True))
            pending.extend((v, False) for v in node.inputs if v is not None)
    return _in_order(nodes, set(constants) | {v.name or "" for v in given.values()}), constants


def node_output_names(node: ir.Node) -> list[str]:
    """Returns the names of a node's outputs."""
    return [v.name or "" for v in node.outputs]


def _in_order(nodes: list[onnx.NodeProto], known: set[str]) -> list[onnx.NodeProto]:
    ordered: list[onnx.NodeProto] = []
    left = nodes
    while left:
        ready = [n for n in left if all(not i or i in known for i in n.input)]
        if not ready:
            return ordered + left  # onnxruntime says what is missing
        ordered += ready
        known |= {o for n in ready for o in n.output}
        left = [n for n in left if n not in ready]
    return ordered


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
