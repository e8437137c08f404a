"""``--quantize int8``: what is quantized, what is left, and what is proved about it."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from cells import layer_model, trace
from conftest import GRAPHS, Graph, initializers, recurrent_model, run, two_layers, weights
from onnx import TensorProto, helper, numpy_helper

from rnnprune_cli import quantize
from rnnprune_cli.comparison import quantized_advice
from rnnprune_cli.errors import ExitCode, NotEquivalentError, RnnpruneError, UsageError
from rnnprune_cli.load import load
from rnnprune_cli.model import ExportOptions, Ratio, Report, Stage, Target
from rnnprune_cli.onnx_model import OnnxModel
from rnnprune_cli.options import PruneOptions
from rnnprune_cli.pipeline import prune, prune_family
from rnnprune_cli.recipe import read_recipe, save_recipe
from rnnprune_cli.report.json import report_document

HALF = Stage("magnitude", "weight", "row", 0.5)
NOTHING = Stage("magnitude", "weight", "row", 0.0)


def options(tmp_path: Path, model: onnx.ModelProto | Path, *stages: Stage, **more) -> PruneOptions:
    path = model
    if isinstance(model, onnx.ModelProto):
        path = tmp_path / "model.onnx"
        onnx.save(model, path)
    more = {"output": tmp_path / "out.onnx", "quantize": "int8", "latency_seconds": 0.0, **more}
    return PruneOptions(path, more.pop("output"), stages or (HALF,), **more)


def quantized(tmp_path: Path, model: onnx.ModelProto | Path, *stages: Stage, **more) -> Report:
    return prune(options(tmp_path, model, *stages, **more), {}, lambda step: None)


def pruned_only(tmp_path: Path, model: onnx.ModelProto) -> Path:
    """The float model that is quantized otherwise."""
    output = tmp_path / "floats.onnx"
    dense = ExportOptions("dense")
    prune(
        options(tmp_path, model, quantize=None, output=output, export=dense), {}, lambda step: None
    )
    return output


def ops(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def only(path: Path, op_type: str) -> onnx.NodeProto:
    (node,) = (node for node in onnx.load(path).graph.node if node.op_type == op_type)
    return node


def feed_of(model: onnx.ModelProto, steps: int = 9, batch: int = 3, seed: int = 5) -> dict:
    size = model.graph.input[0].type.tensor_type.shape.dim[2].dim_value
    rng = np.random.default_rng(seed)
    return {"x": rng.standard_normal((steps, batch, size)).astype(np.float32)}


def dequantized(path: Path) -> dict[str, np.ndarray]:
    """W and R of the only quantized LSTM of a file, read with nothing of rnnprune."""
    node, tensors = only(path, "DynamicQuantizeLSTM"), initializers(path)
    found = {}
    for role, index, scale, zero in (("W", 1, 8, 9), ("R", 2, 10, 11)):
        whole = tensors[node.input[index]].astype(np.int64).transpose(0, 2, 1)
        steps, zeros = tensors[node.input[scale]], tensors[node.input[zero]]
        found[role] = (whole - zeros[..., None]) * steps[..., None].astype(np.float64)
    return found


def head(op: str = "GRU", opset: int = 17, dense: bool = True) -> onnx.ModelProto:
    """A recurrent layer, and a Dense layer after it."""
    g = Graph(["steps", "batch", 6], opset)
    own = weights(op, 8, 6, 1, seed=3)
    g.op(op, "x", own["W"], own["R"], own["B"], outs=2, hidden_size=8)
    y = "v0_1"
    if dense:
        y = g.op("MatMul", y, weights("RNN", 8, 5, 1, seed=4)["W"][0])
    g.output(y)
    return g.model()


# -- what is quantized ----------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_quantized_lstm_computes_what_an_lstm_with_its_weights_computes(
    tmp_path, direction, bias
):
    directions = 2 if direction == "bidirectional" else 1
    tensors = weights("LSTM", 12, 7, directions, seed=1)
    model = recurrent_model(direction=direction, bias=bias, tensors=tensors)
    report = quantized(tmp_path, model)
    out = tmp_path / "out.onnx"
    assert ops(out) == ["DynamicQuantizeLSTM"]
    feed = feed_of(model)
    own = dequantized(out) | ({"B": tensors["B"]} if bias else {})
    wanted = np.stack([t.y for t in trace("LSTM", own, feed["x"], direction)], axis=1)
    # What is left is the rounding of inputs and states to eight bits, at every step.
    np.testing.assert_allclose(run(out, feed)[0], wanted, rtol=0, atol=0.03)
    assert report.quantized.operators == {"LSTM": 1}
    assert report.quantized.left == ()
    assert report.layers[0].stored == ("int8", "int8")
    assert all(claim.passed for claim in report.verification)


def test_quantized_weights_are_those_of_onnxruntime_for_the_whole_model(tmp_path):
    from onnxruntime.quantization import quantize_dynamic

    model = head("LSTM")
    quantized(tmp_path, model, NOTHING)
    theirs = tmp_path / "theirs.onnx"
    quantize_dynamic(
        tmp_path / "model.onnx",
        theirs,
        op_types_to_quantize=["LSTM", "MatMul"],
        per_channel=True,
        reduce_range=True,
    )
    x = np.random.default_rng(0).standard_normal((7, 2, 6)).astype(np.float32)
    np.testing.assert_array_equal(run(tmp_path / "out.onnx", {"x": x})[0], run(theirs, {"x": x})[0])
    both = [
        sorted(
            (t.data_type, tuple(t.dims), numpy_helper.to_array(t).tobytes())
            for t in onnx.load(path).graph.initializer
        )
        for path in (tmp_path / "out.onnx", theirs)
    ]
    assert both[0] == both[1]


def test_peepholes_initial_states_lengths_and_attributes_stay(tmp_path):
    tensors = weights("LSTM", 6, 4, 2, seed=2)
    extra = ((4, "lengths"), (5, "h0"), (6, "cell"))
    model = layer_model("LSTM", "bidirectional", tensors, extra=extra, clip=3.0)
    node = next(n for n in model.graph.node if n.op_type == "LSTM")
    model.graph.initializer.append(
        numpy_helper.from_array(np.full((2, 18), 0.3, np.float32), "peepholes")
    )
    node.input.append("peepholes")
    assert len(node.input) == 8
    quantized(tmp_path, model, NOTHING)
    out = tmp_path / "out.onnx"
    made = only(out, "DynamicQuantizeLSTM")
    assert [made.input[k] for k in (0, 3, 4, 5, 6, 7)] == [
        node.input[k] for k in (0, 3, 4, 5, 6, 7)
    ]
    assert {a.name for a in made.attribute} == {a.name for a in node.attribute}
    rng = np.random.default_rng(0)
    feed = {
        "x": rng.standard_normal((3, 8, 4)).astype(np.float32),
        "lengths": np.array([8, 3, 5], np.int32),
        "h0": rng.standard_normal((3, 2, 6)).astype(np.float32),
        "cell": rng.standard_normal((3, 2, 6)).astype(np.float32),
    }
    np.testing.assert_allclose(run(out, feed)[0], run(model, feed)[0], rtol=0, atol=0.05)


def in_branches(own_weights: bool) -> onnx.ModelProto:
    """An If with an LSTM in each branch; its weights lie there, or outside."""
    outer: list[onnx.TensorProto] = []
    branches = []
    for seed, name in enumerate(("then", "else")):
        tensors = [
            numpy_helper.from_array(array, f"{name}_{role}")
            for role, array in weights("LSTM", 5, 4, 1, seed).items()
        ]
        node = helper.make_node(
            "LSTM", ["x", *(t.name for t in tensors)], [f"{name}_y"], name="lstm", hidden_size=5
        )
        info = helper.make_tensor_value_info(f"{name}_y", 1, None)
        inside = tensors if own_weights else []
        outer += [] if own_weights else tensors
        branches.append(helper.make_graph([node], name, [], [info], inside))
    node = helper.make_node("If", ["c"], ["y"], then_branch=branches[0], else_branch=branches[1])
    graph = helper.make_graph(
        [node],
        "g",
        [
            helper.make_tensor_value_info("x", 1, ["steps", "batch", 4]),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", 1, ["steps", 1, "batch", 5])],
        outer,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("own_weights", [True, False])
def test_lstms_in_branches_are_quantized_wherever_their_weights_lie(tmp_path, own_weights):
    model = in_branches(own_weights)
    report = quantized(tmp_path, model, NOTHING)
    out = tmp_path / "out.onnx"
    assert report.quantized.operators == {"LSTM": 2}
    node = onnx.load(out).graph.node[0]
    assert [a.g.node[0].op_type for a in node.attribute] == ["DynamicQuantizeLSTM"] * 2
    floats = [t for a in node.attribute for t in a.g.initializer if t.name[-1] in "WR"]
    assert not floats  # nothing keeps the float weights in the file
    x = np.random.default_rng(0).standard_normal((5, 2, 4)).astype(np.float32)
    for case in (True, False):
        feed = {"x": x, "c": np.array(case)}
        np.testing.assert_allclose(run(out, feed)[0], run(model, feed)[0], rtol=0, atol=0.05)


def test_a_weight_that_two_layers_share_is_quantized_and_stored_once(tmp_path):
    model = two_layers(share_r=True)
    report = quantized(tmp_path, model)
    out = tmp_path / "out.onnx"
    first, second = (n for n in onnx.load(out).graph.node)
    assert first.input[2] == second.input[2]
    assert first.input[1] != second.input[1]
    assert report.before.parameters == report.after.parameters
    # Of R, and of W twice: what the file holds, each once.
    int8 = [a for a in initializers(out).values() if a.dtype == np.int8 and a.ndim == 3]
    assert report.after.recurrent_nonzero == sum(int(np.count_nonzero(a)) for a in int8)
    x = feed_of(model)
    for ours, theirs in zip(run(out, x), run(model, x), strict=True):
        assert ours.shape == theirs.shape


def test_stacked_lstms_a_gemm_and_an_embedding_are_quantized(tmp_path):
    g = Graph(["batch", 7])
    g.inputs[0] = helper.make_tensor_value_info("x", TensorProto.INT64, ["batch", 7])
    rng = np.random.default_rng(0)
    table = rng.standard_normal((20, 6)).astype(np.float32)
    table[:, 0] = 0
    y = g.op("Transpose", g.op("Gather", table, "x"), perm=[1, 0, 2])
    for seed, inputs in ((1, 6), (2, 8)):
        own = weights("LSTM", 8, inputs, 1, seed)
        y = g.op("LSTM", y, own["W"], own["R"], own["B"], hidden_size=8)
        y = g.op("Squeeze", y, np.array([1]))
    last = g.op("Gather", y, np.array(-1), axis=0)
    bias = rng.standard_normal(3).astype(np.float32)
    g.output(g.op("Gemm", last, rng.standard_normal((3, 8)).astype(np.float32), bias, transB=1))
    model = g.model()
    report = quantized(tmp_path, model, NOTHING)
    out = tmp_path / "out.onnx"
    assert report.quantized.operators == {"LSTM": 2, "Gather": 1, "Gemm": 1}
    made = ops(out)
    assert made.count("DynamicQuantizeLSTM") == 2
    assert made.count("MatMulInteger") == made.count("DequantizeLinear") == 1
    assert "Gemm" not in made
    assert made.count("Gather") == 2  # the other one takes the last step
    tokens = rng.integers(0, 20, (4, 7))
    ours, theirs = (run(m, {"x": tokens})[0] for m in (out, model))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=0.1)


@pytest.mark.parametrize(
    "attributes", [{"alpha": 0.5}, {"transA": 1}], ids=["alpha", "transposed input"]
)
def test_a_gemm_that_is_no_plain_product_stays(tmp_path, attributes):
    g = Graph(["steps", 1, 6])
    own = weights("LSTM", 8, 6, 1, seed=3)
    g.op("LSTM", "x", own["W"], own["R"], outs=2, hidden_size=8)
    matrix = np.ones((1 if "transA" in attributes else 8, 2), np.float32)
    y = g.op("Squeeze", "v0_1", np.array([0]))
    g.output(g.op("Gemm", y, matrix, **attributes))
    report = quantized(tmp_path, g.model())
    assert report.quantized.operators == {"LSTM": 1}
    assert "Gemm" in ops(tmp_path / "out.onnx")


def test_units_are_cut_before_what_is_left_is_quantized(tmp_path):
    model = head("LSTM")
    report = quantized(tmp_path, model, Stage("magnitude", "unit", "layer", 0.5))
    assert report.layers[0].hidden_after == 4
    assert report.layers[0].stored == ("int8", "int8")
    assert dequantized(tmp_path / "out.onnx")["R"].shape == (1, 16, 4)
    assert report.quantized.before.parameters == report.after.parameters


def test_a_file_of_ir_version_3_and_opset_9_has_its_lstms_quantized(tmp_path):
    model = two_layers()
    model.opset_import[0].version, model.ir_version = 9, 3
    for tensor in model.graph.initializer:
        model.graph.input.append(
            helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        )
    quantized(tmp_path, model)
    out = onnx.load(tmp_path / "out.onnx")
    assert out.opset_import[0].version == 9
    assert [i.name for i in out.graph.input] == ["x", "B", "B2"]
    assert [t.name for t in out.graph.initializer] == ["B", "B2"]
    assert {n.op_type for n in out.graph.node} == {"Constant", "DynamicQuantizeLSTM"}
    assert run(tmp_path / "out.onnx", feed_of(model))[1].shape == (9, 1, 3, 12)


def test_weights_beside_the_model_stay_beside_it(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    path = folder / "model.onnx"
    onnx.save(recurrent_model(hidden=40), path, save_as_external_data=True, size_threshold=0)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    report = quantized(tmp_path, path)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert {p.name for p in tmp_path.iterdir()} == {"in", "out.onnx", "out.onnx.data"}
    assert report.ratios.bytes < 0.5
    assert run(tmp_path / "out.onnx", feed_of(recurrent_model()))[0].shape == (9, 1, 3, 40)


# -- what is measured -----------------------------------------------------------------------------


def test_zeros_of_pruned_weights_stay_zeros(tmp_path):
    model = recurrent_model()
    report = quantized(tmp_path, model, export=ExportOptions("dense"))
    floats = initializers(pruned_only(tmp_path, model))
    found = dequantized(tmp_path / "out.onnx")
    for role in "WR":
        assert np.count_nonzero(floats[role] == 0) > 0.4 * floats[role].size
        assert not found[role][floats[role] == 0].any()
    left = sum(int(np.count_nonzero(found[role])) for role in "WR")
    assert report.layers[0].nonzero_after == report.after.recurrent_nonzero == left
    assert report.quantized.before.recurrent_nonzero == sum(
        int(np.count_nonzero(floats[role])) for role in "WR"
    )


def test_a_row_without_weights_stays_without(tmp_path):
    tensors = weights("LSTM", 12, 7, 1, seed=0)
    tensors["W"][0, 5] = 0
    quantized(tmp_path, recurrent_model(tensors=tensors))
    assert not dequantized(tmp_path / "out.onnx")["W"][0, 5].any()


def test_pruning_and_quantization_are_told_apart(tmp_path):
    model = head("LSTM")
    report = quantized(tmp_path, model, latency_seconds=0.05)
    own = report.quantized
    out = tmp_path / "out.onnx"
    assert report.after.bytes == out.stat().st_size
    assert own.kind == "int8"
    assert report_document(report)["quantized"]["operators"] == {"LSTM": 1, "MatMul": 1}
    assert own.ratios.bytes == report.after.bytes / own.before.bytes
    assert report.before.parameters == own.before.parameters == report.after.parameters
    assert report.before.nonzero > own.before.nonzero >= report.after.nonzero
    assert own.ratios.latency is not None
    assert own.ratios.latency.low <= own.ratios.latency.median <= own.ratios.latency.high
    # Half of the weights gone changes far more than rounding the others.
    assert 0 < own.fidelity[0].max_abs < report.fidelity[0].max_abs / 2


def test_the_metric_of_the_pruned_model_is_reported_too(tmp_path):
    model = head("LSTM")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20, 1, 6)).astype(np.float32)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "samples"
    data = tmp_path / "data.npz"
    np.savez(data, x=x, labels=run(model, {"x": x})[0][0])
    g = Graph(["samples", 9, 6])
    own = weights("LSTM", 8, 6, 1, seed=3)
    g.op("LSTM", g.op("Transpose", "x", perm=[1, 0, 2]), own["W"], own["R"], outs=2, hidden_size=8)
    g.output(g.op("Squeeze", "v1_1", np.array([0])))
    sequences = rng.standard_normal((20, 9, 6)).astype(np.float32)
    np.savez(data, x=sequences, labels=run(g.model(), {"x": sequences})[0])
    report = quantized(tmp_path, g.model(), data=data, metric="mse")
    figures = [m.metric.value for m in (report.before, report.quantized.before, report.after)]
    assert figures[0] == 0
    assert figures[1] > 0
    assert abs(figures[2] - figures[1]) < figures[1]
    assert figures[2] != figures[1]


def test_where_quantizing_does_not_pay_the_report_says_so(tmp_path):
    report = quantized(tmp_path, head("LSTM"), Stage("magnitude", "weight", "row", 0.9))
    assert any("take less room without --quantize" in warning for warning in report.warnings)
    for low, said in ((1.1, True), (0.9, False)):
        latency = Ratio(1.2, low, 1.3)
        ratios = dataclasses.replace(report.quantized.ratios, latency=latency)
        own = dataclasses.replace(report.quantized, ratios=ratios)
        advice = list(quantized_advice(own, report.before))
        assert any("slower" in warning for warning in advice) == said
        assert not any("less room" in warning for warning in advice)


# -- what is left ---------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["GRU", "RNN"])
def test_a_recurrent_layer_that_onnxruntime_cannot_quantize_is_said_to_be_left(tmp_path, op):
    report = quantized(tmp_path, head(op))
    assert report.quantized.operators == {"MatMul": 1}
    (left,) = report.quantized.left
    assert left.name == "n0"
    assert left.reason == f"onnxruntime has no quantized {op}"
    assert "--values int8" in left.hint
    assert any(f"no quantized {op}" in warning for warning in report.warnings)
    assert report.layers[0].stored == ("dense", "dense")
    assert op in ops(tmp_path / "out.onnx")


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (head("GRU", dense=False), "no quantized GRU"),
        (head("RNN", dense=False), "no quantized RNN"),
        (head("GRU", opset=10), "no quantized GRU"),
        (recurrent_model(dtype=np.float16), "float16"),
        (recurrent_model(dtype=np.float64, opset=14), "float64"),
        (
            layer_model("LSTM", "forward", weights("LSTM", 5, 4, 1, 0), layout=1),
            "layout=1",
        ),
    ],
    ids=["GRU", "RNN", "opset 10", "float16", "float64", "batch first"],
)
def test_where_nothing_can_be_quantized_nothing_is_written(tmp_path, model, reason):
    with pytest.raises(RnnpruneError, match="can be quantized") as caught:
        quantized(tmp_path, model)
    assert caught.value.code == ExitCode.UNSUPPORTED
    assert reason in caught.value.message
    assert caught.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_weights_that_callers_may_override_are_left(tmp_path):
    model = two_layers()
    model.graph.input.append(helper.make_tensor_value_info("W", 1, [1, 48, 7]))
    report = quantized(tmp_path, model)
    assert [item.name for item in report.quantized.left] == ["rnn"]
    assert "override" in report.quantized.left[0].reason
    assert ops(tmp_path / "out.onnx") == ["LSTM", "DynamicQuantizeLSTM"]


def test_a_model_that_is_quantized_already_says_so(tmp_path):
    quantized(tmp_path, recurrent_model())
    for path in (tmp_path / "out.onnx", GRAPHS / "int8_ts_lstm_streaming.onnx"):
        item = load(path).skipped[0]
        assert "quantized already" in item.reason
        assert "--quantize int8" in item.hint
    again = options(tmp_path, tmp_path / "out.onnx", output=tmp_path / "again.onnx")
    with pytest.raises(RnnpruneError, match="quantized already"):
        prune(again, {}, lambda step: None)


# -- what is proved -------------------------------------------------------------------------------


def spoil(path: Path, change) -> None:
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)


def set_tensor(model: onnx.ModelProto, name: str, change) -> None:
    (tensor,) = (t for t in model.graph.initializer if t.name == name)
    array = numpy_helper.to_array(tensor).copy()
    change(array)
    tensor.CopyFrom(numpy_helper.from_array(array, name))


def node_of(model: onnx.ModelProto, op_type: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.op_type == op_type)


def weight_off(model):
    set_tensor(model, "n0.W_quantized", lambda a: a.__setitem__((0, 0, 0), a[0, 0, 0] + 2))


def zero_filled(model):
    def change(a):
        a[np.unravel_index(np.flatnonzero(a == 0)[0], a.shape)] = 1

    set_tensor(model, "n0.R_quantized", change)


def scale_off(model):
    set_tensor(model, "n1.weight_scale", lambda a: a.__imul__(1.1))


def zero_point_off(model):
    set_tensor(model, "n0.R_zero_point", lambda a: a.__setitem__((0, 3), 1))


def infinite_scale(model):
    set_tensor(model, "n0.W_scale", lambda a: a.__setitem__((0, 3), np.inf))


def bias_off(model):
    name = node_of(model, "DynamicQuantizeLSTM").input[3]
    set_tensor(model, name, lambda a: a.__setitem__((0, 0), 0.5))


def weights_swapped(model):
    node = node_of(model, "DynamicQuantizeLSTM")
    for one, two in ((1, 2), (8, 10), (9, 11)):
        node.input[one], node.input[two] = node.input[two], node.input[one]


def scales_swapped(model):
    node = node_of(model, "DynamicQuantizeLSTM")
    node.input[8], node.input[10] = node.input[10], node.input[8]


def other_direction(model):
    node_of(model, "DynamicQuantizeLSTM").attribute.append(
        helper.make_attribute("direction", "reverse")
    )


def no_bias(model):
    node_of(model, "DynamicQuantizeLSTM").input[3] = ""


def another_node(model):
    node = node_of(model, "MatMulInteger")
    made = helper.make_node("Identity", [node.input[0]], ["other"])
    model.graph.node.insert([n.op_type for n in model.graph.node].index("MatMulInteger"), made)
    node.input[0] = "other"


def another_output_scale(model):
    node = next(n for n in model.graph.node if list(n.output) == [model.graph.output[0].name])
    node.input[1] = next(n for n in model.graph.node if n.op_type == "Mul").input[0]


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        (None, []),
        (weight_off, ["weights"]),
        (zero_filled, ["weights"]),
        (scale_off, ["weights"]),
        (zero_point_off, ["weights"]),
        (infinite_scale, ["weights"]),
        (bias_off, ["nothing but"]),
        (weights_swapped, ["weights"]),
        (scales_swapped, ["weights"]),
        (other_direction, ["nothing but"]),
        (no_bias, ["nothing but"]),
        (another_node, ["nothing but"]),
        (another_output_scale, ["nothing but"]),
    ],
)
def test_a_spoiled_file_fails_its_claim(tmp_path, change, broken):
    model = head("LSTM")
    floats = pruned_only(tmp_path, model)
    quantized(tmp_path, model)
    if change is not None:
        spoil(tmp_path / "out.onnx", change)
    claims = list(quantize.Comparison(OnnxModel(floats), tmp_path / "out.onnx").claims())
    failed = [claim.claim for claim in claims if not claim.passed]
    assert len(failed) >= len(broken)
    assert all(any(words in claim for claim in failed) for words in broken)
    assert bool(failed) == bool(broken)


def test_a_wrong_quantized_weight_ends_the_run_and_nothing_is_written(tmp_path, monkeypatch):
    right = quantize._quantized

    def wrong(part, opset):
        model = right(part, opset)
        set_tensor(model, "rnn.W_quantized", lambda a: a.__setitem__((0, 0, 0), a[0, 0, 0] + 3))
        return model

    monkeypatch.setattr(quantize, "_quantized", wrong)
    with pytest.raises(NotEquivalentError, match="half a step") as caught:
        quantized(tmp_path, recurrent_model())
    assert caught.value.code == ExitCode.NOT_EQUIVALENT
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_no_two_products_can_overflow_sixteen_bits(tmp_path):
    """Processors without VNNI add them so; 255 is the largest activation."""
    tensors = weights("LSTM", 12, 7, 1, seed=0)
    for role in "WR":
        tensors[role][:] = np.abs(tensors[role]).max()
    quantized(tmp_path, recurrent_model(tensors=tensors), NOTHING)
    int8 = [a for a in initializers(tmp_path / "out.onnx").values() if a.dtype == np.int8]
    assert max(int(np.abs(a.astype(int)).max()) for a in int8) * 2 * 255 <= 32767


def test_the_same_input_gives_the_same_bytes_and_says_where_they_come_from(tmp_path, capfd):
    handlers = list(logging.getLogger().handlers)
    model = head("LSTM")
    model.producer_name = "tests"
    quantized(tmp_path, model)
    first = (tmp_path / "out.onnx").read_bytes()
    quantized(tmp_path, model, force=True)
    assert (tmp_path / "out.onnx").read_bytes() == first
    assert {p.name for p in tmp_path.iterdir()} == {"model.onnx", "out.onnx"}
    out = onnx.load(tmp_path / "out.onnx")
    assert out.producer_name == "tests"
    (note,) = (json.loads(p.value) for p in out.metadata_props if p.key == "rnnprune")
    assert note["quantize"] == "int8"
    assert note["plan"]["stages"][0]["sparsity"] == 0.5
    assert [p.key for p in out.metadata_props] == ["rnnprune"]
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger().handlers == handlers
    assert logging.root.manager.disable == logging.NOTSET


# -- options and recipes --------------------------------------------------------------------------


def test_a_recipe_repeats_it_byte_for_byte(tmp_path):
    done = options(tmp_path, head("LSTM"))
    report = prune(done, {}, lambda step: None)
    save_recipe(tmp_path / "recipe.toml", done, report.plan.stages)
    assert 'quantize = "int8"' in (tmp_path / "recipe.toml").read_text()
    again = read_recipe(tmp_path / "recipe.toml").options(force=True)
    assert again.quantize == "int8"
    first = (tmp_path / "out.onnx").read_bytes()
    assert prune(again, {}, lambda step: None).output.sha256 == report.output.sha256
    assert (tmp_path / "out.onnx").read_bytes() == first


def test_every_model_of_a_family_is_quantized(tmp_path):
    family = options(tmp_path, head("LSTM"), family=(0.3, 0.6))
    reports = prune_family(family, {}, lambda step: None)
    assert [r.quantized.operators for r in reports] == [{"LSTM": 1, "MatMul": 1}] * 2
    for name in ("out-0.3.onnx", "out-0.6.onnx"):
        assert "DynamicQuantizeLSTM" in ops(tmp_path / name)


def test_a_target_that_quantizing_cannot_break_is_searched_for(tmp_path):
    report = quantized(tmp_path, head("LSTM"), targets=(Target("nonzero", 0.6),))
    assert report.ratios.nonzero <= 0.6
    assert all(check.passed for check in report.checks)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"quantize": "int4"}, "int4"),
        ({"export": ExportOptions("packed")}, "--export packed"),
        ({"export": ExportOptions("sparse")}, "--export sparse"),
        ({"export": ExportOptions("auto", "int8")}, "--values int8"),
        ({"targets": (Target("bytes", 0.3),)}, "target 'bytes'"),
        ({"targets": (Target("latency", 0.3),)}, "target 'latency'"),
        ({"family": (0.3, 0.2), "family_of": "bytes"}, "target 'bytes'"),
        ({"output": Path("folder")}, "only ONNX models are quantized"),
    ],
)
def test_what_makes_no_sense_with_it_is_refused(tmp_path, more, words):
    with pytest.raises(UsageError, match=words) as caught:
        quantized(tmp_path, head("LSTM"), **more)
    assert caught.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_on_the_command_line_a_gru_alone_ends_with_3_and_one_json_document(tmp_path):
    onnx.save(head("GRU", dense=False), tmp_path / "model.onnx")
    words = ["prune", "model.onnx", "-s", "0.5", "--quantize", "int8", "--format", "json"]
    done = subprocess.run(
        [sys.executable, "-m", "rnnprune_cli.cli", *words, "--quiet"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == ExitCode.UNSUPPORTED
    assert "no quantized GRU" in json.loads(done.stdout)["error"]["message"]
    assert "--values int8" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_a_quantized_file_has_as_many_weights_as_the_report_says(tmp_path):
    """Scales and zero points are no weights, whoever counts."""
    for hidden in (8, 12):
        folder = tmp_path / str(hidden)
        folder.mkdir()
        report = quantized(folder, recurrent_model("LSTM", "bidirectional", hidden=hidden))
        count = load(folder / "out.onnx").count()
        assert (count.parameters, count.nonzero) == (report.after.parameters, report.after.nonzero)
