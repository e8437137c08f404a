"""Ifs that always go the same way → the nodes of that branch.

Exporters leave them where a framework asked for the number of axes or for an option.
"""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

from rnnprune_cli import shapes
from rnnprune_cli.find import is_recurrent
from rnnprune_cli.graph import Folder, Walker, input_of, subgraphs
from rnnprune_cli.layout import Layout, rank
from rnnprune_cli.rewrite.edit import Editor

_BRANCHES = ("then_branch", "else_branch")


def settle(model: ir.Model, file_bytes: int) -> None:
    """Puts the nodes of the branch that is always taken in an If's place.

    A branch is always taken if the condition is a constant, or follows from fixed sizes; or if
    the other's result has a number of axes that what reads it cannot work with.

    Args:
        model: A model without functions, with shapes inferred; changed in place.
        file_bytes: Size of its files.
    """
    while ifs := [node for node in model.graph.all_nodes() if node.op_type == "If"]:
        walker = Walker(model)
        layout = Layout(walker, Folder(walker, file_bytes))
        decided: dict[int, tuple[ir.Node, str]] = {}
        for node in ifs:
            taken = layout.truth(node.inputs[0])
            branch = _fitting(node, walker, layout) if taken is None else _BRANCHES[not taken]
            if branch is not None:
                decided[id(node)] = (node, branch)
        if not decided:
            return
        for node, branch in decided.values():
            # One inside another's branch waits for the next round.
            inner = {id(n) for n in _around(node, walker)}
            if not inner & decided.keys():
                _unfold(node, branch, Editor(model, "rp"), model)
        shapes.complete(model)


def _around(node: ir.Node, walker: Walker) -> list[ir.Node]:
    """Returns the nodes in whose branches and bodies a node is."""
    found: list[ir.Node] = []
    graph = node.graph
    while isinstance(graph, ir.Graph) and (owner := walker.owner(graph)) is not None:
        found.append(owner)
        graph = owner.graph
    return found


def _fitting(node: ir.Node, walker: Walker, layout: Layout) -> str | None:
    """Returns the only branch whose results have the number of axes that their readers need."""
    possible = set(_BRANCHES)
    for k, output in enumerate(node.outputs):
        needed = _needed_rank(output, walker, layout, set())
        if needed is not None:
            for name in _BRANCHES:
                made = rank(node.attributes[name].as_graph().outputs[k])
                if made is not None and made != needed:
                    possible.discard(name)
    return next(iter(possible)) if len(possible) == 1 else None


def _needed_rank(value: ir.Value, walker: Walker, layout: Layout, seen: set[int]) -> int | None:
    """Returns the number of axes that some reader insists on."""
    if id(value) in seen:
        return None
    seen.add(id(value))
    graph = value.graph
    if value.is_graph_output() and isinstance(graph, ir.Graph):
        owner = walker.owner(graph)
        if owner is None and value.shape is not None:
            return len(value.shape)
        if owner is not None and owner.op_type == "If":
            at = next(k for k, output in enumerate(graph.outputs) if output is value)
            found = _needed_rank(owner.outputs[at], walker, layout, seen)
            if found is not None:
                return found
    for node, index in value.uses():
        found = _insisted(node, index, walker, layout, seen)
        if found is not None:
            return found
    return None


def _insisted(
    node: ir.Node, index: int, walker: Walker, layout: Layout, seen: set[int]
) -> int | None:
    if is_recurrent(node):
        return 3 if index in (0, 5, 6) else None
    if node.op_type in ("Conv", "ConvTranspose") and index == 0 and node.inputs[1] is not None:
        return rank(node.inputs[1])
    if node.op_type == "Gemm" and index < 2:
        return 2
    if node.op_type == "Transpose" and node.attributes.get("perm") is not None:
        return len(node.attributes["perm"].as_ints())
    if index > 0 and node.op_type != "Concat":
        return None
    if node.op_type in _SAME_RANK:
        return _needed_rank(node.outputs[0], walker, layout, seen)
    if node.op_type in ("Squeeze", "Unsqueeze"):
        axes = list(node.attributes.get_ints("axes", ())) or layout.constant_ints(input_of(node, 1))
        after = _needed_rank(node.outputs[0], walker, layout, seen)
        if after is not None and axes:
            return after + len(axes) * (1 if node.op_type == "Squeeze" else -1)
    return None


_SAME_RANK = frozenset(
    {"Identity", "Relu", "Tanh", "Sigmoid", "Cast", "Dropout", "Clip", "LeakyRelu"}
    | {"Concat", "Slice", "Softmax", "Neg", "Abs"}
)


def _unfold(node: ir.Node, branch: str, editor: Editor, model: ir.Model) -> None:
    graph, outer = node.attributes[branch].as_graph(), node.graph
    assert isinstance(outer, ir.Graph)
    names: Counter[str | None] = Counter()
    for around in (model.graph, *model.graph.subgraphs()):
        names.update(around.initializers.keys())
        names.update(v.name for n in around for v in n.outputs)
    results = list(graph.outputs)
    graph.outputs.clear()
    for value in list(graph.initializers.values()):
        graph.initializers.pop(value.name or "")
        if names[value.name] > 1:  # two branches may use the same names
            value.name = editor.unique(value.name or "")
        outer.initializers[value.name or ""] = value
    for inner in list(graph):
        graph.remove(inner)
        outer.insert_before(node, inner)
        for value in inner.outputs:
            if names[value.name] > 1:
                value.name = editor.unique(value.name or "value")
    for old, new in zip(node.outputs, results, strict=True):
        editor.replace(old, new)
    # What the other branch reads from outside is no longer read by it.
    for other in subgraphs(node):
        for inner in other.all_nodes():
            for k in range(len(inner.inputs)):
                inner.replace_input_with(k, None)
    outer.remove(node, safe=True)
