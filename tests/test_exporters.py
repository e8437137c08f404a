"""Graphs of other exporters: pruned and verified, or refused with a reason. See tests/graphs."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from conftest import GRAPHS

from rnnprune_cli.errors import ExitCode, RnnpruneError
from rnnprune_cli.load import load
from rnnprune_cli.model import GATES

INDEX = json.loads((GRAPHS / "index.json").read_text())
# Weights that only exist when the model runs.
AT_RUN_TIME = {
    "hand_w_chosen_at_run_time": "Gather",
    "hand_w_from_input": "graph input",
    "hand_w_graph_inputs": "graph input",
    "ts_weights_as_inputs": "graph input",
}


def prunable(entry: dict) -> list[dict]:
    return [node for node in entry["recurrent"] if node["op"] in GATES]


def feed_of(name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    data = np.load(GRAPHS / f"{name}.npz")
    feeds = {k.removeprefix("input:"): data[k] for k in data.files if k.startswith("input:")}
    return feeds, {k.removeprefix("output:"): data[k] for k in data.files if k.startswith("output")}


@pytest.mark.parametrize("name", sorted(INDEX))
def test_graph_is_pruned_or_refused_with_a_reason(prune_model, tmp_path, name):
    entry, path = INDEX[name], GRAPHS / f"{name}.onnx"
    quantized = entry["recurrent"] and not prunable(entry)
    if quantized or name in AT_RUN_TIME:
        with pytest.raises(RnnpruneError) as caught:
            prune_model(path, 0.5)
        assert caught.value.code == ExitCode.UNSUPPORTED
        assert caught.value.hint
        assert not list(tmp_path.iterdir())
        if name in AT_RUN_TIME:
            assert "is not a constant" in caught.value.message
        return
    data = tmp_path / "data.npz"
    feed, expected = feed_of(name)
    np.savez(data, **{k: v[None] for k, v in feed.items()})
    sparsity = 0.9 if "sparse" in name else 0.5  # some are sparse already
    report = prune_model(path, sparsity, data=data)
    assert all(claim.passed for claim in report.verification)
    ops = {layer.op for layer in report.layers}
    assert ops <= {node["op"] for node in prunable(entry)} | {lift.op for lift in report.lifts}
    assert report.lifts or prunable(entry)
    assert all(row.sparsity >= sparsity - 1 / 12 for row in report.layers if not row.blocked)
    # Unpruned, our runner gives what the exporter's own framework gave.
    runner = load(path).open()
    for spec, result in zip(runner.outputs, runner.run(feed), strict=True):
        np.testing.assert_allclose(
            result, expected[spec.name], rtol=1e-5, atol=max(entry["atol"], 1e-5)
        )
    if entry["full_check"]:
        onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)


@pytest.mark.parametrize("name", sorted(n for n in INDEX if prunable(INDEX[n])))
def test_made_up_inputs_are_accepted(name):
    if name in AT_RUN_TIME:
        return
    from rnnprune_cli.data import made_up_feeds

    runner = load(GRAPHS / f"{name}.onnx").open()
    feeds = made_up_feeds(runner, 0)
    assert feeds
    assert all(np.isfinite(o).all() for o in runner.run(feeds[0]) if o.dtype.kind == "f")
