"""An input projection in front of a lifted operator → part of its W and B.

Exporters that unroll or loop often multiply the whole sequence with the input weights first. The
lifted operator then reads the product, with ones for its W; here the weights go where they belong.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from rnnprune_cli.layout import rank
from rnnprune_cli.lift.algebra import Product
from rnnprune_cli.lift.context import Context, op_of
from rnnprune_cli.model import GATES, Array


@dataclass(frozen=True, eq=False)
class _Projection:
    """``X = moves(value · matrix + bias)``."""

    value: ir.Value
    matrix: Array
    bias: Array
    moves: list[ir.Node]


def fold_projection(node: ir.Node, context: Context) -> bool:
    """Makes an operator read what its input was projected from.

    Returns:
        Whether there was a projection.
    """
    op = op_of(node)
    w = context.layout.constant(node.inputs[1])
    if w is None or len(w) != 1 or not _selects(w[0]) or node.inputs[0] is None:
        return False
    found = _projection(node.inputs[0], context)
    if found is None:
        return False
    gates, hidden = GATES[op], w.shape[1] // GATES[op]
    b = np.zeros((1, 2 * gates * hidden), np.float32)
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        given = context.layout.constant(node.inputs[3])
        if given is None:
            return False
        b = given.copy()
    name = node.name or op
    bias = w[0].astype(np.float64) @ np.broadcast_to(found.bias, w.shape[2])
    b[0, : gates * hidden] = (b[0, : gates * hidden] + bias).astype(np.float32)
    x = found.value
    for move in reversed(found.moves):
        x = context.one(node, move.op_type, [x, *move.inputs[1:]])
        for attribute in move.attributes.values():
            made = x.producer()
            assert made is not None
            made.attributes.add(attribute)
    matrix = (w[0] @ found.matrix.T)[None].astype(np.float32)
    old = [v for v in node.inputs if v is not None]
    inputs = [x, context.constant(f"{name}/W", matrix), node.inputs[2]]
    inputs += [context.constant(f"{name}/B", b), *node.inputs[4:]]
    new = context.node(node, op, inputs, len(node.outputs), name=node.name)
    for attribute in node.attributes.values():
        new.attributes.add(attribute)
    for before, after in zip(node.outputs, new.outputs, strict=True):
        context.replace(before, after)
    context.clean([*node.outputs, *old])
    return True


def _selects(w: Array) -> bool:
    """Tells whether every row picks one column as it is."""
    return bool(((w != 0).sum(axis=1) == 1).all() and (w.sum(axis=1) == 1).all())


def _projection(value: ir.Value, context: Context) -> _Projection | None:
    moves: list[ir.Node] = []
    while True:
        value = context.layout.origin(value)
        node = value.producer()
        if node is None or rank(value) != 3:
            return None
        if node.op_type == "Transpose":
            if list(node.attributes.get_ints("perm", ()) or ()) != [1, 0, 2]:
                return None
        elif node.op_type == "Slice":
            bounds = context.layout.slice_bounds(node)
            if bounds is None or any(axis % 3 == 2 for axis in bounds):
                return None
        else:
            break
        moves.append(node)
        if node.inputs[0] is None:
            return None
        value = node.inputs[0]
    expression = context.algebra.of(value)
    if expression is None:
        return None
    bias, product = np.zeros(1), None
    for term in expression.terms.values():
        if not term.factors:
            bias = term.coefficient
        elif len(term.factors) == 1 and isinstance(term.factors[0], Product) and product is None:
            product = term
        else:
            return None
    if product is None:
        return None
    factor = product.factors[0]
    assert isinstance(factor, Product)
    if rank(factor.value) != 3:
        return None
    matrix = factor.matrix * product.coefficient
    return _Projection(factor.value, matrix, bias, moves)
