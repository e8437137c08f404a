"""Adding constants and nodes to the front of a graph or function body, and removing unread ones."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from rnnprune_cli.model import Array

MIN_IR_INITIALIZERS = 4
"""Before IR version 4 every initializer had to be a graph input as well."""


class Builder:
    """Adds values at the start of a graph, where every other node can read them.

    Args:
        graph: A main graph or the graph of a function.
        opset: Version of the default operator set in there.
        initializers: Whether constants may be initializers; otherwise they are Constant nodes, as
            in function bodies and before :data:`MIN_IR_INITIALIZERS`.
        taken: Names in use anywhere in the model; new ones are added.
    """

    def __init__(self, graph: ir.Graph, opset: int, initializers: bool, taken: set[str]) -> None:
        self.opset = opset
        self._graph = graph
        self._initializers = initializers
        self._taken = taken
        self._first = next(iter(graph))
        self._shared: dict[str, ir.Value] = {}
        self._next: dict[str, int] = {}

    def constant(
        self, name: str, tensor: Array | ir.TensorProtocol, own_name: bool = False
    ) -> ir.Value:
        """Adds a constant.

        Args:
            name: Wanted name; made unique unless ``own_name``.
            tensor: Its value.
            own_name: The name was just freed and can be used as it is.
        """
        if isinstance(tensor, np.ndarray):
            tensor = ir.tensor(tensor)
        name = name if own_name else self.unique(name)
        if not self._initializers:
            return self.node("Constant", [], output=name, value=tensor)
        value = ir.Value(
            name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype)
        )
        value.const_value = tensor
        tensor.name = name
        self._graph.register_initializer(value)
        return value

    def shared(self, name: str, array: Array) -> ir.Value:
        """Adds a small constant once per graph."""
        if name not in self._shared:
            self._shared[name] = self.constant(name, array)
        return self._shared[name]

    def node(
        self,
        op_type: str,
        inputs: list[ir.Value],
        output: str | None = None,
        **attributes: int | str | list[int] | ir.TensorProtocol,
    ) -> ir.Value:
        """Adds a node with one output, before all nodes that were there."""
        # Short names, and none for the node: they are a good part of a small model's file.
        node = ir.node(op_type, inputs, attributes=attributes)
        node.outputs[0].name = output if output is not None else self.unique("rp")
        self._graph.insert_before(self._first, node)
        return node.outputs[0]

    def unique(self, name: str) -> str:
        """Returns a name that nothing else in the model has, and reserves it."""
        candidate = name
        number = self._next.get(name, 1)
        while candidate in self._taken:
            number += 1
            candidate = f"{name}_{number}"
        self._next[name] = number
        self._taken.add(candidate)
        return candidate


def value_names(model: ir.Model) -> set[str]:
    """Returns every value and node name in a model, in all graphs and functions."""
    names: set[str] = set()
    for top in (model.graph, *(f.graph for f in model.functions.values())):
        for graph in (top, *top.subgraphs()):
            names.update(v.name or "" for v in (*graph.inputs, *graph.initializers.values()))
            for node in graph:
                names.add(node.name or "")
                names.update(v.name or "" for v in node.outputs)
    return names


def remove_unread(values: Iterable[ir.Value]) -> None:
    """Removes values that nothing reads any more, and what only fed them."""
    pending = list(values)
    while pending:
        value = pending.pop()
        if value.uses() or value.is_graph_output():
            continue
        graph, node = value.graph, value.producer()
        if value.is_initializer() and graph is not None and value.name:
            graph.initializers.pop(value.name)
            if value.is_graph_input():  # IR version 3 lists every initializer as an input
                graph.inputs.remove(value)
        elif node is not None and node.graph is not None:
            if any(o.uses() or o.is_graph_output() for o in node.outputs):
                continue
            sources = [v for v in node.inputs if v is not None]
            node.graph.remove(node, safe=True)
            pending.extend(sources)
