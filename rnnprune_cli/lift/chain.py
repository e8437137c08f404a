"""Unrolled chains of one-step operators with the same weights → one operator over their steps.

1. Find operators whose state is the state after another one with the same weights.
2. Cut the chain where a step's input depends on an earlier step of it (a decoder), or where
   something else reads a cell state on the way: an operator gives the last one only.
3. Find the sequence that the inputs are the steps of, or join them to one.
4. Put one operator in their place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from rnnprune_cli.find import is_recurrent
from rnnprune_cli.graph import input_of
from rnnprune_cli.layout import rank, static
from rnnprune_cli.lift.context import Context, depends, is_read, settings

_WEIGHTS = (1, 2, 3, 7)
MIN_OPSET_REVERSED = 10
"""Slice has no steps before."""


def find_chains(graph: ir.Graph, context: Context) -> list[list[ir.Node]]:
    """Returns the chains of at least two operators in one graph, in order."""
    nodes = [n for n in graph if is_recurrent(n) and _is_one_step(n, context)]
    after = {id(context.layout.bare(v)): n for n in nodes for v in n.outputs[:2]}
    follows: dict[int, list[ir.Node]] = {}
    for node in nodes:
        before = after.get(id(context.layout.bare(h))) if (h := input_of(node, 5)) else None
        if before is not None and _continues(before, node, context):
            follows.setdefault(id(before), []).append(node)
    begun = {id(n) for others in follows.values() if len(others) == 1 for n in others}
    chains = []
    for node in nodes:
        if id(node) in begun:
            continue
        chain = [node]
        while len(others := follows.get(id(chain[-1]), [])) == 1:
            chain.append(others[0])
        chains += [part for part in _cut(chain, context) if len(part) > 1]
    return chains


def _is_one_step(node: ir.Node, context: Context) -> bool:
    x = input_of(node, 0)
    return (
        x is not None
        and rank(x) == 3
        and context.layout.is_one(x, 0)
        and input_of(node, 4) is None
        and node.attributes.get_string("direction", "forward") != "bidirectional"
        and not node.attributes.get_int("layout")
        and all(
            (w := input_of(node, k)) is None or context.layout.constant(w) is not None
            for k in _WEIGHTS
        )
    )


def _continues(before: ir.Node, node: ir.Node, context: Context) -> bool:
    """Tells whether a node is the next step of another."""
    free = ("direction", "layout")
    if before.op_type != node.op_type or settings(before, *free) != settings(node, *free):
        return False
    if not all(context.same(input_of(before, k), input_of(node, k)) for k in _WEIGHTS):
        return False
    if node.op_type != "LSTM":
        return True
    c = input_of(node, 6)
    return (
        c is not None
        and len(before.outputs) > 2
        and context.layout.bare(c) is context.layout.bare(before.outputs[2])
    )


def _cut(chain: list[ir.Node], context: Context) -> Iterator[list[ir.Node]]:
    part: list[ir.Node] = []
    for node in chain:
        x = input_of(node, 0)
        assert x is not None
        if part and (depends(x, part) or _cell_is_read(part[-1], node, context)):
            yield part
            part = []
        part.append(node)
    yield part


def _cell_is_read(before: ir.Node, node: ir.Node, context: Context) -> bool:
    """Tells whether anything but the next step reads a cell state."""
    if before.op_type != "LSTM":
        return False
    pending = [before.outputs[2]]
    while pending:
        value = pending.pop()
        if value.is_graph_output():
            return True
        for user, index in value.uses():
            if (user is node and index == 6) or not user.outputs:
                continue
            made = user.outputs[0]
            if context.layout.bare(made) is not context.layout.bare(value):
                return True
            pending.append(made)
    return False


# Where the inputs come from


@dataclass(frozen=True, eq=False)
class _Place:
    """One step of a sequence."""

    source: ir.Value
    axis: int
    index: int


def _place(x: ir.Value, context: Context) -> _Place | None:
    """Finds out which step of which sequence an input is."""
    value = context.layout.bare(x)
    node = value.producer()
    source = node.inputs[0] if node is not None and node.inputs else None
    if node is None or source is None or not _is_sequence(source, context):
        return None
    source = context.layout.origin(source)
    axis = node.attributes.get_int("axis", 0) or 0
    if node.op_type == "Gather":
        index = context.layout.constant_ints(node.inputs[1])
        if index is None or len(index) != 1 or axis not in (0, 1):
            return None
        return _at(source, axis, index[0])
    if node.op_type == "Split" and axis in (0, 1):
        if any(static(v, axis) != 1 for v in node.outputs):
            return None
        return _Place(source, axis, value.index() or 0)
    if node.op_type == "Slice":
        bounds = context.layout.slice_bounds(node)
        if bounds is None or len(bounds) != 1:
            return None
        ((axis, (start, end, step)),) = bounds.items()
        axis %= rank(source) or 3
        if axis in (0, 1) and step == 1 and (end - start == 1 or (start == -1 and end > 0)):
            return _at(source, axis, start)
    return None


def _is_sequence(value: ir.Value, context: Context) -> bool:
    """Tells whether a value is ``[T, N, I]``, ``[N, T, I]``, or the Y of an operator."""
    return rank(value) == 3 or (rank(value) == 4 and context.layout.is_one(value, 1))


def _at(source: ir.Value, axis: int, index: int) -> _Place | None:
    size = static(source, axis)
    if index < 0:
        return None if size is None else _Place(source, axis, index + size)
    return _Place(source, axis, index)


def lift_chain(chain: list[ir.Node], context: Context, name: str) -> ir.Node:
    """Replaces a chain by one operator.

    Returns:
        The operator.
    """
    first, last = chain[0], chain[-1]
    x, backwards = _sequence(chain, context)
    inputs = [x, *(input_of(first, k) for k in range(1, 8))]
    while inputs[-1] is None:
        inputs.pop()
    new = context.node(last, first.op_type, inputs, len(first.outputs), name=name)
    for attribute in first.attributes.values():
        if attribute.name != "direction":
            new.attributes.add(attribute)
    if backwards:
        new.attributes.add(ir.AttrString("direction", "reverse"))
    for value, role in zip(new.outputs, ("Y", "Y_h", "Y_c"), strict=False):
        value.name = context.unique(f"{name}/{role}")
    _replace_outputs(chain, new, backwards, context)
    return new


def _sequence(chain: list[ir.Node], context: Context) -> tuple[ir.Value, bool]:
    """Returns the inputs as ``[T, N, I]``, and whether the chain goes through it backwards."""
    before = chain[-1]
    xs = [x for x in (input_of(node, 0) for node in chain) if x is not None]
    places = [_place(x, context) for x in xs]
    known = [p for p in places if p is not None]
    if len(known) == len(xs) and len({(id(p.source), p.axis) for p in known}) == 1:
        indices = [p.index for p in known]
        source, axis, low = known[0].source, known[0].axis, min(indices)
        upwards = list(range(low, low + len(xs)))
        if indices in (upwards, upwards[::-1]):
            if rank(source) == 4:
                source = context.squeeze(before, source, [1])
            elif axis == 1:
                source = context.one(before, "Transpose", [source], perm=[1, 0, 2])
            if static(known[0].source, axis) != len(xs):
                source = context.slice(before, source, 0, low, low + len(xs))
            return source, indices != upwards
    return context.one(before, "Concat", xs, axis=0), False


def _replace_outputs(chain: list[ir.Node], new: ir.Node, backwards: bool, context: Context) -> None:
    last = chain[-1]
    steps = len(chain)
    joined = _joined(chain, context)
    for old, made in zip(last.outputs[1:], new.outputs[1:], strict=False):
        context.replace(old, made)
    if is_read(last.outputs[0]):
        context.replace(last.outputs[0], context.unsqueeze(last, new.outputs[1], [0]))
    flat: ir.Value | None = None
    for concat, axis, reversed_order in joined:
        turn = backwards != reversed_order
        if turn and context.opset < MIN_OPSET_REVERSED:
            continue
        flat = flat or context.squeeze(last, new.outputs[0], [1])
        whole = context.reverse(last, flat) if turn else flat
        if axis == 1:
            whole = context.one(last, "Transpose", [whole], perm=[1, 0, 2])
        context.replace(concat.outputs[0], whole)
        context.clean([concat.outputs[0]])
    for step, node in enumerate(chain[:-1]):
        index = steps - 1 - step if backwards else step
        for k, value in enumerate(node.outputs[:2]):
            if not _is_read_besides(value, chain):
                continue
            # Y is [T, 1, N, H]; one step of it is what Y_h [1, N, H] was.
            here = context.slice(last, new.outputs[0], 0, index, index + 1)
            context.replace(value, here if k == 0 else context.squeeze(last, here, [0]))
    context.clean([v for node in reversed(chain) for v in node.outputs])


def _is_read_besides(value: ir.Value, chain: list[ir.Node]) -> bool:
    """Tells whether a state leads anywhere but to the next steps."""
    ids = {id(node) for node in chain}
    pending = [value]
    while pending:
        current = pending.pop()
        if current.is_graph_output():
            return True
        for user, index in current.uses():
            if id(user) in ids and index in (5, 6):
                continue
            if user.op_type not in ("Squeeze", "Unsqueeze", "Identity", "Reshape"):
                return True
            pending.extend(user.outputs)
    return False


def _joined(chain: list[ir.Node], context: Context) -> list[tuple[ir.Node, int, bool]]:
    """Finds where the states of all steps are stacked: (Concat, its axis, last step first)."""
    states = [{id(context.layout.bare(value)) for value in node.outputs[:2]} for node in chain]
    found = []
    pending, seen = [chain[0].outputs[0], chain[0].outputs[1]], set()
    while pending:
        for user in pending.pop().consumers():
            if id(user) in seen:
                continue
            seen.add(id(user))
            if user.op_type in ("Squeeze", "Unsqueeze", "Identity", "Reshape"):
                pending.append(user.outputs[0])
            axis = user.attributes.get_int("axis", 0)
            parts = [v for v in user.inputs if v is not None]
            if (
                user.op_type != "Concat"
                or len(parts) != len(chain)
                or axis not in (0, 1)
                or any(rank(v) != 3 or static(v, axis) != 1 for v in parts)
            ):
                continue
            bare = [id(context.layout.bare(v)) for v in parts]
            for order in (states, states[::-1]):
                if all(b in ids for b, ids in zip(bare, order, strict=True)):
                    found.append((user, axis, order is not states))
                    break
    return found
