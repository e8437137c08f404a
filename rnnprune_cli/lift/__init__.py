"""Loops, hand-written cells and unrolled chains → LSTM, GRU and RNN operators.

:func:`attempt` rewrites a model; :func:`rnnprune_cli.lift.apply.lift` holds the result against the
original. One file for each pattern:

1. :mod:`.cell`: a cell written out with MatMul, Sigmoid, … → an operator over one step.
2. :mod:`.loop`: a Loop or Scan around one-step operators → operators over its sequences.
3. :mod:`.chain`: one-step operators in a row, with the same weights → one operator.
4. :mod:`.projection`: the input weights, where they were applied before → part of the operator.
5. :mod:`.directions`: a forward and a backward operator → one bidirectional operator.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import onnx_ir as ir

from rnnprune_cli import shapes
from rnnprune_cli.find import is_recurrent
from rnnprune_cli.graph import subgraphs
from rnnprune_cli.lift import cell, chain, check, directions, loop, projection
from rnnprune_cli.lift.context import Context, depends, op_of, tidy
from rnnprune_cli.lift.iteration import Declined, interface
from rnnprune_cli.lift.weights import Cell
from rnnprune_cli.model import Lift, Skipped
from rnnprune_cli.onnx_file import deserialize, graphs
from rnnprune_cli.rewrite.build import MIN_IR_INITIALIZERS

NO_CELL_HINT = "only standard LSTM, GRU and RNN cells can become operators, and be pruned"


@dataclass(frozen=True)
class Attempt:
    """A model after rewriting.

    Attributes:
        proto: The model; the one that was given if nothing was lifted.
        lifts: What was rewritten, in order.
        declined: What looks recurrent and was left as it is.
    """

    proto: onnx.ModelProto
    lifts: tuple[Lift, ...]
    declined: tuple[Skipped, ...]


def attempt(
    proto: onnx.ModelProto,
    path: Path,
    file_bytes: int,
    right_padding: bool = False,
    without: frozenset[str] = frozenset(),
    inside_loops: bool = True,
) -> Attempt:
    """Rewrites whatever can be.

    Every cell is held against its operator before; that the whole model still computes the same
    is for the caller to see.

    Args:
        proto: The model, without functions.
        path: Where its external data lie beside.
        file_bytes: Size of its files; what constants may expand to depends on it.
        right_padding: Whether the user promises that padding is always on the right.
        without: Sources of lifts to leave as they are.
        inside_loops: Whether operators may take the place of cells in loops that stay loops: their
            weights can be pruned then, but a loop around an operator is 11 to 15 % slower.
    """
    rewriter = _Rewriter(proto, path, file_bytes, right_padding, without)
    rewriter.cells()
    rewriter.loops()
    if not inside_loops and (inner := rewriter.cells_in_loops()):
        again = attempt(proto, path, file_bytes, right_padding, without | inner, inside_loops)
        reasons = {item.name: item for item in again.declined} | rewriter.declined
        return replace(again, declined=tuple(reasons.values()))
    rewriter.chains()
    rewriter.sequences()
    return rewriter.result()


class _Rewriter:
    """One model on its way; what is known about it is asked anew after every change."""

    def __init__(
        self,
        proto: onnx.ModelProto,
        path: Path,
        file_bytes: int,
        right_padding: bool,
        without: frozenset[str],
    ) -> None:
        self.proto = _with_names(proto)
        self.lifts: list[Lift] = []
        self.declined: dict[str, Skipped] = {}
        self._path = path
        self._bytes = file_bytes
        self._right_padding = right_padding
        self._without = without
        self._declared = {info.name for graph in graphs(proto) for info in graph.value_info}
        self._in_loops: dict[str, str] = {}
        self._known: Context | None = None

    def _context(self) -> Context:
        """Returns what is known about the model as it is now."""
        if self._known is None:
            model = deserialize(self.proto, self._path)
            shapes.complete(model)
            self._known = Context(model, self._bytes)
        return self._known

    def _keep(self, context: Context) -> None:
        """Takes over a changed model."""
        for graph in _all_graphs(context.model.graph):
            graph.sort()
        self.proto = ir.to_proto(context.model)
        self.proto.ir_version = max(self.proto.ir_version, MIN_IR_INITIALIZERS)
        self._known = None

    def result(self) -> Attempt:
        """Returns the model, without the shapes that were worked out, and what was done."""
        if self.lifts:
            for graph in graphs(self.proto):
                for info in [v for v in graph.value_info if v.name not in self._declared]:
                    graph.value_info.remove(info)
        return Attempt(self.proto, tuple(self.lifts), tuple(self.declined.values()))

    def _decline(self, name: str, reason: str, hint: str = "") -> None:
        self.declined[name] = Skipped(name, reason, hint)

    def cells(self) -> None:
        """Makes one-step operators of hand-written cells."""
        context = self._context()
        checked: list[tuple[str, Cell]] = []
        for graph in _all_graphs(context.model.graph):
            found, reasons = cell.find_cells(graph, context)
            for each in found:
                source = name_of(each.h_next.producer())
                if source in self._without:
                    continue
                problem = check.check(each, context, context.opset)
                if problem is None:
                    checked.append((source, each))
                else:
                    reasons[source] = problem
            owner = context.walker.owner(graph)
            for name, reason in reasons.items():
                if owner is not None and owner.op_type in ("Loop", "Scan"):
                    self._in_loops.setdefault(name_of(owner), reason)
                else:
                    self._decline(name, reason, NO_CELL_HINT)
        for source, each in checked:
            node = cell.write(each, context)
            self.lifts.append(Lift(name_of(node), "cell", each.op, source))
        if checked:
            self._keep(context)

    def loops(self) -> None:
        """Makes operators over sequences of loops, inner ones first."""
        done = set(self._without)
        while True:
            context = self._context()
            node = next((n for n in _loops(context.model) if name_of(n) not in done), None)
            if node is None:
                return
            name = name_of(node)
            done.add(name)
            if not any(is_recurrent(inner) for inner in node.attributes["body"].as_graph()):
                if (reason := self._in_loops.get(name)) is not None:
                    reason = f"its cell is no LSTM, GRU or RNN: {reason}"
                    self._decline(name, reason, NO_CELL_HINT)
                continue
            try:
                made = loop.lift_loop(interface(node, context), context, self._right_padding)
            except Declined as declined:
                self._decline(name, declined.reason, declined.hint)
                self._known = None  # it may be changed half-way
            else:
                self.lifts += [Lift(name_of(n), "loop", op_of(n), name) for n in made]
                self._keep(context)

    def cells_in_loops(self) -> frozenset[str]:
        """Returns the sources of the operators that were made in loops which stay."""
        model = deserialize(self.proto, self._path)
        inside = {
            node.name for loop in _loops(model) for graph in subgraphs(loop) for node in graph
        }
        return frozenset(lift.source for lift in self.lifts if lift.name in inside)

    def chains(self) -> None:
        """Makes one operator of each unrolled chain."""
        done = set(self._without)
        while True:
            context = self._context()
            found = [
                nodes
                for graph in _all_graphs(context.model.graph)
                for nodes in chain.find_chains(graph, context)
                if name_of(nodes[0]) not in done
            ]
            if not found:
                return
            made: list[ir.Node] = []
            for nodes in found:
                # One that reads another is to be seen anew.
                if not any(v is not None and depends(v, made) for n in nodes for v in n.inputs):
                    name = name_of(nodes[0])
                    done.add(name)
                    made.append(chain.lift_chain(nodes, context, context.unique(f"{name}/steps")))
                    self.lifts.append(Lift(name_of(made[-1]), "chain", op_of(made[-1]), name))
            self._keep(context)

    def sequences(self) -> None:
        """Tidies up around operators over sequences: projections, reversals, directions."""
        made = {lift.name: lift for lift in self.lifts if lift.pattern in ("loop", "chain")}
        if made:
            self._everywhere(lambda graph, context: self._fold(graph, context, made))
            self._everywhere(directions.cancel_reversals)
            while self._everywhere(lambda graph, context: self._join(graph, context, made)):
                pass
            self._everywhere(tidy)

    def _everywhere(self, change: Callable[[ir.Graph, Context], bool]) -> bool:
        context = self._context()
        changed = [change(graph, context) for graph in _all_graphs(context.model.graph)]
        if any(changed):
            self._keep(context)
        return any(changed)

    @staticmethod
    def _fold(graph: ir.Graph, context: Context, made: Mapping[str, Lift]) -> bool:
        nodes = [node for node in graph if node.name in made]
        return True in [projection.fold_projection(node, context) for node in nodes]

    def _join(self, graph: ir.Graph, context: Context, made: Mapping[str, Lift]) -> bool:
        for forward, backward in directions.find_pairs(graph, context, made):
            names = name_of(forward), name_of(backward)
            source = " + ".join(made[name].source for name in names)
            if source not in self._without:
                name = context.unique(_common(*names))
                new = directions.join(forward, backward, context, name)
                self.lifts.append(Lift(name_of(new), "directions", op_of(new), source))
                return True  # what two of them read of each other is to be seen anew
        return False


def _with_names(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Gives loops of the same name, as in two branches of an If, names of their own."""
    found: Counter[str] = Counter()
    nodes = (n for g in graphs(proto) for n in g.node if n.op_type in ("Loop", "Scan"))
    found.update(node.name or node.output[0] for node in nodes)
    if not found or max(found.values()) == 1:
        return proto
    named = onnx.ModelProto()
    named.CopyFrom(proto)
    for graph in graphs(named):
        for node in graph.node:
            name = node.name or node.output[0]
            if node.op_type in ("Loop", "Scan") and found[name] > 1:
                node.name = f"{name}#{found[name]}"
                found[name] -= 1
    return named


def name_of(node: ir.Node | None) -> str:
    """Returns the name of a node, or else that of its first output."""
    return "" if node is None else node.name or node.outputs[0].name or node.op_type


def _common(one: str, other: str) -> str:
    """The path that two names share."""
    pairs = zip(one.split("/"), other.split("/"), strict=False)
    return "/".join(a for a, b in pairs if a == b) or f"{one}_bidirectional"


def _all_graphs(graph: ir.Graph) -> list[ir.Graph]:
    """A graph and all inside it, in the order in which they appear."""
    found = [graph]
    for node in graph:
        for inner in subgraphs(node):
            found += _all_graphs(inner)
    return found


def _loops(model: ir.Model) -> list[ir.Node]:
    """Every Loop and Scan, inner ones first."""
    return [
        node
        for graph in reversed(_all_graphs(model.graph))
        for node in graph
        if node.op_type in ("Loop", "Scan") and node.domain in ("", "ai.onnx")
    ]
