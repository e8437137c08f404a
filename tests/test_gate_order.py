from __future__ import annotations

import numpy as np
import pytest

from rnnprune_cli.gate_order import KERAS_ORDER, ONNX_ORDER, keras_to_onnx, onnx_to_keras
from rnnprune_cli.model import GATES, Op

OPS: tuple[Op, ...] = ("LSTM", "GRU", "RNN")


def labelled(op: Op, order: str, hidden: int, columns: int) -> np.ndarray:
    """A kernel ``[columns, gates * hidden]`` whose values tell gate, unit and column."""
    blocks = [
        100 * ord(gate) + 10 * np.arange(hidden)[None] + np.arange(columns)[:, None]
        for gate in order
    ]
    return np.concatenate(blocks, axis=1).astype(np.float32)


@pytest.mark.parametrize("op", OPS)
def test_each_gate_lands_where_onnx_expects_it(op: Op) -> None:
    kernel = labelled(op, KERAS_ORDER[op], hidden=3, columns=2)
    expected = labelled(op, ONNX_ORDER[op], hidden=3, columns=2).T[None]
    np.testing.assert_array_equal(keras_to_onnx(op, kernel), expected)


@pytest.mark.parametrize("op", OPS)
def test_the_two_conversions_are_inverse(op: Op) -> None:
    kernel = np.random.default_rng(0).standard_normal((5, GATES[op] * 4)).astype(np.float32)
    weight = keras_to_onnx(op, kernel)
    assert weight.shape == (1, GATES[op] * 4, 5)
    assert weight.flags.c_contiguous
    back = onnx_to_keras(op, weight)
    assert back.flags.c_contiguous
    assert back.tobytes() == kernel.tobytes()


def test_the_result_is_a_copy() -> None:
    kernel = np.zeros((2, 3), np.float32)
    keras_to_onnx("RNN", kernel)[...] = 1
    assert not kernel.any()


def test_rows_that_are_no_whole_gates_are_refused() -> None:
    with pytest.raises(ValueError, match="split"):
        keras_to_onnx("LSTM", np.zeros((2, 6), np.float32))


def test_two_directions_are_refused() -> None:
    with pytest.raises(ValueError, match="one direction"):
        onnx_to_keras("GRU", np.zeros((2, 6, 2), np.float32))
