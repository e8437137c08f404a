"""Dense layers and embeddings, pruned on request."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import GRAPHS, SAMPLES, Graph, initializers, run, weights
from onnx import TensorProto, helper, numpy_helper

from rnnprune_cli.data import load_dataset
from rnnprune_cli.errors import ExitCode, NotEquivalentError, RnnpruneError, UsageError
from rnnprune_cli.hessians import layer_inputs
from rnnprune_cli.model import UNCHANGED, ExportOptions, OtherLayer, Stage, StoredWeight
from rnnprune_cli.onnx_model import OnnxModel
from rnnprune_cli.options import complete_stage
from rnnprune_cli.verify import run_all, verify_same, verify_weights

HIDDEN = 48
KEPT = 8
SPARSITY = 1 - KEPT / HIDDEN


def recurrent(graph: Graph, x: str, inputs: int = 7) -> str:
    """Adds an LSTM over x [samples, steps, inputs]; returns its states, laid out the same way."""
    w = weights("LSTM", HIDDEN, inputs, 1, seed=0)
    turned = graph.op("Transpose", x, perm=[1, 0, 2])
    y = graph.op("LSTM", turned, w["W"], w["R"], w["B"], hidden_size=HIDDEN)
    flat = graph.op("Squeeze", y, np.array([1]))
    return graph.op("Transpose", flat, perm=[1, 0, 2])


def square(seed: int = 1) -> np.ndarray:
    """A weight whose transpose has the same shape, so that a mistaken one is not noticed by it."""
    return np.random.default_rng(seed).standard_normal((HIDDEN, HIDDEN)).astype(np.float32)


def dense_model(form: str) -> tuple[onnx.ModelProto, str, bool]:
    """An LSTM and one Dense layer; returns the weight's name and if its columns are the outputs."""
    graph = Graph(["samples", "steps", 7])
    h = recurrent(graph, "x")
    w, bias = square(), np.linspace(-1, 1, HIDDEN, dtype=np.float32)
    if form == "x @ W":
        y, columns = graph.op("MatMul", h, w), True
    elif form == "W @ x":
        y, columns = graph.op("MatMul", w, graph.op("Transpose", h, perm=[0, 2, 1])), False
    elif form == "x @ Wt":
        y, columns = graph.op("MatMul", h, graph.op("Transpose", w, perm=[1, 0])), False
    elif form == "Wtt @ x":
        twice = graph.op("Transpose", graph.op("Identity", graph.op("Transpose", w)))
        y = graph.op("MatMul", twice, graph.op("Transpose", h, perm=[0, 2, 1]))
        columns = False
    else:
        flat = graph.op("Reshape", h, np.array([-1, HIDDEN]))
        scaled = {"alpha": 0.5, "beta": 2.0}
        if form == "gemm":
            y, columns = graph.op("Gemm", flat, w, bias, **scaled), True
        elif form == "gemm transB":
            y, columns = graph.op("Gemm", flat, w, bias, transB=1, **scaled), False
        elif form == "gemm transA":
            turned = graph.op("Transpose", flat)
            y, columns = graph.op("Gemm", turned, w, bias, transA=1, **scaled), True
        elif form == "gemm W first":
            y, columns = graph.op("Gemm", w, flat, transB=1), False
        else:
            assert form == "gemm W first transA"
            y, columns = graph.op("Gemm", w, graph.op("Transpose", flat), transA=1), True
    graph.output(y)
    name = next(t.name for t in graph.tensors if list(t.dims) == [HIDDEN, HIDDEN])
    return graph.model(), name, columns


FORMS = ["x @ W", "W @ x", "x @ Wt", "Wtt @ x", "gemm", "gemm transB", "gemm transA"]
FORMS += ["gemm W first", "gemm W first transA"]


def pruned_by_hand(weight: np.ndarray, columns: bool) -> np.ndarray:
    """Leaves the largest weights of each output."""
    rows = weight.T if columns else weight
    ranks = np.argsort(np.argsort(np.abs(rows), axis=1), axis=1)
    kept = np.where(ranks >= HIDDEN - KEPT, rows, 0)
    return kept.T if columns else kept


def with_tensor(model: onnx.ModelProto, name: str, array: np.ndarray) -> onnx.ModelProto:
    """A copy of a model with another initializer."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    tensor = next(t for t in copy.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))
    return copy


def x(samples: int = 3, steps: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((samples, steps, 7)).astype(np.float32)


@pytest.mark.parametrize("export", ["dense", "sparse", "packed"])
@pytest.mark.parametrize("form", FORMS)
def test_each_output_of_a_dense_layer_loses_its_smallest_weights(
    prune_model, tmp_path, form, export
):
    model, name, columns = dense_model(form)
    report = prune_model(model, SPARSITY, export=export, include=["dense"], exclude=["n1"])
    (row,) = [row for row in report.layers if row.op in ("MatMul", "Gemm")]
    assert row.stored == (export,)
    assert (row.weights_before, row.nonzero_after) == (HIDDEN**2, HIDDEN * KEPT)
    assert (row.hidden_before, row.hidden_after, row.direction) == (HIDDEN, HIDDEN, "")
    expected = with_tensor(model, name, pruned_by_hand(square(), columns))
    np.testing.assert_allclose(
        run(tmp_path / "out.onnx", {"x": x()})[0], run(expected, {"x": x()})[0], rtol=0, atol=1e-6
    )
    onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)
    if export == "dense":  # where it was, as it was stored
        written = initializers(tmp_path / "out.onnx")[name]
        np.testing.assert_array_equal(written, initializers(expected)[name])


@pytest.mark.parametrize("values", ["float16", "int8"])
@pytest.mark.parametrize("form", ["x @ W", "gemm transB"])
def test_packed_values_of_less_precision_are_scaled_by_output(prune_model, tmp_path, form, values):
    model, name, columns = dense_model(form)
    prune_model(model, SPARSITY, export="packed", values=values, include=["dense"], exclude=["n1"])
    by_hand = pruned_by_hand(square(), columns)
    axis = 0 if columns else 1
    if values == "float16":
        rounded = by_hand.astype(np.float16).astype(np.float32)
    else:
        scale = (np.abs(by_hand).max(axis=axis, keepdims=True).astype(float) / 127).astype("f4")
        rounded = np.rint(by_hand / scale).astype(np.float32) * scale
    expected = run(with_tensor(model, name, rounded), {"x": x()})[0]
    written = run(tmp_path / "out.onnx", {"x": x()})[0]
    np.testing.assert_allclose(written, expected, rtol=0, atol=1e-5)


def test_packed_dense_weights_are_unpacked_once_when_the_model_is_loaded(prune_model, tmp_path):
    import onnxruntime as ort

    prune_model(dense_model("x @ W")[0], SPARSITY, export="packed", include=["dense"])
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(str(tmp_path / "out.onnx"), options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(str(tmp_path / "optimized.onnx")).graph
    (product,) = [node for node in optimized.node if node.op_type == "MatMul"]
    assert product.input[1] in {tensor.name for tensor in optimized.initializer}


@pytest.mark.parametrize("form", ["dense_dyn_encoder_decoder", "ts_gru_norm", "ts_lstm_streaming"])
@pytest.mark.parametrize("values", ["float32", "int8"])
def test_half_precision_is_exact_too(tmp_path, form, values):
    model = OnnxModel(GRAPHS / f"half_{form}.onnx")
    saved, claims = written(model, tmp_path, "packed", values, force=True)
    assert "packed" in saved.exports.values()
    assert all(claim.passed and claim.max_abs == 0 for claim in claims)


def written(model: OnnxModel, folder: Path, export: str, values: str, force: bool = False):
    """Removes random weights of all layers, others too, writes the rest, and verifies it."""
    from rnnprune_cli.data import made_up_feeds

    rng = np.random.default_rng(0)
    every = [*model.others.layers, *model.layers]
    pruned = {
        w.name: StoredWeight(w, rng.random(w.shape) < 0.3) for layer in every for w in layer.weights
    }
    if force:  # even where it does not pay
        model._choose = lambda *_: (export, None)  # type: ignore[method-assign]
    saved = model.save(pruned, folder, "o.onnx", ExportOptions(export, values), "")
    feeds = made_up_feeds(model.open(), 0, 8)
    names = [output.name for output in model.open().outputs]
    unpruned = {name: stored.weight.read for name, stored in pruned.items()}
    runs = [
        run_all(runner, feeds, names)
        for runner in (
            model.open(),
            model.open_masked(unpruned),
            model.open_masked(saved.stored),
            model.reopen(saved),
        )
    ]
    claims = [
        verify_weights(model, saved)[0],
        verify_same("found", runs[0], runs[1]),
        verify_same("written", runs[2], runs[3]),
        *model.verify_untouched(saved),
    ]
    return saved, claims


@pytest.mark.parametrize("export", ["dense", "packed"])
@pytest.mark.parametrize(
    "name",
    [
        "dyn_cond_shared",  # one head for both branches
        "hand_if_same_names",  # a head of one name in each branch
        "ts_script_if_shared",
        "ts_script_loop_layer",  # a Gemm in a Loop
        "ts_initializers_as_inputs",
        "ts_functions",
        "ts_double",
        "ts_opset9",
        "keras3_lstm_stack",
    ],
)
def test_models_of_exporters_keep_their_meaning(tmp_path, name, export):
    model = OnnxModel(GRAPHS / f"{name}.onnx")
    assert model.others.layers
    saved, claims = written(model, tmp_path, export, "float32")
    assert all(claim.passed for claim in claims), claims
    assert {layer.w.name for layer in model.others.layers} <= saved.stored.keys()


def test_a_weight_that_is_read_back_otherwise_fails(tmp_path):
    model, name, _ = dense_model("x @ W")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    loaded = OnnxModel(tmp_path / "m.onnx")
    (layer,) = loaded.others.layers
    mask = np.random.default_rng(0).random(layer.w.shape) < 0.5
    stored = {layer.w.name: StoredWeight(layer.w, mask)}
    saved = loaded.save(stored, tmp_path, "o.onnx", ExportOptions("dense"), "")
    assert verify_weights(loaded, saved)[0].passed
    proto = onnx.load(str(saved.path))
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    array = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array.T), name))
    saved.path.write_bytes(proto.SerializeToString())
    assert not verify_weights(loaded, saved)[0].passed


def test_a_packed_weight_that_is_lost_cannot_be_read_back(tmp_path):
    model, name, _ = dense_model("x @ W")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    loaded = OnnxModel(tmp_path / "m.onnx")
    (layer,) = loaded.others.layers
    stored = {layer.w.name: StoredWeight(layer.w, np.ones(layer.w.shape, np.bool_))}
    saved = loaded.save(stored, tmp_path, "o.onnx", ExportOptions("dense"), "")
    proto = onnx.load(str(saved.path))
    product = next(node for node in proto.graph.node if node.op_type == "MatMul")
    proto.graph.node.insert(0, helper.make_node("RandomUniformLike", [name], ["random"]))
    product.input[1] = "random"
    saved.path.write_bytes(proto.SerializeToString())
    with pytest.raises(NotEquivalentError, match="cannot be read back"):
        verify_weights(loaded, saved)


def test_nothing_else_changes_unless_it_is_asked_for(prune_model, tmp_path):
    model, name, _ = dense_model("x @ W")
    report = prune_model(model, 0.5, export="dense")
    assert [row.op for row in report.layers] == ["LSTM"]
    np.testing.assert_array_equal(initializers(tmp_path / "out.onnx")[name], square())


def test_recurrent_layers_lose_the_same_with_and_without_others(prune_model, tmp_path):
    model, name, _ = dense_model("x @ W")
    files = []
    for include in ((), ("dense",)):
        prune_model(model, 0.5, method="random", export="dense", include=include, force=True)
        files.append(initializers(tmp_path / "out.onnx"))
    assert all(np.array_equal(files[0][k], files[1][k]) for k in files[0] if k != name)


def test_parameters_are_counted_with_what_others_lose(prune_model, tmp_path):
    report = prune_model(dense_model("gemm")[0], SPARSITY, export="packed", include=["dense"])
    plain = prune_model(
        dense_model("gemm")[0], SPARSITY, export="dense", include=["dense"], force=True
    )
    assert report.after.nonzero == plain.after.nonzero
    stored = initializers(tmp_path / "out.onnx").values()
    assert plain.after.nonzero == sum(np.count_nonzero(a) for a in stored if a.dtype.kind == "f")
    assert plain.before.parameters == plain.after.parameters
    assert plain.before.recurrent_parameters == 4 * HIDDEN * (7 + HIDDEN)


@pytest.mark.parametrize("granularity", ["block:4x4", "bank:8", "nm:2:4"])
def test_other_granularities_follow_outputs_and_inputs(prune_model, tmp_path, granularity):
    model, name, columns = dense_model("x @ W")
    prune_model(
        model, 0.5, granularity=granularity, export="dense", include=["dense"], exclude=["n1"]
    )
    kept = initializers(tmp_path / "out.onnx")[name].T != 0  # [outputs, inputs]
    assert columns
    assert kept.mean() == pytest.approx(0.5)
    if granularity.startswith("block"):
        blocks = kept.reshape(HIDDEN // 4, 4, HIDDEN // 4, 4).swapaxes(1, 2).reshape(-1, 16)
        assert set(blocks.sum(axis=1)) == {0, 16}
    else:
        size = 8 if granularity == "bank:8" else 4
        assert set(kept.reshape(-1, size).sum(axis=1)) == {size // 2}


# Selecting


def two_heads() -> onnx.ModelProto:
    graph = Graph(["samples", "steps", 7])
    h = recurrent(graph, "x")
    for seed in (1, 2):
        graph.output(graph.op("MatMul", h, square(seed)))
    model = graph.model()
    for node, name in zip(
        [n for n in model.graph.node if n.op_type == "MatMul"], ("head/a", "head/b"), strict=True
    ):
        node.name = name
    return model


def test_globs_include_and_exclude(prune_model):
    def pruned(**options) -> set[str]:
        report = prune_model(two_heads(), 0.5, force=True, **options)
        return {row.name for row in report.layers if row.sparsity > 0.4}

    assert pruned(include=["dense"]) == {"n1", "head/a", "head/b"}
    assert pruned(include=["*/a"]) == {"n1", "head/a"}
    assert pruned(include=["head/a", "*b"]) == {"n1", "head/a", "head/b"}
    assert pruned(include=["dense"], exclude=["*/a"]) == {"n1", "head/b"}
    assert pruned(include=["dense"], exclude=["n*"]) == {"head/a", "head/b"}
    assert pruned(include=["dense"], layers=["n1"], exclude=["*b"]) == {"n1", "head/a"}


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"include": ["head/c"]}, "no Dense layer or embedding matches", "'head/a'"),
        ({"include": ["dens"]}, "no Dense layer or embedding matches", "'dense'"),
        ({"include": ["embedding"]}, "the model has no embedding", "leave it out"),
        ({"include": ["dense"], "exclude": ["head/x"]}, "no layer matches 'head/x'", "'head/a'"),
        ({"include": ["dense"], "exclude": ["*"]}, "leaves no layer", ""),
        ({"exclude": ["head/a"]}, "no layer matches 'head/a'", ""),
    ],
)
def test_what_matches_nothing_is_said(prune_model, tmp_path, options, message, hint):
    with pytest.raises(UsageError) as caught:
        prune_model(two_heads(), 0.5, **options)
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert not (tmp_path / "out.onnx").exists()


def test_units_and_layers_are_no_weights():
    with pytest.raises(UsageError, match="single weights"):
        complete_stage("magnitude", "unit", None, 0.5, include=("dense",))


def test_names_are_those_of_nodes_or_of_what_they_make(tmp_path):
    model = two_heads()
    heads = [node for node in model.graph.node if node.op_type == "MatMul"]
    heads[0].name = ""
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    loaded = OnnxModel(tmp_path / "m.onnx")
    names = [layer.name for layer in loaded.others.layers]
    assert names == [heads[0].output[0], "head/b"]
    _, claims = written(loaded, tmp_path, "packed", "float32")
    assert all(claim.passed for claim in claims)


# What cannot be pruned


def refused(model: onnx.ModelProto, tmp_path: Path) -> dict[str, str]:
    """Returns name → reason of what is skipped."""
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    others = OnnxModel(tmp_path / "m.onnx").others
    return {item.name: item.reason for item in others.skipped}


def model_with(add, opset: int = 17) -> onnx.ModelProto:
    """An LSTM, and what a function adds to its states."""
    graph = Graph(["samples", "steps", 7], opset)
    for output in add(graph, recurrent(graph, "x")):
        graph.output(output)
    return graph.model()


def computed(graph, h):
    return [graph.op("MatMul", h, graph.op("Transpose", h, perm=[0, 2, 1]))]


def stacked(graph, h):
    return [graph.op("MatMul", h, square()[None])]


def scaled(graph, h):
    return [graph.op("MatMul", h, graph.op("Mul", square(), np.float32([2])))]


def quantized(graph, h):
    stored = np.rint(square() * 20).astype(np.int8)
    scale, zero = np.float32(0.05), np.int8(0)
    return [graph.op("MatMul", h, graph.op("DequantizeLinear", stored, scale, zero))]


def transposed_elsewhere(graph, h):
    w = graph.name(square())
    first = graph.op("MatMul", h, w)
    return [graph.op("MatMul", first, graph.op("Transpose", w))]


def also_added(graph, h):
    w = graph.name(square())
    return [graph.op("MatMul", h, w), graph.op("ReduceSum", w)]


def also_an_output(graph, h):
    w = graph.name(square())
    return [graph.op("MatMul", h, w), graph.op("Identity", w)]


def not_finite(graph, h):
    w = square()
    w[3, 4] = np.nan
    return [graph.op("MatMul", h, w)]


def two_constants(graph, h):
    return [graph.op("Add", h, graph.op("MatMul", square()[:1], square()))]


def vector(graph, h):
    return [graph.op("MatMul", h, square()[0])]


@pytest.mark.parametrize(
    ("add", "reason"),
    [
        (computed, "neither of its inputs is a constant"),
        (stacked, "shape [1, 48, 48]: that is no matrix"),
        (vector, "shape [48]: that is no matrix"),
        (scaled, "computed by Mul"),
        (quantized, "already quantized"),
        (transposed_elsewhere, "also read transposed (tied weights)"),
        (also_added, "also read by ReduceSum"),
        (also_an_output, "handed out"),
        (not_finite, "NaN"),
        (two_constants, "both of its inputs are constants"),
    ],
    ids=lambda item: getattr(item, "__name__", None),
)
def test_what_is_no_dense_layer_is_skipped_with_a_reason(prune_model, tmp_path, add, reason):
    model = model_with(add)
    reasons = refused(model, tmp_path)
    assert reasons
    assert all(reason in said for said in reasons.values())
    with pytest.raises(UsageError, match="cannot be pruned") as caught:
        prune_model(model, 0.5, include=["dense"])
    assert caught.value.code == ExitCode.USAGE


def test_a_quantized_operator_is_skipped(tmp_path):
    reasons = {
        item.reason for item in OnnxModel(GRAPHS / "int8_ts_lstm_streaming.onnx").others.skipped
    }
    assert any("MatMulInteger is already quantized" in reason for reason in reasons)


def test_a_layer_in_a_function_is_skipped(tmp_path):
    model, _, _ = dense_model("x @ W")
    product = next(node for node in model.graph.node if node.op_type == "MatMul")
    opset = helper.make_opsetid("", 17)
    inner = helper.make_node("MatMul", ["a", "b"], ["c"], name="inner")
    model.functions.append(
        helper.make_function("local", "layer", ["a", "b"], ["c"], [inner], [opset])
    )
    model.opset_import.append(helper.make_opsetid("local", 1))
    product.op_type, product.domain, product.name = "layer", "local", "call"
    reasons = refused(model, tmp_path)
    assert "in a model function" in reasons["call/inner"]


def test_a_layer_beside_a_function_is_pruned(prune_model):
    report = prune_model(GRAPHS / "sim_ts_functions.onnx", 0.5, include=["dense"])
    assert report.layers[-1].op == "Gemm"
    assert report.layers[-1].sparsity == pytest.approx(0.5, abs=0.1)


def test_a_weight_that_callers_may_override_stays_dense(prune_model, tmp_path):
    model, name, _ = dense_model("x @ W")
    model.graph.input.append(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [HIDDEN, HIDDEN])
    )
    report = prune_model(model, 0.7, export="packed", include=["dense"])
    assert report.layers[-1].stored == ("dense",)
    assert any("override" in warning for warning in report.warnings)


def test_a_head_that_is_used_twice_is_one_weight(prune_model, tmp_path):
    graph = Graph(["samples", "steps", 7])
    h = recurrent(graph, "x")
    w = graph.name(square())
    graph.output(graph.op("MatMul", graph.op("MatMul", h, w), w))
    turned = graph.op("Transpose", w)
    graph.output(graph.op("Gemm", graph.op("Reshape", h, np.array([-1, HIDDEN])), turned, transB=1))
    model = graph.model()
    report = prune_model(model, SPARSITY, export="packed", include=["dense"])
    rows = [row for row in report.layers if row.op != "LSTM"]
    assert len(rows) == 3
    assert {row.nonzero_after for row in rows} == {HIDDEN * KEPT}
    assert report.before.parameters - report.before.recurrent_parameters < 2 * HIDDEN**2
    prune_model(model, SPARSITY, export="dense", include=["dense"], exclude=["n1"], force=True)
    np.testing.assert_array_equal(
        initializers(tmp_path / "out.onnx")[w], pruned_by_hand(square(), columns=True)
    )


def test_a_weight_that_an_excluded_layer_reads_stays(prune_model, tmp_path):
    graph = Graph(["samples", "steps", 7])
    w = graph.name(square())
    graph.output(graph.op("MatMul", graph.op("MatMul", recurrent(graph, "x"), w), w))
    model = graph.model()
    other = next(n.name for n in reversed(model.graph.node) if n.op_type == "MatMul")
    prune_model(model, 0.5, export="dense", include=["dense"], exclude=[other])
    np.testing.assert_array_equal(initializers(tmp_path / "out.onnx")[w], square())


# Data


def save_data(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def states(model: onnx.ModelProto, feed: np.ndarray) -> np.ndarray:
    """What the LSTM of a model makes, ``[samples, steps, units]``."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    lstm = next(node for node in copy.graph.node if node.op_type == "LSTM")
    del copy.graph.output[:]
    copy.graph.output.append(helper.make_tensor_value_info(lstm.output[0], 1, None))
    return run(copy, {"x": feed})[0][:, 0].transpose(1, 0, 2)


@pytest.mark.parametrize("form", FORMS)
def test_what_stays_is_refitted_by_least_squares(prune_model, tmp_path, form):
    model, name, columns = dense_model(form)
    given = x(samples=40, steps=30)
    data = save_data(tmp_path / "data.npz", x=given)
    report = prune_model(model, 0.5, export="dense", include=["dense"], exclude=["n1"], data=data)
    (repair,) = report.repairs
    assert repair.samples == given.shape[0] * given.shape[1]
    new = initializers(tmp_path / "out.onnx")[name].astype(np.float64)
    old = square().astype(np.float64)
    if columns:
        new, old = new.T, old.T
    read = states(model, given).reshape(-1, HIDDEN).astype(np.float64)
    best, cut, found = 0.0, 0.0, 0.0
    for row, before in zip(new, old, strict=True):
        stays = np.abs(before) >= np.sort(np.abs(before))[HIDDEN // 2]
        np.testing.assert_array_equal(row != 0, stays)
        wanted = read @ before
        solution = np.linalg.lstsq(read[:, stays], wanted, rcond=None)[0]
        best += np.square(read[:, stays] @ solution - wanted).sum()
        found += np.square(read @ row - wanted).sum()
        cut += np.square(read @ np.where(stays, before, 0) - wanted).sum()
    assert found < 1.02 * best  # but for the ridge
    assert found < 0.6 * cut


def test_padded_steps_are_not_read(tmp_path):
    model, _, _ = dense_model("x @ W")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    loaded = OnnxModel(tmp_path / "m.onnx")
    given, lengths = x(samples=6, steps=9), np.array([9, 4, 1, 7, 4, 2])
    path = save_data(tmp_path / "data.npz", x=given, lengths=lengths)
    data = load_dataset(path, loaded.open().inputs)
    (layer,) = loaded.others.layers
    found = layer_inputs(loaded, [layer], data, tmp_path, 1, lambda text: None)[layer.name]
    assert found.problem is None
    read = np.concatenate(
        [states(model, given[k : k + 1, :n])[0] for k, n in enumerate(lengths)]
    ).astype(np.float64)
    assert found.moments.count == lengths.sum() == len(read)
    total = found.moments.sums(False)[0] + found.moments.sums(True)[0]
    np.testing.assert_allclose(total[0], read.T @ read, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["activation", "obs"])
def test_criteria_with_data_do_better_than_size_alone(prune_model, tmp_path, method):
    graph = Graph(["samples", "steps", 7])
    scale = np.geomspace(1, 100, HIDDEN).astype(np.float32)
    h = graph.op("Mul", recurrent(graph, "x"), scale)
    graph.output(graph.op("MatMul", h, square()))
    model = graph.model()
    data = save_data(tmp_path / "data.npz", x=x(40, 20))
    lost = []
    for name in ("magnitude", method):
        report = prune_model(
            model,
            0.7,
            method=name,
            include=["dense"],
            exclude=["n1"],
            data=data,
            force=True,
            compensate=False,
        )
        lost.append(report.fidelity[0].mean_abs)
    assert lost[1] < 0.7 * lost[0]


def test_a_layer_in_a_loop_cannot_be_watched(tmp_path):
    loaded = OnnxModel(GRAPHS / "ts_script_loop_layer.onnx")
    specs = loaded.open().inputs
    shapes = {s.name: [d if isinstance(d, int) else 4 for d in s.shape or ()] for s in specs}
    path = save_data(
        tmp_path / "data.npz", **{n: np.ones((3, *s), "f4") for n, s in shapes.items()}
    )
    data = load_dataset(path, specs)
    (layer,) = loaded.others.layers
    found = layer_inputs(loaded, [layer], data, tmp_path, 1, lambda text: None)[layer.name]
    assert found.problem == "it is in a loop, where it cannot be watched"


def test_the_gradient_of_others_is_not_known(prune_model, tmp_path):
    data = save_data(tmp_path / "data.npz", x=x())
    with pytest.raises(UsageError, match="recurrent layers only"):
        prune_model(two_heads(), 0.5, method="gradient", include=["dense"], data=data)


def test_a_refit_of_sample_models_leaves_them_better(prune_model):
    data = SAMPLES / "timeseries.calibration.npz"
    quality = [
        prune_model(
            SAMPLES / "timeseries.onnx",
            0.6,
            include=["dense"],
            exclude=["GRU*"],
            data=data,
            compensate=compensate,
            force=True,
        ).fidelity[0]
        for compensate in (False, True)
    ]
    assert quality[1].mean_abs < 0.5 * quality[0].mean_abs


# Branches


def branches() -> onnx.ModelProto:
    """A head in each branch of an If, the weight of one in the branch, the other's outside."""
    graph = Graph(["samples", "steps", 7])
    h = recurrent(graph, "x")
    outside = graph.name(square())
    both = []
    for k, weight in enumerate((outside, "inside")):
        node = helper.make_node("MatMul", [h, weight], [f"b{k}"], name=f"head{k}")
        tensors = [] if k == 0 else [numpy_helper.from_array(square(2), "inside")]
        info = helper.make_tensor_value_info(f"b{k}", 1, None)
        both.append(helper.make_graph([node], f"branch{k}", [], [info], tensors))
    total = graph.op("ReduceSum", "x", keepdims=0)
    positive = graph.op("Greater", total, np.float32(0))
    graph.output(graph.op("If", positive, then_branch=both[0], else_branch=both[1]))
    return graph.model()


@pytest.mark.parametrize("export", ["dense", "sparse", "packed"])
def test_heads_in_branches_are_pruned_and_refitted(prune_model, tmp_path, export):
    given = x(60, 6)  # some of them sum up to more than zero
    data = save_data(tmp_path / "data.npz", x=given)
    options = {"include": ["dense"], "exclude": ["n1"], "export": export, "force": True}
    report = prune_model(branches(), SPARSITY, data=data, **options)
    heads = {row.name: row for row in report.layers[1:]}
    assert heads.keys() == {"head0", "head1"}
    assert {row.nonzero_after for row in heads.values()} == {HIDDEN * KEPT}
    assert {row.stored for row in heads.values()} == {(export,)}
    repaired = {repair.reader: repair.samples for repair in report.repairs}
    assert all(repaired.values())
    prune_model(branches(), SPARSITY, **options)
    for k, sign in ((0, 1), (1, -1)):
        feed = {"x": sign * np.abs(x())}
        expected = branches()
        w = next(t.name for t in expected.graph.initializer if list(t.dims) == [HIDDEN, HIDDEN])
        expected = with_tensor(expected, w, pruned_by_hand(square(), columns=True))
        inner = next(n for n in expected.graph.node if n.op_type == "If").attribute
        inside = next(a.g for a in inner if a.name == "else_branch").initializer[0]
        by_hand = pruned_by_hand(square(2), columns=True)
        inside.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(by_hand), "inside"))
        np.testing.assert_allclose(
            run(tmp_path / "out.onnx", feed)[0], run(expected, feed)[0], atol=1e-6, err_msg=str(k)
        )


def test_external_data_stay_external(prune_model, tmp_path):
    model, name, columns = dense_model("x @ W")
    path = tmp_path / "model.onnx"
    onnx.save(
        model, str(path), save_as_external_data=True, location="weights.bin", size_threshold=1024
    )
    prune_model(path, SPARSITY, export="dense", include=["dense"], exclude=["n1"])
    written = initializers(tmp_path / "out.onnx")[name]
    np.testing.assert_array_equal(written, pruned_by_hand(square(), columns))


# Embeddings

TOKENS = 30


def words(
    twice: bool = False, tied: bool = False, axis: int = 0, dtype: type = np.float32
) -> onnx.ModelProto:
    """Tokens → embedding of 7 features → LSTM → head; perhaps tied, or with a second look-up."""
    graph = Graph(["samples", "steps"])
    graph.inputs[0] = helper.make_tensor_value_info("x", TensorProto.INT64, ["samples", "steps"])
    table = np.random.default_rng(3).standard_normal((TOKENS, 7)).astype(dtype)
    name = graph.name(table if axis == 0 else np.ascontiguousarray(table.T))
    looked = graph.op("Gather", name, "x", axis=axis)
    if axis:
        looked = graph.op("Transpose", looked, perm=[1, 2, 0])
    if dtype != np.float32:
        looked = graph.op("Cast", looked, to=TensorProto.FLOAT)
    h = recurrent(graph, looked)
    if tied:
        narrow = graph.op("MatMul", h, square()[:, :7])
        graph.output(graph.op("MatMul", narrow, graph.op("Transpose", name)))
    else:
        graph.output(graph.op("MatMul", h, square()))
    if twice:
        later = graph.op("Add", "x", np.array([1]))
        graph.output(graph.op("Gather", name, graph.op("Mod", later, np.array([TOKENS]))))
    return graph.model()


def tokens(low: int, high: int, samples: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(low, high, (samples, 12))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("export", ["dense", "sparse", "packed"])
def test_entries_that_the_data_never_use_become_zero(prune_model, tmp_path, export, dtype):
    model = words(dtype=dtype)
    given = tokens(-4, 6)  # negative ones count from the end
    data = save_data(tmp_path / "data.npz", x=given)
    before = (tmp_path / "data.npz").read_bytes()
    report = prune_model(model, 0.0, include=["embedding"], data=data, export=export)
    (row,) = [row for row in report.layers if row.op == "Gather"]
    used = np.unique(given % TOKENS)
    assert (row.hidden_before, row.nonzero_after) == (TOKENS, 7 * len(used))
    feed = {"x": given}
    np.testing.assert_array_equal(run(tmp_path / "out.onnx", feed)[0], run(model, feed)[0])
    if export == "dense":
        table = next(a for a in initializers(tmp_path / "out.onnx").values() if len(a) == TOKENS)
        np.testing.assert_array_equal(np.flatnonzero(table.any(axis=1)), used)
    said = [warning for warning in report.warnings if "never occur in the data" in warning]
    assert len(said) == 1
    assert f"{TOKENS - len(used)} of {TOKENS} entries" in said[0]
    assert "read zeros" in said[0]
    (claim,) = [c for c in report.verification if "never use" in c.claim]
    assert claim.passed
    assert claim.max_abs == 0
    assert (tmp_path / "data.npz").read_bytes() == before
    assert report.after.nonzero == report.before.nonzero - 7 * (TOKENS - len(used))


def test_padding_counts_as_used(prune_model, tmp_path):
    given, lengths = tokens(1, 6), np.array([12, 3, 4, 5, 12, 1, 2, 9])
    for k, n in enumerate(lengths):
        given[k, n:] = 29
    data = save_data(tmp_path / "data.npz", x=given, lengths=lengths)
    prune_model(words(), 0.0, include=["embedding"], data=data, export="dense")
    table = next(a for a in initializers(tmp_path / "out.onnx").values() if len(a) == TOKENS)
    assert list(np.flatnonzero(table.any(axis=1))) == [*range(1, 6), 29]


def test_a_table_that_is_looked_up_twice_keeps_what_either_uses(prune_model, tmp_path):
    data = save_data(tmp_path / "data.npz", x=tokens(0, 6))
    prune_model(words(twice=True), 0.0, include=["embedding"], data=data, export="dense")
    table = next(a for a in initializers(tmp_path / "out.onnx").values() if len(a) == TOKENS)
    assert list(np.flatnonzero(table.any(axis=1))) == [*range(7)]


def test_a_table_that_an_excluded_layer_shares_stays(prune_model, tmp_path):
    model = words(twice=True)
    data = save_data(tmp_path / "data.npz", x=tokens(0, 6))
    other = [node.name for node in model.graph.node if node.op_type == "Gather"][-1]
    report = prune_model(model, 0.5, include=["embedding"], exclude=[other], data=data)
    row = report.layers[-1]
    assert row.op == "Gather"
    assert row.sparsity == 0
    assert "not selected" in (row.blocked or "")


def test_a_table_whose_entries_are_all_used_stays(prune_model, tmp_path):
    data = save_data(tmp_path / "data.npz", x=np.arange(TOKENS)[None])
    report = prune_model(words(), 0.5, include=["embedding"], data=data)
    assert "all of its entries" in (report.layers[-1].blocked or "")
    assert report.layers[-1].sparsity == 0


def test_embeddings_need_data(prune_model):
    with pytest.raises(UsageError, match="is seen on data"):
        prune_model(words(), 0.5, include=["embedding"])


def test_tied_weights_are_refused_with_the_reason(prune_model, tmp_path):
    reasons = refused(words(tied=True), tmp_path)
    assert len(reasons) == 2
    assert all("(tied weights)" in reason for reason in reasons.values())
    with pytest.raises(UsageError, match="tied weights"):
        prune_model(words(tied=True), 0.5, include=["embedding"])
    report = prune_model(words(tied=True), 0.5, include=["dense"])  # the layer before it
    assert sum(row.op == "MatMul" for row in report.layers) == 1


def test_a_look_up_along_another_axis_is_no_embedding(tmp_path):
    reasons = refused(words(axis=1), tmp_path)
    assert any("axis 1" in reason for reason in reasons.values())


def test_looking_up_sizes_is_no_embedding():
    others = OnnxModel(GRAPHS / "ts_shared_layer.onnx").others
    assert not [name for name, kind in others.kinds.items() if kind == "embedding"]


def test_others_and_recurrent_layers_go_together(prune_model, tmp_path):
    report = prune_model(
        SAMPLES / "language.onnx",
        0.5,
        include=["dense", "embedding"],
        calibration=SAMPLES / "language.calibration.npz",
        data=SAMPLES / "language.test.npz",
        method="activation",
    )
    assert [row.op for row in report.layers] == ["LSTM", "Gather", "MatMul"]
    assert all(claim.passed for claim in report.verification)
    assert report.layers[2].sparsity == pytest.approx(0.5, abs=0.01)
    assert {repair.reader for repair in report.repairs} == {
        row.name for row in report.layers if row.op != "Gather"
    }


# TensorFlow


def test_saved_models_are_converted_for_it(prune_model, tmp_path):
    with pytest.raises(UsageError, match="for ONNX models") as caught:
        prune_model(SAMPLES / "medicine", 0.5, include=["dense"], output=tmp_path / "out")
    assert ".onnx" in caught.value.hint


def test_others_are_data():
    (layer,) = OnnxModel(SAMPLES / "speech.onnx").others.layers
    assert isinstance(layer, OtherLayer)
    assert (layer.kind, layer.input_size, layer.hidden_size) == ("dense", 128, 9)
    assert layer.macs_per_step == layer.w.size == 128 * 9
    stage = Stage("magnitude", "weight", "row", 0.5, include=("dense",))
    assert dataclasses.asdict(stage)["include"] == ("dense",)


def test_nothing_is_searched_for_unless_it_is_asked_for(prune_model, monkeypatch):
    def searched(walker):
        raise AssertionError("searched")

    monkeypatch.setattr("rnnprune_cli.onnx_model.find_others", searched)
    prune_model(two_heads(), 0.5)
    with pytest.raises(AssertionError, match="searched"):
        prune_model(two_heads(), 0.5, include=["dense"], force=True)


def test_the_reason_of_a_skipped_layer_is_said(prune_model):
    with pytest.raises(RnnpruneError) as caught:
        prune_model(model_with(quantized), 0.5, include=["dense"])
    assert "--quantize int8" in caught.value.hint


@pytest.mark.parametrize("export", ["dense", "packed"])
def test_large_models_are_held_against_the_original(prune_model, monkeypatch, export):
    monkeypatch.setattr("rnnprune_cli.onnx_model.BIG_MODEL_BYTES", 1)
    report = prune_model(dense_model("x @ Wt")[0], SPARSITY, export=export, include=["dense"])
    assert all(claim.passed for claim in report.verification)
    unchanged = any(claim.claim == UNCHANGED for claim in report.verification)
    assert unchanged == (export == "dense")
