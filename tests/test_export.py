"""SavedModels from ONNX models: what plain TensorFlow loads is what was cut, and nothing less."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import GRAPHS, SAMPLES, Graph, weights
from onnx import helper, numpy_helper

from rnnprune_cli.data import made_up_feeds
from rnnprune_cli.errors import ExitCode, NotEquivalentError, RnnpruneError, UsageError
from rnnprune_cli.load import load
from rnnprune_cli.model import ExportOptions, Plan, Report, Saved, Stage, Target
from rnnprune_cli.onnx_model import OnnxModel
from rnnprune_cli.options import PruneOptions
from rnnprune_cli.pipeline import prune
from rnnprune_cli.session import opened
from rnnprune_cli.written import written

try:
    from rnnprune_cli.tensorflow.runtime import import_tensorflow, set_threads

    tf: Any = import_tensorflow()
except RnnpruneError:
    pytest.skip("TensorFlow is an optional dependency", allow_module_level=True)
set_threads(1)

from rnnprune_cli.trainer.export import Exported, Exporter  # noqa: E402  imports TensorFlow

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file:UserWarning"),
]

MEDICINE = SAMPLES / "medicine"
HALF = Stage("magnitude", "unit", "layer", 0.5)


def options(model: Path, output: Path | None, *stages: Stage, **more: Any) -> PruneOptions:
    return PruneOptions(model, output, stages or (HALF,), latency_seconds=0.0, **more)


def pruned(model: Path, output: Path | None, *stages: Stage, **more: Any) -> Report:
    return prune(options(model, output, *stages, **more), {}, lambda step: None)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -- the models -----------------------------------------------------------------------------------


def keras_of(version: str) -> Any:
    if version == "keras":
        import keras

        return keras
    import tf_keras

    return tf_keras


def sequential(k: Any, *layers: Any, dtype: str = "float32") -> Any:
    x = k.Input((None, 5), name="x", dtype=dtype)
    y = x
    for layer in layers:
        y = layer(y)
    model = k.Model(x, k.layers.Dense(3)(y))
    return randomized(model)


def randomized(model: Any) -> Any:
    """Biases start as zeros, which converters drop."""
    rng = np.random.default_rng(5)
    model.set_weights([w + 0.1 * rng.standard_normal(w.shape) for w in model.get_weights()])
    return model


def many(k: Any) -> Any:
    """Two inputs, one of tokens, and two outputs."""
    layers = k.layers
    ids, features = (
        k.Input((None,), dtype="int32", name="ids"),
        k.Input((None, 4), name="features"),
    )
    tags = layers.Bidirectional(layers.LSTM(6, return_sequences=True))(layers.Embedding(11, 5)(ids))
    score = layers.GRU(6)(features)
    outputs = {"tags": layers.Dense(3)(tags), "score": layers.Dense(1)(score)}
    return randomized(k.Model([ids, features], outputs))


def export(model: Any, path: Path) -> None:
    with Path(os.devnull).open("w") as sink, contextlib.redirect_stdout(sink):
        model.export(str(path))


def in_half(k: Any, path: Path) -> None:
    """A signature of half precision around a model of single precision, beside one more."""
    model = sequential(k, k.layers.LSTM(8))
    root = tf.Module()
    root.model = model
    spec = tf.TensorSpec([None, None, 5], tf.float16, name="x")

    def call(x: Any) -> dict[str, Any]:
        return {"y": tf.cast(model(tf.cast(x, tf.float32)), tf.float16)}

    one, two = (tf.function(call, input_signature=[spec]) for _ in range(2))
    tf.saved_model.save(root, str(path), {"score": one, "other": two})


def in_double(k: Any, path: Path) -> None:
    k.backend.set_floatx("float64")
    try:
        export(sequential(k, k.layers.LSTM(8), dtype="float64"), path)
    finally:
        k.backend.set_floatx("float32")


def states(k: Any) -> Any:
    """A state that is handed in and out."""
    x, h = k.Input((None, 5), name="x"), k.Input((8,), name="h")
    y, after = k.layers.GRU(8, return_state=True)(x, initial_state=h)
    return randomized(k.Model([x, h], {"y": k.layers.Dense(2)(y), "after": after}))


LSTM, GRU, RNN = ("LSTM", "forward"), ("GRU", "forward"), ("RNN", "forward")
Build = Callable[[Any, Path], None]


def of(build: Callable[[Any], Any]) -> Build:
    return lambda k, path: export(build(k), path)


ZOO: dict[str, tuple[str, Build, list[tuple[str, str]]]] = {
    "lstm": ("keras", of(lambda k: sequential(k, k.layers.LSTM(8))), [LSTM]),
    "gru": ("tf_keras", of(lambda k: sequential(k, k.layers.GRU(8))), [GRU]),
    "others": (
        "keras",
        of(
            lambda k: sequential(
                k,
                k.layers.GRU(8, reset_after=False, use_bias=False, return_sequences=True),
                k.layers.SimpleRNN(8),
            )
        ),
        [GRU, RNN],
    ),
    "stacked": (
        "tf_keras",
        of(
            lambda k: sequential(
                k,
                k.layers.Bidirectional(k.layers.LSTM(6, return_sequences=True)),
                k.layers.Bidirectional(k.layers.GRU(4)),
            )
        ),
        [LSTM, ("LSTM", "reverse"), GRU, ("GRU", "reverse")],
    ),
    "many": ("keras", of(many), [GRU, LSTM, ("LSTM", "reverse")]),
    "half": ("tf_keras", in_half, [LSTM]),
    "double": ("tf_keras", in_double, [LSTM]),
    "states": ("keras", of(states), [GRU]),
}

PLAIN = """
import json, sys
import numpy as np
import tensorflow as tf
for folder, signature, feed, result in json.loads(sys.argv[1]):
    signatures = tf.saved_model.load(folder).signatures
    assert list(signatures) == [signature]
    given = {name: tf.constant(array) for name, array in np.load(feed).items()}
    found = signatures[signature](**given)
    np.savez(result, **{name: tensor.numpy() for name, tensor in found.items()})
assert not any("rnnprune" in name for name in sys.modules)
"""


@dataclasses.dataclass(frozen=True)
class Made:
    """A model, what became of it, and what a process without rnnprune makes of that."""

    original: Path
    signature: str
    path: Path
    report: Report
    twin: Path
    feeds: list[dict[str, np.ndarray]]
    results: list[dict[str, np.ndarray]]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """All of the zoo, loaded by one other process."""
    root = tmp_path_factory.mktemp("export")
    found, jobs = {}, []
    for name, (version, build, _) in ZOO.items():
        keras = keras_of(version)
        keras.utils.set_random_seed(7)
        original = root / name
        build(keras, original)
        signature = "score" if name == "half" else "serving_default"
        path, twin = root / f"{name}.cut", root / f"{name}.onnx"
        report = pruned(original, path, signature=signature)
        pruned(original, twin, signature=signature)
        runner = load(original, signature).open()
        feeds = []
        for k, steps in enumerate((3, 9)):
            shapes = {"ids": (2, steps), "features": (2, steps, 4), "x": (2, steps, 5), "h": (2, 8)}
            rng = np.random.default_rng(k)
            feeds.append(
                {
                    s.name: (
                        rng.integers(0, 11, shapes[s.name])
                        if s.dtype.kind == "i"
                        else rng.standard_normal(shapes[s.name])
                    ).astype(s.dtype)
                    for s in runner.inputs
                }
            )
            np.savez(root / f"{name}.{k}.feed.npz", **feeds[-1])
            jobs.append(
                [
                    str(path),
                    signature,
                    *(str(root / f"{name}.{k}.{x}.npz") for x in ("feed", "out")),
                ]
            )
        found[name] = Made(original, signature, path, report, twin, feeds, [])
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", PLAIN, json.dumps(jobs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    for name, one in found.items():
        for k in range(2):
            with np.load(root / f"{name}.{k}.out.npz") as results:
                one.results.append(dict(results))
    return found


# -- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_plain_tensorflow_computes_what_the_onnx_model_computes(
    name: str, made: dict[str, Made]
) -> None:
    one = made[name]
    runner = OnnxModel(one.twin).open()
    for feed, found in zip(one.feeds, one.results, strict=True):
        expected = dict(zip([o.name for o in runner.outputs], runner.run(feed), strict=True))
        assert found.keys() == expected.keys()
        for output, wanted in expected.items():
            got = found[output]
            assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
            step = max(1e-5, 2 * float(np.finfo(wanted.dtype).eps))
            np.testing.assert_allclose(got, wanted, rtol=0, atol=step * np.abs(wanted).max())


@pytest.mark.parametrize("name", ZOO)
def test_signature_is_that_of_the_original(name: str, made: dict[str, Made]) -> None:
    one = made[name]
    functions = [load(p, one.signature).program.function for p in (one.original, one.path)]
    inputs = [function.structured_input_signature[1] for function in functions]
    assert inputs[0] == inputs[1]
    outputs = [function.structured_outputs for function in functions]
    described = [{n: (s.shape.as_list(), s.dtype) for n, s in found.items()} for found in outputs]
    assert described[0] == described[1]


@pytest.mark.parametrize("name", ZOO)
def test_layers_are_found_again_under_their_names(name: str, made: dict[str, Made]) -> None:
    one = made[name]
    before, after = (load(path, one.signature) for path in (one.original, one.path))
    assert {x.name for x in before.layers} == {x.name for x in after.layers}
    assert sorted((x.op, x.direction) for x in after.layers) == sorted(ZOO[name][2])
    was = {x.name: x.hidden_size for x in before.layers}
    assert all(x.hidden_size == was[x.name] // 2 for x in after.layers)
    assert not after.skipped


@pytest.mark.parametrize("name", ZOO)
def test_weights_are_variables_that_are_stored_once(name: str, made: dict[str, Made]) -> None:
    one = made[name]
    stored = tf.train.list_variables(str(one.path / "variables" / "variables"))
    sizes = [int(np.prod(shape)) for key, shape in stored if key != "_CHECKPOINTABLE_OBJECT_GRAPH"]
    count = load(one.path, one.signature).count()
    assert sum(sizes) == count.parameters == one.report.after.parameters
    assert count.nonzero == one.report.after.nonzero
    held = sum(w.size for x in load(one.twin).layers for w in x.weights)
    assert count.parameters >= held == one.report.after.recurrent_parameters


@pytest.mark.parametrize("name", ["lstm", "gru", "others", "stacked"])
def test_what_was_written_is_cut_again(name: str, made: dict[str, Made], tmp_path: Path) -> None:
    one = made[name]
    report = pruned(one.path, tmp_path / "again")
    layers = [load(path, one.signature).layers for path in (one.path, tmp_path / "again")]
    for before, after in zip(*layers, strict=True):
        assert (after.name, after.hidden_size) == (before.name, before.hidden_size // 2)
    assert all(claim.passed for claim in report.verification)


def test_what_was_written_is_pruned_in_place(made: dict[str, Made], tmp_path: Path) -> None:
    one = made["stacked"]
    pruned(one.path, tmp_path / "zeros", Stage("magnitude", "weight", "row", 0.5))
    graphs = [path / "saved_model.pb" for path in (one.path, tmp_path / "zeros")]
    assert graphs[0].read_bytes() == graphs[1].read_bytes()


def test_signatures_that_are_left_out_are_named(made: dict[str, Made]) -> None:
    said = "only the signature 'score' is written: 'other' is left out"
    assert said in made["half"].report.warnings


def test_half_precision_signature_stays(made: dict[str, Made]) -> None:
    assert {a.dtype for result in made["half"].results for a in result.values()} == {
        np.dtype("half")
    }


def test_medicine_keeps_its_accuracy(tmp_path: Path) -> None:
    before = files(MEDICINE)
    stage = Stage("obs", "unit", "layer", 0.5)
    report = pruned(
        MEDICINE,
        tmp_path / "out",
        stage,
        data=SAMPLES / "medicine.test.npz",
        calibration=SAMPLES / "medicine.calibration.npz",
    )
    assert files(MEDICINE) == before
    assert (report.model.format, report.output.format) == ("savedmodel", "savedmodel")
    assert report.before.metric is not None and report.after.metric is not None
    assert report.after.metric.value == pytest.approx(report.before.metric.value, abs=0.01)
    assert report.after.bytes == sum(map(len, files(tmp_path / "out").values()))
    assert report.ratios.parameters < 0.3
    own = [c for c in report.verification if "SavedModel" in c.claim]
    assert [c.max_abs <= 1e-5 for c in own] == [True, True] and own[0].max_abs == 0
    assert not any("latency before is" in warning for warning in report.warnings)
    note = json.loads((tmp_path / "out" / "assets.extra" / "rnnprune.json").read_text())["note"]
    assert json.loads(note)["plan"]["stages"][0]["granularity"] == "unit"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_units_and_then_weights(tmp_path: Path) -> None:
    stages = HALF, Stage("magnitude", "weight", "row", 0.5)
    report = pruned(MEDICINE, tmp_path / "out", *stages)
    model = load(tmp_path / "out")
    for layer in model.layers:
        joint = np.concatenate([w.read() for w in layer.weights], axis=2)
        assert np.all(np.abs((joint == 0).sum(axis=2) - 0.5 * joint.shape[2]) < 1)
    assert model.count().nonzero == report.after.nonzero < 0.6 * report.after.parameters


def test_cut_states_are_shorter_in_the_signature(made: dict[str, Made], tmp_path: Path) -> None:
    pruned(made["states"].original, tmp_path / "out", dataclasses.replace(HALF, resize_state=True))
    runner = load(tmp_path / "out").open()
    assert {s.name: s.shape for s in runner.inputs} == {"x": (None, None, 5), "h": (None, 4)}
    feed = {"x": np.ones((2, 3, 5), np.float32), "h": np.ones((2, 4), np.float32)}
    shapes = {o.name: a.shape for o, a in zip(runner.outputs, runner.run(feed), strict=True)}
    assert shapes == {"y": (2, 2), "after": (2, 4)}


def test_same_input_gives_the_same_bytes(made: dict[str, Made], tmp_path: Path) -> None:
    for name in ("one", "two"):
        pruned(made["stacked"].original, tmp_path / name)
    assert files(tmp_path / "one") == files(tmp_path / "two")


@pytest.mark.parametrize(("version", "suffix"), [("keras", ".keras"), ("tf_keras", ".h5")])
def test_keras_file_becomes_a_directory(version: str, suffix: str, tmp_path: Path) -> None:
    keras = keras_of(version)
    keras.utils.set_random_seed(7)
    path = tmp_path / f"model{suffix}"
    sequential(keras, keras.layers.GRU(8)).save(path)
    report = pruned(path, tmp_path / "out-0.5")
    assert (report.model.format, report.output.format) == (suffix[1:], "savedmodel")
    assert any("not a Keras file" in warning for warning in report.warnings)
    before, after = load(path), load(tmp_path / "out-0.5")
    assert [x.name for x in before.layers] == [x.name for x in after.layers]
    assert after.layers[0].hidden_size == 4


# -- from ONNX ------------------------------------------------------------------------------------


def written_from(model: OnnxModel, file: Path, path: Path) -> Exported:
    saved = Saved(file, (file,), "onnx", {}, {})
    return Exporter(model, model, 1).write(model, saved, path, "note")


REFUSED = {
    "hand_odd_names": "'in put:0'",
    "ts_script_list": "SequenceEmpty",
    "ts_script_unbound": "SequenceEmpty",
    "ts_weights_as_inputs": "'onnx::GRU_110'",
}
NAMES = sorted(p.stem for p in GRAPHS.glob("*.onnx") if not p.stem.startswith("int8_"))


@pytest.mark.parametrize("name", NAMES)
def test_exported_graphs_compute_the_same(name: str, tmp_path: Path) -> None:
    file = GRAPHS / f"{name}.onnx"
    model = OnnxModel(file)
    if name in REFUSED:
        with pytest.raises(RnnpruneError, match=REFUSED[name]) as caught:
            written_from(model, file, tmp_path / "out")
        assert ".onnx" in caught.value.hint
        return
    runner = model.open()
    feeds, names = made_up_feeds(runner, 0, 20), [o.name for o in runner.outputs]
    exported = written_from(model, file, tmp_path / "out")
    for claim in exported.verify(runner, feeds, names, True):
        assert claim.passed, claim


def layer(op: str, direction: str, **more: Any) -> onnx.ModelProto:
    """An operator with everything that it can have besides; sequence lengths are an input."""
    directions, hidden = (2 if direction == "bidirectional" else 1), 6
    tensors = weights(op, hidden, 5, directions, 3)
    states = ["h", "c"] if op == "LSTM" else ["h"]
    names = ["x", "W", "R", "B", "lengths", *states]
    node = helper.make_node(
        op, names, ["y", "y_h"], name="rnn", hidden_size=hidden, direction=direction, **more
    )
    inputs = [
        helper.make_tensor_value_info("x", 1, ["steps", "batch", 5]),
        helper.make_tensor_value_info("lengths", 6, ["batch"]),
        *(helper.make_tensor_value_info(s, 1, [directions, "batch", hidden]) for s in states),
    ]
    outputs = [
        helper.make_tensor_value_info("y", 1, ["steps", directions, "batch", hidden]),
        helper.make_tensor_value_info("y_h", 1, [directions, "batch", hidden]),
    ]
    stored = [numpy_helper.from_array(tensors[n], n) for n in "WRB"]
    graph = helper.make_graph([node], "g", inputs, outputs, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize(
    ("op", "more"),
    [
        ("LSTM", {}),
        ("LSTM", {"clip": 0.7}),
        ("GRU", {"linear_before_reset": 1}),
        ("GRU", {"linear_before_reset": 0}),
        ("RNN", {}),
    ],
)
def test_every_operator_with_lengths_and_states(
    op: str, more: dict[str, Any], direction: str, tmp_path: Path
) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(layer(op, direction, **more).SerializeToString())
    model = OnnxModel(file)
    exported = written_from(model, file, tmp_path / "out")
    rng = np.random.default_rng(0)
    directions = 2 if direction == "bidirectional" else 1
    feed = {
        s.name: rng.standard_normal((directions, 3, 6)).astype(np.float32)
        for s in model.open().inputs
    }
    feed["x"] = rng.standard_normal((7, 3, 5)).astype(np.float32)
    feed["lengths"] = np.array([7, 2, 5], np.int32)
    for claim in exported.verify(model.open(), [feed], ["y", "y_h"], False):
        assert claim.passed, claim
        assert claim.max_abs < 1e-6
    assert [x.op for x in load(tmp_path / "out").layers] == [op] * directions


def test_onnx_model_becomes_a_directory(prune_model: Any, tmp_path: Path) -> None:
    model = layer("LSTM", "forward")
    report = prune_model(model, 0.5, output=tmp_path / "out")
    assert (report.model.format, report.output.format) == ("onnx", "savedmodel")
    (found,) = load(tmp_path / "out").layers
    (original,) = OnnxModel(tmp_path / "model.onnx").layers
    kept = np.concatenate([w.read() for w in found.weights], axis=2) != 0
    assert np.all(np.abs(kept.sum(axis=2) - 0.5 * kept.shape[2]) < 1)
    for new, old in zip(found.weights, original.weights, strict=True):
        np.testing.assert_array_equal(new.read()[new.read() != 0], old.read()[new.read() != 0])
    assert any("before is onnxruntime's, after TensorFlow's" in w for w in report.warnings)


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", [None, "out.keras", "out.h5", "out.pruned"])
def test_keras_file_asks_for_a_directory(output: str | None, tmp_path: Path) -> None:
    path = tmp_path / "model.keras"
    path.write_bytes(b"not looked at")
    with pytest.raises(UsageError, match=r"is not written as a \.keras file") as caught:
        pruned(path, None if output is None else tmp_path / output)
    assert "directory" in caught.value.hint and ".onnx" in caught.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["model.keras"]


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"export": ExportOptions("packed")}, "packed"),
        ({"export": ExportOptions("auto", "int8")}, "int8"),
        ({"targets": (Target("latency", 0.5),)}, "'latency'"),
        ({"targets": (Target("bytes", 0.5),)}, "'bytes'"),
    ],
)
def test_what_a_rebuilt_savedmodel_cannot_have_is_refused(
    more: dict[str, Any], what: str, tmp_path: Path
) -> None:
    stages = (HALF,) if "targets" in more else (HALF, Stage("magnitude", "weight", "row", 0.5))
    with pytest.raises(UsageError, match=what) as caught:
        pruned(MEDICINE, tmp_path / "out", *stages, **more)
    assert ".onnx" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_stateful_model_is_refused(tmp_path: Path) -> None:
    keras = keras_of("keras")
    x = keras.Input((3, 5), batch_size=2)
    y = keras.layers.Dense(2)(keras.layers.LSTM(7, stateful=True)(x))
    export(keras.Model(x, y), tmp_path / "model")
    with pytest.raises(RnnpruneError, match="a call changes variables") as caught:
        pruned(tmp_path / "model", tmp_path / "out")
    assert "--granularity weight" in caught.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_operator_without_a_form_is_named_before_anything_is_done(tmp_path: Path) -> None:
    graph = Graph(["steps", "batch", 4])
    tensors = weights("LSTM", 4, 4, 1, 0)
    y = graph.op("LSTM", "x", tensors["W"], tensors["R"], hidden_size=4)
    last = graph.op("Det", graph.op("MatMul", y, np.eye(4, dtype=np.float32)))
    graph.output(last)
    (tmp_path / "model.onnx").write_bytes(graph.model().SerializeToString())
    steps: list[str] = []
    with pytest.raises(RnnpruneError, match=r"Det .* cannot be written as TensorFlow") as caught:
        prune(options(tmp_path / "model.onnx", tmp_path / "out"), {}, steps.append)
    assert ".onnx" in caught.value.hint
    assert not any("removing" in step for step in steps)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_older_savedmodel_is_replaced_by_force_alone(made: dict[str, Made], tmp_path: Path) -> None:
    original = made["lstm"].original
    pruned(original, tmp_path / "out")
    with pytest.raises(UsageError, match="exists already"):
        pruned(original, tmp_path / "out")
    before = files(tmp_path / "out")
    pruned(original, tmp_path / "out", dataclasses.replace(HALF, sparsity=0.25), force=True)
    assert files(tmp_path / "out") != before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# -- verification ---------------------------------------------------------------------------------


class Corrupting(Exporter):
    """Changes one number of what it writes."""

    def write(self, *what: Any) -> Exported:
        made = super().write(*what)
        prefix = str(made.path / "variables" / "variables")
        reader = tf.train.load_checkpoint(prefix)
        types = reader.get_variable_to_dtype_map()
        values = {key: reader.get_tensor(key) for key in types}
        key = next(key for key in sorted(values) if "recurrent_kernel" in key)
        values[key].flat[3] += 1e-7
        tf.raw_ops.SaveV2(
            prefix=prefix,
            tensor_names=list(values),
            shape_and_slices=[""] * len(values),
            tensors=[tf.constant(values[key], types[key]) for key in values],
        )
        return made


class Failing(Exporter):
    """Fails when everything lies there."""

    def write(self, *what: Any) -> Exported:
        super().write(*what)
        raise RnnpruneError("no space left")


@pytest.mark.parametrize(
    ("kind", "error"), [(Corrupting, NotEquivalentError), (Failing, RnnpruneError)]
)
def test_nothing_is_left_of_what_fails(
    kind: type[Exporter], error: type[RnnpruneError], made: dict[str, Made], tmp_path: Path
) -> None:
    asked = options(made["stacked"].original, tmp_path / "out")
    with opened(asked, "savedmodel", lambda step: None) as session:
        exporter = kind(session.source, session.base, 1)
        session = dataclasses.replace(session, exporter=exporter)
        applied = session.applier.apply(session.base, asked.stages)
        plan = Plan(asked.stages)
        with (
            pytest.raises(error) as caught,
            written(session, applied, tmp_path / "out", plan) as result,
        ):
            result.move()
    if kind is Corrupting:
        assert "variables hold exactly" in caught.value.message
        assert caught.value.code == ExitCode.NOT_EQUIVALENT
    assert not list(tmp_path.iterdir())


def test_other_outputs_fail_verification(made: dict[str, Made], tmp_path: Path) -> None:
    model = OnnxModel(made["lstm"].twin)
    exported = written_from(model, made["lstm"].twin, tmp_path / "out")
    other = OnnxModel(made["gru"].twin).open()
    names = [o.name for o in model.open().outputs]
    claims = exported.verify(other, made["lstm"].feeds, names, False)
    assert [claim.passed for claim in claims] == [True, False]
