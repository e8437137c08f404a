"""Fine-tuning: what is removed stays removed; the same again; what is refused."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import GRAPHS, Graph, two_layers, weights
from test_cli import rnnprune
from tuning import HIDDEN, INPUTS, inputs, network, recurrent, stored, tune

from rnnprune_cli import cli
from rnnprune_cli.errors import RnnpruneError, UsageError
from rnnprune_cli.model import FineTune

VARIANTS = [
    (op, reset, direction)
    for op, reset in (("LSTM", 0), ("GRU", 0), ("GRU", 1), ("RNN", 0))
    for direction in ("forward", "reverse", "bidirectional")
]
PATTERNS = ("weight", "block:4x1", "bank:8", "nm:2:4", "unit")
CASES = [
    (variant, PATTERNS[(k + 2 * m) % len(PATTERNS)])
    for m in range(2)
    for k, variant in enumerate(VARIANTS)
]


def share(granularity: str) -> float | None:
    return None if granularity == "nm:2:4" else 0.5


@pytest.mark.parametrize(("variant", "granularity"), CASES, ids=str)
def test_removed_weights_stay_exactly_zero_and_others_learn(tmp_path, variant, granularity):
    op, reset, direction = variant
    model = network(op, direction, reset=reset)
    x = {"x": inputs()}
    same = {"granularity": granularity, "sparsity": share(granularity), "compensate": False}
    tune(tmp_path, model, None, name="one", **same)
    report = tune(tmp_path, model, x, validation=x, epochs=2, lr=0.01, batch=8, **same)
    assert report.finetune.best > 0
    assert all(claim.passed for claim in report.verification)
    (before,), (after,) = (recurrent(tmp_path / f"{name}.onnx") for name in ("one", "out"))
    for name, values in after.items():
        kept = before[name] != 0
        assert np.array_equal(values != 0, kept)
        assert np.mean(values[kept] != before[name][kept]) > 0.9
    (row,) = report.layers
    zeros = sum(int((after[name] == 0).sum()) for name in "WR")
    sizes = sum(after[name].size for name in "WR")
    if granularity == "unit":
        assert zeros == 0 and row.hidden_after == after["R"].shape[2] == HIDDEN // 2
    else:
        assert zeros == sizes // 2 and row.nonzero_after == sizes - zeros
        assert row.sparsity == 0.5
        assert [e.sparsity for e in report.finetune.epochs] == [0.5, 0.5]


@pytest.mark.parametrize("granularity", ["weight", "block:4x1", "nm:2:4"])
def test_masks_of_dense_layers_hold_too(tmp_path, granularity):
    x = {"x": inputs()}
    same = {"granularity": granularity, "sparsity": share(granularity), "include": ["dense"]}
    model = network(outputs=8, end="Softmax")
    tune(tmp_path, model, None, name="one", compensate=False, **same)
    report = tune(tmp_path, model, x, validation=x, compensate=False, epochs=2, lr=0.01, **same)
    assert report.finetune.best > 0
    one, two = (_dense(tmp_path / f"{name}.onnx") for name in ("one", "out"))
    assert np.array_equal(one != 0, two != 0) and np.mean(two == 0) == 0.5
    assert np.mean(one != two) > 0.45


def _dense(path: Path) -> np.ndarray:
    known = stored(path)
    (node,) = (n for n in onnx.load(str(path)).graph.node if n.op_type == "MatMul")
    return known[node.input[1]]


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
@pytest.mark.parametrize("granularity", ["weight", "unit"])
@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
def test_every_precision_is_trained_and_stays_what_it_is(tmp_path, op, granularity, dtype):
    model = network(op, dtype=dtype)
    x = {"x": inputs().astype(dtype)}
    same = {"granularity": granularity, "compensate": False}
    report = tune(tmp_path, model, x, validation=x, epochs=2, lr=0.01, **same)
    assert report.finetune.best > 0 and report.finetune.rollbacks == 0
    before = recurrent(model)[0]
    after = recurrent(tmp_path / "out.onnx")[0]
    assert all(
        values.dtype == dtype
        for values in stored(tmp_path / "out.onnx").values()
        if values.dtype.kind == "f"
    )
    if granularity == "weight":
        assert np.mean(np.concatenate([after["W"], after["R"]], axis=2) == 0) == 0.5
        assert not np.array_equal(after["R"][after["R"] != 0], before["R"][after["R"] != 0])


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("schedule", ["one-shot", "polynomial"])
def test_what_layers_share_is_trained_as_one(tmp_path, copy, schedule):
    x = {"x": np.random.default_rng(6).standard_normal((30, 5, 1, 7)).astype(np.float32)}
    model = two_layers(share_r=not copy, copy=copy)
    report = tune(
        tmp_path, model, x, validation=x, epochs=2, batch=4, lr=0.01, compensate=False,
        schedule=schedule,
    )  # fmt: skip
    assert report.finetune.best > 0
    before = recurrent(model)
    first, second = recurrent(tmp_path / "out.onnx")
    assert np.array_equal(first["R"], second["R"])
    assert np.array_equal(first["W"], second["W"]) == copy
    assert not np.array_equal(first["R"][first["R"] != 0], before[0]["R"][first["R"] != 0])
    assert abs(np.mean(first["R"] == 0) - 0.5) < 0.1


PLACES = (
    "hand_if_one_branch",
    "hand_if_outer_weights",
    "hand_if_equal_copies",
    "hand_if_in_loop",
    "hand_loop_step",
    "hand_loop_body_weights",
    "hand_scan_step",
    "hand_function_constants",
    "hand_function_nested",
    "hand_function_weight_inputs",
    "hand_w_weight_norm",
    "hand_w_partly_shared",
    "hand_w_shared",
    "hand_w_sparse_initializer",
    "hand_w_external",
    "hand_ir3_inputs",
    "hand_peephole",
    "hand_duplicate_names",
    "dyn_tied_layers",
    "dyn_lstm_attention",
)


@pytest.mark.parametrize("name", PLACES)
def test_weights_are_trained_wherever_they_are(tmp_path, name):
    with np.load(GRAPHS / f"{name}.npz") as given:
        one = {k.removeprefix("input:"): given[k] for k in given if k.startswith("input:")}
    rng = np.random.default_rng(0)
    data = {
        k: v
        if not v.ndim
        else np.stack(
            [
                v
                + rng.standard_normal(v.shape).astype(v.dtype)
                * (v.dtype.kind == "f" and v.ndim > 1)
                for _ in range(8)
            ]
        )
        for k, v in one.items()
    }
    report = tune(
        tmp_path, GRAPHS / f"{name}.onnx", data, 0.8, validation=data, epochs=2, batch=4,
        lr=0.003, compensate=False,
    )  # fmt: skip
    assert report.finetune.best > 0
    assert report.layers
    for row in report.layers:
        assert row.blocked is None and row.sparsity == pytest.approx(0.8, abs=0.04)
    assert all(claim.passed for claim in report.verification)


# Reports, recipes, and the same again


def test_two_runs_write_the_same_bytes(tmp_path):
    x = {"x": inputs(), "labels": np.random.default_rng(0).integers(0, 3, (48, 6))}
    for name in ("one", "two"):
        tune(tmp_path, network("GRU"), x, name=name, epochs=2, batch=7, lr=0.01)
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()
    tune(tmp_path, network("GRU"), x, name="three", epochs=2, batch=7, lr=0.01, seed=1)
    one, three = (recurrent(tmp_path / f"{name}.onnx")[0]["R"] for name in ("one", "three"))
    assert np.array_equal(one == 0, three == 0) and not np.array_equal(one, three)


def test_logs_for_tensorboard_hold_losses_and_metrics(tmp_path):
    tune(tmp_path, network(), {"x": inputs()}, epochs=2, batch=8, logdir=tmp_path / "logs")
    from rnnprune_cli.trainer.call import tf

    (file,) = (tmp_path / "logs").rglob("events.*")
    found: dict[str, list[int]] = {}
    for record in tf.data.TFRecordDataset(str(file)):
        event = tf.compat.v1.Event.FromString(record.numpy())
        for value in event.summary.value:
            assert value.metadata.plugin_data.plugin_name == "scalars"
            assert np.isfinite(tf.make_ndarray(value.tensor))
            found.setdefault(value.tag, []).append(event.step)
    each = {"loss", "gradient_norm", "learning_rate", "sparsity"}
    assert found.keys() == each | {"validation_loss", "drop", "relative-error"}
    assert found["loss"] == list(range(1, 13)) and found["drop"] == [6, 12]


@pytest.fixture
def files(tmp_path) -> Path:
    """A folder with a model and data for it."""
    (tmp_path / "model.onnx").write_bytes(network().SerializeToString())
    rng = np.random.default_rng(0)
    for name, count in (("train", 40), ("held", 20), ("test", 30)):
        labels = rng.integers(0, 3, (count, 6))
        np.savez(tmp_path / f"{name}.npz", x=inputs(count, seed=count), labels=labels)
    return tmp_path


def test_recipes_and_reports_repeat_a_run_to_the_byte(files):
    more = {
        "finetune": 2, "train": "train.npz", "validation": "held.npz", "data": "test.npz",
        "lr": 0.01, "batch": 8, "distill": 0.4, "temperature": 3, "clip": 0.5, "seed": 3,
        "save-recipe": "recipe.toml", "report": "report.json", "loss-weight": "v5_0=2",
    }  # fmt: skip
    words = [word for name, value in more.items() for word in (f"--{name}", value)]
    done = rnnprune(
        "prune", "model.onnx", "-s", 0.5, "-o", "out.onnx", "--format", "json", "--balance",
        *words, cwd=files,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    log = document["finetune"]
    assert len(log["epochs"]) == 2 and log["samples"] == [40, 20] and log["steps"] == 10
    assert {"loss", "validation_loss", "metrics", "drop", "sparsity", "lr", "seconds"} == set(
        log["epochs"][0]
    )
    assert log["epochs"][0]["metrics"][0]["name"] == "accuracy"
    assert log["loss"].startswith("1.2 x cross-entropy of v5_0 + 0.8 x distance")
    assert document["plan"]["finetune"]["lr"] == 0.01
    assert not (files / "out.onnx.training").exists()
    wanted = (files / "out.onnx").read_bytes()
    for source in ("recipe.toml", "report.json"):
        done = rnnprune("run", source, "-o", "again.onnx", "--force", cwd=files)
        assert done.returncode == 0, done.stderr
        assert "not, byte for byte" not in done.stdout
        assert (files / "again.onnx").read_bytes() == wanted
    assert str(files).encode() not in wanted  # where things lie is nobody's business


def test_the_table_tells_how_training_went(files):
    done = rnnprune(
        "prune", "model.onnx", "-s", 0.5, "--finetune", 2, "--train", "train.npz", "--batch", 8,
        cwd=files,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "epoch" in done.stdout and "accuracy" in done.stdout


# What is refused

ALONE = {
    "train": "train.npz",
    "validation": "held.npz",
    "distill": 0.5,
    "temperature": 3,
    "lr": 0.01,
    "batch": 8,
    "schedule": "polynomial",
    "patience": 3,
    "clip": 2,
    "bptt": 4,
    "balance": None,
    "loss-weight": "y=2",
    "freeze": "rnn",
    "resume": None,
    "logdir": "logs",
    "strategy": "mirrored",
    "noise": 0.1,
}


def test_all_options_of_fine_tuning_are_known_here():
    known = {f.name for f in dataclasses.fields(FineTune)} - {"epochs"}
    assert {name.replace("-", "_") for name in ALONE} == known - {"output_weights"} | {
        "loss_weight"
    }


@pytest.mark.parametrize("option", ALONE)
def test_options_of_fine_tuning_want_it(monkeypatch, capsys, files, option):
    value = ALONE[option]
    words = [f"--{option}", *([] if value is None else [str(value)])]
    code, said = ended(
        monkeypatch, capsys, "prune", files / "model.onnx", "-s", 0.5, "--data",
        files / "test.npz", *words,
    )  # fmt: skip
    assert code == 2
    assert f"--{option} is for fine-tuning" in said and "--finetune EPOCHS" in said
    assert not (files / "model.pruned.onnx").exists()


def ended(monkeypatch, capsys, *arguments: object) -> tuple[int, str]:
    """Runs the command line in this process; returns the exit code and stderr."""
    monkeypatch.setattr(sys, "argv", ["rnnprune", *map(str, arguments)])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ending:
        cli.main()
    return ending.value.code, " ".join(capsys.readouterr().err.split())


BAD = {
    "no data": ((), "fine-tuning needs data", "--train"),
    "no epochs": (("--finetune", -1), "-1 is no number of epochs", "such as"),
    "distill": (("--distill", 1.5), "not between 0 and 1", "share of the loss"),
    "distill nan": (("--distill", "nan"), "not between 0 and 1", "share of the loss"),
    "temperature": (("--temperature", 0), "--temperature 0", "leave it out"),
    "lr": (("--lr", -1), "--lr -1", "leave it out"),
    "lr nan": (("--lr", "nan"), "--lr nan", "leave it out"),
    "lr inf": (("--lr", "inf"), "--lr inf", "leave it out"),
    "batch": (("--batch", 0), "--batch 0", "leave it out"),
    "patience": (("--patience", 0), "--patience 0", "leave it out"),
    "clip": (("--clip", 0), "--clip 0", "leave it out"),
    "noise": (("--noise", -1), "--noise -1", "leave it out"),
    "bptt": (("--bptt", 0), "--bptt 0", "leave it out"),
    "schedule": (("--schedule", "polinomial"), "no schedule", "'polynomial'"),
    "strategy": (("--strategy", "miror"), "no strategy", "'mirrored'"),
    "weight": (("--loss-weight", "2"), "no OUTPUT=WEIGHT", "such as"),
    "weight of nothing": (("--loss-weight", "why=2"), "no output 'why'", "v5_0"),
    "negative weight": (("--loss-weight", "v5_0=-2"), "no OUTPUT=WEIGHT", "such as"),
    "freeze": (("--freeze", "rn"), "no weight matches --freeze 'rn'", "'rnn'"),
    "distill without labels": (("--distill", 0.5), "the data have none", "leave --distill out"),
    "no file": (("--train", "none.npz"), "none.npz", ""),
}
UNLABELLED = ("distill without labels",)


@pytest.mark.parametrize("name", BAD)
def test_values_that_make_no_sense_are_refused(monkeypatch, capsys, files, name):
    words, message, hint = BAD[name]
    train = files / "plain.npz"
    np.savez(train, x=inputs())
    data = (
        []
        if name == "no data"
        else ["--train", train if name in UNLABELLED else files / "train.npz"]
    )
    code, said = ended(
        monkeypatch, capsys, "prune", files / "model.onnx", "-s", 0.5, "--finetune", 1, *data,
        *words,
    )  # fmt: skip
    assert code == (3 if name == "no file" else 2), said
    assert message in said and hint in said
    assert not (files / "model.pruned.onnx").exists()


def test_an_operator_that_is_not_supported_is_named_before_anything_is_trained(tmp_path):
    g = Graph(["time", 1, INPUTS])
    made = weights("LSTM", 8, INPUTS, 1, 0)
    y = g.op("LSTM", "x", *(made[k] for k in "WRB"), hidden_size=8)
    scales = np.array([1, 1, 2, 2], np.float32)
    g.output(g.op("Resize", g.op("Transpose", y, perm=[1, 2, 0, 3]), None, scales))
    steps: list[str] = []
    with pytest.raises(RnnpruneError, match=r"Resize \('n2'\)") as caught:
        tune(tmp_path, g.model(), {"x": inputs(8)[:, :, None]}, epochs=1, told=steps.append)
    assert caught.value.hint
    assert not any("epoch" in step for step in steps)
    assert not (tmp_path / "out.onnx").exists()
    assert not (tmp_path / "out.onnx.training").exists()


@pytest.mark.parametrize("granularity", ["weight", "unit"])
def test_frozen_weights_stay_as_they_are(tmp_path, granularity):
    x, model = {"x": inputs()}, network()
    same = {"granularity": granularity, "compensate": False}
    tune(tmp_path, model, None, name="one", **same)
    report = tune(
        tmp_path, model, x, validation=x, epochs=2, lr=0.01, freeze=("rnn",), **same
    )  # fmt: skip
    assert report.finetune.best > 0
    one, out = (recurrent(tmp_path / f"{name}.onnx")[0] for name in ("one", "out"))
    assert all(np.array_equal(one[name], out[name]) for name in "WRB")
    heads = [
        {a.tobytes() for a in stored(tmp_path / f"{name}.onnx").values() if a.dtype.kind == "f"}
        for name in ("one", "out")
    ]
    assert len(heads[0] - heads[1]) == 2  # the dense layer and its bias


def test_frozen_weights_cannot_go_while_training(tmp_path):
    x = {"x": inputs()}
    with pytest.raises(UsageError, match="--freeze holds 'rnn") as caught:
        tune(tmp_path, network(), x, epochs=2, freeze=("rnn",), schedule="polynomial")
    assert "one-shot" in caught.value.hint


def test_the_report_says_how_much_is_trained(tmp_path):
    x = {"x": inputs()}
    every, some = (
        tune(tmp_path, network(), x, epochs=1, freeze=freeze, name=f"{len(freeze)}")
        for freeze in ((), ("rnn",))
    )
    trained, parameters = every.finetune.parameters
    assert trained == parameters == every.after.parameters
    assert some.finetune.parameters[0] < trained == some.finetune.parameters[1]
