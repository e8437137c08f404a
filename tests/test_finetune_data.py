"""What fine-tuning makes of data: padding, batches, samples that follow one another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Graph, run, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from tuning import INPUTS, STEPS, STILL, Arrays, inputs, network, recurrent, tune

from rnnprune_cli.data import Dataset
from rnnprune_cli.model import Array, Feed, Runner, TensorSpec
from rnnprune_cli.trainer.batches import Batches

COUNT = 24
LENGTHS = np.random.default_rng(7).integers(1, STEPS + 1, COUNT)
BEYOND = np.arange(STEPS)[None] >= LENGTHS[:, None]

# Padding


def padded(junk: float, labels: str | None, whole_feeds: bool = False) -> dict[str, np.ndarray]:
    """Samples whose padded steps hold anything, and so do the labels of these."""
    rng = np.random.default_rng(3)
    x = np.where(BEYOND[..., None], np.float32(junk), inputs(COUNT))
    arrays = {"x": x[:, :, None] if whole_feeds else x, "lengths": LENGTHS.astype(np.int32)}
    if labels == "class":
        made = rng.integers(0, 3, (COUNT, STEPS))
        arrays["labels"] = np.where(BEYOND, 2 if junk else 0, made)
    elif labels == "real":
        real = rng.standard_normal((COUNT, STEPS, 3)).astype(np.float32)
        beyond = np.float32(np.nan if junk else 0)
        real = np.where(BEYOND[..., None], beyond, real)
        arrays["labels"] = real[:, :, None] if whole_feeds else real
    return arrays


def steps_first(direction: str = "forward") -> onnx.ModelProto:
    """x [time, 1, inputs] → [time, 1, 3]."""
    directions = 2 if direction == "bidirectional" else 1
    made = weights("LSTM", 8, INPUTS, directions, 0)
    g = Graph(["time", 1, INPUTS])
    y = g.op("LSTM", "x", *(2 * made[k] for k in "WRB"), hidden_size=8, direction=direction)
    v = g.op("Reshape", g.op("Transpose", y, perm=[0, 2, 1, 3]), np.array([0, 0, -1]))
    head = np.random.default_rng(1).standard_normal((8 * directions, 3)).astype(np.float32)
    g.output(g.op("MatMul", v, head))
    return g.model()


MODELS: dict[str, tuple[onnx.ModelProto, bool]] = {
    "told": (network("LSTM", "bidirectional", lengths=True), False),
    "not told": (network("GRU"), False),
    "not told, both directions": (network("RNN", "bidirectional"), False),
    "steps first": (steps_first(), True),
    "steps first, both directions": (steps_first("bidirectional"), True),
}


@pytest.mark.parametrize("labels", [None, "class", "real"])
@pytest.mark.parametrize("name", MODELS)
def test_what_padding_holds_changes_not_a_byte(tmp_path, name, labels):
    model, whole_feeds = MODELS[name]
    more: dict[str, Any] = {}
    if "both" in name:  # metrics run them with their padding, so let there be none
        held = padded(0.0, labels, whole_feeds)
        more["validation"] = held | {"lengths": np.full(COUNT, STEPS)}
    elif labels is None:
        more["noise"] = 0.2
    losses = []
    for out, junk in (("zeros", 0.0), ("junk", 1000.0)):
        report = tune(
            tmp_path, model, padded(junk, labels, whole_feeds), epochs=2, batch=7, lr=0.01,
            name=out, compensate=False, **more,
        )  # fmt: skip
        assert report.finetune.rollbacks == 0
        losses.append([(e.loss, e.validation_loss, e.drop) for e in report.finetune.epochs])
    assert losses[0] == losses[1]
    files = [tmp_path / f"{out}.onnx" for out in ("zeros", "junk")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_model_is_trained_alike_whether_it_is_told_lengths_or_not(tmp_path):
    """Nothing of the padding reaches a model that is not told."""
    arrays = padded(5.0, "class")
    losses = []
    for told in (True, False):
        report = tune(
            tmp_path, network(lengths=told), arrays, epochs=2, batch=7, lr=0.01, compensate=False,
            force=True,
        )  # fmt: skip
        losses.append([(e.loss, e.validation_loss) for e in report.finetune.epochs])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


# Batches


class Anything(Runner):
    """Takes whatever it is given."""

    def __init__(self, told: bool, dims: tuple[Any, ...] = ("n", "t", INPUTS)) -> None:
        self.inputs = (TensorSpec("x", dims, np.dtype(np.float32)),)
        if told:
            self.inputs += (TensorSpec("lengths", ("n",), np.dtype(np.int32), is_length=True),)
        self.outputs = ()

    def run(self, feed: Feed) -> list[Array]:
        return []


def padded_set(lengths: np.ndarray | None, count: int, told: bool = False) -> Dataset:
    x = np.zeros((count, STEPS, INPUTS), np.float32)
    x[:] = np.arange(count)[:, None, None]
    given = {"x": x} | ({"lengths": lengths.astype(np.int32)} if told else {})
    return Dataset(given, frozenset(given), frozenset(), False, count, {}, lengths)


@given(
    count=st.integers(1, 90),
    size=st.integers(1, 40),
    seed=st.integers(0, 99),
    kind=st.sampled_from(["whole", "told", "not told"]),
)
@settings(max_examples=60, deadline=None)
def test_an_epoch_holds_each_sample_once(count, size, seed, kind):
    lengths = None
    if kind != "whole":
        lengths = np.random.default_rng(seed).integers(1, STEPS + 1, count)
    data = padded_set(lengths, count, kind == "told")
    batches = Batches(data, size, Anything(kind == "told"), {})
    epoch = batches.epoch([seed, 1])
    assert sorted(np.concatenate(epoch)) == list(range(count))
    assert len(epoch) == batches.count == -(-count // size)
    assert sorted(len(b) for b in epoch)[1:] == [size] * (len(epoch) - 1)
    again, other = batches.epoch([seed, 1]), batches.epoch([seed, 2])
    assert all(np.array_equal(a, b) for a, b in zip(epoch, again, strict=True))
    if count > 12 and size > 1:
        assert not all(np.array_equal(a, b) for a, b in zip(epoch, other, strict=True))
    assert np.array_equal(np.concatenate(batches.epoch(None)), np.arange(count))
    for samples in epoch:
        parts = list(batches.parts(samples))
        assert sorted(np.concatenate([p.samples for p in parts])) == sorted(samples)
        for part in parts:
            assert np.array_equal(part.feed["x"][:, 0, 0], part.samples)
            if lengths is None:
                assert part.valid.all() and part.feed["x"].shape[1] == STEPS
                continue
            own = lengths[part.samples]
            assert part.feed["x"].shape[1] == part.steps == own.max()
            assert np.array_equal(part.valid.sum(axis=1), own)
            if kind == "not told":
                assert len(set(own)) == 1  # no padding at all


def test_samples_of_one_length_meet(tmp_path):
    lengths = np.random.default_rng(0).integers(1, 101, 1000)
    x = np.zeros((1000, 100, 1), np.float32)
    data = Dataset({"x": x}, frozenset("x"), frozenset(), False, 1000, {}, lengths)
    batches = Batches(data, 20, Anything(False, ("n", "t", 1)), {})
    epoch = batches.epoch([0])
    kept = sum(len(b) * lengths[b].max() for b in epoch)
    assert kept < 1.2 * lengths.sum()  # unsorted it is almost twice as much
    longest = [lengths[b].max() for b in epoch]
    assert longest != sorted(longest)  # but short ones do not come first


# Samples that follow one another


def stream(count: int = 10, seed: int = 5, labels: bool = False) -> dict[str, np.ndarray]:
    """Parts of one sequence, each a whole feed, with states that are zero."""
    zeros = {f"state_{letter}": np.zeros((count, 1, 1, 8), np.float32) for letter in "hc"}
    rng = np.random.default_rng([seed, 1])
    target = {"labels": rng.standard_normal((count, 1, STEPS, 3)).astype(np.float32)}
    return {"x": inputs(count, seed=seed)[:, None], **zeros, **(target if labels else {})}


def streamed(model: onnx.ModelProto | Path, arrays: Arrays) -> tuple[np.ndarray, dict]:
    """Outputs of each part, and the states that each began with."""
    states = {name: arrays[name][0] for name in ("state_h", "state_c")}
    outputs, begun = [], {name: [] for name in states}
    for x in arrays["x"]:
        for name, state in states.items():
            begun[name].append(state)
        output, *ends = run(model, {"x": x, **states})
        states = dict(zip(states, ends, strict=True))
        outputs.append(output)
    return np.stack(outputs), {name: np.stack(values) for name, values in begun.items()}


def test_states_are_handed_on_for_the_model_and_the_original(tmp_path):
    model = network(states=True)
    train, held = stream(11), stream(9, seed=8)
    same = {"compensate": False}
    tune(tmp_path, model, None, name="one", **same)
    report = tune(
        tmp_path, model, train, validation=held, epochs=1, lr=STILL, batch=4, **same
    )  # fmt: skip
    dense, _ = streamed(model, train)
    plain = np.concatenate([run(model, {n: a[k] for n, a in train.items()})[0] for k in range(11)])
    # What outputs vary by is looked at sample by sample.
    variance = plain.astype(np.float64).var()

    def loss(arrays: Arrays, samples: slice) -> float:
        wanted, found = (streamed(m, arrays)[0][samples] for m in (model, tmp_path / "one.onnx"))
        return float(np.square(found.astype(np.float64) - wanted).mean() / variance)

    (epoch,) = report.finetune.epochs
    assert report.finetune.steps == 3
    assert epoch.validation_loss == pytest.approx(loss(held, slice(None)), rel=1e-4)
    batches = [loss(train, slice(k, k + 4)) for k in (0, 4, 8)]  # in order, states go on
    assert epoch.loss == pytest.approx(np.mean(batches), rel=1e-4)
    assert np.abs(dense[1:, 0, 0] - plain.reshape(dense.shape)[1:, 0, 0]).max() > 0.1


def test_gradients_stop_where_states_are_handed_on(tmp_path):
    """One update is that of a model that is given the states as numbers."""
    model, train = network(states=True), stream(labels=True)
    same = {"compensate": False, "epochs": 1, "batch": 10, "lr": 0.01, "distill": 0.0}
    tune(tmp_path, model, None, name="one", compensate=False)
    _, begun = streamed(tmp_path / "one.onnx", train)
    assert begun["state_h"][1:].any()
    results = []
    for name, arrays in (("handed", train), ("given", train | begun)):
        report = tune(tmp_path, model, arrays, validation=arrays, name=name, **same)
        assert report.finetune.best == 1
        results += recurrent(tmp_path / f"{name}.onnx")
    (before,) = recurrent(tmp_path / "one.onnx")
    for name, values in results[0].items():
        np.testing.assert_allclose(values, results[1][name], atol=2e-5)
        assert np.abs(values - before[name]).max() > 5e-3
