"""Products that sum over units, where the way of a unit ends, and recurrent operators."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from rnnprune_cli.coupling.classes import IntArray
from rnnprune_cli.coupling.rules import Rule, meets, of_first
from rnnprune_cli.graph import input_of
from rnnprune_cli.layout import einsum_terms as einsum_terms
from rnnprune_cli.model import GATES

if TYPE_CHECKING:
    from rnnprune_cli.coupling import Coupling

_GATES: dict[str, int] = {str(op): count for op, count in GATES.items()}


def einsum(c: Coupling, node: ir.Node) -> None:
    """Multiplies and sums over what the terms name."""
    terms, result = einsum_terms(node)
    if "." in "".join(terms) or any(len(set(term)) < len(term) for term in terms):
        c.block(node, "its equation has an ellipsis or a diagonal")
        return
    contract(c, node, terms, result)


def matmul(c: Coupling, node: ir.Node) -> None:
    """Multiplies matrices; axes before the last two are broadcast."""
    ranks = [c.rank(v) if v is not None else None for v in node.inputs]
    if None in ranks:
        c.block(node, "the number of axes of an operand is not known")
        return
    a, b = (r or 0 for r in ranks)
    batch = "bcdefghij"
    lefts = batch[max(0, len(batch) - (a - 2)) :] if a > 2 else ""
    rights = batch[max(0, len(batch) - (b - 2)) :] if b > 2 else ""
    first = lefts + ("m" if a > 1 else "") + "k"
    second = rights + "k" + ("n" if b > 1 else "")
    wide = max(lefts, rights, key=len)
    contract(c, node, [first, second], wide + ("m" if a > 1 else "") + ("n" if b > 1 else ""))


def gemm(c: Coupling, node: ir.Node) -> None:
    """Multiplies two matrices and adds a third operand."""
    turned = [node.attributes.get_int(name, 0) for name in ("transA", "transB")]
    contract(c, node, ["km" if turned[0] else "mk", "nk" if turned[1] else "kn"], "mn", plus=True)


def contract(c: Coupling, node: ir.Node, terms: list[str], result: str, plus: bool = False) -> None:
    """Hands labels on through a product whose operands' axes have letters.

    1. A letter of units that is in the result goes on; every other operand with it follows.
    2. One that is summed over ends there: the others with it are what reads the units.
    3. An axis that tells units apart (directions) is tied, unless it is one of the result that
       every operand with the units has, too.
    """
    out: tuple[IntArray, int] | None = None
    for index, term in enumerate(terms):
        labels = c.of(node.inputs[index])
        if labels is None:
            continue
        letter = term[labels.axis]
        others = [k for k, other in enumerate(terms) if k != index and letter in other]
        if letter not in result and not others:
            c.block(node, "it adds up units")
            return
        array = labels.array
        for k, own in enumerate(term):
            shared = own in result and all(
                own in terms[other] and _is_long(c, node, other, terms[other].index(own))
                for other in others
            )
            if k != labels.axis and array.shape[k] > 1 and not shared:
                array = c.tied(array, k)
        for other in others:
            where = terms[other]
            if letter in result:
                c.operand(node, other, _placed(array, term, where), where.index(letter))
            else:
                c.reads(node, index, other, _placed(array, term, where), where.index(letter))
        if letter in result:
            moved = _placed(array, term, result), result.index(letter)
            if out is not None and out[1] != moved[1]:
                c.block(node, "units meet here along different axes")
                return
            if out is not None:
                c.classes.join(out[0], moved[0])
            out = moved
    added = input_of(node, 2) if plus else None
    known = c.of(added)
    if added is not None and known is not None:
        array = known.array.reshape((1,) * (2 - known.array.ndim) + known.array.shape)
        axis = known.axis + 2 - known.array.ndim
        if out is None:
            # Units from elsewhere are added: the product must have no more than these.
            out = (array, axis)
            side = next(k for k, term in enumerate(terms) if result[axis] in term)
            c.operand(
                node, side, _placed(array, result, terms[side]), terms[side].index(result[axis])
            )
        elif out[1] == axis:
            c.classes.join(out[0], array)
        else:
            c.block(node, "units meet here along different axes")
            return
    elif added is not None and out is not None:
        out = meets(c, node, 2, added, *out), out[1]
    if out is not None:
        c.give(node.outputs[0], *out, node)


def _is_long(c: Coupling, node: ir.Node, index: int, axis: int) -> bool:
    value = node.inputs[index]
    return value is not None and (c.size(value, axis) or 0) > 1


def _placed(array: IntArray, term: str, other: str) -> IntArray:
    """Moves labels from the axes of one term to the axes of the same letters of another."""
    sizes = dict(zip(term, array.shape, strict=True))
    order = [term.index(x) for x in other if x in term]
    rest = [k for k in range(array.ndim) if k not in order]
    turned: IntArray = array.transpose([*order, *rest])
    return turned.reshape([sizes.get(x, 1) for x in other])


@of_first
def conv(c: Coupling, node: ir.Node, array: IntArray, axis: int) -> None:
    """Sums over channels, the second axis."""
    weight = node.inputs[1]
    group = node.attributes.get_int("group", 1)
    outputs = None if weight is None else c.size(weight, 0)
    if axis > 1:
        c.block(node, "it slides over the units")
    elif axis == 0 or weight is None:
        c.block(node, "units are its batch")
    elif group == 1:
        ndim = c.rank(weight) or 3
        turned = node.op_type == "ConvTranspose"
        at = 0 if turned else 1
        c.reads(node, 0, 1, c.along(array, axis, ndim, at), at)
    elif group == array.shape[1] == outputs and node.op_type == "Conv":
        vector = c.tie(array, axis)
        c.operand(node, 1, vector.reshape([-1] + [1] * ((c.rank(weight) or 3) - 1)), 0)
        if input_of(node, 2) is not None:
            c.operand(node, 2, vector, 0)
        c.give(node.outputs[0], c.along(array, axis, array.ndim, 1), 1, node)
    else:
        c.block(node, "it works on groups of channels")


def recurrent(c: Coupling, node: ir.Node) -> None:
    """LSTM, GRU and RNN: what they read, and the units that they have themselves."""
    batch_first = node.attributes.get_int("layout", 0) == 1
    x = c.of(node.inputs[0])
    weight = node.inputs[1]
    if x is not None and weight is not None:
        if x.axis != 2:
            c.block(node, "units are its batch or its steps", labels=x.array)
        else:
            c.reads(node, 0, 1, c.along(x.array, 2, 3, 2), 2)
    for index in (1, 2, 3, 4, 7):
        if (own := c.of(input_of(node, index))) is not None:
            c.block(node, "units reach it where it takes no data", labels=own.array)
    units = c.units(node)
    if units is None:
        for index in (5, 6):
            if (own := c.of(input_of(node, index))) is not None:
                c.block(
                    node,
                    "its weights cannot be cut, and its state has these units",
                    labels=own.array,
                )
        return
    hidden = units.shape[1]
    if hidden == 1:
        c.block(node, "it has one unit only", labels=units)
    state = units[:, None, :] if not batch_first else units[None]
    for index in (5, 6):
        if input_of(node, index) is not None:
            known = c.of(node.inputs[index])
            if known is None:
                c.cut(node, index, state, 2, "initial")
            else:
                c.operand(node, index, state, 2)
    gates = _GATES[node.op_type]
    rows = np.tile(units, gates)
    c.cut(node, 1, rows[:, :, None], 1, "own")
    c.cut(node, 2, rows[:, :, None], 1, "own")
    c.cut(node, 2, units[:, None, :], 2, "reads")
    for index, times in ((3, 2 * gates), (7, 3)):
        if input_of(node, index) is not None:
            c.cut(node, index, np.tile(units, times), 1, "own")
    outputs = dict(enumerate(node.outputs))
    if hidden > 1:
        if 0 in outputs:
            y = units[None, None] if batch_first else units[None, :, None, :]
            c.give(outputs[0], y, 3, node)
        for k in (1, 2):
            if k in outputs:
                c.give(outputs[k], state, 2, node)


RULES: dict[str, Rule] = {
    "Einsum": einsum,
    "MatMul": matmul,
    "Gemm": gemm,
    "Conv": conv,
    "ConvTranspose": conv,
    **dict.fromkeys(_GATES, recurrent),
}
