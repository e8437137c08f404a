"""The TensorFlow back end on models built with the real Keras 2 and Keras 3."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from rnnprune_cli.errors import ExitCode, RnnpruneError, UsageError
from rnnprune_cli.gate_order import onnx_to_keras
from rnnprune_cli.model import ExportOptions, LoadedModel, Runner, Saved, StoredWeight
from rnnprune_cli.tensorflow.canonical import canonicalize
from rnnprune_cli.tensorflow.runtime import import_tensorflow, set_threads
from rnnprune_cli.tensorflow_model import TensorFlowModel, load, to_onnx

try:
    tf: Any = import_tensorflow()
except RnnpruneError:
    pytest.skip("TensorFlow is an optional dependency", allow_module_level=True)
set_threads(1)

import h5py  # noqa: E402  comes with TensorFlow

# Keras 3's own __array__, and Keras 2's advice on formats.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file:UserWarning"),
]

VERSIONS = ("keras", "tf_keras")
DENSE = ExportOptions()
LSTM, GRU, RNN = ("LSTM", "forward"), ("GRU", "forward"), ("RNN", "forward")
BACK = {"LSTM": ("LSTM", "reverse"), "GRU": ("GRU", "reverse"), "RNN": ("RNN", "reverse")}


def keras_of(version: str) -> Any:
    if version == "keras":
        import keras

        return keras
    import tf_keras

    return tf_keras


# -- the models -----------------------------------------------------------------------------------


def sequential(k: Any, *layers: Any, shape: tuple[int | None, ...] = (None, 5), batch: Any = None):
    x = k.Input(shape, name="x") if batch is None else k.Input(shape, batch_size=batch, name="x")
    y = x
    for layer in layers:
        y = layer(y)
    return k.Model(x, y)


def bidirectional(k: Any) -> Any:
    layers = k.layers
    return sequential(
        k,
        layers.Bidirectional(layers.LSTM(7, return_sequences=True)),
        layers.Bidirectional(layers.GRU(6, reset_after=False, return_sequences=True)),
        layers.Bidirectional(layers.SimpleRNN(4), merge_mode="sum"),
    )


def embedded(k: Any) -> Any:
    ids = k.Input((None,), name="ids", dtype="int32")
    return k.Model(ids, k.layers.GRU(7)(k.layers.Embedding(11, 5, mask_zero=True)(ids)))


def encoder_decoder(k: Any) -> Any:
    a, b = k.Input((None, 5), name="a"), k.Input((None, 4), name="b")
    _, h, c = k.layers.LSTM(7, return_state=True)(a)
    y = k.layers.LSTM(7, return_sequences=True)(b, initial_state=[h, c])
    return k.Model([a, b], k.layers.Dense(2)(y))


def shared(k: Any) -> Any:
    a, b, layer = k.Input((None, 5), name="a"), k.Input((None, 5), name="b"), k.layers.GRU(7)
    return k.Model([a, b], k.layers.Add()([layer(a), layer(b)]))


def step(k: Any, cell: str) -> Any:
    x = k.Input((1, 5), batch_size=1, name="x")
    names = ("h", "c") if cell == "LSTM" else ("h",)
    states = [k.Input((7,), batch_size=1, name=name) for name in names]
    layer = getattr(k.layers, cell)(7, return_state=True, unroll=True)
    return k.Model([x, *states], layer(x, initial_state=states))


def stateful(k: Any, cell: str, **options: Any) -> Any:
    layer = getattr(k.layers, cell)(7, stateful=True, **options)
    return sequential(k, layer, k.layers.Dense(2), shape=(3, 5), batch=2)


def half(k: Any) -> Any:
    policy = k.config.dtype_policy if k.__name__ == "keras" else k.mixed_precision.global_policy
    change = k.mixed_precision.set_global_policy
    before = policy()
    change("mixed_float16")
    try:
        return sequential(k, k.layers.LSTM(7), k.layers.Dense(2, dtype="float32"))
    finally:
        change(before)


def one(cell: str, units: int = 7, **options: Any) -> Callable[[Any], Any]:
    return lambda k: sequential(k, getattr(k.layers, cell)(units, **options))


Layers = list[tuple[str, str]]
ZOO: dict[str, tuple[Callable[[Any], Any], Layers]] = {
    "lstm": (one("LSTM", return_sequences=True), [LSTM]),
    "gru": (one("GRU", return_sequences=True), [GRU]),
    "gru_reset_before": (one("GRU", reset_after=False), [GRU]),
    "rnn": (one("SimpleRNN"), [RNN]),
    "rnn_linear_no_bias": (one("SimpleRNN", activation="linear", use_bias=False), [RNN]),
    "rnn_square": (one("SimpleRNN", 5, activation="relu"), [RNN]),
    "bidirectional": (
        bidirectional,
        [LSTM, BACK["LSTM"], GRU, BACK["GRU"], RNN, BACK["RNN"]],
    ),
    "go_backwards": (one("LSTM", go_backwards=True), [BACK["LSTM"]]),
    "stacked": (
        lambda k: sequential(
            k,
            k.layers.LSTM(7, return_sequences=True),
            k.layers.LSTM(7, return_sequences=True),
            k.layers.Dense(7),
            k.layers.GRU(7),
        ),
        [LSTM, LSTM, GRU],
    ),
    "masking": (lambda k: sequential(k, k.layers.Masking(), k.layers.LSTM(7)), [LSTM]),
    "embedding": (embedded, [GRU]),
    "hard_sigmoid": (one("LSTM", recurrent_activation="hard_sigmoid"), [LSTM]),
    "hard_sigmoid_gru": (one("GRU", recurrent_activation="hard_sigmoid"), [GRU]),
    "implementation_1": (
        one("LSTM", implementation=1, recurrent_activation="hard_sigmoid"),
        [LSTM],
    ),
    "implementation_1_gru": (one("GRU", implementation=1, reset_after=False), [GRU]),
    "unrolled": (
        lambda k: sequential(
            k,
            k.layers.LSTM(7, unroll=True, return_sequences=True),
            k.layers.SimpleRNN(6, unroll=True, return_sequences=True),
            k.layers.GRU(6, unroll=True, implementation=1),
            shape=(4, 5),
        ),
        [LSTM, RNN, GRU],
    ),
    "stateful": (lambda k: stateful(k, "LSTM"), [LSTM]),
    "stateful_gru": (lambda k: stateful(k, "GRU"), [GRU]),
    "stateful_unrolled": (lambda k: stateful(k, "SimpleRNN", unroll=True), [RNN]),
    "stacked_cells": (
        lambda k: sequential(
            k,
            k.layers.RNN([k.layers.LSTMCell(7), k.layers.GRUCell(7), k.layers.SimpleRNNCell(7)]),
        ),
        [LSTM, GRU, RNN],
    ),
    "time_distributed": (
        lambda k: sequential(k, k.layers.TimeDistributed(k.layers.LSTM(7)), shape=(3, 4, 5)),
        [LSTM],
    ),
    "return_state": (encoder_decoder, [LSTM, LSTM]),
    "shared": (shared, [GRU]),
    "step": (lambda k: step(k, "LSTM"), [LSTM]),
    "step_gru": (lambda k: step(k, "GRU"), [GRU]),
    "mixed_precision": (half, [LSTM]),
    "one_unit": (lambda k: sequential(k, k.layers.LSTM(1), shape=(None, 1)), [LSTM]),
    "no_recurrence": (
        lambda k: sequential(k, k.layers.Flatten(), k.layers.Dense(16), shape=(4, 5)),
        [],
    ),
}
STATEFUL = ("stateful", "stateful_gru", "stateful_unrolled")


@dataclass(frozen=True)
class Exported:
    """A SavedModel and the kernels that Keras says it has: one (kernel, recurrent) a cell."""

    path: Path
    kernels: list[tuple[bytes, bytes]]
    layers: Layers


def keras_kernels(model: Any) -> list[tuple[bytes, bytes]]:
    cells: dict[str, dict[str, bytes]] = {}
    for variable in model.weights:
        cell, _, leaf = getattr(variable, "path", variable.name).split(":")[0].rpartition("/")
        cells.setdefault(cell, {})[leaf] = np.asarray(variable).tobytes()
    return [
        (cell["kernel"], cell["recurrent_kernel"])
        for cell in cells.values()
        if "recurrent_kernel" in cell
    ]


def export(model: Any, path: Path) -> None:
    with Path(os.devnull).open("w") as sink, contextlib.redirect_stdout(sink):
        model.export(str(path))


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Exported]:
    """Builds and exports a model of the zoo once."""
    root = tmp_path_factory.mktemp("zoo")
    done: dict[tuple[str, str], Exported] = {}

    def get(version: str, name: str) -> Exported:
        if (version, name) not in done:
            build, layers = ZOO[name]
            keras = keras_of(version)
            keras.utils.set_random_seed(7)
            model = build(keras)
            path = root / f"{version}-{name}"
            export(model, path)
            done[version, name] = Exported(path, keras_kernels(model), layers)
        return done[version, name]

    return get


def random_masks(model: LoadedModel, seed: int = 0) -> dict[str, StoredWeight]:
    rng = np.random.default_rng(seed)
    weights = [w for layer in model.layers for w in layer.weights]
    return {w.name: StoredWeight(w, rng.random(w.shape) < 0.5) for w in weights}


def random_feed(runner: Runner, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    feed = {}
    for spec in runner.inputs:
        shape = [4 if size is None else size for size in spec.shape or ()]
        if spec.maximum is not None:
            feed[spec.name] = rng.integers(spec.minimum, spec.maximum + 1, shape).astype(spec.dtype)
        else:
            feed[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
    return feed


def assert_same(left: list[np.ndarray], right: list[np.ndarray]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()


def assert_stored(model: TensorFlowModel, saved: Saved) -> None:
    """The files hold exactly the masked values, and nothing else has changed."""
    seen = set()
    for name, values in model.read_back(saved):
        assert values.tobytes() == saved.stored[name]().tobytes()
        seen.add(name)
    assert seen == set(saved.stored)
    (claim,) = model.verify_untouched(saved)
    assert claim.passed, claim.claim


# -- finding and pruning --------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ZOO)
def test_pruned_savedmodel_equals_masked_model(
    name: str, version: str, exported: Callable[[str, str], Exported], tmp_path: Path
) -> None:
    source = exported(version, name)
    model = load(source.path)

    assert [(layer.op, layer.direction) for layer in model.layers] == source.layers
    found = [
        tuple(onnx_to_keras(layer.op, w.read()).tobytes() for w in layer.weights)
        for layer in model.layers
    ]
    assert sorted(found) == sorted(source.kernels)
    assert model.skipped == ()
    assert len({layer.name for layer in model.layers}) == len(model.layers)

    masks = random_masks(model)
    saved = model.save(masks, tmp_path, "pruned", DENSE, "a note")
    assert_stored(model, saved)
    assert (saved.path / "saved_model.pb").read_bytes() == (
        source.path / "saved_model.pb"
    ).read_bytes()

    # A plain load sees the masked values, in whichever signature.
    reloaded = tf.saved_model.load(str(saved.path))
    removed = 0
    for signature in reloaded.signatures.values():
        values = {
            v.numpy().tobytes() for v in signature.variables if v.dtype.is_floating and v.shape.rank
        }
        for layer in model.layers:
            for weight in layer.weights:
                kernel = onnx_to_keras(layer.op, saved.stored[weight.name]())
                assert kernel.tobytes() in values
                removed += int((kernel == 0).sum())
    assert removed > 0 or not model.layers

    reference, pruned = model.open_masked(saved.stored), model.reopen(saved)
    feed = random_feed(reference)
    assert_same(pruned.run(feed), reference.run(feed))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["lstm", "return_state", "stateful_gru"])
def test_every_signature_of_the_pruned_model_works(
    name: str, version: str, exported: Callable[[str, str], Exported], tmp_path: Path
) -> None:
    model = load(exported(version, name).path)
    saved = model.save(random_masks(model), tmp_path, "pruned", DENSE, "")
    reference = model.open_masked(saved.stored)
    feed = random_feed(reference)
    expected = reference.run(feed)
    signatures = list(tf.saved_model.load(str(saved.path)).signatures)
    assert len(signatures) == 2
    for signature in signatures:
        fresh = tf.saved_model.load(str(saved.path))
        got = fresh.signatures[signature](**{key: tf.constant(feed[key]) for key in feed})
        assert_same([got[spec.name].numpy() for spec in reference.outputs], expected)


@pytest.mark.parametrize("version", VERSIONS)
def test_convolutional_layer_is_skipped_with_a_reason(version: str, tmp_path: Path) -> None:
    k = keras_of(version)
    layers = (k.layers.ConvLSTM2D(4, 3), k.layers.Flatten(), k.layers.Dense(2))
    export(sequential(k, *layers, shape=(3, 6, 6, 2)), tmp_path / "m")
    model = load(tmp_path / "m")
    assert model.layers == ()
    (skipped,) = model.skipped
    assert "conv" in skipped.name
    assert "convolutional" in skipped.reason


class Cell(tf.Module):
    """An RNN written by hand; how its kernels come about is up to the caller."""

    def __init__(self, kernel: Any, recurrent: Any) -> None:
        self.kernel, self.recurrent = kernel, recurrent

    @tf.function(input_signature=[tf.TensorSpec([None, None, 5], tf.float32, "x")])
    def call(self, x: Any) -> Any:
        steps = tf.transpose(x, [1, 0, 2])
        h = tf.zeros([tf.shape(x)[0], 7])
        _, h = tf.while_loop(
            lambda t, h: t < tf.shape(steps)[0],
            lambda t, h: (t + 1, tf.tanh(steps[t] @ self.kernel() + h @ self.recurrent())),
            [tf.constant(0), h],
        )
        return {"h": h}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def save_cell(path: Path, kernel: Callable[..., Any], recurrent: Callable[..., Any], **kept: Any):
    cell = Cell(kernel, recurrent)
    for name, variable in kept.items():
        setattr(cell, name, variable)
    tf.saved_model.save(cell, str(path), signatures=cell.call)


def test_hand_written_loop_is_found(tmp_path: Path) -> None:
    w, r = tf.Variable(normal(5, 7), name="w"), tf.Variable(normal(7, 7), name="r")
    save_cell(tmp_path / "m", lambda: w, lambda: r, w=w, r=r)
    (layer,) = load(tmp_path / "m").layers
    assert layer.op == "RNN"
    assert layer.w.read()[0].T.tobytes() == w.numpy().tobytes()
    assert layer.r.read()[0].T.tobytes() == r.numpy().tobytes()


def test_constant_weights_are_skipped_with_a_reason(tmp_path: Path) -> None:
    save_cell(tmp_path / "m", lambda: tf.constant(normal(5, 7)), lambda: tf.constant(normal(7, 7)))
    model = load(tmp_path / "m")
    assert model.layers == ()
    assert [s.reason for s in model.skipped] == [
        "its weights are constants of the graph, not variables"
    ]


def test_quantized_weights_are_skipped_with_a_reason(tmp_path: Path) -> None:
    w, r = tf.Variable(normal(5, 7)), tf.Variable(normal(7, 7))
    quantize = tf.quantization.fake_quant_with_min_max_args
    save_cell(tmp_path / "m", lambda: quantize(w), lambda: quantize(r), w=w, r=r)
    model = load(tmp_path / "m")
    assert model.layers == ()
    (skipped,) = model.skipped
    assert "FakeQuantWithMinMaxArgs" in skipped.reason


def test_old_control_flow_is_skipped_with_a_reason(tmp_path: Path) -> None:
    v1 = tf.compat.v1
    path = tmp_path / "m"
    v1.disable_control_flow_v2()
    try:
        with v1.Graph().as_default(), v1.Session() as session:
            x = v1.placeholder(tf.float32, [2, 5])
            r = v1.get_variable("r", [5, 5], initializer=v1.ones_initializer())
            _, h = v1.while_loop(
                lambda t, h: t < 4, lambda t, h: (t + 1, tf.tanh(h @ r)), [tf.constant(0), x]
            )
            session.run(v1.global_variables_initializer())
            v1.saved_model.simple_save(session, str(path), {"x": x}, {"h": h})
    finally:
        v1.enable_control_flow_v2()
    model = load(path)
    assert model.layers == ()
    assert [s.reason for s in model.skipped] == ["the loop uses TensorFlow 1 control flow"]


def test_one_matrix_for_input_and_state_is_skipped_with_a_reason(tmp_path: Path) -> None:
    both = tf.Variable(normal(12, 7), name="cell/both")

    class Joined(tf.Module):
        def __init__(self) -> None:
            self.both = both

        @tf.function(input_signature=[tf.TensorSpec([3, 2, 5], tf.float32, "x")])
        def call(self, x: Any) -> Any:
            h = tf.zeros([2, 7])
            for t in tf.range(3):
                h = tf.tanh(tf.concat([x[t], h], 1) @ self.both)
            return {"h": h}

    module = Joined()
    tf.saved_model.save(module, str(tmp_path / "m"), signatures=module.call)
    model = load(tmp_path / "m")
    assert model.layers == ()
    (skipped,) = model.skipped
    assert "one matrix" in skipped.reason


def test_equal_variables_share_a_weight_and_are_both_written(tmp_path: Path) -> None:
    k = keras_of("keras")
    x = k.Input((None, 5), name="x")
    first, second = k.layers.LSTM(7), k.layers.LSTM(7)
    net = k.Model(x, k.layers.Add()([first(x), second(x)]))
    second.set_weights(first.get_weights())
    export(net, tmp_path / "m")
    model = load(tmp_path / "m")
    assert len(model.layers) == 2
    assert model.layers[0].w is model.layers[1].w
    assert model.layers[0].r is model.layers[1].r
    before = model.count()
    assert before.parameters == 5 * 28 + 7 * 28 + 2 * 28
    saved = model.save(random_masks(model), tmp_path, "out", DENSE, "")
    assert_stored(model, saved)
    plain = tf.saved_model.load(str(saved.path))
    variables = plain.signatures["serving_default"].variables
    kernels = [v.numpy() for v in variables if v.shape == (7, 28)]
    assert len(kernels) == 2
    removed = sum(
        w.nonzero - int(np.count_nonzero(saved.stored[w.name]())) for w in model.layers[0].weights
    )
    assert load(saved.path).count().nonzero == before.nonzero - removed
    assert kernels[0].tobytes() == kernels[1].tobytes()
    assert (kernels[0] == 0).any()
    feed = random_feed(model.open())
    assert_same(model.reopen(saved).run(feed), model.open_masked(saved.stored).run(feed))


def test_equal_w_and_r_stay_two_weights(tmp_path: Path) -> None:
    class Loop(tf.Module):
        def __init__(self) -> None:  # both of the default name
            self.w, self.r = tf.Variable(normal(7, 7)), tf.Variable(normal(7, 7))

        @tf.function(input_signature=[tf.TensorSpec([None, 4, 7], tf.float32, "x")])
        def call(self, x: Any) -> Any:
            h = tf.zeros([tf.shape(x)[0], 7])
            for t in tf.range(4):
                h = tf.tanh(x[:, t] @ self.w + h @ self.r)
            return {"h": h}

    module = Loop()
    tf.saved_model.save(module, str(tmp_path / "m"), signatures=module.call)
    model = load(tmp_path / "m")
    (layer,) = model.layers
    assert layer.w is not layer.r
    assert (layer.w.name[-2:], layer.r.name[-2:]) == (".W", ".R")
    assert model.count().parameters == 2 * 49
    saved = model.save(random_masks(model), tmp_path, "out", DENSE, "")
    assert_stored(model, saved)
    assert saved.stored[layer.w.name]().tobytes() != saved.stored[layer.r.name]().tobytes()
    feed = random_feed(model.open())
    assert_same(model.reopen(saved).run(feed), model.open_masked(saved.stored).run(feed))


def test_data_sets_that_may_be_w_or_r_are_left_alone(tmp_path: Path) -> None:
    k = keras_of("tf_keras")
    net = sequential(k, k.layers.SimpleRNN(5))
    w, _, b = net.get_weights()
    net.set_weights([w, w, b])
    net.save(str(tmp_path / "m.h5"))
    model = load(tmp_path / "m.h5")
    assert model.layers == ()
    assert ["cannot be told" in s.reason for s in model.skipped] == [True]


def test_weights_that_are_not_named_stay(exported: Any, tmp_path: Path) -> None:
    model = load(exported("keras", "stacked").path)
    weight = model.layers[1].r
    saved = model.save({weight.name: random_masks(model)[weight.name]}, tmp_path, "m", DENSE, "")
    assert_stored(model, saved)
    assert set(saved.exports) == {weight.name}


def test_no_copy_of_a_removed_weight_stays_in_the_file(exported: Any, tmp_path: Path) -> None:
    """Keras 3 exports every weight twice."""
    model = load(exported("keras", "lstm").path)
    weights = model.layers[0].weights
    masks = {w.name: StoredWeight(w, np.zeros(w.shape, bool)) for w in weights}
    saved = model.save(masks, tmp_path, "m", DENSE, "")
    reader = tf.train.load_checkpoint(str(saved.path / "variables" / "variables"))
    for key, shape in reader.get_variable_to_shape_map().items():
        if tuple(shape) in ((5, 28), (7, 28)):
            assert not reader.get_tensor(key).any(), key


# -- the rest of the interface --------------------------------------------------------------------


def test_saving_twice_gives_equal_files(exported: Any, tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        model = load(exported("tf_keras", "bidirectional").path)
        saved = model.save(random_masks(model), tmp_path, name, DENSE, "note")
        contents.append({file.relative_to(saved.path): file.read_bytes() for file in saved.files})
    assert contents[0] == contents[1]
    assert json.loads(contents[0][Path("assets.extra/rnnprune.json")]) == {"note": "note"}


def test_corrupted_copy_fails_verification(exported: Any, tmp_path: Path) -> None:
    model = load(exported("keras", "gru").path)
    saved = model.save(random_masks(model), tmp_path, "m", DENSE, "")
    graph = saved.path / "saved_model.pb"
    graph.write_bytes(graph.read_bytes() + b"\0")
    (claim,) = model.verify_untouched(saved)
    assert not claim.passed
    assert "saved_model.pb" in claim.claim


def test_changed_bias_fails_verification(exported: Any, tmp_path: Path) -> None:
    source = exported("keras", "gru")
    model = load(source.path)
    saved = model.save(random_masks(model), tmp_path, "m", DENSE, "")
    bias = next(m.capture for m in model.program.matrices() if m and m.name.endswith("bias"))
    model.program.assign(bias, model.program.values(bias) + 1)
    tf.saved_model.save(model.program.root, str(tmp_path / "changed"))
    shutil.rmtree(saved.path / "variables")
    shutil.copytree(tmp_path / "changed" / "variables", saved.path / "variables")
    (claim,) = model.verify_untouched(saved)
    assert not claim.passed


def test_count_is_that_of_keras_without_states(exported: Any) -> None:
    count = load(exported("tf_keras", "stateful").path).count()
    # kernel 5x28, recurrent 7x28, bias 28, dense 7x2 + 2; the biases start as zeros and ones
    assert count.parameters == 140 + 196 + 28 + 14 + 2
    assert count.nonzero == 140 + 196 + 7 + 14


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", STATEFUL)
def test_reset_makes_runs_of_a_stateful_model_comparable(
    name: str, version: str, exported: Any
) -> None:
    model = load(exported(version, name).path)
    assert model.stateful
    runner = model.open()
    feed = random_feed(runner)
    first, second = runner.run(feed), runner.run(feed)
    assert first[0].tobytes() != second[0].tobytes()
    runner.reset()
    assert_same(runner.run(feed), first)
    assert_same(model.open().run(feed), first)


@pytest.mark.parametrize("version", VERSIONS)
def test_range_of_an_embedding_input_is_derived(version: str, exported: Any) -> None:
    (spec,) = load(exported(version, "embedding").path).open().inputs
    assert (spec.name, spec.dtype, spec.shape) == ("ids", np.int32, (None, None))
    assert (spec.minimum, spec.maximum) == (0, 10)


@pytest.mark.parametrize(
    "feed",
    [
        {"x": np.zeros((1, 2, 6), np.float32)},
        {"x": np.zeros((1, 2, 5), np.float64)},
        {"y": np.zeros((1, 2, 5), np.float32)},
        {},
    ],
)
def test_wrong_feed_is_refused(feed: dict[str, np.ndarray], exported: Any) -> None:
    runner = load(exported("keras", "lstm").path).open()
    with pytest.raises(RnnpruneError) as caught:
        runner.run(feed)
    assert "x float32 [?, ?, 5]" in caught.value.hint
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "options", [ExportOptions("sparse"), ExportOptions("packed"), ExportOptions("auto", "float16")]
)
def test_forms_that_only_onnx_has_are_refused(
    options: ExportOptions, exported: Any, tmp_path: Path
) -> None:
    model = load(exported("keras", "lstm").path)
    with pytest.raises(UsageError) as caught:
        model.save(random_masks(model), tmp_path, "m", options, "")
    assert ".onnx" in caught.value.hint
    assert not (tmp_path / "m").exists()


# -- signatures and damaged files -----------------------------------------------------------------


@pytest.fixture(scope="session")
def two_signatures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("two") / "m"
    w, r = tf.Variable(normal(5, 7), name="a/w"), tf.Variable(normal(7, 7), name="a/r")
    cell = Cell(lambda: w, lambda: r)
    cell.w, cell.r = w, r
    other = tf.function(lambda x: {"y": x + 1}, input_signature=[tf.TensorSpec([2], name="x")])
    tf.saved_model.save(cell, str(path), signatures={"recur": cell.call, "add": other})
    return path


def test_several_signatures_must_be_chosen_from(two_signatures: Path) -> None:
    with pytest.raises(UsageError, match=r"recur, add|add, recur"):
        load(two_signatures)
    with pytest.raises(UsageError, match="no signature 'recurr'") as caught:
        load(two_signatures, "recurr")
    assert "recur" in caught.value.hint
    assert [layer.op for layer in load(two_signatures, "recur").layers] == ["RNN"]
    assert load(two_signatures, "add").layers == ()


def test_no_signature_is_refused(tmp_path: Path) -> None:
    tf.saved_model.save(tf.Module(), str(tmp_path / "m"))
    with pytest.raises(RnnpruneError, match="no signatures"):
        load(tmp_path / "m")


def damage_graph(path: Path) -> None:
    file = path / "saved_model.pb"
    file.write_bytes(file.read_bytes()[:-100])


def empty_graph(path: Path) -> None:
    (path / "saved_model.pb").write_bytes(b"")


def garbage_graph(path: Path) -> None:
    (path / "saved_model.pb").write_bytes(bytes(range(256)) * 8)


def remove_variables(path: Path) -> None:
    shutil.rmtree(path / "variables")


def remove_shard(path: Path) -> None:
    (path / "variables" / "variables.data-00000-of-00001").unlink()


def cut_shard(path: Path) -> None:
    file = path / "variables" / "variables.data-00000-of-00001"
    file.write_bytes(file.read_bytes()[:1000])


def cut_index(path: Path) -> None:
    file = path / "variables" / "variables.index"
    file.write_bytes(file.read_bytes()[:-30])


def remove_graph(path: Path) -> None:
    (path / "saved_model.pb").unlink()


@pytest.mark.parametrize(
    "damage",
    [
        damage_graph,
        empty_graph,
        garbage_graph,
        remove_variables,
        remove_shard,
        cut_shard,
        cut_index,
        remove_graph,
    ],
)
def test_damaged_savedmodel_is_refused_in_one_line(
    damage: Callable[[Path], None], exported: Any, tmp_path: Path
) -> None:
    path = tmp_path / "m"
    shutil.copytree(exported("tf_keras", "lstm").path, path)
    damage(path)
    with pytest.raises(RnnpruneError) as caught:
        load(path)
    assert caught.value.code == ExitCode.UNSUPPORTED
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    broken = normal(7, 7)
    broken[3, 2] = np.nan
    w, r = tf.Variable(normal(5, 7), name="w"), tf.Variable(broken, name="r")
    save_cell(tmp_path / "m", lambda: w, lambda: r, w=w, r=r)
    with pytest.raises(RnnpruneError, match="NaN"):
        load(tmp_path / "m")


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.txt").write_text("hello")
    with pytest.raises(RnnpruneError, match="not a TensorFlow model"):
        load(tmp_path / "model.txt")
    with pytest.raises(RnnpruneError, match="not a SavedModel"):
        load(tmp_path)


def test_nothing_is_printed(exported: Any) -> None:
    """TensorFlow's own chatter must not reach the user, not even that of its C++ start-up."""
    code = (
        "import sys; from pathlib import Path\n"
        "from rnnprune_cli.tensorflow_model import load, to_onnx\n"
        "model = load(Path(sys.argv[1])); model.open(); to_onnx(model)"
    )
    path = exported("tf_keras", "lstm").path
    environment = {
        key: os.environ[key] for key in ("PATH", "HOME", "PYTHONPATH") if key in os.environ
    }
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd=Path(__file__).parents[1],
    )
    assert done.stdout == ""
    assert done.stderr == ""


# -- ONNX -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["lstm", "embedding", "return_state"])
def test_converted_model_computes_the_same(name: str, version: str, exported: Any) -> None:
    model = load(exported(version, name).path)
    runner = model.open()
    converted = to_onnx(model)
    session = ort.InferenceSession(converted.SerializeToString())
    assert {v.name for v in session.get_inputs()} == {spec.name for spec in runner.inputs}
    assert not isinstance(session.get_inputs()[0].shape[1], int)
    feed = random_feed(runner)
    names = [spec.name for spec in runner.outputs]
    for a, b in zip(runner.run(feed), session.run(names, feed), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def shuffled(model: onnx.ModelProto, seed: int) -> onnx.ModelProto:
    """The same model as another run of the converter could have named and sorted it."""
    rng = np.random.default_rng(seed)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    kept = {value.name for value in (*copy.graph.input, *copy.graph.output)}
    order = rng.permutation(len(copy.graph.node))
    nodes = [copy.graph.node[index] for index in order]

    def rename(name: str) -> str:
        return name if name in kept or not name else f"x{seed}/{name}"

    def visit(graph: onnx.GraphProto) -> None:
        for item in (*graph.initializer, *graph.input, *graph.output):
            item.name = rename(item.name)
        for node in graph.node:
            node.input[:] = map(rename, node.input)
            node.output[:] = map(rename, node.output)
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    visit(attribute.g)

    visit(copy.graph)
    sorted_nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del copy.graph.node[:]
    copy.graph.node.extend(sorted_nodes)
    return copy


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_converted_model_does_not_depend_on_the_converter_s_names(name: str, exported: Any) -> None:
    """A Keras 3 LSTM becomes an operator, a GRU a Loop with a body."""
    converted = to_onnx(load(exported("keras", name).path))
    onnx.checker.check_model(converted, full_check=True)
    for seed in range(3):
        other = shuffled(converted, seed)
        assert other != converted
        canonicalize(other)
        assert other.SerializeToString() == converted.SerializeToString()


def test_stateful_model_cannot_be_converted(exported: Any) -> None:
    model = load(exported("tf_keras", "stateful").path)
    with pytest.raises(RnnpruneError, match="changes variables"):
        to_onnx(model)


def test_unsupported_operator_is_named(tmp_path: Path) -> None:
    call = tf.function(
        lambda x: {"y": tf.math.bessel_i0(x)}, input_signature=[tf.TensorSpec([2], name="x")]
    )
    module = tf.Module()
    module.call = call
    tf.saved_model.save(module, str(tmp_path / "m"), signatures=call)
    with pytest.raises(RnnpruneError, match="BesselI0") as caught:
        to_onnx(load(tmp_path / "m"))
    assert "\n" not in caught.value.message


# -- Keras files ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def keras_files(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Trained models, with an optimizer, in each format of each version."""
    root = tmp_path_factory.mktemp("files")
    files = {}
    for version in VERSIONS:
        k = keras_of(version)
        k.utils.set_random_seed(3)
        layers = k.layers
        model = sequential(
            k,
            layers.Bidirectional(layers.LSTM(7, return_sequences=True)),
            layers.GRU(6),
            layers.Dense(3),
        )
        model.compile("adam", "mse")
        model.optimizer.build(model.trainable_variables)
        for suffix in (".keras", ".h5"):
            files[version, suffix] = root / f"{version}{suffix}"
            model.save(str(files[version, suffix]))
    return files


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_pruned_keras_file_equals_masked_model(
    suffix: str, version: str, keras_files: Any, tmp_path: Path
) -> None:
    source = keras_files[version, suffix]
    model = load(source)
    assert model.format == suffix[1:]
    assert [layer.op for layer in model.layers] == ["LSTM", "LSTM", "GRU"]
    saved = model.save(random_masks(model), tmp_path, f"out{suffix}", DENSE, "a note")
    again = model.save(random_masks(model), tmp_path, f"again{suffix}", DENSE, "a note")
    assert saved.path.read_bytes() == again.path.read_bytes()
    assert_stored(model, saved)
    feed = random_feed(model.open())
    expected = model.open_masked(saved.stored).run(feed)
    assert_same(model.reopen(saved).run(feed), expected)

    # Keras itself reads it, optimizer included, except that Keras 3 cannot read its own .h5 files
    # with their loss function.
    compiled = (version, suffix) != ("keras", ".h5")
    plain = keras_of(version).models.load_model(str(saved.path), compile=compiled)
    assert not compiled or plain.optimizer is not None
    np.testing.assert_allclose(np.asarray(plain(feed["x"])), expected[0], atol=1e-6)


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_changed_bias_in_a_keras_file_fails_verification(
    suffix: str, keras_files: Any, tmp_path: Path
) -> None:
    source = keras_files["keras", suffix]
    model = load(source)
    saved = model.save(random_masks(model), tmp_path, f"out{suffix}", DENSE, "")
    k = keras_of("keras")
    plain = k.models.load_model(str(saved.path), compile=False)
    plain.layers[-1].bias.assign([1, 2, 3])
    plain.save(str(saved.path))
    (claim,) = model.verify_untouched(saved)
    assert not claim.passed


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_lambda_layers_are_refused_and_never_run(suffix: str, version: str, tmp_path: Path) -> None:
    k = keras_of(version)
    model = sequential(k, k.layers.LSTM(3), k.layers.Lambda(lambda x: x + 1))
    path = tmp_path / f"m{suffix}"
    model.save(str(path))
    with pytest.raises(RnnpruneError, match="Lambda"):
        load(path)


def test_functions_of_keras_are_no_foreign_code(tmp_path: Path) -> None:
    k = keras_of("tf_keras")
    x = k.Input((None, 5), name="x")
    y = tf.nn.softmax(k.layers.LSTM(7, activation=tf.nn.relu)(x) * 2.0)
    model = k.Model(x, y)
    model.compile("adam", k.losses.mean_squared_error)
    for suffix in (".keras", ".h5"):
        model.save(str(tmp_path / f"m{suffix}"))
        assert [layer.op for layer in load(tmp_path / f"m{suffix}").layers] == ["LSTM"]


def test_function_of_python_is_refused(keras_files: Any, tmp_path: Path) -> None:
    def change(config: Any) -> None:
        config["config"]["layers"][-1]["config"]["activation"] = {
            "module": "builtins",
            "class_name": "function",
            "config": "exit",
        }

    rewrite_config(keras_files["tf_keras", ".keras"], tmp_path / "m.keras", change)
    with pytest.raises(RnnpruneError, match="builtins"):
        load(tmp_path / "m.keras")


def rewrite_config(source: Path, target: Path, change: Callable[[Any], None]) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            if info.filename == "config.json":
                config = json.loads(data)
                change(config)
                data = json.dumps(config).encode()
            new.writestr(info, data)


def test_code_of_other_modules_is_refused(keras_files: Any, tmp_path: Path) -> None:
    def change(config: Any) -> None:
        config["config"]["layers"][1]["module"] = "subprocess"
        config["config"]["layers"][1]["class_name"] = "Popen"

    rewrite_config(keras_files["keras", ".keras"], tmp_path / "m.keras", change)
    with pytest.raises(RnnpruneError, match="subprocess"):
        load(tmp_path / "m.keras")


def test_layers_that_call_any_function_of_tensorflow_are_refused(
    keras_files: Any, tmp_path: Path
) -> None:
    def change(config: Any) -> None:
        layer = config["config"]["layers"][1]
        layer["class_name"], layer["config"] = "TFOpLambda", {"function": "io.write_file"}

    rewrite_config(keras_files["tf_keras", ".keras"], tmp_path / "m.keras", change)
    with pytest.raises(RnnpruneError, match=r"tf\.io\.write_file"):
        load(tmp_path / "m.keras")


def call_function(source: Path, target: Path, kind: str, settings: dict[str, Any]) -> None:
    """Adds a layer to an .h5 that calls what the settings name, on a constant."""
    shutil.copy(source, target)
    with h5py.File(target, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        config["config"]["layers"].append(
            {
                "class_name": kind,
                "name": "extra",
                "config": {"name": "extra", "trainable": True, "dtype": "float32", **settings},
                "inbound_nodes": [["_CONSTANT_VALUE", -1, "/nowhere/evil.so", {}]],
            }
        )
        file.attrs["model_config"] = json.dumps(config)


@pytest.mark.parametrize("kind", ["TFOpLambda", "SlicingOpLambda"])
@pytest.mark.parametrize(
    "function",
    [
        "compat.v1.load_file_system_library",
        "compat.v1.load_library",
        "compat.v1.write_file",
        "compat.v1.read_file",
        "compat.v1.py_func",
        "compat.v1.import_graph_def",
        "compat.v1.math.add",
        "load_op_library",
        "numpy_function",
        "import_graph_def",
        "io.write_file",
        "data.Dataset.from_generator",
        "raw_ops.WriteFile",
        "no_such_function",
    ],
)
def test_functions_that_are_no_plain_computation_are_refused(
    function: str, kind: str, keras_files: Any, tmp_path: Path
) -> None:
    settings = {"function": function}
    call_function(keras_files["tf_keras", ".h5"], tmp_path / "m.h5", kind, settings)
    with pytest.raises(RnnpruneError, match=f"calls 'tf.{function}'") as caught:
        load(tmp_path / "m.h5")
    assert caught.value.code == ExitCode.UNSUPPORTED


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("ClassMethod", {"cls_symbol": "load_library", "method_name": "__call__"}),
        ("ClassMethod", {"cls_symbol": "io.TFRecordWriter", "method_name": "write"}),
        ("InstanceMethod", {"attr_name": "__init__"}),
        ("TensorFlowOpLayer", {"node_def": {"name": "a", "op": "WriteFile", "attr": {}}}),
        ("TensorFlowOpLayer", {"node_def": "\n\x01a\x12\x06SaveV2\x1a\x01x"}),
    ],
)
def test_methods_and_operators_that_reach_files_are_refused(
    kind: str, settings: dict[str, Any], keras_files: Any, tmp_path: Path
) -> None:
    call_function(keras_files["tf_keras", ".h5"], tmp_path / "m.h5", kind, settings)
    with pytest.raises(RnnpruneError, match="a layer calls"):
        load(tmp_path / "m.h5")


def test_plain_functions_of_tensorflow_are_allowed(tmp_path: Path) -> None:
    k = keras_of("tf_keras")
    x = k.Input((4, 5), name="x")
    y = k.layers.LSTM(6, return_sequences=True)(tf.concat([x, x], 2))
    y = tf.reduce_mean(tf.tanh(tf.reshape(y, [-1, 4, 6])[:, 1:]), 1) - 1.0
    a, b = tf.split(tf.math.softplus(y), 2, 1)
    y = tf.stack([tf.where(a > 0.5, a, tf.cast(b, tf.float32)), b], 1)
    k.Model(x, tf.matmul(y, y, transpose_b=True) * 2).save(str(tmp_path / "m.h5"))
    assert [layer.op for layer in load(tmp_path / "m.h5").layers] == ["LSTM"]


@pytest.mark.parametrize(("version", "suffix"), [("keras", ".keras"), ("tf_keras", ".h5")])
def test_sequential_keras_file_is_pruned(version: str, suffix: str, tmp_path: Path) -> None:
    k = keras_of(version)
    net = k.Sequential([k.Input((4, 5)), k.layers.LSTM(6), k.layers.Dense(2)])
    net.save(str(tmp_path / f"m{suffix}"))
    model = load(tmp_path / f"m{suffix}")
    assert [layer.op for layer in model.layers] == ["LSTM"]
    saved = model.save(random_masks(model), tmp_path, f"out{suffix}", DENSE, "")
    assert_stored(model, saved)
    feed = random_feed(model.open())
    expected = model.open_masked(saved.stored).run(feed)
    assert_same(model.reopen(saved).run(feed), expected)
    plain = k.models.load_model(str(saved.path), compile=False)
    (value,) = feed.values()
    np.testing.assert_allclose(np.asarray(plain(value)), expected[0], atol=1e-6)


# -- SavedModels that do more than compute --------------------------------------------------------


def save_call(call: Callable[[Any], Any], path: Path, dtype: Any = None) -> None:
    module = tf.Module()
    spec = tf.TensorSpec([2], dtype or tf.float32, name="x")
    module.call = tf.function(call, input_signature=[spec])
    tf.saved_model.save(module, str(path), signatures=module.call)


def write_checkpoint(path: str, value: Any) -> Any:
    return tf.raw_ops.SaveV2(
        prefix=path, tensor_names=["a"], shape_and_slices=[""], tensors=[value]
    )


HARMFUL: dict[str, Callable[[Any], Any]] = {
    "WriteFile": lambda x: tf.io.write_file("/nowhere/f", "x"),
    "ReadFile": lambda x: tf.io.read_file("/nowhere/f"),
    "MatchingFiles": lambda x: tf.io.matching_files("/nowhere/*"),
    "EagerPyFunc": lambda x: tf.py_function(lambda y: y, [x], tf.float32),
    "PyFunc": lambda x: tf.numpy_function(lambda y: y, [x], tf.float32),
    "PrintV2": lambda x: tf.print(x, output_stream="file:///nowhere/f"),
    "SaveV2": lambda x: write_checkpoint("/nowhere/f", x),
    "RestoreV2": lambda x: tf.raw_ops.RestoreV2(
        prefix="/nowhere", tensor_names=["a"], shape_and_slices=[""], dtypes=[tf.float32]
    )[0],
    "MergeV2Checkpoints": lambda x: tf.raw_ops.MergeV2Checkpoints(
        checkpoint_prefixes=["/nowhere/f"], destination_prefix="/nowhere/g"
    ),
}


@pytest.mark.parametrize("depth", ["top", "nested"])
@pytest.mark.parametrize("op", HARMFUL)
def test_signature_that_reaches_files_or_code_is_refused(
    op: str, depth: str, tmp_path: Path
) -> None:
    def effect(x: Any) -> Any:
        done = HARMFUL[op](x)
        with tf.control_dependencies([] if done is None else [done]):
            return x + 1

    def call(x: Any) -> Any:
        if depth == "top":
            return {"y": effect(x)}
        return {"y": tf.cond(tf.reduce_sum(x) > 0, lambda: effect(x), lambda: x)}

    save_call(call, tmp_path / "m")
    with pytest.raises(RnnpruneError, match=rf"operator {op}\b") as caught:
        load(tmp_path / "m")
    assert caught.value.code == ExitCode.UNSUPPORTED
    assert caught.value.hint


def test_printing_to_the_terminal_is_allowed(tmp_path: Path) -> None:
    def call(x: Any) -> Any:
        tf.print(x)
        return {"y": x + 1}

    save_call(call, tmp_path / "m")
    assert load(tmp_path / "m").layers == ()


@pytest.mark.parametrize("op", ["WriteFile", "SaveV2"])
def test_initialiser_that_writes_is_refused_before_it_runs(op: str, tmp_path: Path) -> None:
    target = str(tmp_path / "written")

    class Resource(tf.saved_model.experimental.TrackableResource):
        def _create_resource(self) -> Any:
            return tf.raw_ops.MutableHashTableV2(key_dtype=tf.int64, value_dtype=tf.int64)

        def _initialize(self) -> None:
            if op == "WriteFile":
                tf.io.write_file(target, "x")
            else:
                write_checkpoint(target, 1.0)

    class Holder(tf.Module):
        def __init__(self) -> None:
            self.resource = Resource()

        @tf.function(input_signature=[tf.TensorSpec([2], name="x")])
        def call(self, x: Any) -> Any:
            size = tf.raw_ops.LookupTableSizeV2(table_handle=self.resource.resource_handle)
            return {"y": x + tf.cast(size, tf.float32)}

    module = Holder()
    tf.saved_model.save(module, str(tmp_path / "m"), signatures=module.call)
    for file in tmp_path.glob("written*"):
        file.unlink()
    with pytest.raises(RnnpruneError, match=f"operator {op}"):
        load(tmp_path / "m")
    assert not list(tmp_path.glob("written*"))


def test_vocabulary_of_a_table_is_read(tmp_path: Path) -> None:
    (tmp_path / "words").write_text("a\nb\n")
    index = tf.lookup.TextFileIndex
    words = tf.lookup.TextFileInitializer(
        str(tmp_path / "words"), tf.string, index.WHOLE_LINE, tf.int64, index.LINE_NUMBER
    )

    class Holder(tf.Module):
        def __init__(self) -> None:
            self.table = tf.lookup.StaticVocabularyTable(words, 1)

        @tf.function(input_signature=[tf.TensorSpec([2], tf.string, "x")])
        def call(self, x: Any) -> Any:
            return {"y": self.table.lookup(x)}

    module = Holder()
    tf.saved_model.save(module, str(tmp_path / "m"), signatures=module.call)
    runner = load(tmp_path / "m").open()
    assert runner.run({"x": np.array(["b", "z"], object)})[0].tolist() == [1, 2]


@pytest.mark.parametrize("op", ["", "WriteFile", "SaveV2"])
def test_initialiser_of_tensorflow_1_is_searched(op: str, tmp_path: Path) -> None:
    v1, target = tf.compat.v1, str(tmp_path / "written")
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [2], name="x")
        start = v1.ones_initializer()  # training elsewhere may have forbidden random ones
        y = x + v1.get_variable("v", [2], initializer=start, use_resource=True)
        session.run(v1.global_variables_initializer())
        main = tf.no_op()
        if op == "WriteFile":
            main = tf.io.write_file(target, "x")
        elif op == "SaveV2":
            main = write_checkpoint(target, 1.0)
        signature = v1.saved_model.predict_signature_def({"x": x}, {"y": y})
        builder = v1.saved_model.Builder(str(tmp_path / "m"))
        signatures = {"serving_default": signature}
        builder.add_meta_graph_and_variables(session, ["serve"], signatures, main_op=main)
        builder.save()
    if not op:
        assert load(tmp_path / "m").layers == ()
        return
    with pytest.raises(RnnpruneError, match=f"operator {op}"):
        load(tmp_path / "m")
    assert not list(tmp_path.glob("written*"))


def test_zip_bomb_is_refused(keras_files: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    shutil.copy(keras_files["keras", ".keras"], path)
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open("bomb", "w") as sink,
    ):
        for _ in range(300):
            sink.write(bytes(1 << 20))
    with pytest.raises(RnnpruneError, match="would unpack"):
        load(path)


def test_bomb_inside_hdf5_is_refused(keras_files: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.h5"
    shutil.copy(keras_files["tf_keras", ".h5"], path)
    with h5py.File(path, "a") as file:
        file.create_dataset("bomb", shape=(1 << 40,), dtype="f4", chunks=(1 << 20,))
    with pytest.raises(RnnpruneError, match="would unpack"):
        load(path)


def test_link_to_another_file_is_refused(keras_files: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.h5"
    shutil.copy(keras_files["tf_keras", ".h5"], path)
    with h5py.File(path, "a") as file:
        file["model_weights/extra"] = h5py.ExternalLink("/etc/passwd", "/")
    with pytest.raises(RnnpruneError, match="link"):
        load(path)


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize("size", [0, 10, 5000])
def test_truncated_keras_file_is_refused_in_one_line(
    size: int, suffix: str, keras_files: Any, tmp_path: Path
) -> None:
    path = tmp_path / f"m{suffix}"
    path.write_bytes(keras_files["keras", suffix].read_bytes()[:size])
    with pytest.raises(RnnpruneError) as caught:
        load(path)
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message


def test_weights_without_a_model_are_refused(tmp_path: Path) -> None:
    k = keras_of("tf_keras")
    sequential(k, k.layers.LSTM(3)).save_weights(str(tmp_path / "m.h5"))
    with pytest.raises(RnnpruneError, match="weights but no model"):
        load(tmp_path / "m.h5")
