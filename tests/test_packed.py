from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import run
from hypothesis import given, settings
from hypothesis import strategies as st

from rnnprune_cli.errors import UsageError
from rnnprune_cli.rewrite import packed
from rnnprune_cli.rewrite.build import Builder


def masked(shape, sparsity, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape).astype(dtype)
    return np.where(rng.random(shape) < sparsity, dtype(0), values)


def unpack(form: packed.Packed) -> np.ndarray:
    """What the emitted operators compute, in NumPy."""
    size = int(np.prod(form.shape))
    if form.is_bitmap:
        positions = np.flatnonzero(np.unpackbits(form.positions, count=size, bitorder="little"))
    else:
        positions = np.cumsum(form.positions, dtype=np.int64)
    flat = np.zeros(size, form.values.dtype)
    flat[positions] = form.values
    return packed.dense(flat.reshape(form.shape), form.scale, form.dtype)


def emitted(weight: np.ndarray, values: str, opset: int) -> tuple[onnx.ModelProto, np.ndarray]:
    """A model whose output is the unpacked weight, and what onnxruntime makes of it."""
    graph = ir.Graph(
        [ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]))],
        [],
        nodes=[],
        opset_imports={"": opset},
        name="g",
    )
    end = ir.node("Identity", [graph.inputs[0]])
    end.outputs[0].name = "end"
    graph.append(end)
    build = Builder(graph, opset, initializers=True, taken={"x", "end"})
    value = packed.emit(packed.pack(weight, values, opset), build, "w")
    value.type = ir.TensorType(ir.DataType.from_numpy(weight.dtype))
    value.shape = ir.Shape(weight.shape)
    graph.outputs.append(value)
    model = ir.to_proto(ir.Model(graph, ir_version=8))
    onnx.checker.check_model(model, full_check=True)
    return model, run(model, {"x": np.zeros(1, np.float32)})[0]


@given(
    st.tuples(st.integers(1, 2), st.integers(1, 20), st.integers(1, 33)),
    st.floats(0, 1),
    st.sampled_from(["float32", "float16", "int8"]),
    st.sampled_from([np.float32, np.float16, np.float64]),
    st.integers(0, 1000),
)
@settings(max_examples=200, deadline=None)
def test_unpacking_gives_the_rounded_weight_back(shape, sparsity, values, dtype, seed):
    weight = masked(shape, sparsity, seed, dtype)
    one = unpack(packed.pack(weight, values, 17))
    assert one.dtype == weight.dtype
    assert np.array_equal(one, packed.rounding(values)(weight))
    if values == "float32":
        assert np.array_equal(one.view(np.uint8), weight.view(np.uint8))


@pytest.mark.parametrize("opset", [7, 9, 10, 11, 13, 18, 21])
@pytest.mark.parametrize("values", ["float32", "float16", "int8"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.97, 1.0])
def test_operators_unpack_bit_by_bit(opset, values, sparsity):
    weight = masked((2, 24, 37), sparsity)
    _, unpacked = emitted(weight, values, opset)
    wanted = packed.rounding(values)(weight)
    assert np.array_equal(unpacked.view(np.uint32), wanted.view(np.uint32))


@given(st.lists(st.integers(0, 2000), min_size=0, max_size=12, unique=True))
@settings(max_examples=100, deadline=None)
def test_gaps_of_any_width_survive(positions):
    weight = np.zeros((1, 1, 2001), np.float32)
    weight[0, 0, positions] = 1.5
    form = packed.pack(weight, "float32", 17)
    assert np.array_equal(unpack(form), weight)


def test_wide_gaps_are_unpacked_by_operators():
    weight = np.zeros((1, 1, 5000), np.float32)
    weight[0, 0, [0, 255, 511, 1022, 2000, 4999]] = np.arange(1, 7)
    model, unpacked = emitted(weight, "float32", 17)
    assert any(n.op_type == "CumSum" for n in model.graph.node)
    assert np.array_equal(unpacked, weight)


def test_the_smaller_form_is_chosen():
    assert packed.pack(masked((1, 400, 100), 0.7), "float32", 17).is_bitmap
    assert not packed.pack(masked((1, 400, 100), 0.95), "float32", 17).is_bitmap
    assert packed.pack(masked((1, 400, 100), 0.95), "float32", 10).is_bitmap


@pytest.mark.parametrize(("sparsity", "limit"), [(0.7, 0.345), (0.9, 0.14)])
def test_size_meets_the_bound(sparsity, limit):
    weight = masked((1, 1024, 320), 0)
    order = np.random.default_rng(0).permutation(weight.size)
    weight.reshape(-1)[order[: int(sparsity * weight.size)]] = 0
    model, _ = emitted(weight, "float32", 17)
    assert model.ByteSize() <= limit * weight.nbytes


def test_kept_negative_zero_stays():
    weight = np.array([[[-0.0, 1.0, 0.0, 2.0]]], np.float32)
    unpacked = unpack(packed.pack(weight, "float32", 17))
    assert np.signbit(unpacked[0, 0, 0])
    assert not np.signbit(unpacked[0, 0, 2])


def test_values_too_large_for_float16_are_refused():
    with pytest.raises(UsageError, match="float16"):
        packed.pack(np.full((1, 1, 2), 1e6, np.float32), "float16", 17)


def test_int8_keeps_the_sign_of_tiny_float16_weights():
    weight = np.array([[[1e-5, -8e-6, 3e-6]]], np.float16)
    rounded = packed.rounding("int8")(weight)
    assert np.all(np.sign(rounded) * np.sign(weight) >= 0)
    assert np.all(np.abs(rounded) <= 2 * np.abs(weight).max())
