"""What onnxruntime's CPU kernels reject → an equivalent that they run, for running only.

The written model keeps what the original has; verification and timing use the equivalent of both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import onnx_ir as ir

from rnnprune_cli.graph import Instance, Walker, attribute
from rnnprune_cli.model import RecurrentLayer

_STATE = (1, 0, 2)  # [batch, directions, hidden] ↔ [directions, batch, hidden]; X likewise
_Y = (2, 0, 1, 3)  # [steps, directions, batch, hidden] → [batch, steps, directions, hidden]
_FLOAT_INPUTS = (0, 1, 2, 3, 5, 6, 7)  # all but sequence_lens


def obstacles(walker: Walker, instance: Instance, layer: RecurrentLayer) -> Iterator[str]:
    """Yields what onnxruntime's CPU kernels do not support about a recurrent operator."""
    layout = attribute(walker, instance, "layout")
    if layout is not None and layout.as_int() == 1:
        yield "layout=1"
    if layer.w.dtype == np.float64:
        yield "double weights"
    if attribute(walker, instance, "hidden_size") is None:
        yield "a missing hidden_size"


def make_runnable(walker: Walker, nodes: Iterable[tuple[ir.Node, RecurrentLayer]]) -> None:
    """Rewrites recurrent operators of a model without functions, in place.

    1. A missing ``hidden_size`` is set from R.
    2. ``layout=1`` (batch first) becomes ``layout=0`` between Transposes.
    3. Double operators become float operators between Casts.
    """
    for node, layer in nodes:
        for obstacle in tuple(obstacles(walker, Instance(node, ()), layer)):
            if obstacle == "a missing hidden_size":
                node.attributes["hidden_size"] = ir.AttrInt64("hidden_size", layer.hidden_size)
            elif obstacle == "layout=1":
                del node.attributes["layout"]
                for index in (0, 5, 6):
                    _before(node, index, "Transpose", perm=_STATE)
                for index, value in enumerate(node.outputs):
                    _after(value, "Transpose", perm=_STATE if index else _Y)
            else:
                for index in _FLOAT_INPUTS:
                    _before(node, index, "Cast", to=ir.DataType.FLOAT.value)
                for value in node.outputs:
                    _after(value, "Cast", to=ir.DataType.DOUBLE.value)


def _before(node: ir.Node, index: int, op_type: str, **attributes: int | tuple[int, ...]) -> None:
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is not None and node.graph is not None:
        new = ir.node(op_type, [value], attributes=attributes)
        node.graph.insert_before(node, new)
        node.replace_input_with(index, new.outputs[0])


def _after(value: ir.Value, op_type: str, **attributes: int | tuple[int, ...]) -> None:
    node = value.producer()
    if node is None or node.graph is None or not (value.uses() or value.is_graph_output()):
        return
    users = tuple(value.uses())
    new = ir.node(op_type, [value], attributes=attributes)
    node.graph.insert_after(node, new)
    made = new.outputs[0]
    made.name, made.type, made.shape = value.name, value.type, value.shape
    value.name, value.type, value.shape = f"{value.name}/{op_type}", None, None
    for user, position in users:
        user.replace_input_with(position, made)
    for k, output in enumerate(node.graph.outputs):
        if output is value:
            node.graph.outputs[k] = made
