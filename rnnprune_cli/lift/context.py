"""What all lifts of one pass share: the graph's algebra and layout, and the means to edit it."""

from __future__ import annotations

import re
from typing import get_args

import onnx_ir as ir

from rnnprune_cli.graph import Folder, Walker, input_of
from rnnprune_cli.layout import Layout, rank, static
from rnnprune_cli.lift.algebra import Algebra
from rnnprune_cli.model import Op
from rnnprune_cli.rewrite.edit import Editor

_REACH = 2000
"""How many nodes to look through for a state's way to the next step."""


class Context(Editor):
    """A model without functions, seen before a pass changes it, and what changes it.

    What was asked before a change must not be asked again after it: make a new context then.

    Args:
        model: The model, with shapes inferred.
        file_bytes: Size of its files; what constants may expand to depends on it.
    """

    SURE = 3

    def __init__(self, model: ir.Model, file_bytes: int) -> None:
        super().__init__(model, "lift")
        self.walker = Walker(model)
        self.layout = Layout(self.walker, Folder(self.walker, file_bytes))
        self.algebra = Algebra(self.layout)
        self._positions: dict[int, dict[int, int]] = {}

    def position(self, node: ir.Node) -> int:
        """Returns the place of a node among those of its graph; -1 for nodes added since."""
        graph = node.graph
        if graph is not None and id(graph) not in self._positions:
            self._positions[id(graph)] = {id(n): k for k, n in enumerate(graph)}
        return -1 if graph is None else self._positions[id(graph)].get(id(node), -1)

    # Telling states from inputs

    def likeness(self, value: ir.Value, cell: ir.Value | None, after: ir.Value) -> int:
        """Rates how much a value looks like the hidden state before a step.

        Args:
            value: The value.
            cell: The cell state before, where the cell has one.
            after: The hidden state after.

        Returns:
            :attr:`SURE` for a state of a loop, or of a model that hands it in and out; less for
            what comes from the same tensor as the cell state, or from an input or a constant.
        """
        source = self.source(value)
        loop = None if source.graph is None else self.walker.owner(source.graph)
        if loop is not None and loop.op_type in ("Loop", "Scan") and source.is_graph_input():
            carried = self.carried(loop, source)
            return self.SURE if carried is not None and self._reaches(carried, after) else 0
        main = self.model.graph
        fed = source.graph is main and source.is_graph_input() and not source.is_initializer()
        if fed and any(self._reaches(out, after, layout_only=True) for out in main.outputs):
            return self.SURE
        if cell is not None and self.source(cell) is source:
            return 2
        return 1 if source.is_graph_input() or self.layout.constant(source) is not None else 0

    def in_loop(self, value: ir.Value) -> bool:
        """Tells whether a value is made in the body of a Loop or Scan."""
        owner = None if value.graph is None else self.walker.owner(value.graph)
        return owner is not None and owner.op_type in ("Loop", "Scan")

    def reads(self, value: ir.Value, state: ir.Value) -> bool:
        """Tells whether a value is made from a state."""
        wanted, pending, seen = self.layout.bare(state), [value], set[int]()
        while pending:
            current = self.layout.bare(pending.pop())
            if current is wanted:
                return True
            node = current.producer()
            if node is not None and id(node) not in seen:
                seen.add(id(node))
                pending.extend(v for v in node.inputs if v is not None)
        return False

    def source(self, value: ir.Value) -> ir.Value:
        """Returns the tensor that a value is a part of."""
        while True:
            value = self.layout.bare(value)
            node = value.producer()
            if node is None or node.op_type not in _PARTS or not node.inputs:
                return value
            before = node.inputs[0]
            if before is None:
                return value
            value = before

    def carried(self, loop: ir.Node, value: ir.Value) -> ir.Value | None:
        """Returns what a loop's body hands on for one of its inputs; None for other inputs."""
        assert value.graph is not None
        position = next(i for i, v in enumerate(value.graph.inputs) if v is value)
        if loop.op_type == "Loop":
            return value.graph.outputs[position - 1] if position >= 2 else None
        scanned = loop.attributes.get_int("num_scan_inputs", 0) or 0
        states = len(value.graph.inputs) - scanned
        return value.graph.outputs[position] if position < states else None

    def rows(self, value: ir.Value) -> int | None:
        """Returns the size of the batch axis; a loop's state has that of its initial value."""
        bare = self.layout.bare(value)
        graph = bare.graph
        owner = None if graph is None else self.walker.owner(graph)
        size = static(value, -2)
        carries = owner is not None and owner.op_type in ("Loop", "Scan") and bare.is_graph_input()
        if size is not None or owner is None or graph is None or not carries:
            return size
        if self.carried(owner, bare) is None:
            return None
        position = next(i for i, v in enumerate(graph.inputs) if v is bare)
        initial = owner.inputs[position]
        return None if initial is None else static(initial, -2)

    def same(self, one: ir.Value | None, other: ir.Value | None) -> bool:
        """Tells whether two values are one, are equal constants, or are made alike of such."""
        if one is None or other is None:
            return one is other
        one, other = self.layout.origin(one), self.layout.origin(other)
        if one is other:
            return True
        a, b = self.layout.constant(one), self.layout.constant(other)
        if a is not None and b is not None:
            return a.shape == b.shape and bool((a == b).all())
        made, too = one.producer(), other.producer()
        return (
            made is not None
            and too is not None
            and made.op_type == too.op_type
            and made.op_type in _DETERMINED
            and one.index() == other.index()
            and settings(made) == settings(too)
            and len(made.inputs) == len(too.inputs)
            and all(map(self.same, made.inputs, too.inputs))
        )

    def _reaches(self, end: ir.Value, start: ir.Value, layout_only: bool = False) -> bool:
        """Tells whether a value is made from another without leaving its elements' places."""
        wanted = self.layout.bare(start)
        pending, seen = [end], set[int]()
        allowed = _PARTS | {"Concat"} if layout_only else _PARTS | _CHOOSING
        while pending and len(seen) < _REACH:
            value = self.layout.bare(pending.pop())
            if value is wanted:
                return True
            node = value.producer()
            if node is None or id(node) in seen or node.op_type not in allowed:
                continue
            seen.add(id(node))
            if node.op_type != "Mul" or any(v is not None and is_flag(v) for v in node.inputs):
                pending.extend(v for v in node.inputs if v is not None)
        return False


def depends(value: ir.Value, on: list[ir.Node]) -> bool:
    """Tells whether a value is made from the output of one of some nodes."""
    ids = {id(node) for node in on}
    pending, seen = [value], set[int]()
    while pending:
        node = pending.pop().producer()
        if node is None or id(node) in seen:
            continue
        if id(node) in ids:
            return True
        seen.add(id(node))
        pending.extend(v for v in node.inputs if v is not None)
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                for inner in attribute.as_graph().all_nodes():
                    pending.extend(v for v in inner.inputs if v is not None)
    return False


def settings(node: ir.Node, *besides: str) -> dict[str, str]:
    """Returns the attributes of a node in a form that can be compared."""
    return {name: str(a.value) for name, a in node.attributes.items() if name not in besides}


def is_read(value: ir.Value) -> bool:
    """Tells whether anything reads a value."""
    return bool(value.uses()) or value.is_graph_output()


def op_of(node: ir.Node) -> Op:
    """Returns the operator of a recurrent node."""
    found: Op = next(op for op in get_args(Op) if op == node.op_type)
    return found


def is_flag(value: ir.Value) -> bool:
    """Tells whether a value is a boolean made a number."""
    node = value.producer()
    source = node.inputs[0] if node is not None and node.op_type == "Cast" else None
    return source is not None and source.dtype == ir.DataType.BOOL


def known_rank(value: ir.Value) -> int:
    """Returns the number of dimensions of a value that is known to have some."""
    found = rank(value)
    assert found is not None
    return found


def tidy(graph: ir.Graph, context: Context) -> bool:
    """Removes pairs of Squeeze and Unsqueeze that lifting put back to back.

    Returns:
        Whether there were any.
    """
    changed = False
    opposite = {"Squeeze": "Unsqueeze", "Unsqueeze": "Squeeze"}
    for node in list(graph):
        source = node.inputs[0] if node.inputs else None
        before = None if source is None else source.producer()
        inner = None if before is None else input_of(before, 0)
        if node.op_type not in opposite or before is None or inner is None:
            continue
        ours = any((n.outputs[0].name or "").startswith("lift_") for n in (node, before))
        if before.op_type != opposite[node.op_type] or not ours:
            continue
        longer = before.outputs[0] if before.op_type == "Unsqueeze" else node.outputs[0]
        axes = [context.layout.axes(n, rank(longer)) for n in (before, node)]
        if axes[0] is not None and axes[0] == axes[1]:
            context.replace(node.outputs[0], context.current(inner))
            context.clean([node.outputs[0]])
            changed = True
    return changed


def layer_name(path: str, op: str) -> str:
    """Returns a name for a lifted operator from the path that its loop or values have.

    A path that says no more than that it is a loop gives none.
    """
    short = re.sub(r"[/_]while(_loop)?(/.*)?$", "", path)
    short = re.sub(r"^(StatefulPartitionedCall/)+|/(Stateful)?PartitionedCall$", "", short)
    short = short.strip("/")
    return short if re.sub(r"^(Loop|Scan)(_\d+)?$", "", short) else f"lifted_{op.lower()}"


_DETERMINED = frozenset(
    {"Transpose", "Reshape", "ReduceSum", "Cast", "Squeeze", "Unsqueeze", "Slice"}
)
_PARTS = frozenset(
    {"Slice", "Gather", "Split", "Squeeze", "Unsqueeze", "Reshape", "Transpose", "Identity"}
)
_CHOOSING = frozenset({"Where", "Mul", "Add"})
