"""Whole recurrent layers out of a graph: a linear map of its input, or its input itself, instead.

A layer whose final states nothing reads can be taken out: :func:`bypass` puts ``Y = X · A + c``, or
``Y = X`` where shapes allow, in its place; :func:`imitate` makes the operator itself compute that
(an RNN with R = 0 and the activation Affine), for comparison.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from rnnprune_cli.graph import input_of
from rnnprune_cli.model import Array
from rnnprune_cli.rewrite.edit import Editor


@dataclass(frozen=True, eq=False)
class LinearMap:
    """What stands for a layer.

    Attributes:
        weight: ``[input_size, directions * hidden_size]``; None for the identity.
        bias: ``[directions * hidden_size]``; None for the identity.
    """

    weight: Array | None = None
    bias: Array | None = None


Maps = Mapping[str, LinearMap]
"""Name of the recurrent node → what stands for it."""


def obstacle(node: ir.Node, input_size: int, directions: int, hidden: int, data: bool) -> str:
    """Returns why a layer cannot be taken out; nothing if it can.

    Args:
        node: The recurrent operator.
        input_size: Features that it reads.
        directions: 1 or 2.
        hidden: Units of each direction.
        data: Whether a linear map can be fitted to data.
    """
    for value, what in zip(node.outputs[1:], ("final state", "final cell state"), strict=False):
        if value.uses() or value.is_graph_output():
            return f"its {what} is read"
    if node.attributes.get_int("layout", 0) == 1:
        return "its layout is batch first"
    if input_of(node, 4) is not None:
        return "it makes zeros of padded steps (sequence_lens)"
    if not data and input_size != directions * hidden:
        return (
            f"it makes {directions * hidden} features of {input_size}: without data, nothing of"
            " another shape can stand for it; give --data"
        )
    return ""


def bypass(model: ir.Model, maps: Maps) -> None:
    """Puts linear maps in the place of layers.

    Args:
        model: A model without functions, changed in place.
        maps: The layers and what stands for them.
    """
    editor = Editor(model, "rp")
    for node in [n for n in model.graph.all_nodes() if n.name in maps and n.domain == ""]:
        x, y = node.inputs[0], node.outputs[0]
        linear = maps[node.name or ""]
        assert x is not None
        value = x
        if linear.weight is not None and linear.bias is not None:
            weight = editor.constant(f"{node.name}/linear", linear.weight)
            bias = editor.constant(f"{node.name}/linear_bias", linear.bias)
            product = editor.one(node, "MatMul", [x, weight])
            value = editor.one(node, "Add", [product, bias])
        hidden = node.attributes.get_int("hidden_size", 0) or 0
        if node.attributes.get_string("direction", "forward") == "bidirectional":
            shape = editor.ints(node, [0, 0, 2, hidden])
            parted = editor.one(node, "Reshape", [value, shape])
            new = editor.one(node, "Transpose", [parted], perm=[0, 2, 1, 3])
        else:
            new = editor.unsqueeze(node, value, [1])
        editor.replace(y, new)
        editor.clean([y])
    _forget_types(model)


def imitate(model: ir.Model, maps: Maps) -> None:
    """Makes recurrent operators compute linear maps of what they read.

    Args:
        model: A model without functions, changed in place.
        maps: The layers and what they become.
    """
    editor = Editor(model, "rp")
    for node in [n for n in model.graph.all_nodes() if n.name in maps and n.domain == ""]:
        linear = maps[node.name or ""]
        hidden = node.attributes.get_int("hidden_size", 0) or 0
        direction = node.attributes.get_string("direction", "forward")
        directions = 2 if direction == "bidirectional" else 1
        units = directions * hidden
        weight = np.eye(units, dtype=np.float32) if linear.weight is None else linear.weight
        bias = np.zeros(units, weight.dtype) if linear.bias is None else linear.bias
        w = weight.T.reshape(directions, hidden, -1)
        r = np.zeros((directions, hidden, hidden), weight.dtype)
        b = np.concatenate([bias.reshape(directions, hidden), r[:, :, 0]], axis=1)
        constants = [
            editor.constant(f"{node.name}/{k}", np.ascontiguousarray(a))
            for k, a in zip("WRB", (w, r, b), strict=True)
        ]
        new = editor.node(
            node,
            "RNN",
            [node.inputs[0], *constants],
            hidden_size=hidden,
            direction=direction,
            activations=["Affine"] * directions,
            activation_alpha=[1.0] * directions,
            activation_beta=[0.0] * directions,
        )
        editor.replace(node.outputs[0], new.outputs[0])
        editor.clean([node.outputs[0]])
    _forget_types(model)


def _forget_types(model: ir.Model) -> None:
    for graph in (model.graph, *model.graph.subgraphs()):
        graph.sort()
        for node in graph:
            for value in node.outputs:
                if not value.is_graph_output():
                    value.shape = value.type = None
