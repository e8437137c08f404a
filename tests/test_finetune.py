"""Fine-tuning: what is removed stays removed, and nothing gets worse."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import GRAPHS, Graph, run, two_layers, weights
from onnx import helper, numpy_helper
from tuning import HIDDEN, INPUTS, inputs, network, recurrent, stored, tune

from rnnprune_cli.errors import RnnpruneError, UsageError
from rnnprune_cli.model import Report

HELD = 5
"""Of 48 samples a tenth validates."""
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
    assert all(values.dtype == dtype for values in stored(tmp_path / "out.onnx").values() if values.dtype.kind == "f")
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
    "hand_if_same_names",
    "hand_if_in_loop",
    "hand_loop_step",
    "hand_loop_body_weights",
    "hand_scan_step",
    "hand_function_constants",
    "hand_function_attribute",
    "hand_function_nested",
    "hand_function_weight_inputs",
    "hand_w_keras_kernel",
    "hand_w_torch_chain",
    "hand_w_weight_norm",
    "hand_w_partly_shared",
    "hand_w_shared",
    "hand_w_sparse_initializer",
    "hand_w_external",
    "hand_opset7",
    "hand_ir3_inputs",
    "hand_peephole",
    "hand_duplicate_names",
    "dyn_tied_layers",
    "dyn_shared_layer",
    "dyn_lstm_attention",
)


@pytest.mark.parametrize("name", PLACES)
def test_weights_are_trained_wherever_they_are(tmp_path, name):
    with np.load(GRAPHS / f"{name}.npz") as given:
        one = {k.removeprefix("input:"): given[k] for k in given if k.startswith("input:")}
    rng = np.random.default_rng(0)
    data = {
        k: v if not v.ndim else np.stack([v + rng.standard_normal(v.shape).astype(v.dtype) * (v.dtype.kind == "f" and v.ndim > 1) for _ in range(8)])
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
