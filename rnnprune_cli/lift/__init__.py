"""Loops, hand-written cells and unrolled chains → LSTM, GRU and RNN operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from rnnprune_cli.graph import subgraphs
from rnnprune_cli.lift import cell, chain, directions, loop, projection, shapes
from rnnprune_cli.lift.context import Context, tidy
from rnnprune_cli.model import Skipped
from rnnprune_cli.onnx_file import deserialize, graphs

MAX_INFERRED_BYTES = 1_900 << 20


@dataclass(frozen=True)
class Lift:
    """One rewrite that was made.

    Attributes:
        name: The new operator.
        pattern: ``cell``, ``loop``, ``chain`` or ``directions``.
        op: LSTM, GRU or RNN.
        source: The node that it stands for.
    """

    name: str
    pattern: str
    op: str
    source: str


@dataclass(frozen=True)
class Attempt:
    """A model after a round of rewriting.

    Attributes:
        proto: The model; the one that was given if nothing was lifted.
        lifts: What was rewritten.
        declined: What looked recurrent and was left as it is.
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
) -> Attempt:
    """Rewrites whatever can be.

    Args:
        proto: The model, without functions.
        path: Where its external data lie beside.
        file_bytes: Size of its files.
        right_padding: Whether the user promises that padding is always on the right.
        without: Sources to leave as they are.
    """
    state = _State(proto, path, file_bytes, right_padding, without)
    state.cells()
    state.loops()
    state.chains()
    state.sequences()
    return Attempt(state.proto, tuple(state.lifts), tuple(state.declined.values()))


class _State:
    def __init__(
        self,
        proto: onnx.ModelProto,
        path: Path,
        file_bytes: int,
        right_padding: bool,
        without: frozenset[str],
    ) -> None:
        self.proto = proto
        self._path = path
        self._bytes = file_bytes
        self._right_padding = right_padding
        self._without = without
        self._declared = {info.name for graph in graphs(proto) for info in graph.value_info}
        self.lifts: list[Lift] = []
        self.declined: dict[str, Skipped] = {}

    def _context(self) -> Context:
        proto = self.proto
        if proto.ByteSize() < MAX_INFERRED_BYTES:
            try:
                proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
            except Exception:  # noqa: BLE001, S110  it raises unrelated types on odd models
                pass
        model = deserialize(proto, self._path)
        shapes.complete(model)
        return Context(model, self._bytes)

    def _keep(self, context: Context) -> None:
        """Takes over a changed model."""
        for graph in _all_graphs(context.model):
            graph.sort()
        proto = ir.to_proto(context.model)
        for graph in graphs(proto):
            for info in [v for v in graph.value_info if v.name not in self._declared]:
                graph.value_info.remove(info)
        self.proto = proto

    def cells(self) -> None:
        context = self._context()
        changed = False
        for graph in _all_graphs(context.model):
            found, declined = cell.find_cells(graph, context)
            for name, reason in declined.items():
                self.declined[name] = Skipped(name, reason, "")
            checked = []
            for each in found:
                source = each.h_next.producer().name or each.h_next.name
                if source in self._without:
                    continue
                problem = cell.check(each, context, context.opset)
                if problem is not None:
                    self.declined[source] = Skipped(source, problem, "")
                    continue
                checked.append((source, each))
            for source, each in checked:
                node = cell.write(each, context)
                self.lifts.append(Lift(node.name, "cell", each.op, source))
                changed = True
        if changed:
            self._keep(context)

    def loops(self) -> None:
        done: set[str] = set()
        while True:
            context = self._context()
            for node in _loops(context.model):
                name = node.name or node.outputs[0].name
                if name in done or name in self._without:
                    continue
                done.add(name)
                try:
                    made = loop.lift_loop(
                        loop.interface(node, context), context, self._right_padding
                    )
                except loop.Declined as declined:
                    if declined.reason:
                        self.declined[name] = Skipped(name, declined.reason, declined.hint)
                    continue
                self.lifts += [Lift(n.name, "loop", n.op_type, name) for n in made]
                self._keep(context)
                break
            else:
                return


    def chains(self) -> None:
        done: set[str] = set()
        while True:
            context = self._context()
            for graph in _all_graphs(context.model):
                for found in chain.find_chains(graph, context):
                    name = found[0].name or ""
                    if name in done or name in self._without:
                        continue
                    done.add(name)
                    made = chain.lift_chain(found, context, context.unique(f"{name}/steps"))
                    self.lifts.append(Lift(made.name, "chain", made.op_type, name))
                    self._keep(context)
                    break
                else:
                    continue
                break
            else:
                return


    def sequences(self) -> None:
        """Tidies up after operators over whole sequences: projections, reversals, directions."""
        made = {lift.name: lift for lift in self.lifts if lift.pattern in ("loop", "chain")}
        if not made:
            return
        self._everywhere(lambda graph, context: self._fold(graph, context, made))
        self._everywhere(directions.cancel_reversals)
        self._everywhere(lambda graph, context: self._join(graph, context, made))
        self._everywhere(tidy)

    def _everywhere(self, change: Callable[[ir.Graph, Context], bool]) -> None:
        context = self._context()
        if any([change(graph, context) for graph in _all_graphs(context.model)]):
            self._keep(context)

    @staticmethod
    def _fold(graph: ir.Graph, context: Context, made: Mapping[str, Lift]) -> bool:
        nodes = [node for node in graph if node.name in made]
        return any([projection.fold_projection(node, context) for node in nodes])

    def _join(self, graph: ir.Graph, context: Context, made: Mapping[str, Lift]) -> bool:
        pairs = list(directions.find_pairs(graph, context, made))
        for forward, backward in pairs:
            sources = [made[node.name or ""].source for node in (forward, backward)]
            if f"{sources[0]} + {sources[1]}" in self._without:
                continue
            new = directions.join(
                forward, backward, context, context.unique(_common(forward.name, backward.name))
            )
            self.lifts.append(Lift(new.name or "", "directions", new.op_type, " + ".join(sources)))
        return bool(pairs)


def _common(one: str | None, other: str | None) -> str:
    """The path that two names share."""
    parts = [name.split("/") for name in (one or "", other or "")]
    shared = [a for a, b in zip(*parts, strict=False) if a == b]
    return "/".join(shared) or f"{one}_bidirectional"


def _all_graphs(model: ir.Model) -> list[ir.Graph]:
    found, pending = [], [model.graph]
    while pending:
        graph = pending.pop()
        found.append(graph)
        for node in graph:
            pending.extend(subgraphs(node))
    return found


def _loops(model: ir.Model) -> list[ir.Node]:
    """Every Loop and Scan, inner ones first."""
    return [
        node
        for graph in reversed(_all_graphs(model))
        for node in graph
        if node.op_type in ("Loop", "Scan") and node.domain in ("", "ai.onnx")
    ]
