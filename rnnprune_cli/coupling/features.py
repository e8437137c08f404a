"""Input features of recurrent layers that no weight reads: they go like units, at no cost.

What makes features (a Dense layer, an Embedding, an input of the model) gets labels, just as
recurrent layers do for their units. Those whose readers all have zero weights for them can be left
out, and with them whatever made them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from rnnprune_cli.coupling.classes import IntArray
from rnnprune_cli.find import is_recurrent
from rnnprune_cli.graph import input_of
from rnnprune_cli.layout import static
from rnnprune_cli.model import Array, BoolArray

if TYPE_CHECKING:
    from rnnprune_cli.coupling import Coupling


def seed(c: Coupling, nodes: list[ir.Node]) -> None:
    """Labels what the inputs of recurrent layers are made of."""
    pending = [node.inputs[0] for node in nodes if is_recurrent(node)]
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        if value is None or id(value) in seen:
            continue
        seen.add(id(value))
        node = value.producer()
        if node is None:
            if value.is_graph_input() and value.graph is c.model.graph:
                _seed_input(c, value)
        elif node.op_type in ("MatMul", "Gemm", "Gather"):
            _seed_maker(c, node)
        elif not is_recurrent(node):
            pending.extend(node.inputs)


def _seed_input(c: Coupling, value: ir.Value) -> None:
    size = static(value, -1)
    is_data = value.dtype is not None and value.dtype.is_floating_point()
    if value.is_initializer() or value.shape is None or size is None or size < 2 or not is_data:
        return
    ndim = len(value.shape)
    c.fed.append(value)
    c.label(value, c.classes.new((*[1] * (ndim - 1), size)), ndim - 1)


def _seed_maker(c: Coupling, node: ir.Node) -> None:
    """Labels the features that a product with a constant, or a table, makes."""
    index = 0 if node.op_type == "Gather" else 1
    table = c.constant(node.inputs[index])
    ndim = c.rank(node.outputs[0])
    if table is None or table.ndim != 2 or ndim is None:
        return
    if node.op_type == "Gather" and (node.attributes.get_int("axis", 0) or 0) % 2 != 0:
        return
    turned = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    axis = 0 if turned else 1
    size = table.shape[axis]
    if size < 2:
        return
    labels = c.classes.new((size,))
    shape = [1, 1]
    shape[axis] = size
    own = [(index, labels.reshape(shape), axis)]
    added = input_of(node, 2) if node.op_type == "Gemm" else None
    if added is not None:
        constant = c.constant(added)
        if constant is None:
            return
        if constant.ndim and constant.shape[-1] == size:
            own.append((2, labels.reshape((1,) * (constant.ndim - 1) + (size,)), constant.ndim - 1))
    for where, array, at in own:
        c.make(node, where, array, at)
    c.label(node.outputs[0], labels.reshape((1,) * (ndim - 1) + (size,)), ndim - 1)


def unread(c: Coupling) -> BoolArray:
    """Returns which labels can go because all weights that read them are zero.

    Returns:
        bool, one for each label.
    """
    root = c.classes.of(np.arange(len(c.classes)))
    energy = np.zeros(len(root))
    is_read = np.zeros(len(root), np.bool_)
    for cut in c.cuts:
        if cut.role != "reads":
            continue
        weight = c.constant(cut.value)
        assert weight is not None
        array = cut.labels.array
        over = tuple(k for k in range(array.ndim) if array.shape[k] == 1)
        squares: Array = np.abs(weight, dtype=np.float64).sum(axis=over, keepdims=True)
        np.add.at(energy, root[array], squares)
        is_read[root[array]] = True
    gone = is_read & (energy == 0)
    for block in c.blocks:
        gone[root[block.labels]] = False
    for node, index in c.masked:
        labels = c.of(node.inputs[index])
        if labels is not None:
            gone[root[labels.array]] = False
    # As many must go at every place of a value, and one must stay.
    arrays: list[IntArray] = [root[np.moveaxis(x.array, x.axis, -1)] for x in c.every()]
    uneven = True
    while uneven:
        uneven = False
        for array in arrays:
            rows = gone[array].reshape(-1, array.shape[-1]).sum(axis=1)
            if rows.any() and (len(set(rows.tolist())) > 1 or rows[0] == array.shape[-1]):
                gone[array] = False
                uneven = True
    found: BoolArray = gone[root]
    return found
