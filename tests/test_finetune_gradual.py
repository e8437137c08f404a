"""Weights that go during training, as the toolkit lets them go, and units that fade away."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import run
from test_finetune_data import stream
from test_methods_tfmot import HIDDEN as TOOLKIT_HIDDEN
from test_methods_tfmot import INPUTS as TOOLKIT_INPUTS
from test_methods_tfmot import pruned
from tuning import HIDDEN, inputs, network, recurrent, tune

from rnnprune_cli.apply import Applied, Applier
from rnnprune_cli.errors import UsageError
from rnnprune_cli.gate_order import keras_to_onnx
from rnnprune_cli.model import GATES, Array, BoolArray, ExportOptions, FineTune, Stage
from rnnprune_cli.options import PruneOptions, complete_stage
from rnnprune_cli.pipeline import prune
from rnnprune_cli.trainer.schedule import SCHEDULES

if importlib.util.find_spec("tensorflow_model_optimization") is None:
    pytest.skip("TensorFlow is an optional dependency", allow_module_level=True)

X = {"x": inputs()}


# Schedules


@pytest.mark.parametrize("updates", [1, 2, 7, 20, 21, 100, 1234])
@pytest.mark.parametrize("final", [0.3, 0.5, 0.875])
def test_sparsity_rises_as_a_polynomial_and_is_reached_exactly(updates, final):
    """Zhu and Gupta 2017: s = final (1 - (1 - t / end) ** 3), in ten steps over half of it."""
    sparsity_at = SCHEDULES["polynomial"](final)
    found = {t: s for t in range(updates) if (s := sparsity_at(t, updates)) is not None}
    every = max(1, round(updates / 20))
    end = every * min(10, max(1, updates // every))
    for update, sparsity in found.items():
        wanted = final * (1 - (1 - min(update / end, 1)) ** 3)
        assert sparsity == pytest.approx(wanted, rel=1e-6)
        assert update % every == 0 or update >= end
    assert sparsity_at(updates, updates) == final  # asked once more at the end
    assert len([t for t in found if t < end]) == end // every - 1
    assert all(s == final for t, s in found.items() if t >= end)


@pytest.mark.parametrize("updates", [1, 9, 10, 100, 105])
def test_a_constant_schedule_begins_after_a_tenth(updates):
    sparsity_at = SCHEDULES["constant"](0.6)
    begin = max(1, updates // 10)
    assert [sparsity_at(t, updates) for t in range(begin)] == [None] * begin
    assert {sparsity_at(t, updates) for t in range(begin, updates + 1)} == {0.6}


# Masks


@dataclasses.dataclass(eq=False)
class Change:
    """One change of masks: what the weights were before, and what of them was kept."""

    sparsity: float
    before: dict[str, Array]
    masks: dict[str, BoolArray]


@pytest.fixture
def changes(monkeypatch) -> list[Change]:
    """All stages of single weights that are applied, as they are."""
    found: list[Change] = []
    add = Applier.add

    def watched(self: Applier, done: Applied, stage: Stage, *more: Any) -> Applied:
        weights = [w for layer in done.model.layers for w in layer.weights]
        before = {
            w.name: (done.pruned[w.name]() if w.name in done.pruned else w.read()) for w in weights
        }
        result = add(self, done, stage, *more)
        masks = {name: kept.mask for name, kept in result.pruned.items()}
        found.append(Change(stage.sparsity, before, masks))
        return result

    monkeypatch.setattr(Applier, "add", watched)
    return found


@pytest.mark.parametrize("schedule", ["polynomial", "constant"])
@pytest.mark.parametrize("granularity", ["weight", "block:4x1", "bank:4"])
def test_exact_sparsity_is_reached_during_training(tmp_path, changes, granularity, schedule):
    report = tune(
        tmp_path, network("GRU"), X, 0.75, granularity=granularity, schedule=schedule,
        validation=X, epochs=3, batch=8, lr=0.01, compensate=False,
    )  # fmt: skip
    assert report.finetune.best > 0 and report.finetune.schedule == schedule
    (after,) = recurrent(tmp_path / "out.onnx")
    assert np.mean(np.concatenate([after["W"], after["R"]], 2) == 0) == 0.75
    assert report.finetune.epochs[-1].sparsity == 0.75
    one_shot, *during = changes
    assert one_shot.sparsity == 0.75
    if schedule == "constant":
        assert [c.sparsity for c in during] == [0.75]
    else:
        # One that rounds to the masks that are there already is none.
        steps = [0.75 * (1 - (1 - t / 10) ** 3) for t in range(1, 11)]
        found = [c.sparsity for c in during]
        assert found == sorted(found) and len(found) >= 3
        assert all(min(abs(f - s) for s in steps) < 1e-6 for f in found)
    for one, two in itertools.pairwise(during):
        for name, mask in two.masks.items():
            if name in one.masks:
                assert not (mask & ~one.masks[name]).any()  # what is gone does not come back
            assert not two.before[name][~one.masks.get(name, np.ones_like(mask))].any()
    assert any(
        (change.before[name] != one_shot.before[name]).any()
        for change in during
        for name in change.masks
    )  # training went on in between


TOOLKIT_MASKS = """
import json, sys
import numpy as np
import tensorflow_model_optimization as tfmot  # wants Keras 2, and says so to TensorFlow
import tensorflow as tf
from tensorflow_model_optimization.python.core.sparsity.keras import pruning_impl

folder, cases = json.loads(sys.argv[1])
for number, (sparsity, block) in enumerate(cases):
    with np.load(f"{folder}/before{number}.npz") as arrays:
        before = dict(arrays)
    kept = [(tf.Variable(v), tf.Variable(tf.ones(v.shape)), tf.Variable(0.0))
            for v in before.values()]
    plan = tfmot.sparsity.keras.ConstantSparsity(sparsity, begin_step=0, frequency=1)
    step = tf.constant(1, tf.int64)
    pruning = pruning_impl.Pruning(lambda: step, kept, plan, block, "AVG")
    tf.function(pruning.conditional_mask_update)()
    np.savez(f"{folder}/masks{number}.npz",
             **{name: mask.numpy() for name, (_, mask, _) in zip(before, kept)})
"""


def toolkit(script: str, arguments: object) -> None:
    """Runs a script with the toolkit, in a process of its own: it turns Keras into Keras 2."""
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(arguments)],
        env={**os.environ, **quiet},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_masks_during_training_are_those_of_the_toolkit(tmp_path, changes):
    """From the weights that training has come to, at each change, for each operator and block."""
    cases = []
    for op in GATES:
        for granularity, block in (("weight", (1, 1)), ("block:4x2", (2, 4))):
            changes.clear()
            tune(
                tmp_path, network(op), X, 0.7, granularity=granularity, scope="layer", batch=8,
                schedule="polynomial", epochs=2, lr=0.01, compensate=False, force=True,
            )  # fmt: skip
            assert len(changes) >= 6
            cases += [(change, block) for change in changes]
    for number, (change, _) in enumerate(cases):
        matrices = {f"w{k}": v[0].T for k, v in enumerate(change.before.values())}
        np.savez(tmp_path / f"before{number}.npz", **matrices)
    told = [(change.sparsity, block) for change, block in cases]
    toolkit(TOOLKIT_MASKS, [str(tmp_path), told])
    for number, (change, _) in enumerate(cases):
        with np.load(tmp_path / f"masks{number}.npz") as arrays:
            for k, name in enumerate(change.before):
                assert np.array_equal(change.masks[name][0].T, arrays[f"w{k}"] != 0)


TOOLKIT_TRAINING = """
import json, sys
import numpy as np
import tensorflow_model_optimization as tfmot  # wants Keras 2, and says so to TensorFlow
import tensorflow as tf
import tf_keras as keras

folder, inputs, hidden, updates, plan = json.loads(sys.argv[1])
layers = {"LSTM": keras.layers.LSTM, "GRU": keras.layers.GRU, "RNN": keras.layers.SimpleRNN}
sparsity = tfmot.sparsity.keras


class Watch(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        self.before = [weight.numpy() for weight, _, _ in self.wrapper.pruning_vars]

    def on_train_batch_end(self, batch, logs=None):
        masks = [mask.numpy() for _, mask, _ in self.wrapper.pruning_vars]
        np.savez(f"{folder}/{self.op}{batch}.npz", **dict(zip("wrmn", [*self.before, *masks])))


for op, layer in layers.items():
    keras.utils.set_random_seed(0)
    schedule = sparsity.PolynomialDecay(**plan)
    wrapper = sparsity.prune_low_magnitude(layer(hidden), schedule)
    model = keras.Sequential([keras.Input((None, inputs)), wrapper])
    model.compile(keras.optimizers.Adam(0.01), "mse")
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2 * updates, 5, inputs)), rng.standard_normal((2 * updates, hidden))
    watch = Watch()
    watch.wrapper, watch.op = wrapper, op
    model.fit(x.astype(np.float32), y, batch_size=2, shuffle=False, verbose=0,
              callbacks=[sparsity.UpdatePruningStep(), watch])
"""


def test_models_that_the_toolkit_trains_get_the_same_masks_from_the_same_weights(tmp_path):
    updates, final = 20, 0.8
    plan = {"initial_sparsity": 0.0, "final_sparsity": final, "begin_step": 0, "end_step": 10}
    sizes = [TOOLKIT_INPUTS, TOOLKIT_HIDDEN, updates]
    toolkit(TOOLKIT_TRAINING, [str(tmp_path), *sizes, {**plan, "frequency": 1}])
    sparsity_at = SCHEDULES["polynomial"](final)
    for op in GATES:
        for batch in range(10):  # then the toolkit looks no more
            with np.load(tmp_path / f"{op}{batch}.npz") as arrays:
                w, r, *wanted = (keras_to_onnx(op, arrays[name]) for name in "wrmn")
            # The toolkit counts the batch that it is in.
            share = sparsity_at(batch + 1, updates)
            masks = pruned(op, w, r, Stage("magnitude", "weight", "layer", share))
            for mask, own in zip(masks, wanted, strict=True):
                assert np.array_equal(mask, own != 0)
                assert np.mean(~mask) == pytest.approx(share, abs=1 / mask.size)


# Units


@dataclasses.dataclass(eq=False)
class Cut:
    """A stage that removed units: the files before and after."""

    before: bytes
    after: bytes
    kept: list[list[int]]


@pytest.fixture
def cuts(monkeypatch) -> list[Cut]:
    """All stages of units that are applied, as they are."""
    found: list[Cut] = []
    add = Applier.add

    def watched(self: Applier, done: Applied, stage: Stage, *more: Any) -> Applied:
        result = add(self, done, stage, *more)
        files = [model.files[0].read_bytes() for model in (done.model, result.model)]
        found.append(Cut(*files, [list(rows) for rows in result.units[0].kept]))
        return result

    monkeypatch.setattr(Applier, "add", watched)
    return found


@pytest.mark.parametrize(
    ("op", "reset", "direction", "method"),
    [
        ("LSTM", 0, "bidirectional", "magnitude"),
        ("LSTM", 0, "forward", "group-norm"),
        ("GRU", 0, "reverse", "magnitude"),
        ("GRU", 1, "forward", "obs"),
        ("RNN", 0, "forward", "random"),
        ("RNN", 0, "bidirectional", "activation"),
    ],
)
def test_units_have_faded_away_before_they_are_cut(tmp_path, cuts, op, reset, direction, method):
    report = tune(
        tmp_path, network(op, direction, reset=reset), X, granularity="unit", method=method,
        validation=X, epochs=4, batch=8, lr=0.01, schedule="polynomial",
    )  # fmt: skip
    one_shot, faded = cuts
    assert len(report.finetune.epochs) == 4
    proto = onnx.load_from_string(faded.before)
    (layer,) = recurrent(proto)
    for direction_, kept in enumerate(one_shot.kept):
        gone = np.setdiff1d(np.arange(HIDDEN), kept)
        assert len(gone) == HIDDEN // 2
        blocks = GATES[op]
        for name in "WR":
            rows = layer[name][direction_].reshape(blocks, HIDDEN, -1)
            assert not rows[:, gone].any() and rows[:, kept].any()
        assert not layer["B"][direction_].reshape(2 * blocks, HIDDEN)[:, gone].any()
    assert faded.kept == one_shot.kept
    one, two = (run(onnx.load_from_string(file), X)[0] for file in (faded.before, faded.after))
    np.testing.assert_allclose(one, two, atol=1e-6 * np.abs(one).max())
    if report.finetune.best:
        assert recurrent(tmp_path / "out.onnx")[0]["R"].shape[2] == HIDDEN // 2
        assert report.layers[0].hidden_after == HIDDEN // 2


REFUSED = {
    "constant units": ({"granularity": "unit", "schedule": "constant"}, "for single weights"),
    "nothing": ({"sparsity": 0.0, "schedule": "polynomial"}, "nothing to reach"),
    "one sparsity": (
        {"granularity": "nm:2:4", "sparsity": None, "schedule": "polynomial"}, "one sparsity"
    ),
    "unknown": ({"schedule": "polinomial"}, "no schedule 'polinomial'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_schedules_that_make_no_sense_are_refused(tmp_path, name):
    given, message = REFUSED[name]
    model = network()
    with pytest.raises(UsageError, match=message) as caught:
        tune(tmp_path, model, X, epochs=1, **given)
    assert caught.value.hint
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("schedule", ["one-shot", "polynomial", "constant"])
def test_weights_go_gradually_after_units_have_gone(tmp_path, schedule):
    (tmp_path / "model.onnx").write_bytes(network().SerializeToString())
    np.savez(tmp_path / "train.npz", **X)
    stages = [("unit", 0.5), ("weight", 0.75)]
    options = PruneOptions(
        model=tmp_path / "model.onnx",
        output=tmp_path / "out.onnx",
        stages=tuple(complete_stage("magnitude", kind, None, share) for kind, share in stages),
        export=ExportOptions("dense"),
        latency_seconds=0.0,
        finetune=FineTune(
            epochs=3,
            train=tmp_path / "train.npz",
            validation=tmp_path / "train.npz",
            batch=8,
            lr=0.01,
            schedule=schedule,
        ),
    )
    report = prune(options, {}, lambda step: None)
    assert report.finetune.best > 0
    (layer,) = recurrent(tmp_path / "out.onnx")
    assert layer["R"].shape[2] == HIDDEN // 2
    assert np.mean(np.concatenate([layer["W"], layer["R"]], axis=2) == 0) == 0.75


@pytest.mark.parametrize("resize_state", [False, True])
def test_units_of_streaming_models_fade_away(tmp_path, cuts, resize_state):
    train = stream(20)
    report = tune(
        tmp_path, network(states=True), train, granularity="unit", resize_state=resize_state,
        schedule="polynomial", validation=train, epochs=4, batch=5, lr=0.01,
    )  # fmt: skip
    one_shot, faded = cuts
    assert faded.kept == one_shot.kept
    assert all(claim.passed for claim in report.verification)
    assert bool(report.states) == resize_state
