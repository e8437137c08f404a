"""Gives a converted model names and an order that depend only on what it computes.

tf2onnx merges equal nodes in an order that changes from run to run, so that the same model comes
out with other names each time. Here

1. nodes are sorted by a depth-first walk from the outputs, along the inputs of each node;
2. values and nodes are numbered in that order, and unknown sizes too; inputs and outputs keep their
   names;
3. loops and recurrent operators keep their names, which tell the layer, less the number that the
   converter appends. They are never merged.

Nothing that the model computes is changed.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import onnx

_NAMED = ("LSTM", "GRU", "RNN")


def canonicalize(model: onnx.ModelProto) -> None:
    """Renames and sorts the contents of a model in place.

    Args:
        model: A valid model without local functions.
    """
    _Renaming().graph(model.graph, {}, top=True)


class _Renaming:
    """Numbers that are given out once in the whole model."""

    def __init__(self) -> None:
        self._values = itertools.count()
        self._sizes: dict[str, str] = {}
        self._nodes: dict[str, int] = {}

    def graph(self, graph: onnx.GraphProto, outer: dict[str, str], top: bool = False) -> None:
        """Renames a graph whose surroundings are named already.

        Args:
            graph: The graph; changed in place.
            outer: Old name → new name of the values around it.
            top: Whether its inputs and outputs keep their names.
        """
        order = _sorted(graph)
        graph.ClearField("doc_string")  # holds a number that the converter counts up in a process
        names = dict(outer)
        if top:
            names.update((value.name, value.name) for value in (*graph.input, *graph.output))
        else:
            names.update((value.name, self._fresh()) for value in graph.input)
        constants = {tensor.name for tensor in graph.initializer}
        position: dict[str, int] = {}

        def use(name: str) -> None:
            if name in constants and name not in position:
                position[name] = len(position)
                if not top or names.get(name) != name:
                    names[name] = self._fresh()

        for node in order:
            for name in _references(node):
                use(name)
            for subgraph in _subgraphs(node):
                self.graph(subgraph, names)
            for name in node.output:
                if name and not (top and name in names):
                    names[name] = self._fresh()
            node.name = self._node_name(node)
        for value in graph.output:
            use(value.name)

        for tensor in [tensor for tensor in graph.initializer if tensor.name not in position]:
            graph.initializer.remove(tensor)
        graph.initializer.sort(key=lambda tensor: position[tensor.name])
        place = {node.name: index for index, node in enumerate(order)}
        for node in [node for node in graph.node if node.name not in place]:
            graph.node.remove(node)
        graph.node.sort(key=lambda node: place[node.name])
        # What the converter knew of inner shapes can be inferred again.
        del graph.value_info[:]
        for item in (*graph.initializer, *graph.input, *graph.output):
            item.name = names[item.name]
        for node in graph.node:
            node.input[:] = [names.get(name, name) for name in node.input]
            node.output[:] = [names.get(name, name) for name in node.output]
        for value in (*graph.input, *graph.output):
            for size in value.type.tensor_type.shape.dim:
                if size.dim_param:
                    new = self._sizes.setdefault(size.dim_param, f"dim_{len(self._sizes)}")
                    size.dim_param = new

    def _fresh(self) -> str:
        return f"value_{next(self._values)}"

    def _node_name(self, node: onnx.NodeProto) -> str:
        keeps = node.op_type in _NAMED or any(_subgraphs(node))
        base = (re.sub(r"__\d+$", "", node.name) if keeps else "") or node.op_type
        name = base
        while name in self._nodes:
            self._nodes[base] += 1
            name = f"{base}_{self._nodes[base]}"
        self._nodes[name] = 1
        return name


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The bodies and branches of a node."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def _references(node: onnx.NodeProto) -> list[str]:
    """The values that a node reads, those that its subgraphs read from around them included."""
    found = dict.fromkeys(node.input)
    for subgraph in _subgraphs(node):
        found.update(dict.fromkeys(_free(subgraph)))
    found.pop("", None)
    return list(found)


def _free(graph: onnx.GraphProto) -> list[str]:
    """The values that a subgraph reads from around it, in the order of its sorted nodes."""
    inside = {value.name for value in (*graph.input, *graph.initializer)}
    inside.update(name for node in graph.node for name in node.output)
    read = [name for node in _sorted(graph) for name in _references(node)]
    read += [value.name for value in graph.output]
    return [name for name in dict.fromkeys(read) if name not in inside]


def _sorted(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes that the outputs need, operands first, in the order of a walk from the outputs."""
    producers = {name: index for index, node in enumerate(graph.node) for name in node.output}
    done: set[int] = set()
    order = []
    stack = [(value.name, False) for value in reversed(graph.output)]
    while stack:
        name, leaving = stack.pop()
        index = producers.get(name)
        if index is None or index in done:
            continue
        node = graph.node[index]
        if leaving:
            done.add(index)
            order.append(node)
            continue
        stack.append((name, True))
        stack.extend((reference, False) for reference in reversed(_references(node)))
    return order
