"""``layout=1`` → ``layout=0`` with Transposes, for running only.

onnxruntime's CPU kernels reject ``layout=1`` (batch first). The written model keeps it; what is run
for verification and timing is this equivalent.
"""

from __future__ import annotations

import onnx_ir as ir

from rnnprune_cli.find import is_recurrent

_STATE = (1, 0, 2)  # [batch, directions, hidden] ↔ [directions, batch, hidden]; X likewise
_Y = (2, 0, 1, 3)  # [steps, directions, batch, hidden] → [batch, steps, directions, hidden]


def has_batch_first(model: ir.Model) -> bool:
    """Tells whether any recurrent operator has ``layout=1``."""
    return any(_batch_first(n) for graph in model.graphs() for n in graph)


def make_time_first(model: ir.Model) -> None:
    """Rewrites every ``layout=1`` operator, in place.

    1. X, initial_h and initial_c are transposed on the way in.
    2. ``layout`` is dropped.
    3. Y, Y_h and Y_c are transposed on the way out; graph outputs keep their names.
    """
    for graph in model.graphs():
        for node in [n for n in graph if _batch_first(n)]:
            for index in (0, 5, 6):
                value = node.inputs[index] if index < len(node.inputs) else None
                if value is not None:
                    before = _transpose(value, _STATE)
                    graph.insert_before(node, before)
                    node.replace_input_with(index, before.outputs[0])
            del node.attributes["layout"]
            for index, value in enumerate(node.outputs):
                if not value.uses() and not value.is_graph_output():
                    continue
                after = _transpose(value, _STATE if index else _Y)
                name, value.name = value.name, f"{value.name}/time_first"
                shape, value.shape = value.shape, None
                graph.insert_after(node, after)
                new = after.outputs[0]
                new.name, new.type, new.shape = name, value.type, shape
                for user, position in tuple(value.uses()):
                    if user is not after:
                        user.replace_input_with(position, new)
                for k, output in enumerate(graph.outputs):
                    if output is value:
                        graph.outputs[k] = new


def _batch_first(node: ir.Node) -> bool:
    return is_recurrent(node) and node.attributes.get_int("layout", 0) == 1


def _transpose(value: ir.Value, perm: tuple[int, ...]) -> ir.Node:
    return ir.node("Transpose", [value], attributes={"perm": perm})
