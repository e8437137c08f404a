"""The only place that knows in which order a framework stores the gates of a recurrent cell.

========= ========== =====================================================
framework LSTM       GRU
========= ========== =====================================================
ONNX      ``iofc``   ``zrh``; weights are ``[1, gates * hidden, columns]``
Keras     ``ifco``   ``zrh``; kernels are ``[columns, gates * hidden]``
========= ========== =====================================================

``i`` input, ``o`` output, ``f`` forget, ``c`` cell candidate, ``z`` update, ``r`` reset, ``h`` new
state. The one "gate" of a plain RNN is called ``h``.
"""

from __future__ import annotations

import numpy as np

from rnnprune_cli.model import GATES, Array, Op

ONNX_ORDER: dict[Op, str] = {"LSTM": "iofc", "GRU": "zrh", "RNN": "h"}
KERAS_ORDER: dict[Op, str] = {"LSTM": "ifco", "GRU": "zrh", "RNN": "h"}


def keras_to_onnx(op: Op, kernel: Array) -> Array:
    """Turns a Keras kernel into an ONNX weight.

    Args:
        op: The recurrent operator.
        kernel: ``[columns, gates * hidden]``, gates in Keras order.

    Returns:
        A new contiguous array ``[1, gates * hidden, columns]``, gates in ONNX order.

    Raises:
        ValueError: If the last axis cannot be split into the gates of ``op``.
    """
    order = [KERAS_ORDER[op].index(gate) for gate in ONNX_ORDER[op]]
    blocks = np.split(np.asarray(kernel), GATES[op], axis=1)
    return np.ascontiguousarray(np.concatenate([blocks[gate] for gate in order], axis=1).T[None])


def onnx_to_keras(op: Op, weight: Array) -> Array:
    """Turns an ONNX weight into a Keras kernel; the inverse of :func:`keras_to_onnx`.

    Args:
        op: The recurrent operator.
        weight: ``[1, gates * hidden, columns]``, gates in ONNX order.

    Returns:
        A new contiguous array ``[columns, gates * hidden]``, gates in Keras order.

    Raises:
        ValueError: If the weight has several directions or rows that are not whole gates.
    """
    if weight.shape[0] != 1:
        raise ValueError(f"a Keras kernel holds one direction, not {weight.shape[0]}")
    order = [ONNX_ORDER[op].index(gate) for gate in KERAS_ORDER[op]]
    blocks = np.split(weight[0], GATES[op], axis=0)
    return np.ascontiguousarray(np.concatenate([blocks[gate] for gate in order], axis=0).T)
