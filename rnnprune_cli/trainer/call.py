"""What an operator is given: its inputs as values, and what its node says besides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from rnnprune_cli.model import Array, Runner
from rnnprune_cli.tensorflow.runtime import import_tensorflow

tf = import_tensorflow()

Value = Any
"""A NumPy array if known while the graph is traced (sizes, axes), else a ``tf.Tensor``."""


class Unsupported(Exception):  # noqa: N818  a reason, made an RnnpruneError where the node is known
    """What an operator is asked for that it cannot do."""


@dataclass(frozen=True, eq=False)
class Call:
    """One node.

    Attributes:
        op: Its operator.
        opset: Version of the operator set.
        attributes: Name → value, for those that are given.
        outputs: Number of outputs that the node names.
        real: Maps a floating-point type of the file to that in which it is computed.
        run: Evaluates a branch or body on inputs.
        trained: Whether the result is to be differentiated.
    """

    op: str
    opset: int
    attributes: Mapping[str, Any]
    outputs: int
    real: Callable[[np.dtype[Any]], np.dtype[Any]]
    run: Callable[[ir.Graph, Sequence[Value]], list[Value]]
    trained: bool = True

    def get(self, name: str, default: Any = None) -> Any:  # noqa: ANN401
        """Returns an attribute, or the default."""
        return self.attributes.get(name, default)

    def dtype(self, code: int) -> np.dtype[Any]:
        """Returns the type in which values of an ONNX type are held."""
        return self.real(ir.DataType(code).numpy())


def signature_of(runner: Runner) -> dict[str, Any]:
    """Returns the inputs of a model by name, as TensorFlow describes them."""
    return {
        spec.name: tf.TensorSpec(
            None if spec.shape is None else [d if isinstance(d, int) else None for d in spec.shape],
            spec.dtype,
        )
        for spec in runner.inputs
    }


Operator = Callable[..., Any]
"""``(call, *inputs) → value``, or a sequence of values for several outputs; None for an input that
is left out."""


def is_known(value: Value) -> bool:
    """Tells whether a value is known while the graph is traced."""
    return isinstance(value, np.ndarray)


def known(value: Value, what: str) -> Array:
    """Returns a value that must not depend on the data.

    Raises:
        Unsupported: If it does.
    """
    if not isinstance(value, np.ndarray):
        raise Unsupported(f"{what} that depend on the data")
    return value


def integers(value: Value, what: str) -> list[int]:
    """Returns a known value as a flat list of integers; see :func:`known`."""
    return [int(k) for k in known(value, what).reshape(-1)]


def rank(value: Value) -> int:
    """Returns the number of axes.

    Raises:
        Unsupported: If it depends on the data.
    """
    if isinstance(value, np.ndarray):
        return value.ndim
    if value.shape.rank is None:
        raise Unsupported("a number of axes that depends on the data")
    return int(value.shape.rank)


def axis_of(axis: int, axes: int) -> int:
    """Returns an axis counted from the front."""
    return axis + axes if axis < 0 else axis


def sizes(value: Value) -> list[Any]:
    """Returns the size of each axis: an int where it is known, else a scalar int32 tensor."""
    static = tf.convert_to_tensor(value).shape
    if static.is_fully_defined():
        return list(static)
    dynamic = tf.shape(value)
    return [d if d is not None else dynamic[k] for k, d in enumerate(static)]


def dtype_of(value: Value) -> np.dtype[Any]:
    """Returns the NumPy type of a value."""
    dtype: np.dtype[Any] = np.dtype(tf.as_dtype(value.dtype).as_numpy_dtype)
    return dtype
