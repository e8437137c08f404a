"""Removing hidden units through the whole pipeline, and as a user runs it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import GRAPHS, SAMPLES, Graph, initializers, run, weights
from onnx import TensorProto, helper
from rich.console import Console

from rnnprune_cli import compensate
from rnnprune_cli.errors import NotEquivalentError, NothingRemovedError, RnnpruneError, UsageError
from rnnprune_cli.methods import methods
from rnnprune_cli.model import GATES, ExportOptions, Report, Stage
from rnnprune_cli.options import PruneOptions
from rnnprune_cli.pipeline import prune
from rnnprune_cli.report.json import render, report_document
from rnnprune_cli.report.table import report_table
from rnnprune_cli.rewrite import units as rewrite

INPUTS, HIDDEN = 3, 8
UNIT_METHODS = [name for name, method in methods().items() if method.unit is not None]
PRUNE = [sys.executable, "-m", "rnnprune_cli.cli", "prune"]
Shrink = Callable[..., Report]


def model_of(
    op: str = "LSTM",
    direction: str = "forward",
    opset: int = 17,
    dtype: type = np.float32,
    norm: bool = False,
    layers: int = 1,
) -> onnx.ModelProto:
    """[batch, time, inputs] → [time, batch, 4]"""
    directions = 2 if direction == "bidirectional" else 1
    g = Graph(["batch", "time", INPUTS], opset)
    g.inputs[0].type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    x, inputs = g.op("Transpose", "x", perm=[1, 0, 2]), INPUTS
    for number in range(layers):
        w = weights(op, HIDDEN, inputs, directions, number, dtype)
        y = g.op(op, x, w["W"], w["R"], w["B"], hidden_size=HIDDEN, direction=direction)
        turned = g.op("Transpose", y, perm=[0, 2, 1, 3])
        x, inputs = g.op("Reshape", turned, np.array([0, 0, -1])), HIDDEN * directions
    if norm:
        x = g.op("LayerNormalization", x, np.ones(inputs, dtype), axis=-1)
    rng = np.random.default_rng(7)
    made = g.op("MatMul", x, rng.standard_normal((inputs, 4)).astype(dtype))
    g.output(g.op("Add", made, rng.standard_normal(4).astype(dtype)))
    return g.model()


def streaming_model(op: str = "GRU") -> onnx.ModelProto:
    """x [1, time, inputs] and states → [time, 1, 4] and states."""
    g = Graph([1, "time", INPUTS])
    x = g.op("Transpose", "x", perm=[1, 0, 2])
    w = weights(op, HIDDEN, INPUTS, 1, 0)
    states = ["h", "c"] if op == "LSTM" else ["h"]
    given = [f"{name}_in" for name in states]
    y = g.op(op, x, w["W"], w["R"], w["B"], "", *given, hidden_size=HIDDEN)
    g.nodes[-1].output.extend(f"{name}_out" for name in states)
    flat = g.op("Squeeze", y, np.array([1]))
    dense = np.random.default_rng(7).standard_normal((HIDDEN, 4)).astype(np.float32)
    g.output(g.op("MatMul", flat, dense))
    for name in states:
        shape = [1, 1, HIDDEN]
        g.inputs.append(helper.make_tensor_value_info(f"{name}_in", TensorProto.FLOAT, shape))
        g.outputs.append(helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, shape))
    return g.model()


def time_first_is_last(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with output [batch, time, 4]."""
    last = model.graph.output[0]
    model.graph.node.append(
        helper.make_node("Transpose", [last.name], ["batch_first"], name="turn", perm=[1, 0, 2])
    )
    last.CopyFrom(
        helper.make_tensor_value_info("batch_first", TensorProto.FLOAT, ["batch", "time", 4])
    )
    return model


def save(model: onnx.ModelProto | Path, folder: Path) -> Path:
    if isinstance(model, Path):
        return model
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def save_data(folder: Path, count: int = 40, dtype: type = np.float32, **more: np.ndarray) -> Path:
    x = np.random.default_rng(2).standard_normal((count, 9, INPUTS)).astype(dtype)
    path = folder / "data.npz"
    np.savez(path, x=x, **more)
    return path


@pytest.fixture
def shrink(tmp_path: Path) -> Shrink:
    """Removes units without spending time on timing; returns the report."""

    def call(
        model: onnx.ModelProto | Path,
        sparsity: float = 0.5,
        method: str = "magnitude",
        scope: str = "layer",
        output: str = "out.onnx",
        seed: int = 0,
        data: Path | None = None,
        calibration: Path | None = None,
        granularity: str = "unit",
        force: bool = False,
        **stage: object,
    ) -> Report:
        options = PruneOptions(
            model=save(model, tmp_path),
            output=tmp_path / output,
            stages=(Stage(method, granularity, scope, sparsity, **stage),),
            seed=seed,
            data=data,
            calibration=calibration,
            export=ExportOptions(),
            force=force,
            latency_seconds=0.0,
        )
        return prune(options, {}, lambda step: None)

    return call


def only_model(folder: Path) -> None:
    """A failure leaves nothing behind."""
    assert {p.name for p in folder.iterdir()} <= {"model.onnx", "data.npz"}


# What comes out


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("method", UNIT_METHODS)
@pytest.mark.parametrize("op", GATES)
def test_shrunk_model_is_smaller_and_verified(shrink, tmp_path, op, method, scope):
    model = model_of(op, "bidirectional", layers=2)
    report = shrink(model, 0.5, method, scope, calibration=save_data(tmp_path))
    assert report.verification and all(claim.passed for claim in report.verification)
    removed = [row.hidden_before - row.hidden_after for row in report.layers]
    assert sum(removed) == HIDDEN if scope == "layer" else HIDDEN <= sum(removed) <= HIDDEN + 1
    written = initializers(tmp_path / "out.onnx")
    stored = sum(int(np.prod(v.shape)) for v in written.values() if v.dtype == np.float32)
    assert stored == report.after.parameters < report.before.parameters
    assert report.ratios.parameters == report.after.parameters / report.before.parameters
    nodes = [n for n in onnx.load(str(tmp_path / "out.onnx")).graph.node if n.op_type == op]
    sizes = [a.i for n in nodes for a in n.attribute if a.name == "hidden_size"]
    assert sizes == [row.hidden_after for row in report.layers]
    for row, kept, node in zip(report.layers, report.units, nodes, strict=True):
        assert (row.name, row.hidden_before) == (kept.layer, HIDDEN)
        assert [len(own) for own in kept.kept] == [row.hidden_after] * 2
        shapes = [written[node.input[k]].size for k in (1, 2)]
        assert row.weights_after == sum(shapes) == row.nonzero_after
    feed = {"x": np.random.default_rng(1).standard_normal((2, 5, INPUTS)).astype(np.float32)}
    assert [o.shape for o in run(tmp_path / "out.onnx", feed)] == [(5, 2, 4)]


def test_report_says_what_was_done(shrink, tmp_path):
    data = save_data(tmp_path)
    report = shrink(model_of("GRU"), 0.5, "activation", calibration=data, data=data)
    document = json.loads(render(report_document(report)))
    (layer,), (units,) = document["layers"], document["units"]
    assert (layer["hidden_before"], layer["hidden_after"], layer["blocked"]) == (8, 4, None)
    assert layer["weights_before"] == 3 * 8 * (3 + 8) and layer["weights_after"] == 3 * 4 * (3 + 4)
    assert layer["sparsity"] == pytest.approx(1 - layer["nonzero_after"] / layer["weights_before"])
    assert len(units["kept"][0]) == 4 and units["layer"] == layer["name"]
    assert document["states"] == []
    read = {item["reader"]: item for item in document["repairs"]}
    assert [item["samples"] for item in read.values()] == [40 * 10, 40 * 9]
    assert all(0 < item["unexplained"] < 1 and not item["problem"] for item in read.values())
    assert document["plan"]["stages"][0]["granularity"] == "unit"
    before, after = document["before"], document["after"]
    assert after["macs_per_step"] == layer["weights_after"] < before["macs_per_step"]
    assert after["bytes"] == (tmp_path / "out.onnx").stat().st_size
    assert document["ratios"]["parameters"] == after["parameters"] / before["parameters"]
    assert all(claim["passed"] for claim in document["verification"])
    console = Console(width=200, file=io.StringIO())
    console.print(report_table(report))
    text = console.file.getvalue()
    assert "8 → 4" in text and "left unexplained" in text and "400 samples" in text


def test_the_repair_brings_outputs_nearer_to_the_original(shrink, tmp_path):
    model, data = model_of("LSTM", layers=2), save_data(tmp_path, 200)
    errors = []
    for number, repaired in enumerate((False, True)):
        name = f"{number}.onnx"
        report = shrink(model, 0.5, output=name, data=data, compensate=repaired)
        errors.append(report.fidelity[0].mean_abs)
        assert bool(report.repairs) == repaired
        said = any("nothing was repaired" in w for w in report.warnings)
        assert said != repaired
    assert errors[1] < 0.7 * errors[0]


def test_without_data_it_is_said_that_nothing_was_repaired(shrink):
    report = shrink(model_of())
    assert not report.repairs
    assert any("nothing was repaired" in w for w in report.warnings)


def test_nothing_about_zeros_is_said_of_units(shrink):
    assert not any("zeros" in w for w in shrink(model_of()).warnings)


def test_calibration_is_used_for_the_repair_and_data_for_the_metric(shrink, tmp_path):
    data = save_data(tmp_path, 20, labels=np.zeros((20, 9, 4), np.float32))
    other = tmp_path / "other.npz"
    x = np.random.default_rng(3).standard_normal((50, 9, INPUTS)).astype(np.float32)
    np.savez(other, x=x)
    report = shrink(time_first_is_last(model_of("GRU")), 0.5, data=data, calibration=other)
    assert [r.samples for r in report.repairs] == [500, 450]
    assert report.before.metric.name == report.after.metric.name == "mse"
    report = shrink(time_first_is_last(model_of("GRU")), 0.5, data=data, force=True)
    assert [r.samples for r in report.repairs] == [200, 180]


def test_measuring_on_what_was_learnt_from_is_said(shrink, tmp_path):
    data = save_data(tmp_path, 20)
    other = tmp_path / "other.npz"
    np.savez(other, x=np.load(data)["x"] + 1)
    for calibration, repaired, said in (
        (None, True, True),
        (other, True, False),
        (None, False, False),
    ):
        report = shrink(
            model_of(), data=data, calibration=calibration, compensate=repaired, force=True
        )
        assert any("flatters" in warning for warning in report.warnings) == said


def test_same_input_and_seed_give_the_same_bytes(shrink, tmp_path):
    data = save_data(tmp_path)
    for method in UNIT_METHODS:
        written = []
        for name in ("one.onnx", "two.onnx"):
            shrink(model_of(), 0.5, method, output=f"{method}.{name}", calibration=data, seed=3)
            written.append((tmp_path / f"{method}.{name}").read_bytes())
        assert written[0] == written[1]


def test_another_seed_removes_other_units_at_random(shrink):
    kept = [
        shrink(model_of(), 0.5, "random", seed=seed, output=f"{seed}.onnx").units for seed in (0, 1)
    ]
    assert kept[0] != kept[1]


def test_sparsity_zero_changes_nothing_and_says_so(shrink, tmp_path):
    model = model_of()
    report = shrink(model, 0.0, calibration=save_data(tmp_path))
    assert any("removes nothing" in w and "half of the units" in w for w in report.warnings)
    assert report.after.parameters == report.before.parameters
    feed = {"x": np.random.default_rng(1).standard_normal((2, 5, INPUTS)).astype(np.float32)}
    np.testing.assert_array_equal(run(tmp_path / "out.onnx", feed)[0], run(model, feed)[0])


def test_layers_and_exclude_choose_what_loses_units(shrink):
    model = model_of(layers=2)
    first, second = (n.name for n in model.graph.node if n.op_type == "LSTM")
    for options in ({"layers": (second,)}, {"exclude": (first,)}):
        report = shrink(model, 0.5, force=True, **options)
        assert [row.hidden_after for row in report.layers] == [8, 4]
        assert [row.blocked for row in report.layers] == ["not selected", None]


def test_a_model_can_be_pruned_again(shrink, tmp_path):
    data = save_data(tmp_path)
    shrink(model_of("GRU", layers=2), 0.5, output="one.onnx", calibration=data)
    report = shrink(tmp_path / "one.onnx", 0.5, output="two.onnx", calibration=data)
    assert [row.hidden_after for row in report.layers] == [2, 2]
    report = shrink(
        tmp_path / "one.onnx", 0.5, scope="row", granularity="weight", output="three.onnx"
    )
    assert [row.hidden_after for row in report.layers] == [4, 4]
    assert all(claim.passed for claim in report.verification)
    report = shrink(tmp_path / "three.onnx", 0.5, output="four.onnx", calibration=data)
    assert [row.hidden_after for row in report.layers] == [2, 2]


# States


def states_of(report: Report) -> Mapping[str, np.ndarray]:
    """State input → the places of it that stay."""
    return {s.input: np.array(s.kept[0]) for s in report.states}


@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
def test_public_states_stay_as_long_as_they_are(shrink, tmp_path, op):
    model = streaming_model(op)
    report = shrink(model, 0.5, calibration=None)
    written = onnx.load(str(tmp_path / "out.onnx"))
    assert list(written.graph.input) == list(model.graph.input)
    assert list(written.graph.output) == list(model.graph.output)
    assert report.states == () and report.layers[0].hidden_after == 4
    assert any("handed back" in claim.claim for claim in report.verification)
    kept = np.array(report.units[0].kept[0])
    rng, gone = np.random.default_rng(1), np.setdiff1d(np.arange(HIDDEN), kept)
    feed = {
        i.name: rng.standard_normal([d.dim_value or 5 for d in i.type.tensor_type.shape.dim])
        for i in model.graph.input
    }
    feed = {name: values.astype(np.float32) for name, values in feed.items()}
    outputs = run(tmp_path / "out.onnx", feed)
    for state in outputs[1:]:
        assert not state[..., gone].any() and state[..., kept].all()
    for name in feed.keys() - {"x"}:
        feed[name][..., gone] = 9  # what comes in for removed units is read by nothing
    for one, two in zip(outputs, run(tmp_path / "out.onnx", feed), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("op", ["LSTM", "GRU"])
def test_states_become_shorter_if_they_may(shrink, tmp_path, op):
    model = streaming_model(op)
    report = shrink(model, 0.5, output="long.onnx")
    short = shrink(model, 0.5, output="short.onnx", resize_state=True)
    assert short.units == report.units
    pairs = [("h_in", "h_out"), ("c_in", "c_out")][: 2 if op == "LSTM" else 1]
    assert [(s.input, s.output, s.axis) for s in short.states] == [(*p, 2) for p in pairs]
    assert all(s.kept == short.units[0].kept for s in short.states)
    written = onnx.load(str(tmp_path / "short.onnx")).graph
    for info in (*written.input[1:], *written.output[1:]):
        assert [d.dim_value for d in info.type.tensor_type.shape.dim] == [1, 1, 4]
    places = states_of(short)
    rng = np.random.default_rng(1)
    feed = {"x": rng.standard_normal((1, 5, INPUTS)).astype(np.float32)}
    feed |= {n: rng.standard_normal((1, 1, HIDDEN)).astype(np.float32) for n in places}
    cut = {n: v if n == "x" else v[..., places[n]] for n, v in feed.items()}
    for _ in range(4):
        whole, parts = run(tmp_path / "long.onnx", feed), run(tmp_path / "short.onnx", cut)
        np.testing.assert_allclose(whole[0], parts[0], rtol=1e-5, atol=1e-6)
        for name, one, two in zip(places, whole[1:], parts[1:], strict=True):
            np.testing.assert_allclose(one[..., places[name]], two, rtol=1e-5, atol=1e-6)
            feed[name], cut[name] = one, two


def test_a_state_that_is_only_handed_out_can_become_shorter(shrink, tmp_path):
    model = model_of("GRU")
    node = next(n for n in model.graph.node if n.op_type == "GRU")
    node.output[:] = [node.output[0], "last"]
    info = helper.make_tensor_value_info("last", TensorProto.FLOAT, [1, "batch", HIDDEN])
    model.graph.output.append(info)
    with pytest.raises(RnnpruneError, match="output 'last'") as caught:
        shrink(model)
    assert "--resize-state" in caught.value.hint
    report = shrink(model, resize_state=True)
    assert [(s.input, s.output) for s in report.states] == [(None, "last")]
    feed = {"x": np.random.default_rng(1).standard_normal((2, 5, INPUTS)).astype(np.float32)}
    assert run(tmp_path / "out.onnx", feed)[1].shape == (1, 2, 4)


def test_a_resized_state_is_not_called_the_same(shrink):
    report = shrink(streaming_model("GRU"), 0.5, resize_state=True)
    figures = {row.name: row for row in report.fidelity}
    assert "h_out" not in figures or figures["h_out"].max_abs > 0


def test_states_of_several_samples_and_directions_become_shorter(shrink, tmp_path):
    model = model_of("GRU", "bidirectional")
    node = next(n for n in model.graph.node if n.op_type == "GRU")
    node.input.extend(["", "h_in"])
    node.output[:] = [node.output[0], "h_out"]
    for name, infos in (("h_in", model.graph.input), ("h_out", model.graph.output)):
        shape = [2, "batch", HIDDEN]
        infos.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    report = shrink(model, 0.5, "random", output="long.onnx", seed=4)
    short = shrink(model, 0.5, "random", output="short.onnx", seed=4, resize_state=True)
    (state,) = short.states
    assert state.kept == report.units[0].kept and state.kept[0] != state.kept[1]
    rng = np.random.default_rng(1)
    feed = {"x": rng.standard_normal((3, 5, INPUTS)), "h_in": rng.standard_normal((2, 3, HIDDEN))}
    feed = {name: values.astype(np.float32) for name, values in feed.items()}
    cut = [feed["h_in"][k][:, list(own)] for k, own in enumerate(state.kept)]
    one = run(tmp_path / "long.onnx", feed)
    two = run(tmp_path / "short.onnx", {**feed, "h_in": np.stack(cut)})
    np.testing.assert_allclose(one[0], two[0], rtol=1e-5, atol=1e-6)
    for k, own in enumerate(state.kept):
        np.testing.assert_allclose(one[1][k][:, list(own)], two[1][k], rtol=1e-5, atol=1e-6)


# Normalisation


def test_normalisation_over_units_needs_leave(shrink, tmp_path):
    model = model_of(norm=True)
    with pytest.raises(RnnpruneError, match="LayerNormalization") as caught:
        shrink(model)
    assert "--allow-inexact" in caught.value.hint
    only_model(tmp_path)
    report = shrink(model, allow_inexact=True)
    assert report.layers[0].hidden_after == 4
    assert any("not exact" in w and "LayerNormalization" in w for w in report.warnings)


def test_leave_that_is_not_needed_changes_nothing(shrink, tmp_path):
    shrink(model_of(), output="one.onnx")
    report = shrink(model_of(), output="two.onnx", allow_inexact=True)
    assert not any("not exact" in w for w in report.warnings)
    one, two = (initializers(tmp_path / name) for name in ("one.onnx", "two.onnx"))
    assert one.keys() == two.keys() and all(np.array_equal(one[k], two[k]) for k in one)


# Kinds of files


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_every_precision_stays_what_it_is(shrink, tmp_path, dtype):
    model = model_of("LSTM", dtype=dtype)
    report = shrink(model, 0.5, "obs", data=save_data(tmp_path, dtype=dtype))
    assert report.repairs and all(claim.passed for claim in report.verification)
    kinds = {v.dtype for v in initializers(tmp_path / "out.onnx").values()}
    assert kinds == {np.dtype(dtype), np.dtype(np.int64)}
    written = onnx.load(str(tmp_path / "out.onnx")).graph
    assert written.output[0].type == model.graph.output[0].type


@pytest.mark.parametrize("opset", [7, 8, 9, 10, 11, 13, 14, 18, 21, 22])
def test_every_opset_is_kept(shrink, tmp_path, opset):
    model = model_of("GRU", "bidirectional", opset=opset)
    report = shrink(model, 0.5, data=save_data(tmp_path))
    assert all(claim.passed for claim in report.verification)
    written = onnx.load(str(tmp_path / "out.onnx"))
    assert written.opset_import[0].version == opset
    assert len(report.repairs) == 2


def in_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Puts all nodes into a function of the model; weights are its inputs."""
    graph = model.graph
    weights = [t.name for t in graph.initializer]
    function = helper.make_function(
        "tests", "net", ["x", *weights], [o.name for o in graph.output], graph.node,
        model.opset_import,
    )  # fmt: skip
    call = helper.make_node("net", ["x", *weights], [o.name for o in graph.output], domain="tests")
    del graph.node[:]
    graph.node.append(call)
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("tests", 1))
    return model


def all_inputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """IR 3: every initializer is an input."""
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(
            helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        )
    return model


def without_names(model: onnx.ModelProto) -> onnx.ModelProto:
    for node in model.graph.node:
        node.name = ""
    return model


def odd(model: onnx.ModelProto) -> onnx.ModelProto:
    """Names that no identifier has."""
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [f"во/{name} :0" if name and name != "x" else name for name in names]
    for value in (*model.graph.initializer, *model.graph.output):
        value.name = f"во/{value.name} :0"
    return model


VARIANTS: dict[str, Callable[[], onnx.ModelProto]] = {
    "functions": lambda: in_functions(model_of("GRU", layers=2)),
    "no names": lambda: without_names(model_of("GRU", layers=2)),
    "odd names": lambda: odd(model_of("GRU", layers=2)),
}


@pytest.mark.parametrize("name", [*VARIANTS, "external data", "inputs"])
def test_units_are_removed_from_every_kind_of_file(shrink, tmp_path, name):
    data, plain = save_data(tmp_path), model_of("GRU", layers=2)
    shrink(plain, 0.5, output="plain.onnx", data=data)
    if name == "external data":
        path = tmp_path / "outside.onnx"
        onnx.save(
            plain, str(path), save_as_external_data=True, location="outside.bin", size_threshold=100
        )
    elif name == "inputs":
        path = save(all_inputs(model_of("GRU", layers=2, opset=8)), tmp_path)
    else:
        path = save(VARIANTS[name](), tmp_path)
    report = shrink(path, 0.5, data=data)
    assert [row.hidden_after for row in report.layers] == [4, 4]
    assert len({row.name for row in report.layers}) == 2
    assert all(claim.passed for claim in report.verification)
    assert len(report.repairs) == 4 and not any(r.problem for r in report.repairs)
    feed = {"x": np.random.default_rng(1).standard_normal((2, 5, INPUTS)).astype(np.float32)}
    one, two = run(tmp_path / "plain.onnx", feed)[0], run(tmp_path / "out.onnx", feed)[0]
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


def test_layers_of_one_name_in_two_branches_are_told_apart(shrink):
    report = shrink(GRAPHS / "hand_if_same_names.onnx", 0.5)
    assert [row.name for row in report.layers] == ["lstm", "lstm#2"]
    assert all(row.hidden_after == row.hidden_before // 2 for row in report.layers)
    assert [kept.layer for kept in report.units] == ["lstm", "lstm#2"]


def test_weights_that_are_inputs_do_not_stay_beside_the_new_ones(shrink):
    report = shrink(all_inputs(model_of("GRU", opset=8)))
    assert report.after.parameters < report.before.parameters


# What cannot be done


NOT_POSSIBLE: dict[str, tuple[dict[str, object], type[RnnpruneError], str]] = {
    "scope": ({"scope": "units"}, UsageError, "no scope 'units'"),
    "scope of weights": ({"scope": "row"}, UsageError, "not for granularity 'unit'"),
    "method that needs data": ({"method": "activation"}, UsageError, "method 'activation'"),
    "method that orders": ({"method": "obs"}, UsageError, "method 'obs'"),
    "layer": ({"layers": ("nothing",)}, UsageError, "no layer matches"),
    "too little": ({"sparsity": 0.01}, NothingRemovedError, "removes not a single unit"),
    "sparsity": ({"sparsity": 1.0}, UsageError, "between 0 and 1"),
    "method of no unit": ({"method": "none"}, UsageError, "no method 'none'"),
}


@pytest.mark.parametrize("name", NOT_POSSIBLE)
def test_what_cannot_be_done_is_said_and_nothing_written(shrink, tmp_path, name):
    options, kind, words = NOT_POSSIBLE[name]
    with pytest.raises(kind, match=words) as caught:
        shrink(model_of(), **options)
    assert type(caught.value) is kind and caught.value.hint
    only_model(tmp_path)


@pytest.mark.parametrize("export", ["packed", "sparse", "dense"])
def test_units_have_one_form_of_export(tmp_path, export):
    options = PruneOptions(
        model=save(model_of(), tmp_path),
        output=tmp_path / "out.onnx",
        stages=(Stage("magnitude", "unit", "layer", 0.5),),
        export=ExportOptions(export),
    )
    with pytest.raises(UsageError, match=f"--export {export}"):
        prune(options, {}, lambda step: None)
    only_model(tmp_path)


def test_units_that_are_all_blocked_are_explained(shrink, tmp_path):
    model = model_of()
    node = next(n for n in model.graph.node if n.op_type == "Reshape")
    model.graph.output[0].CopyFrom(
        helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)
    )
    del model.graph.node[-2:]
    with pytest.raises(RnnpruneError, match=f"output '{node.output[0]}'") as caught:
        shrink(model)
    assert int(caught.value.code) == 3
    only_model(tmp_path)


# Honesty


def test_a_cut_at_the_wrong_place_is_found_out(shrink, tmp_path, monkeypatch):
    """Both models have the same new weights; only the one that is cut is cut wrongly."""
    right = rewrite.compress

    def wrong(array, keep, axis):
        return right(array, np.roll(keep, 1, axis), axis)

    monkeypatch.setattr(rewrite, "compress", wrong)
    with pytest.raises(NotEquivalentError, match="the shrunk model computes") as caught:
        shrink(model_of("GRU", layers=2), calibration=save_data(tmp_path))
    assert int(caught.value.code) == 4
    only_model(tmp_path)


@pytest.mark.parametrize("number", range(6))
def test_one_wrong_cut_is_found_out(shrink, tmp_path, monkeypatch, number):
    right, calls = rewrite.compress, []

    def wrong(array, keep, axis):
        if not keep.all():
            calls.append(axis)
        return right(array, np.roll(keep, 1, axis) if len(calls) == number + 1 else keep, axis)

    monkeypatch.setattr(rewrite, "compress", wrong)
    # Of W, R and B each, the rows; of R the columns; of the next W and the MatMul the columns.
    with pytest.raises(NotEquivalentError, match="the shrunk model computes"):
        shrink(model_of("LSTM", layers=2))
    only_model(tmp_path)


def test_states_that_are_cut_wrongly_are_found_out(shrink, tmp_path, monkeypatch):
    right = rewrite._Rewriter.select

    def wrong(self, before, value, labels):
        value = right(self, before, value, labels)
        return self.pick(before, value, np.arange(4)[::-1], labels.axis)

    monkeypatch.setattr(rewrite._Rewriter, "select", wrong)
    with pytest.raises(NotEquivalentError):
        shrink(streaming_model(), 0.5)
    only_model(tmp_path)


def test_no_temporary_file_stays(shrink, tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    shrink(model_of("GRU"), calibration=save_data(tmp_path))
    assert not list(folder.iterdir())
    monkeypatch.setattr(rewrite, "compress", lambda array, keep, axis: array[..., ::-1])
    with pytest.raises(RnnpruneError):
        shrink(model_of("GRU"), output="again.onnx")
    assert not list(folder.iterdir())
    assert {p.name for p in tmp_path.iterdir()} == {
        "temporary", "data.npz", "model.onnx", "out.onnx",
    }  # fmt: skip


# Scores


def scored(op: str, direction: str = "forward") -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A model whose scores are worked out by hand, and the tensors of its layer and reader."""
    model = model_of(op, direction)
    found = initializers(model)
    w, r, b = (found[k] for k in next(n for n in model.graph.node if n.op_type == op).input[1:4])
    dense = found[next(n for n in model.graph.node if n.op_type == "MatMul").input[1]]
    return model, {"W": w, "R": r, "B": b, "M": dense}


def kept_of(report: Report) -> list[list[int]]:
    return [list(row) for row in report.units[0].kept]


def highest(scores: np.ndarray) -> list[list[int]]:
    """The places of the upper half of the scores of each direction."""
    return [sorted(np.argsort(row)[HIDDEN // 2 :].tolist()) for row in scores]


def outgoing(tensors: dict[str, np.ndarray]) -> np.ndarray:
    directions = len(tensors["R"])
    squares = np.square(tensors["M"], dtype=np.float64).sum(axis=1)
    own = np.square(tensors["R"], dtype=np.float64).sum(axis=1)
    return own + squares.reshape(directions, HIDDEN)


SCORED = [("LSTM", "forward"), ("GRU", "bidirectional"), ("RNN", "reverse")]


@pytest.mark.parametrize(("op", "direction"), SCORED)
def test_magnitude_is_the_norm_of_what_reads_a_unit(shrink, op, direction):
    model, tensors = scored(op, direction)
    assert kept_of(shrink(model)) == highest(outgoing(tensors))


@pytest.mark.parametrize(("op", "direction"), SCORED)
def test_group_norm_is_the_norm_of_all_that_goes(shrink, op, direction):
    model, tensors = scored(op, direction)
    rows = sum(
        np.square(tensors[k], dtype=np.float64)
        .sum(axis=2)
        .reshape(len(tensors[k]), GATES[op], HIDDEN)
        .sum(axis=1)
        for k in "WR"
    )
    assert kept_of(shrink(model, method="group-norm")) == highest(outgoing(tensors) + rows)


@pytest.mark.parametrize(("op", "direction"), SCORED)
def test_activation_is_the_variance_times_that_norm(shrink, tmp_path, op, direction):
    model, tensors = scored(op, direction)
    data = save_data(tmp_path)
    report = shrink(model, method="activation", calibration=data)
    node = next(n for n in model.graph.node if n.op_type == op)
    model.graph.output.append(helper.make_empty_tensor_value_info(node.output[0]))
    states = run(model, {"x": np.load(data)["x"]})[1].transpose(1, 0, 2, 3)
    states = states.reshape(len(states), -1, HIDDEN).astype(np.float64)
    start = np.zeros((len(states), len(np.load(data)["x"]), HIDDEN))
    variance = np.concatenate([start, states], axis=1).var(axis=1)
    assert kept_of(report) == highest(variance * outgoing(tensors))


# As a user runs it


def rnnprune(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PRUNE, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def test_the_command_writes_a_smaller_model_and_reports_it(tmp_path):
    path, report = save(model_of("GRU", layers=2), tmp_path), tmp_path / "report.json"
    done = rnnprune(
        path, "--granularity", "unit", "-s", 0.5, "--calibration", save_data(tmp_path),
        "--method", "activation", "--scope", "global", "--format", "json", "--report", report,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document == json.loads(report.read_text())
    assert document["arguments"]["granularity"] == "unit"
    assert document["repairs"] and document["units"]
    written = onnx.load(str(tmp_path / "model.pruned.onnx"))
    note = {p.key: json.loads(p.value) for p in written.metadata_props}["rnnprune"]
    assert note["plan"]["stages"][0]["granularity"] == "unit"


COMMANDS: dict[str, tuple[list[object], int, str]] = {
    "scope": (["--scope", "nothing"], 2, "no scope 'nothing'"),
    "scope of weights": (["--scope", "row"], 2, "not for granularity 'unit'"),
    "export": (["--export", "packed"], 2, "--export packed is for"),
    "data": (["--method", "activation"], 2, "--calibration"),
    "calibration": (["--calibration", "missing.npz"], 3, "missing.npz does not exist"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_usage_has_its_exit_code(tmp_path, name):
    arguments, code, words = COMMANDS[name]
    done = rnnprune(save(model_of(), tmp_path), "--granularity", "unit", "-s", 0.5, *arguments)
    assert (done.returncode, words in done.stderr) == (code, True), done.stderr
    assert 1 <= len(done.stderr.splitlines()) <= 2
    only_model(tmp_path)


def test_units_of_a_sample_model_cost_little(shrink, tmp_path):
    """With the repair, half of the units go and accuracy stays; without it, it does not."""
    test = SAMPLES / "speech.test.npz"
    options = {
        "method": "activation",
        "data": test,
        "calibration": SAMPLES / "speech.calibration.npz",
    }
    report = shrink(SAMPLES / "speech.onnx", 0.5, **options)
    assert report.layers[0].hidden_after == 32 and report.ratios.parameters < 0.4
    assert report.after.metric.value > report.before.metric.value - 0.02


def test_a_stack_of_bidirectional_layers_is_repaired_as_well_as_with_a_fixed_ridge(
    shrink, tmp_path, monkeypatch
):
    """Which samples are held out to choose the ridge must not mislead."""
    g = Graph(["batch", "time", INPUTS])
    x, inputs, hidden = g.op("Transpose", "x", perm=[1, 0, 2]), INPUTS, 32
    for number in range(3):
        w = weights("LSTM", hidden, inputs, 2, number)
        w["W"] /= np.float32(np.sqrt(inputs))
        w["R"] /= np.float32(np.sqrt(hidden))
        y = g.op("LSTM", x, w["W"], w["R"], w["B"], hidden_size=hidden, direction="bidirectional")
        turned = g.op("Transpose", y, perm=[0, 2, 1, 3])
        x, inputs = g.op("Reshape", turned, np.array([0, 0, -1])), 2 * hidden
    dense = np.random.default_rng(7).standard_normal((inputs, 4)).astype(np.float32)
    g.output(g.op("MatMul", x, dense))
    model, rng = g.model(), np.random.default_rng(3)
    paths = [tmp_path / "calibration.npz", tmp_path / "test.npz"]
    for path in paths:
        np.savez(path, x=rng.standard_normal((64, 30, INPUTS)).astype(np.float32))
    errors = []
    for ridges in (compensate.RIDGES, compensate.RIDGES[:1]):
        monkeypatch.setattr(compensate, "RIDGES", ridges)
        report = shrink(model, 0.5, calibration=paths[0], data=paths[1], force=True)
        errors.append(report.fidelity[0].mean_abs)
    chosen, fixed = errors
    assert chosen < 1.5 * fixed
