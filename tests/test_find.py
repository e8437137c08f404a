from __future__ import annotations

import numpy as np
import onnx
import pytest
from conftest import GRAPHS, initializers, recurrent_model, two_layers
from onnx import helper, numpy_helper

from rnnprune_cli.errors import RnnpruneError, UsageError
from rnnprune_cli.load import load


def test_equal_copies_are_pruned_alike(prune_model, tmp_path):
    prune_model(two_layers(copy=True), 0.5, method="random", export="dense")
    written = initializers(tmp_path / "out.onnx")
    assert np.array_equal(written["W"], written["W2"])
    assert np.array_equal(written["R"], written["R2"])


def test_equal_copies_are_counted_once(prune_model):
    report = prune_model(two_layers(copy=True), 0.5)
    assert report.before.recurrent_parameters == 48 * (7 + 12)


def test_a_weight_of_an_excluded_layer_is_left_alone(prune_model, tmp_path):
    model = two_layers(share_r=True)
    report = prune_model(model, 0.5, exclude=["other"], export="dense")
    written = initializers(tmp_path / "out.onnx")
    assert np.array_equal(written["R"], initializers(model)["R"])
    assert np.count_nonzero(written["W"]) < 48 * 7
    rows = {row.name: row for row in report.layers}
    assert "other" in rows["rnn"].blocked
    assert rows["other"].sparsity == 0


def test_globs_select_layers(prune_model, tmp_path):
    model = two_layers()
    prune_model(model, 0.5, layers=["oth*"], export="dense")
    written = initializers(tmp_path / "out.onnx")
    assert np.array_equal(written["W"], initializers(model)["W"])
    assert np.count_nonzero(written["W2"]) < 48 * 7


def test_a_misspelt_layer_names_the_closest(prune_model):
    with pytest.raises(UsageError) as caught:
        prune_model(two_layers(), 0.5, layers=["othr"])
    assert "'other'" in caught.value.hint


def test_a_weight_read_by_something_else_is_not_changed_for_it(prune_model, tmp_path):
    model = recurrent_model()
    model.graph.node.append(helper.make_node("Identity", ["W"], ["w_out"]))
    model.graph.output.append(helper.make_tensor_value_info("w_out", 1, [1, 48, 7]))
    prune_model(model, 0.5, export="dense")
    original = initializers(model)["W"]
    assert np.array_equal(initializers(tmp_path / "out.onnx")["W"], original)
    node = next(n for n in onnx.load(str(tmp_path / "out.onnx")).graph.node if n.name == "rnn")
    assert node.input[1] != "W"


def test_both_calls_of_a_function_are_one_layer():
    model = load(GRAPHS / "hand_function_constants.onnx")
    assert [layer.name for layer in model.layers] == ["layer/GRU_0"]


def test_weights_given_by_the_caller_are_found_through_the_call():
    model = load(GRAPHS / "hand_function_weight_inputs.onnx")
    assert len(model.layers) == 2
    assert len({layer.w.name for layer in model.layers}) == 2


def test_same_names_in_different_graphs_stay_apart():
    names = [layer.name for layer in load(GRAPHS / "hand_if_same_names.onnx").layers]
    assert len(set(names)) == len(names) == 2


def test_a_model_without_recurrence_says_so(prune_model):
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", 1, [1])],
        [helper.make_tensor_value_info("y", 1, [1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(RnnpruneError, match="no recurrent layer"):
        prune_model(model)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("keras3_gru", "inside a Loop"),
        ("ts_cell_step", "an LSTM cell is written out"),
        ("ts_grucell_unrolled", "a GRU cell is written out"),
        ("dyn_rnn_tanh", "unrolled recurrence"),
        ("int8_ts_lstm_streaming", "quantized already"),
        ("hand_w_graph_inputs", "is a graph input"),
    ],
)
def test_what_cannot_be_pruned_is_listed_with_reason_and_hint(name, words):
    skipped = load(GRAPHS / f"{name}.onnx").skipped
    assert words in skipped[0].reason
    assert skipped[0].hint


def test_too_small_a_sparsity_prunes_nothing_and_fails(prune_model, tmp_path):
    with pytest.raises(RnnpruneError, match="not a single weight"):
        prune_model(recurrent_model(hidden=2, inputs=1), 0.001)
    assert not (tmp_path / "out.onnx").exists()


def test_one_tensor_as_both_w_and_r_is_refused(prune_model):
    model = recurrent_model(inputs=12)
    model.graph.node[0].input[1] = "R"
    with pytest.raises(RnnpruneError, match="both W and R"):
        prune_model(model, 0.5)


def call_with(r_input: bool) -> onnx.ModelProto:
    """A function around an LSTM, called with constants and, if asked, once with R from outside."""
    model = recurrent_model(bias=False)
    node = onnx.NodeProto()
    node.CopyFrom(model.graph.node[0])
    node.output[:] = ["o"]
    opset = helper.make_opsetid("", 17)
    for attr in node.attribute:
        if attr.name == "direction":
            attr.ClearField("s")
            attr.ref_attr_name = "way"
    function = helper.make_function(
        "local",
        "layer",
        ["x", "W", "R"],
        ["o"],
        [node],
        [opset],
        attribute_protos=[helper.make_attribute("way", "reverse")],
    )
    del model.graph.node[:]
    model.graph.node.append(helper.make_node("layer", ["x", "W", "R"], ["y"], domain="local"))
    if r_input:
        model.graph.input.append(helper.make_tensor_value_info("r", 1, [1, 48, 12]))
        model.graph.node.append(helper.make_node("layer", ["x", "W", "r"], ["z"], domain="local"))
        output = onnx.ValueInfoProto()
        output.CopyFrom(model.graph.output[0])
        output.name = "z"
        model.graph.output.append(output)
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("local", 1))
    return model


def test_a_functions_default_attribute_is_used(prune_model):
    report = prune_model(call_with(r_input=False), 0.5)
    assert [row.direction for row in report.layers] == ["reverse"]


def test_a_function_that_is_also_called_with_other_weights_is_refused(prune_model):
    with pytest.raises(RnnpruneError) as caught:
        prune_model(call_with(r_input=True), 0.5)
    assert caught.value.code == 3


@pytest.mark.parametrize("export", ["dense", "packed"])
def test_a_weight_computed_by_the_caller_of_a_function_is_pruned(prune_model, tmp_path, export):
    model = call_with(r_input=False)
    values = initializers(model)["W"]
    stored = next(t for t in model.graph.initializer if t.name == "W")
    turned = np.ascontiguousarray(values.transpose(0, 2, 1))
    stored.CopyFrom(numpy_helper.from_array(turned, "turned"))
    model.graph.node.insert(0, helper.make_node("Transpose", ["turned"], ["W"], perm=[0, 2, 1]))
    report = prune_model(model, 0.5, export=export)
    assert report.layers[0].sparsity == pytest.approx(0.5, abs=0.03)
    ops = [node.op_type for node in onnx.load(str(tmp_path / "out.onnx")).graph.node]
    assert "Transpose" not in ops
