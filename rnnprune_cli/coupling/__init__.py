"""What must go together with a hidden unit, everywhere in a graph, or what keeps it from going.

Every hidden unit of every recurrent operator has a *label*. A value that units reach has a label at
each place of its unit axis; operators hand labels on from their inputs to their outputs, and join
those that meet at the same place into one class. Whatever reads a labelled value has to be *cut*
along with it: rows and columns of weights, per-unit constants, values from elsewhere that are
added. A class of labels can be removed if nothing blocks one of them.

The rules for operators are in :mod:`.rules`, :mod:`.products` and :mod:`.control`; an operator
without a rule blocks what reaches it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir

from rnnprune_cli.coupling import control, products, rules
from rnnprune_cli.coupling.classes import Classes, IntArray
from rnnprune_cli.coupling.features import seed
from rnnprune_cli.coupling.rules import Rule
from rnnprune_cli.find import Found, is_recurrent, locate
from rnnprune_cli.graph import Folder, Walker, subgraphs
from rnnprune_cli.layout import ONE, Layout, rank, static
from rnnprune_cli.model import Array

Role = Literal["own", "reads", "element", "initial"]
"""What is cut: what makes a unit (``own``), what multiplies it and adds up (``reads``), what meets
it element by element (``element``), the state a layer begins with (``initial``)."""


@dataclass(frozen=True, eq=False)
class Labels:
    """The labels of a value.

    Attributes:
        array: Broadcastable to the value: axes of size 1 say nothing about theirs.
        axis: The unit axis, the one that becomes shorter. If others are longer than 1, places
            along them hold different units, such as the directions of Y, and lose equally many.
    """

    array: IntArray
    axis: int


@dataclass(frozen=True, eq=False)
class Cut:
    """An input of a node, or an output of a branch or body, that loses what its labels lose.

    Attributes:
        node: The node.
        index: Which input; for ``output``, which output of the subgraph.
        labels: Broadcastable to what is cut.
        role: Why it is cut.
        graph: The subgraph whose output is cut, instead of an input of ``node``.
    """

    node: ir.Node
    index: int
    labels: Labels
    role: Role
    graph: ir.Graph | None = None

    @property
    def value(self) -> ir.Value:
        """What is cut."""
        found = (
            self.node.inputs[self.index] if self.graph is None else self.graph.outputs[self.index]
        )
        assert found is not None
        return found


@dataclass(frozen=True, eq=False)
class Block:
    """Why labels cannot be removed."""

    labels: IntArray
    reason: str
    hint: str


@dataclass(frozen=True, eq=False)
class UnitLayer:
    """The units of one recurrent operator.

    Attributes:
        name: The layer's.
        node: The operator.
        labels: int64 ``[directions, hidden_size]``.
    """

    name: str
    node: ir.Node
    labels: IntArray


@dataclass(eq=False)
class _Outcome:
    """What the last look at a node found; a later look, with more known, replaces it."""

    cuts: list[Cut] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    masked: list[int] = field(default_factory=list)
    inexact: bool = False


@dataclass(frozen=True, eq=False)
class State:
    """A state that a caller hands in and gets back.

    Attributes:
        input: Input of the main graph; None for a final state that is only handed out.
        output: Output of the main graph with the same units at the same places.
    """

    input: ir.Value | None
    output: ir.Value


class Coupling:
    """The labels of a model without functions, and everything that follows from them.

    Args:
        model: The model, with shapes inferred.
        found: Its layers.
        file_bytes: Size of its files; what constants may expand to depends on it.
        allow_inexact: Whether normalisation over units lets units go.
        resize_state: Whether final states may be handed out shorter.
        features: Label input features of recurrent layers instead of their units.

    Attributes:
        layers: The layers whose units have labels.
        fed: Inputs of the model whose features have labels.
        cuts: Everything that is cut, in graph order.
        blocks: What cannot go, in graph order.
        masked: (node, input index) of what sums over units without weights that can be zero.
        inexact: Nodes that normalise over units.
        states: States that callers hand in and get back.
    """

    def __init__(
        self,
        model: ir.Model,
        found: Found,
        file_bytes: int,
        allow_inexact: bool = False,
        resize_state: bool = False,
        features: bool = False,
    ) -> None:
        self.model = model
        self.walker = Walker(model)
        self.layout = Layout(self.walker, Folder(self.walker, file_bytes))
        self.opset = self.walker.opset(model.graph)
        self.classes = Classes()
        self.allow_inexact = allow_inexact
        self.layers: list[UnitLayer] = []
        self.states: list[State] = []
        self.fed: list[ir.Value] = []
        self._made: list[Cut] = []
        self._labels: dict[int, tuple[ir.Value, Labels]] = {}
        self._outcomes: dict[int, _Outcome] = {}
        self._pending: set[int] = set()
        self._fresh: dict[tuple[int, int], IntArray] = {}
        self._nodes = list(_in_order(model.graph))
        self._places = {id(node): k for k, node in enumerate(self._nodes)}
        if features:
            seed(self, self._nodes)
        else:
            self._seed(found)
        self._propagate()
        self._pair_states()
        self._propagate()
        looked = [
            (node, self._outcomes[id(node)]) for node in self._nodes if id(node) in self._outcomes
        ]
        self.cuts = self._made + [cut for _, outcome in looked for cut in outcome.cuts]
        self.blocks = [block for _, outcome in looked for block in outcome.blocks]
        self.masked = [(node, k) for node, outcome in looked for k in outcome.masked]
        self.inexact = [node for node, outcome in looked if outcome.inexact]
        self.blocks += [*self._blocked_places(), *self._blocked_outputs(resize_state)]

    def _look_at(self, *nodes: ir.Node) -> None:
        self._pending.update(self._places[id(node)] for node in nodes)

    def _propagate(self) -> None:
        # In graph order, a node mostly sees the labels of all its inputs at once. What it assumes
        # of an input without labels would tie more than is needed, if that gets labels later.
        while self._pending:
            place = min(self._pending)
            self._pending.remove(place)
            node = self._nodes[place]
            self._outcomes[id(node)] = _Outcome()
            rule = _RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
            if rule is None:
                fused = node.domain.startswith("com.microsoft")
                hint = "take the file from before onnxruntime optimised it" if fused else ""
                self.block(node, "what it does to units is not known", hint)
            else:
                rule(self, node)

    def _seed(self, found: Found) -> None:
        first: dict[str, IntArray] = {}
        for located in locate(self.walker):
            layer = found.by_name.get(located.name)
            if layer is None:
                continue
            node = located.instance.node
            labels = self.classes.new((layer.w.shape[0], layer.hidden_size))
            self.layers.append(UnitLayer(located.name, node, labels))
            for weight in layer.weights:  # what is stored once stays one
                self.classes.join(first.setdefault(weight.name, labels), labels)
            self._look_at(node)

    # States

    def _pair_states(self) -> None:
        """Finds inputs and outputs that are the same states, and labels the inputs."""
        begins: dict[int, tuple[ir.Value, set[tuple[int, bool]]]] = {}
        for cut in self.cuts_now():
            if cut.role == "initial":
                for value in self._inputs_of(cut.value):
                    begins.setdefault(id(value), (value, set()))[1].add(
                        (id(cut.node), cut.index == 6)
                    )
        for output in dict.fromkeys(self.model.graph.outputs):
            labels = self.of(output)
            if labels is None:
                continue
            made = {(id(v.producer()), v.index() == 2) for v in self._recurrent_outputs(output)}
            for value, begun in list(begins.values()):
                if begun == made and self._may_be(value, output, labels):
                    shape = [static(value, k) or 1 for k in range(labels.array.ndim)]
                    shape[labels.axis] = labels.array.shape[labels.axis]
                    array = self.classes.new(tuple(shape))
                    self.label(value, array, labels.axis)
                    self.states.append(State(value, output))
                    del begins[id(value)]
                    break

    def _may_be(self, value: ir.Value, output: ir.Value, labels: Labels) -> bool:
        """Tells whether an input has the shape of an output; all steps are no state."""
        if rank(value) != labels.array.ndim:
            return False
        if static(value, labels.axis) not in (None, labels.array.shape[labels.axis]):
            return False
        others = [k for k in range(labels.array.ndim) if k != labels.axis]
        alike = [
            self.layout.dimension(value, k) == self.layout.dimension(output, k) for k in others
        ]
        return all(alike) or self._is_final(output)

    def cuts_now(self) -> list[Cut]:
        """Returns what is to be cut as far as is known."""
        return [cut for outcome in self._outcomes.values() for cut in outcome.cuts]

    def _inputs_of(self, value: ir.Value) -> list[ir.Value]:
        """Returns the inputs of the main graph whose elements a value is made of."""
        found: dict[ir.Value, None] = {}
        pending, seen = [value], set[int]()
        while pending:
            current = pending.pop()
            if id(current) in seen:
                continue
            seen.add(id(current))
            node = current.producer()
            if current.is_graph_input() and current.graph is self.model.graph:
                if not current.is_initializer():
                    found[current] = None
            elif node is not None and node.op_type == "If":
                pending += [branch.outputs[current.index() or 0] for branch in subgraphs(node)]
            elif node is not None and node.op_type in rules.IN_PLACE:
                pending += [v for v in node.inputs if v is not None]
        return list(found)

    def _recurrent_outputs(self, value: ir.Value) -> Iterator[ir.Value]:
        """Yields the outputs of recurrent operators that a value with labels is made of."""
        pending, seen = [value], set[int]()
        while pending:
            current = pending.pop()
            node = current.producer()
            if id(current) in seen or node is None or self.of(current) is None:
                continue
            seen.add(id(current))
            if is_recurrent(node):
                yield current
            elif node.op_type == "If":
                pending += [branch.outputs[current.index() or 0] for branch in subgraphs(node)]
            else:
                pending += [v for v in node.inputs if v is not None]

    def _is_final(self, output: ir.Value) -> bool:
        """Tells whether an output is made of final states, not of all steps."""
        return all(value.index() != 0 for value in self._recurrent_outputs(output))

    def _blocked_places(self) -> Iterator[Block]:
        """Says which units would take along what no unit reaches, from all that reads it."""
        own = [layer.labels.reshape(-1) for layer in self.layers]
        units = np.unique(self.classes.of(np.concatenate(own))) if own else np.zeros(0, np.int64)
        for node in self._nodes:
            for index, value in enumerate(node.inputs):
                labels = self._fresh.get((id(node), index))
                if labels is None or value is None or self.of(value) is not None:
                    continue
                held = labels[np.isin(self.classes.of(labels), units)]
                if held.size and not self.layout.is_zero(value):
                    said = f"{node.op_type} '{node.name or node.outputs[0].name}': "
                    yield Block(held, f"{said}parts of '{value.name}' would go with them", "")

    def _blocked_outputs(self, resize_state: bool) -> list[Block]:
        """Says which units callers see; a state goes back to where it came from."""
        blocks = []
        paired = {id(state.output): state for state in self.states}
        for output in dict.fromkeys(self.model.graph.outputs):
            labels = self.of(output)
            if labels is None:
                continue
            state = paired.get(id(output))
            own = None if state is None else self.of(state.input)
            said = f"they are the model's output '{output.name}'"
            if own is not None:
                mine, theirs = (self.classes.of(x.array) for x in (own, labels))
                if own.axis == labels.axis and bool((mine == theirs).all()):
                    continue
                said += ", in another order than its input"
                hint = "hand states out in the order in which they are handed in"
                blocks.append(Block(labels.array.reshape(-1), said, hint))
                continue
            final = self._is_final(output)
            if state is None and final and resize_state:
                self.states.append(State(None, output))
                continue
            hint = "return what is made of them instead, such as logits"
            if final:
                hint = "--resize-state hands out a shorter state"
            blocks.append(Block(labels.array.reshape(-1), said, hint))
        return blocks

    # What is known

    def of(self, value: ir.Value | None) -> Labels | None:
        """Returns the labels of a value, None if no unit reaches it."""
        found = None if value is None else self._labels.get(id(value))
        return None if found is None else found[1]

    def every(self) -> Iterator[Labels]:
        """Yields the labels of all values and of all that is cut."""
        yield from (labels for _, labels in self._labels.values())
        yield from (cut.labels for cut in self.cuts)

    def units(self, node: ir.Node) -> IntArray | None:
        """Returns the labels ``[directions, hidden_size]`` of a recurrent node's units."""
        return next((layer.labels for layer in self.layers if layer.node is node), None)

    def constant(self, value: ir.Value | None) -> Array | None:
        """Returns the value of a constant, or None."""
        return self.layout.constant(value)

    def size(self, value: ir.Value, axis: int) -> int | None:
        """Returns the size of an axis, where it is known."""
        array = None if value.is_graph_input() else self.constant(value)
        if array is not None:
            return int(array.shape[axis])
        found = static(value, axis)
        if found is None:
            size = self.layout.dimension(value, axis)
            found = size.get(ONE, 0) if size is not None and set(size) <= {ONE} else None
        return found

    def rank(self, value: ir.Value) -> int | None:
        """Returns the number of dimensions of a value, where it is known."""
        labels = self.of(value)
        if labels is not None:
            return labels.array.ndim
        return rank(value)

    # What is labelled from the start

    def label(self, value: ir.Value, array: IntArray, axis: int) -> None:
        """Labels a value that labels begin at."""
        self._labels[id(value)] = (value, Labels(array, axis))
        self._look_at(*(user for user, _ in value.uses()))

    def make(self, node: ir.Node, index: int, array: IntArray, axis: int) -> None:
        """Notes a constant that makes what labels begin at."""
        self._made.append(Cut(node, index, Labels(array, axis), "own"))

    # What rules find

    def give(self, value: ir.Value, array: IntArray, axis: int, node: ir.Node) -> None:
        """Labels a value that a node makes, or joins the labels with those it has."""
        if array.shape[axis] == 1:
            self.block(node, "it picks one unit", labels=array)
            return
        known = self.of(value)
        if known is not None:
            if known.axis != axis or known.array.ndim != array.ndim:
                self.block(node, "units meet here along different axes", labels=array)
                self.block(node, "units meet here along different axes", labels=known.array)
            else:
                self.join(node, known.array, array)
            return
        self._labels[id(value)] = (value, Labels(array, axis))
        self._look_at(*(user for user, _ in value.uses()))
        owner = None if value.graph is None else self.walker.owner(value.graph)
        if value.is_graph_output() and owner is not None:
            self._look_at(owner)

    def cut(self, node: ir.Node, index: int, array: IntArray, axis: int, role: Role) -> None:
        """Notes that an input of a node is to be cut, once along an axis."""
        for cut in self._outcomes[id(node)].cuts:
            if cut.graph is None and (cut.index, cut.labels.axis) == (index, axis):
                if cut.labels.array.shape == array.shape:
                    self.classes.join(cut.labels.array, array)
                else:
                    self.block(node, "units meet here in different numbers", labels=array)
                    self.block(
                        node, "units meet here in different numbers", labels=cut.labels.array
                    )
                return
        self._outcomes[id(node)].cuts.append(Cut(node, index, Labels(array, axis), role))

    def cut_output(
        self, owner: ir.Node, graph: ir.Graph, index: int, array: IntArray, axis: int
    ) -> None:
        """Notes that an output of a branch or body is to be cut."""
        cut = Cut(owner, index, Labels(array, axis), "element", graph)
        self._outcomes[id(owner)].cuts.append(cut)

    def block(
        self, node: ir.Node, reason: str, hint: str = "", labels: IntArray | None = None
    ) -> None:
        """Notes that labels, or all that reach a node, cannot go."""
        found = [labels] if labels is not None else []
        if labels is None:
            found = [own.array for value in node.inputs if (own := self.of(value)) is not None]
        said = f"{node.op_type} '{node.name or node.outputs[0].name}': {reason}"
        blocks = self._outcomes[id(node)].blocks
        blocks.extend(Block(array.reshape(-1), said, hint) for array in found)

    def join(self, node: ir.Node, one: IntArray, other: IntArray) -> None:
        """Joins labels that meet at a node, or blocks them where their sizes differ."""
        pairs = zip(one.shape[::-1], other.shape[::-1], strict=False)
        if all(a == b or 1 in (a, b) for a, b in pairs):
            self.classes.join(one, other)
            return
        for array in (one, other):
            self.block(node, "units meet here in different numbers", labels=array)

    def tie(self, array: IntArray, axis: int) -> IntArray:
        """Joins what stands at the same place of the unit axis; returns it as ``[n]``."""
        rows: IntArray = np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])
        self.classes.join(rows[:1], rows)
        first: IntArray = rows[0]
        return first

    def along(self, array: IntArray, axis: int, ndim: int, to: int) -> IntArray:
        """Ties an array and returns it with its unit axis at a place among other axes of size 1."""
        shape = [1] * ndim
        shape[to] = array.shape[axis]
        return self.tie(array, axis).reshape(shape)

    def tied(self, array: IntArray, axis: int) -> IntArray:
        """Joins what stands at the same place along an axis other than the unit axis."""
        first: IntArray = np.take(array, [0], axis)
        self.classes.join(first, array)
        return first

    def alike(self, array: IntArray, axis: int) -> IntArray:
        """Ties an array, where its unit axis is taken apart at the same places for all."""
        return self.along(array, axis, array.ndim, axis)

    def operand(self, node: ir.Node, index: int, array: IntArray, axis: int) -> None:
        """Makes an input follow labels: joined if it has some, else cut."""
        value = node.inputs[index]
        assert value is not None
        known = self.of(value)
        if known is None:
            self.cut(node, index, array, axis, "element")
        elif known.axis == axis:
            self.join(node, known.array, array)
        else:
            self.block(node, "units meet here along different axes")

    def reads(self, node: ir.Node, index: int, other: int, array: IntArray, axis: int) -> None:
        """Notes a product that sums over units.

        Args:
            node: The node.
            index: The input that has the labels.
            other: The input that is multiplied with it.
            array: The labels in the shape of the other.
            axis: The axis of the other that is summed over.
        """
        value = node.inputs[other]
        if value is not None and self.of(value) is None and self.constant(value) is not None:
            self.cut(node, other, array, axis, "reads")
            return
        self.adds_up(node, index)
        self.operand(node, other, array, axis)

    def adds_up(self, node: ir.Node, index: int) -> None:
        """Notes that a node sums over units without constants that could be zero instead."""
        self._outcomes[id(node)].masked.append(index)

    def normalises(self, node: ir.Node, what: str) -> bool:
        """Notes that a node normalises over units; tells whether it may."""
        if self.allow_inexact:
            self._outcomes[id(node)].inexact = True
            return True
        self.block(
            node,
            f"{what} over the units, so that removing some changes the others",
            "--allow-inexact removes them nevertheless",
        )
        return False

    def unlabelled(self, node: ir.Node, index: int, size: int) -> IntArray:
        """Returns labels for the places of a value that no unit reaches; the same every time."""
        key = (id(node), index)
        if key not in self._fresh:
            self._fresh[key] = self.classes.new((size,))
        return self._fresh[key]


def _in_order(graph: ir.Graph) -> Iterator[ir.Node]:
    """Yields all nodes, each after what it reads: an If after its branches."""
    for node in graph:
        if node.op_type != "If":
            yield node
        for inner in subgraphs(node):
            yield from _in_order(inner)
        if node.op_type == "If":
            yield node


_RULES: dict[str, Rule] = {**rules.RULES, **products.RULES, **control.RULES}
