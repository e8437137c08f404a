"""The equations of LSTM, GRU and RNN cells, and how to recognise them in a sum of products.

Source: ONNX operators LSTM, GRU and RNN, section "Equations". Where a cell starts from a state that
is zero, exporters leave products with it away; such a cell is recognised, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from rnnprune_cli.lift.algebra import (
    Activation,
    Expression,
    Function,
    Key,
    Leaf,
    Product,
    Term,
)
from rnnprune_cli.lift.context import Context
from rnnprune_cli.model import Array, Op


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
    return (
        isinstance(factor, Leaf)
        and factor.start == 0
        and factor.value.shape is not None
        and (factor.value.shape[-1] == factor.width)
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
    z = (
        next(f for f in minus.factors if f.key != single.key)
        if len(set(_keys(minus))) == 2
        else None
    )
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


def readings(form: Form) -> Iterable[Term]:
    """Yields every term in which a gate reads a value."""
    for each in (*form.gates, *([] if form.recurrent is None else [form.recurrent])):
        yield from each.products.values()
        yield from each.columns.values()


def kernel(form: Form) -> frozenset[Key]:
    """Names the constant matrices of a cell: equal for the steps of an unrolled chain."""
    return frozenset(
        term.factors[0].key[2:] for term in readings(form) if isinstance(term.factors[0], Product)
    )
