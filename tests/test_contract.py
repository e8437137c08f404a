"""Every method on every recurrent variant, scope and export form, through the whole pipeline."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from cells import layer_model
from conftest import GRAPHS, initializers, recurrent_model, run, two_layers, weights

from rnnprune_cli.errors import RnnpruneError
from rnnprune_cli.methods import methods
from rnnprune_cli.model import GATES
from rnnprune_cli.select import SCOPES, parse_pattern

METHODS = [name for name, m in methods().items() if m.weight is not None]
DATA_FREE = [name for name in METHODS if not methods()[name].needs_data]
VARIANTS = [
    (op, direction, bias, reset)
    for op, direction, bias in itertools.product(
        GATES, ("forward", "reverse", "bidirectional"), (True, False)
    )
    for reset in ((0, 1) if op == "GRU" else (0,))
]
FEED = {"x": np.random.default_rng(5).standard_normal((9, 2, 7)).astype(np.float32)}


@pytest.mark.parametrize(("op", "direction", "bias", "reset"), VARIANTS)
@pytest.mark.parametrize("method", DATA_FREE)
def test_pruned_model_equals_masked_model(
    prune_model, tmp_path, method, op, direction, bias, reset
):
    model = recurrent_model(op, direction, bias=bias, linear_before_reset=reset)
    original = initializers(model)
    report = prune_model(model, 0.6, method=method, export="dense")
    written = initializers(tmp_path / "out.onnx")
    for name in ("W", "R"):
        kept = written[name] != 0
        assert np.array_equal(written[name][kept], original[name][kept])
    if bias:
        assert np.array_equal(written["B"], original["B"])
    masked = recurrent_model(op, direction, bias=bias, linear_before_reset=reset, tensors=written)
    np.testing.assert_array_equal(run(tmp_path / "out.onnx", FEED)[0], run(masked, FEED)[0])
    row = report.layers[0]
    joint = np.concatenate([written["W"], written["R"]], axis=2)
    assert np.all(np.abs((joint == 0).sum(axis=2) - 0.6 * joint.shape[2]) < 1)
    assert row.nonzero_after == np.count_nonzero(joint) == report.after.recurrent_nonzero
    assert row.sparsity == pytest.approx(0.6, abs=1 / joint.shape[2])
    assert all(claim.passed and claim.max_abs == 0 for claim in report.verification)


@pytest.mark.parametrize("scope", sorted(SCOPES))
@pytest.mark.parametrize("export", ["dense", "sparse", "packed", "auto"])
@pytest.mark.parametrize("op", sorted(GATES))
def test_every_export_runs_and_is_valid(prune_model, tmp_path, op, export, scope):
    model = recurrent_model(op, "bidirectional", hidden=40, inputs=24)
    report = prune_model(model, 0.85, scope=scope, export=export)
    dense = tmp_path / "dense.onnx"
    prune_model(model, 0.85, scope=scope, export="dense", output=dense)
    feed = {"x": np.random.default_rng(5).standard_normal((9, 2, 24)).astype(np.float32)}
    np.testing.assert_array_equal(run(tmp_path / "out.onnx", feed)[0], run(dense, feed)[0])
    onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)
    if export != "dense":
        assert report.after.bytes < dense.stat().st_size


@pytest.mark.parametrize("values", ["float16", "int8"])
@pytest.mark.parametrize("op", sorted(GATES))
def test_rounded_values_are_what_was_asked_for(prune_model, tmp_path, op, values):
    report = prune_model(recurrent_model(op, hidden=32), 0.5, values=values)
    assert all(claim.passed for claim in report.verification)
    exact = prune_model(
        recurrent_model(op, hidden=32), 0.5, export="packed", output=tmp_path / "exact.onnx"
    )
    assert report.after.bytes < exact.after.bytes


def test_same_input_and_seed_give_the_same_bytes(prune_model, tmp_path):
    for method in DATA_FREE:
        outputs = []
        for name in ("one.onnx", "two.onnx"):
            prune_model(
                recurrent_model(), 0.7, method=method, seed=3, output=tmp_path / f"{method}.{name}"
            )
            outputs.append((tmp_path / f"{method}.{name}").read_bytes())
        assert outputs[0] == outputs[1]


def test_another_seed_gives_another_random_mask(prune_model, tmp_path):
    written = []
    for seed in (0, 1):
        path = tmp_path / f"{seed}.onnx"
        prune_model(recurrent_model(), 0.5, method="random", seed=seed, export="dense", output=path)
        written.append(initializers(path)["R"])
    assert not np.array_equal(written[0], written[1])


def test_sparsity_zero_changes_nothing_and_says_so(prune_model, tmp_path):
    model = recurrent_model()
    report = prune_model(model, 0.0, export="dense")
    assert any("removes nothing" in w for w in report.warnings)
    for name, values in initializers(model).items():
        assert np.array_equal(initializers(tmp_path / "out.onnx")[name], values)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("export", ["dense", "packed"])
def test_every_precision_stays_what_it_is(prune_model, tmp_path, dtype, export):
    tensors = weights("LSTM", 40, 24, 1, 0, dtype)
    model = recurrent_model(hidden=40, inputs=24, dtype=dtype, tensors=tensors, opset=18)
    report = prune_model(model, 0.8, export=export)
    assert all(claim.passed for claim in report.verification)
    written = onnx.load(str(tmp_path / "out.onnx"))
    assert written.graph.input[0].type == model.graph.input[0].type
    if export == "dense":
        assert initializers(written)["W"].dtype == dtype


@pytest.mark.parametrize(
    ("opset", "ir_version"), [(7, 3), (8, 4), (9, 4), (11, 6), (14, 7), (18, 8), (22, 10), (24, 11)]
)
@pytest.mark.parametrize("export", ["dense", "sparse", "packed"])
def test_every_opset_is_kept(prune_model, tmp_path, opset, ir_version, export):
    model = recurrent_model(hidden=40, inputs=24, opset=opset, ir_version=ir_version)
    if ir_version < 4:
        for tensor in model.graph.initializer:
            model.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    report = prune_model(model, 0.8, export=export)
    written = onnx.load(str(tmp_path / "out.onnx"))
    assert written.opset_import[0].version == opset
    assert written.ir_version == ir_version
    assert report.model.opset == opset
    if export == "sparse" and opset < 11:
        assert any("is not stored sparse" in w for w in report.warnings)
    if export == "packed" and opset == 7:
        assert any("has no constants" in w for w in report.warnings)


def test_everything_else_of_the_model_is_kept(prune_model, tmp_path):
    model = recurrent_model()
    prune_model(model, 0.5)
    written = onnx.load(str(tmp_path / "out.onnx"))
    assert written.producer_name == "tests"
    assert written.graph.name == "graph"
    assert written.graph.doc_string == "a graph"
    assert list(written.graph.input) == list(model.graph.input)
    assert list(written.graph.output) == list(model.graph.output)
    assert not written.graph.value_info
    props = {p.key: p.value for p in written.metadata_props}
    assert props["owner"] == "tests"
    assert '"sparsity": 0.5' in props["rnnprune"]


def test_pruned_model_can_be_pruned_again(prune_model, tmp_path):
    model = recurrent_model(hidden=40, inputs=24)
    prune_model(model, 0.6, export="packed", output=tmp_path / "first.onnx")
    report = prune_model(tmp_path / "first.onnx", 0.9, export="packed")
    assert report.layers[0].sparsity == pytest.approx(0.9, abs=0.01)
    assert report.ratios.nonzero < 0.32


def test_values_that_are_not_rounded_are_named(prune_model):
    report = prune_model(recurrent_model(hidden=3, inputs=2), 0.5, values="int8")
    assert report.layers[0].stored == ("dense", "dense")
    assert any("not rounded" in warning for warning in report.warnings)


# With data

PATTERNS = ("weight", "block:4x2", "bank:4", "nm:2:4")
CHOICES = [(g, scope) for g in PATTERNS for scope in parse_pattern(g).scopes]
LENGTHS = np.array([9, 1, 4, 9, 6, 2, 9, 5, 3, 8])
DATA = np.random.default_rng(6).standard_normal((10, 9, 7)).astype(np.float32)
"""[samples, steps, features]"""


def padded(junk: float) -> np.ndarray:
    beyond = np.arange(9)[None, :, None] >= LENGTHS[:, None, None]
    return np.where(beyond, np.float32(junk), DATA)


def tensors_of(op: str, direction: str, bias: bool = True) -> dict[str, np.ndarray]:
    made = weights(op, 9, 7, 2 if direction == "bidirectional" else 1, 0)
    return made if bias else {name: made[name] for name in "WR"}


CASES = [
    (method, variant, CHOICES[(k + 3 * m) % len(CHOICES)])
    for m, method in enumerate(METHODS)
    for k, variant in enumerate(VARIANTS)
]


@pytest.mark.parametrize(("method", "variant", "choice"), CASES)
def test_what_padding_holds_changes_not_a_byte(prune_model, tmp_path, method, variant, choice):
    op, direction, bias, reset = variant
    granularity, scope = choice
    asked = parse_pattern(granularity).sparsity or 0.6
    model = layer_model(op, direction, tensors_of(op, direction, bias), reset)
    written = []
    for name, junk in (("one", 0.0), ("two", 1000.0)):
        data = tmp_path / f"{name}.npz"
        np.savez(data, x=padded(junk), lengths=LENGTHS)
        report = prune_model(
            model,
            asked,
            method=method,
            granularity=granularity,
            scope=scope,
            calibration=data,
            output=tmp_path / f"{name}.onnx",
        )
        written.append((tmp_path / f"{name}.onnx").read_bytes())
        assert all(claim.passed for claim in report.verification)
        # Rows of sixteen weights, of which four in a bank are three in the end; blocks are of 8.
        assert report.layers[0].sparsity == pytest.approx(asked, abs=0.11)
        (repair,) = report.repairs
        assert repair.problem is None and repair.samples == LENGTHS.sum()
    assert written[0] == written[1]


@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("op", sorted(GATES))
@pytest.mark.parametrize("method", METHODS)
def test_states_and_lengths_may_be_inputs(prune_model, tmp_path, method, op, layout):
    extra = ((4, "lengths"), (5, "start_h"), (6, "start_c"))[: 3 if op == "LSTM" else 2]
    model = layer_model(
        op, "bidirectional", tensors_of(op, "bidirectional"), extra=extra, layout=layout
    )
    rng = np.random.default_rng(1)
    states = {n: rng.standard_normal((10, 2, 9)).astype(np.float32) for _, n in extra[1:]}
    data = tmp_path / "data.npz"
    np.savez(data, x=padded(7.0), lengths=LENGTHS.astype(np.int32), **states)
    report = prune_model(model, 0.6, method=method, data=data)
    assert all(claim.passed for claim in report.verification)
    assert report.layers[0].sparsity == pytest.approx(0.6, abs=0.01)
    (repair,) = report.repairs
    assert repair.problem is None and repair.samples == LENGTHS.sum()


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
@pytest.mark.parametrize("op", sorted(GATES))
@pytest.mark.parametrize("method", METHODS)
def test_every_precision_can_be_refitted(prune_model, tmp_path, method, op, dtype):
    tensors = {name: values.astype(dtype) for name, values in tensors_of(op, "reverse").items()}
    model = layer_model(op, "reverse", tensors, dtype=dtype)
    np.savez(tmp_path / "data.npz", x=DATA)
    report = prune_model(model, 0.6, method=method, data=tmp_path / "data.npz", export="dense")
    assert all(claim.passed for claim in report.verification)
    assert [repair.problem for repair in report.repairs] == [None]
    original, written = initializers(model), initializers(tmp_path / "out.onnx")
    assert all(written[name].dtype == dtype for name in original)
    assert any(
        (written[name][written[name] != 0] != values[written[name] != 0]).any()
        for name, values in original.items()
    )


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_what_layers_share_stays_the_same_in_both(prune_model, tmp_path, method, copy):
    data = tmp_path / "data.npz"
    np.savez(data, x=DATA[:, :, None])
    model = two_layers(share_r=not copy, copy=copy)
    prune_model(model, 0.6, method=method, data=data, export="dense")
    written = initializers(tmp_path / "out.onnx")
    first, second = (
        {index: written[node.input[index]] for index in (1, 2)}
        for node in onnx.load(str(tmp_path / "out.onnx")).graph.node
    )
    assert np.array_equal(first[2], second[2])
    assert np.array_equal(first[1], second[1]) == copy
    for own in (first, second):
        assert all((values == 0).any() for values in own.values())


@pytest.mark.parametrize("method", METHODS)
def test_sparsity_zero_changes_nothing_with_data_either(prune_model, tmp_path, method):
    np.savez(tmp_path / "data.npz", x=DATA)
    for op in GATES:
        model = layer_model(op, "bidirectional", tensors_of(op, "bidirectional"))
        prune_model(
            model, 0.0, method=method, data=tmp_path / "data.npz", export="dense", force=True
        )
        written = initializers(tmp_path / "out.onnx")
        for name, values in initializers(model).items():
            assert np.array_equal(written[name], values)


def data_of(name: str, tmp_path):
    """Saves the inputs that a graph comes with as a data set of one sample, or of its batch."""
    with np.load(GRAPHS / f"{name}.npz") as stored:
        given = {k.removeprefix("input:"): stored[k] for k in stored if k.startswith("input:")}
    np.savez(tmp_path / "data.npz", **{k: v[None] for k, v in given.items()})
    return tmp_path / "data.npz"


@pytest.mark.parametrize("name", ["hand_function_constants", "hand_function_weight_inputs"])
@pytest.mark.parametrize("method", METHODS)
def test_layers_in_functions_are_pruned_and_refitted(prune_model, tmp_path, method, name):
    report = prune_model(GRAPHS / f"{name}.onnx", 0.6, method=method, data=data_of(name, tmp_path))
    assert all(claim.passed for claim in report.verification)
    assert report.repairs and all(repair.problem is None for repair in report.repairs)
    for row in report.layers:
        assert row.blocked is None and row.sparsity == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_a_branch_that_data_never_take_is_blocked_by_name(prune_model, tmp_path, method):
    """Each branch of an If has a layer; the sum of x is never below zero."""
    from test_hessians import branching

    model, _ = branching()
    data = tmp_path / "data.npz"
    np.savez(data, x=np.abs(DATA[:, :, None, :3]))
    report = prune_model(model, 0.6, method=method, data=data)
    rows = {row.name: row for row in report.layers}
    assert rows["then"].sparsity == pytest.approx(0.6, abs=0.02)
    if methods()[method].needs_data:
        why = f"method '{method}' cannot see what it reads: the data never reach it"
        assert rows["else"].blocked == why and rows["else"].sparsity == 0
    else:
        assert rows["else"].blocked is None
        assert rows["else"].sparsity == pytest.approx(0.6, abs=0.02)
        said = {repair.reader: repair.problem for repair in report.repairs}
        assert said == {"then": None, "else": "the data never reach it"}


@pytest.mark.parametrize("method", METHODS)
def test_the_cell_of_a_loop_that_stays_cannot_be_watched(prune_model, tmp_path, method):
    path = GRAPHS / "keras3_masked_lstm.onnx"
    data = data_of("keras3_masked_lstm", tmp_path)
    if methods()[method].needs_data:
        with pytest.raises(RnnpruneError, match=f"'{method}' cannot see .* it is in a loop"):
            prune_model(path, 0.6, method=method, data=data)
        return
    report = prune_model(path, 0.6, method=method, data=data)
    assert {repair.problem for repair in report.repairs} == {
        "it is in a loop, where it cannot be watched"
    }
    assert all(row.sparsity == pytest.approx(0.6, abs=0.02) for row in report.layers)
