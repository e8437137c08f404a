"""Labels through branches and loops."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from rnnprune_cli.coupling.classes import IntArray
from rnnprune_cli.coupling.rules import Rule
from rnnprune_cli.graph import subgraphs

if TYPE_CHECKING:
    from rnnprune_cli.coupling import Coupling


def if_(c: Coupling, node: ir.Node) -> None:
    """Both branches must lose the same."""
    branches = subgraphs(node)
    for k, output in enumerate(node.outputs):
        results = [branch.outputs[k] for branch in branches]
        known = next((found for v in results if (found := c.of(v)) is not None), None)
        if known is None:
            continue
        array = known.array
        for branch, value in zip(branches, results, strict=True):
            array = _follow(c, node, branch, k, value, array, known.axis)
        c.give(output, array, known.axis, node)


def _follow(
    c: Coupling,
    node: ir.Node,
    graph: ir.Graph,
    index: int,
    value: ir.Value,
    array: IntArray,
    axis: int,
) -> IntArray:
    """Makes an output of a branch or body lose what labels lose."""
    own = c.of(value)
    if own is not None and (own.axis != axis or own.array.ndim != array.ndim):
        c.block(node, "units meet here along different axes", labels=array)
        c.block(node, "units meet here along different axes", labels=own.array)
    elif own is not None:
        c.join(node, own.array, array)
    elif not len(graph):
        c.block(node, "a branch has no nodes", labels=array)
    elif c.rank(value) != array.ndim or c.size(value, axis) != array.shape[axis]:
        c.block(node, "an output without units has another shape in the other branch", labels=array)
    else:
        array = c.along(array, axis, array.ndim, axis)
        c.cut_output(node, graph, index, array, axis)
    return array


def loop(c: Coupling, node: ir.Node) -> None:
    """Loop and Scan: states keep their labels, sequences gain or lose an axis."""
    (body,) = subgraphs(node)
    if c.opset < 9 and node.op_type == "Scan":
        c.block(node, "its inputs are laid out in the way of opset 8")
        return
    if node.op_type == "Loop":
        carried = [(k, k, k - 1, k - 2) for k in range(2, len(node.inputs))]
        scanned: list[int] = []
    else:
        count = node.attributes.get_int("num_scan_inputs", 0) or 0
        states = len(node.inputs) - count
        carried = [(k, k, k, k) for k in range(states)]
        scanned = list(range(states, len(node.inputs)))
    for outer, inner, handed, final in carried:
        _carried(c, node, body, outer, inner, handed, final)
    for k in scanned:
        labels = c.of(node.inputs[k])
        if labels is None:
            continue
        axes = list(node.attributes.get_ints("scan_input_axes", ()) or [0] * len(scanned))
        at = axes[k - len(carried)] % labels.array.ndim
        array = labels.array
        if at == labels.axis:
            c.block(node, "it takes one unit after the other", labels=array)
            continue
        if array.shape[at] > 1:
            array = c.tied(array, at)
        c.give(body.inputs[k], array.squeeze(at), labels.axis - (at < labels.axis), node)
    skip = 1 if node.op_type == "Loop" else 0
    axes = list(node.attributes.get_ints("scan_output_axes", ()))
    for k in range(len(carried), len(node.outputs)):
        labels = c.of(body.outputs[k + skip])
        if labels is not None:
            at = axes[k - len(carried)] if axes else 0
            at += labels.array.ndim + 1 if at < 0 else 0
            shape = (*labels.array.shape[:at], 1, *labels.array.shape[at:])
            axis = labels.axis + (at <= labels.axis)
            c.give(node.outputs[k], labels.array.reshape(shape), axis, node)
    for labels in (c.of(v) for v in ([body.outputs[0], *node.inputs[:2]] if skip else [])):
        if labels is not None:
            c.block(node, "units decide how long it runs", labels=labels.array)


def _carried(
    c: Coupling, node: ir.Node, body: ir.Graph, outer: int, inner: int, handed: int, final: int
) -> None:
    """One state: before the first step, before and after a step, after the last."""
    start, after = node.inputs[outer], body.outputs[handed]
    ends = [start, body.inputs[inner], after, node.outputs[final]]
    known = next((found for v in ends if (found := c.of(v)) is not None), None)
    if known is None or start is None:
        return
    array, axis = known.array, known.axis
    own = c.of(start)
    if own is None:
        array = c.along(array, axis, array.ndim, axis)
        c.cut(node, outer, array, axis, "element")
    elif own.axis == axis and own.array.ndim == array.ndim:
        c.join(node, own.array, array)
    else:
        c.block(node, "units meet here along different axes", labels=own.array)
        c.block(node, "units meet here along different axes", labels=array)
        return
    array = _follow(c, node, body, handed, after, array, axis)
    c.give(body.inputs[inner], array, axis, node)
    c.give(node.outputs[final], array, axis, node)


RULES: dict[str, Rule] = {"If": if_, "Loop": loop, "Scan": loop}
