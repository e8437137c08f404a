"""Initializers as ``sparse_initializer``: values and linear positions, as ONNX stores them.

onnx-ir has no sparse initializers, so this works on the serialized proto.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx

MIN_IR_VERSION = 6
"""``sparse_initializer`` came with IR version 6 (ONNX 1.6)."""
INDEX_BYTES = 8
"""The checker accepts int64 positions only."""


def nbytes(nonzero: int, itemsize: int) -> int:
    """Returns the bytes of a sparse tensor."""
    return nonzero * (itemsize + INDEX_BYTES)


def make_sparse(proto: onnx.ModelProto, names: set[str]) -> None:
    """Replaces dense initializers of the main graph and its subgraphs by sparse ones.

    Args:
        proto: The model, changed in place.
        names: Names of the initializers; unique in the model.
    """
    for graph in _graphs(proto.graph):
        dense = [t for t in graph.initializer if t.name in names]
        for tensor in dense:
            array = onnx.numpy_helper.to_array(tensor)
            flat = array.reshape(-1)
            positions = np.flatnonzero(flat.view(f"u{flat.itemsize}"))
            graph.sparse_initializer.append(
                onnx.helper.make_sparse_tensor(
                    onnx.numpy_helper.from_array(flat[positions], tensor.name),
                    onnx.numpy_helper.from_array(positions.astype(np.int64), ""),
                    list(array.shape),
                )
            )
            graph.initializer.remove(tensor)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attr in node.attribute:
            for sub in ([attr.g] if attr.HasField("g") else []) + list(attr.graphs):
                yield from _graphs(sub)
