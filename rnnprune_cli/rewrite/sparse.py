"""Weights as ONNX sparse tensors: values and linear positions.

The sparse tensor sits in a Constant (``sparse_value``). As a ``sparse_initializer`` it would take
the same bytes, but ``onnx.checker`` with full check then refuses every operator that reads it,
because its type is not a dense tensor. onnx-ir has neither, so this works on the serialized proto.

Never inside model functions: inlining one with a sparse constant, onnxruntime 1.31 reads memory
that it has freed (seen with valgrind), and now and then crashes.
"""

from __future__ import annotations

import numpy as np
import onnx

from rnnprune_cli.model import Array
from rnnprune_cli.onnx_file import graphs

MIN_OPSET = 11
"""Constant has ``sparse_value`` since operator set 11."""
INDEX_BYTES = 8
"""The specification allows int64 positions only."""
_OVERHEAD = 160
"""Bytes of the node around the arrays, rounded up."""


def nbytes(nonzero: int, itemsize: int) -> int:
    """Returns the bytes that a sparse weight adds to a file."""
    return nonzero * (itemsize + INDEX_BYTES) + _OVERHEAD


def make_sparse(proto: onnx.ModelProto, names: set[str]) -> None:
    """Replaces dense initializers and Constants by sparse Constants, where that is smaller.

    Args:
        proto: The model, changed in place.
        names: Names of the initializers and Constant outputs.
    """
    for graph in graphs(proto):
        for tensor in [t for t in graph.initializer if t.name in names]:
            array = onnx.numpy_helper.to_array(tensor)
            if _pays(array):
                graph.initializer.remove(tensor)
                graph.node.insert(
                    0,
                    onnx.helper.make_node(
                        "Constant",
                        [],
                        [tensor.name],
                        name=f"{tensor.name}/sparse",
                        sparse_value=_sparse(array),
                    ),
                )
        for node in graph.node:
            if node.op_type == "Constant" and node.output[0] in names:
                for attr in node.attribute:
                    if attr.name == "value":
                        array = onnx.numpy_helper.to_array(attr.t)
                        if _pays(array):
                            attr.CopyFrom(
                                onnx.helper.make_attribute("sparse_value", _sparse(array))
                            )
        # Declared as a dense tensor, which a Constant with a sparse value is not.
        for info in [v for v in graph.value_info if v.name in names]:
            graph.value_info.remove(info)


def _pays(array: Array) -> bool:
    return nbytes(int(np.count_nonzero(array)), array.itemsize) < array.nbytes


def _sparse(array: Array) -> onnx.SparseTensorProto:
    flat = array.reshape(-1)
    positions = np.flatnonzero(flat.view(f"u{flat.itemsize}"))  # by bits: a kept -0.0 stays
    return onnx.helper.make_sparse_tensor(
        onnx.numpy_helper.from_array(flat[positions]),
        onnx.numpy_helper.from_array(positions.astype(np.int64)),
        list(array.shape),
    )
