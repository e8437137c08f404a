"""Two lifted operators over one sequence, forward and backward → one bidirectional operator.

Exporters run the backward direction over the reversed sequence and reverse what it gives. Lifted,
it reads the sequence itself, so that the second reversal is one of a reversal: both go.
"""

from __future__ import annotations

from collections.abc import Container, Iterator

import numpy as np
import onnx_ir as ir

from rnnprune_cli.graph import input_of
from rnnprune_cli.layout import rank
from rnnprune_cli.lift.context import Context, depends, op_of, settings
from rnnprune_cli.model import GATES, Array

_PER_DIRECTION = ("activations", "activation_alpha", "activation_beta")


def cancel_reversals(graph: ir.Graph, context: Context) -> bool:
    """Replaces reversals of reversals, with Transposes between them.

    Returns:
        Whether there were any.
    """
    changed = False
    for node in list(graph):
        if node.op_type not in ("ReverseSequence", "Slice") or rank(node.outputs[0]) is None:
            continue
        for axis in range(rank(node.outputs[0]) or 0):
            source = context.layout.reversed_from(node.outputs[0], axis)
            if source is None:
                continue
            order = list(range(rank(source) or 0))
            value, inner = context.layout.origin(source), axis
            while (made := value.producer()) is not None and made.op_type == "Transpose":
                perm = list(made.attributes.get_ints("perm", ()) or order[::-1])
                order = [perm[k] for k in order]
                inner = perm[inner]
                if made.inputs[0] is None:
                    break
                value = context.layout.origin(made.inputs[0])
            if made is None or not _is_ours(value):
                continue
            original = context.layout.reversed_from(value, inner)
            if original is None:
                continue
            new = context.current(original)
            if order != sorted(order):
                new = context.one(node, "Transpose", [new], perm=order)
            context.replace(node.outputs[0], new)
            context.clean([node.outputs[0]])
            changed = True
            break
    return changed


def _is_ours(value: ir.Value) -> bool:
    return (value.name or "").startswith("lift_")


def find_pairs(
    graph: ir.Graph, context: Context, lifted: Container[str]
) -> Iterator[tuple[ir.Node, ir.Node]]:
    """Yields lifted operators that differ in direction and weights only: forward, backward."""
    nodes = [n for n in graph if n.name in lifted and n.op_type in GATES]
    taken: set[int] = set()
    for forward in nodes:
        if _direction(forward) != "forward" or id(forward) in taken:
            continue
        for backward in nodes:
            if _direction(backward) != "reverse" or id(backward) in taken:
                continue
            if _fit(forward, backward, context):
                taken |= {id(forward), id(backward)}
                yield forward, backward
                break


def _direction(node: ir.Node) -> str:
    return node.attributes.get_string("direction", "forward") or "forward"


def _fit(one: ir.Node, other: ir.Node, context: Context) -> bool:
    def given(k: int) -> bool:
        return (input_of(one, k) is None) == (input_of(other, k) is None)

    return (
        one.op_type == other.op_type
        and settings(one, "direction") == settings(other, "direction")
        and all(context.same(input_of(one, k), input_of(other, k)) for k in (0, 4))
        and all(given(k) for k in (5, 6, 7))
        and _independent(one, other)
    )


def _independent(one: ir.Node, other: ir.Node) -> bool:
    """Neither reads what comes of the other: initial states may."""
    states = [
        (v, n) for k in (5, 6) for v, n in ((input_of(one, k), other), (input_of(other, k), one))
    ]
    return not any(v is not None and depends(v, [n]) for v, n in states)


def join(forward: ir.Node, backward: ir.Node, context: Context, name: str) -> ir.Node:
    """Replaces two operators by a bidirectional one.

    Returns:
        The operator.
    """
    before = backward
    op = op_of(forward)
    hidden = forward.attributes.get_int("hidden_size", 0) or 0

    def both(k: int, role: str, width: int) -> ir.Value | None:
        values = (input_of(forward, k), input_of(backward, k))
        if values == (None, None):
            return None
        arrays: list[Array] = []
        for value in values:
            array = None if value is None else context.layout.constant(value)
            arrays.append(np.zeros((1, width), np.float32) if array is None else array)
        return context.constant(f"{name}/{role}", np.concatenate(arrays))

    def states(k: int) -> ir.Value | None:
        values = [v for v in (input_of(forward, k), input_of(backward, k)) if v is not None]
        return context.one(before, "Concat", values, axis=0) if values else None

    inputs = [
        input_of(forward, 0),
        both(1, "W", 0),
        both(2, "R", 0),
        both(3, "B", 2 * GATES[op] * hidden),
        input_of(forward, 4),
        states(5),
        states(6),
        both(7, "P", 3 * hidden),
    ]
    while inputs[-1] is None:
        inputs.pop()
    new = context.node(before, op, inputs, len(forward.outputs), name=name)
    for attribute in forward.attributes.values():
        if attribute.name in _PER_DIRECTION:
            doubled = list(attribute.value) * 2
            kind = ir.AttrStrings if attribute.name == "activations" else ir.AttrFloat32s
            new.attributes.add(kind(attribute.name, doubled))
        elif attribute.name != "direction":
            new.attributes.add(attribute)
    new.attributes.add(ir.AttrString("direction", "bidirectional"))
    for value, role in zip(new.outputs, ("Y", "Y_h", "Y_c"), strict=False):
        value.name = context.unique(f"{name}/{role}")
    old = list(zip(forward.outputs, backward.outputs, new.outputs, strict=True))
    for k, (one, other, whole) in enumerate(old):
        axis = 0 if k else 1
        for number, value in enumerate((one, other)):
            if value.uses() or value.is_graph_output():
                part = context.slice(before, whole, axis, number, number + 1)
                context.replace(value, part)
    context.clean([v for one, other, _ in old for v in (one, other)])
    return new
