"""What the report says of gates and of several outputs, held against what was written."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from conftest import Graph, initializers, recurrent_model, two_layers, weights
from onnx import helper
from rich.console import Console

from rnnprune_cli.gate_order import ONNX_ORDER
from rnnprune_cli.metrics import drop
from rnnprune_cli.model import GATES
from rnnprune_cli.report.json import render, report_document
from rnnprune_cli.report.table import report_table


def shown(report):
    """The table as lines, without what depends on the terminal."""
    console = Console(width=200, file=io.StringIO())
    console.print(report_table(report))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def document(report):
    return json.loads(render(report_document(report)))


def by_gate(op, *tensors):
    """Gate → sparsity, counted from W and R of one layer."""
    joint = np.concatenate(tensors, axis=2)
    blocks = np.split(joint, GATES[op], axis=1)
    return {g: float((b == 0).mean()) for g, b in zip(ONNX_ORDER[op], blocks, strict=True)}


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("op", sorted(GATES))
def test_gates_are_counted_in_what_was_written(prune_model, tmp_path, op, direction):
    tensors = weights(op, 12, 7, 2 if direction == "bidirectional" else 1, 0)
    for k in range(GATES[op]):  # gates of different size lose differently
        for name in ("W", "R"):
            tensors[name][:, k * 12 : (k + 1) * 12] *= 1 + k
    report = prune_model(
        recurrent_model(op, direction, tensors=tensors), 0.6, scope="layer", export="dense"
    )
    written = initializers(tmp_path / "out.onnx")
    (row,) = report.layers
    assert row.gates == pytest.approx(by_gate(op, written["W"], written["R"]))
    assert "".join(row.gates) == ONNX_ORDER[op]
    assert np.mean(list(row.gates.values())) == pytest.approx(row.sparsity)
    assert len(set(row.gates.values())) == GATES[op]
    assert document(report)["layers"][0]["gates"] == row.gates


@pytest.mark.parametrize("export", ["sparse", "packed"])
def test_gates_do_not_depend_on_how_weights_are_stored(prune_model, tmp_path, export):
    model = recurrent_model(hidden=40, inputs=24)
    dense = prune_model(model, 0.85, scope="layer", export="dense", output=tmp_path / "dense.onnx")
    other = prune_model(model, 0.85, scope="layer", export=export)
    assert set(other.layers[0].stored) == {export}
    assert other.layers[0].gates == dense.layers[0].gates


def test_gates_of_a_layer_that_is_left_alone_are_those_of_its_own_weights(prune_model):
    model = two_layers()
    for tensor in model.graph.initializer:
        if tensor.name in ("W2", "R2"):
            values = initializers(model)[tensor.name].copy()
            values[:, 24:36] = 0  # the forget gate
            tensor.raw_data = values.tobytes()
    report = prune_model(model, 0.5, exclude=["other"])
    gates = {row.name: row.gates for row in report.layers}
    assert gates["other"] == {"i": 0, "o": 0, "f": 1, "c": 0}
    assert all(0.45 < share < 0.55 for share in gates["rnn"].values())


def test_the_table_shows_gates_where_weights_were_pruned(prune_model):
    report = prune_model(recurrent_model("GRU"), 0.5, scope="layer")
    lines = shown(report)
    (head,) = [line for line in lines if line.startswith("layer ")]
    (row,) = [line for line in lines if line.startswith("rnn ")]
    assert "by gate" in head
    expected = " ".join(
        f"{g} {s:.2f}".replace("0.", ".") for g, s in report.layers[0].gates.items()
    )
    assert row[head.index("by gate") :].startswith(expected)
    assert expected.startswith("z .")


def classifier():
    """x [batch, time, 7] → LSTM → logits [batch, time, 3] and a level [batch]."""
    g = Graph(["batch", "time", 7])
    w = weights("LSTM", 12, 7, 1, 0)
    rng = np.random.default_rng(1)
    y = g.op(
        "LSTM",
        g.op("Transpose", "x", perm=[1, 0, 2]),
        w["W"],
        w["R"],
        w["B"],
        hidden_size=12,
        outs=3,
    )
    steps = g.op("Transpose", g.op("Squeeze", y, np.array([1])), perm=[1, 0, 2])
    for name, size in (("logits", 3), ("level", 1)):
        out = g.op("MatMul", steps, rng.standard_normal((12, size)).astype(np.float32))
        if name == "level":
            out = g.op("ReduceMean", out, axes=[1, 2], keepdims=0)
        g.nodes[-1].output[0] = name
        g.output(name)
    model = g.model()
    model.graph.node[1].name = "rnn"
    return model


@pytest.fixture
def data(tmp_path):
    """Makes a data set for :func:`classifier`."""

    def make(**targets):
        rng = np.random.default_rng(2)
        path = tmp_path / "data.npz"
        x = rng.standard_normal((70, 5, 7)).astype(np.float32)
        np.savez(path, x=x, lengths=rng.integers(1, 6, 70), **targets)
        return path

    return make


CLASSES = np.random.default_rng(3).integers(0, 3, (70, 5))
LEVELS = np.random.default_rng(4).standard_normal(70)


def test_units_show_no_column_of_gates(prune_model, data):
    report = prune_model(classifier(), 0.5, granularity="unit", scope="layer", data=data())
    assert not any("by gate" in line for line in shown(report))
    (row,) = report.layers
    assert row.hidden_after == 6
    assert set(row.gates.values()) == {row.sparsity}  # each gate lost the same


def test_every_output_with_a_target_has_a_row(prune_model, data):
    targets = {"target:level": LEVELS, "target:logits": CLASSES}
    report = prune_model(classifier(), 0.7, data=data(**targets), compensate=False)
    names = [(m.output, m.name) for m in report.before.metrics]
    assert names == [("logits", "accuracy"), ("level", "mse")]
    assert report.before.metric == report.before.metrics[0]
    assert report.after.metric == report.after.metrics[0]
    assert drop(report.before.metrics, report.after.metrics) > 0
    plain = document(report)
    assert [m["output"] for m in plain["after"]["metrics"]] == ["logits", "level"]
    lines = shown(report)
    for label, before, after in zip(
        ("accuracy of logits ↑", "mse of level ↓"),
        report.before.metrics,
        report.after.metrics,
        strict=True,
    ):
        (line,) = [line for line in lines if line.startswith(label)]
        change = f"{after.value - before.value:+.4f}"
        assert line.split()[4:] == [f"{before.value:.4f}", f"{after.value:.4f}", change]


def test_one_target_is_shown_as_before(prune_model, data):
    alone = prune_model(classifier(), 0.7, data=data(labels=CLASSES), compensate=False)
    both = {"target:level": LEVELS, "labels": CLASSES}
    path = data(**both)
    with_other = prune_model(
        classifier(), 0.7, data=path, compensate=False, output=path.with_name("two.onnx")
    )
    assert alone.after.metrics == (alone.after.metric,) == with_other.after.metrics[:1]
    (line,) = [line for line in shown(alone) if line.startswith("accuracy")]
    assert line.split()[:2] == ["accuracy", "↑"]


def test_without_labels_outputs_are_held_against_the_original_only(prune_model, data):
    report = prune_model(classifier(), 0.7, data=data(), compensate=False)
    assert report.before.metric is None and report.after.metric is None
    assert [(m.output, m.name, m.value) for m in report.before.metrics] == [
        ("logits", "relative-error", 0.0),
        ("level", "relative-error", 0.0),
    ]
    assert all(m.value > 0.01 for m in report.after.metrics)
    assert any("no labels" in warning for warning in report.warnings)


def test_a_metric_that_needs_no_labels_can_be_asked_for(prune_model, data):
    report = prune_model(
        classifier(), 0.7, data=data(labels=CLASSES), metric="logits=agreement", compensate=False
    )
    assert report.before.metrics == (report.before.metric,)
    assert (report.before.metric.name, report.before.metric.value) == ("agreement", 1.0)
    assert report.after.metric.value == report.fidelity[0].agreement < 1


def test_a_metric_that_needs_labels_is_not_measured_without(prune_model, data):
    report = prune_model(classifier(), 0.7, data=data(), metric="accuracy", compensate=False)
    assert report.before.metric is None
    assert {m.name for m in report.before.metrics} == {"relative-error"}


def streaming():
    """x, state → the new state and, unless only states come out, what is made of it."""
    g = Graph(["time", "batch", 7])
    w = weights("GRU", 12, 7, 1, 0)
    g.inputs.append(helper.make_tensor_value_info("h", 1, [1, "batch", 12]))
    g.op("GRU", "x", w["W"], w["R"], w["B"], None, "h", hidden_size=12, outs=2)
    g.nodes[-1].output[1] = "new"
    g.output("new")
    return g


@pytest.mark.parametrize("reads", [True, False])
def test_states_that_become_shorter_are_not_measured(tmp_path, reads):
    from rnnprune_cli.model import Stage
    from rnnprune_cli.options import PruneOptions
    from rnnprune_cli.pipeline import prune

    g = streaming()
    if reads:
        g.op("MatMul", g.nodes[0].output[0], np.ones((12, 2), np.float32))
        g.nodes[-1].output[0] = "y"
        g.output("y")
    (tmp_path / "model.onnx").write_bytes(g.model().SerializeToString())
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "data.npz",
        x=rng.standard_normal((5, 4, 1, 7)).astype(np.float32),
        h=np.zeros((5, 1, 1, 12), np.float32),
    )
    options = PruneOptions(
        model=tmp_path / "model.onnx",
        output=tmp_path / "out.onnx",
        stages=(Stage("magnitude", "unit", "layer", 0.5, resize_state=True),),
        data=tmp_path / "data.npz",
        latency_seconds=0.0,
    )
    report = prune(options, {}, lambda step: None)
    assert [state.output for state in report.states] == ["new"]
    assert [m.output for m in report.after.metrics] == (["y"] if reads else [])
