"""Which units go: by score, scope and sparsity, within what is coupled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import Graph, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import random_graph

from rnnprune_cli.coupling import Coupling
from rnnprune_cli.onnx_model import OnnxModel
from rnnprune_cli.shrink.task import coupled
from rnnprune_cli.units import Chosen, choose

INPUTS = 3


def layer(
    g: Graph,
    x: str,
    hidden: int,
    op: str = "LSTM",
    direction: str = "forward",
    inputs: int = INPUTS,
) -> str:
    """[time, batch, inputs] → [time, batch, directions * hidden]"""
    directions = 2 if direction == "bidirectional" else 1
    w = weights(op, hidden, inputs, directions, len(g.nodes))
    y = g.op(op, x, w["W"], w["R"], w["B"], hidden_size=hidden, direction=direction)
    return g.op("Reshape", g.op("Transpose", y, perm=[0, 2, 1, 3]), np.array([0, 0, -1]))


def dense(g: Graph, x: str, inputs: int) -> None:
    w = np.random.default_rng(len(g.nodes)).standard_normal((inputs, 2)).astype(np.float32)
    g.output(g.op("MatMul", x, w))


def begin() -> Graph:
    return Graph(["time", "batch", INPUTS])


def one_layer(hidden: int, direction: str = "forward") -> onnx.ModelProto:
    g = begin()
    dense(g, layer(g, "x", hidden, direction=direction), hidden * (1 + (direction[0] == "b")))
    return g.model()


def two_layers(*sizes: int) -> onnx.ModelProto:
    g = begin()
    for hidden in sizes:
        dense(g, layer(g, "x", hidden, "GRU"), hidden)
    return g.model()


def tied_layers(hidden: int) -> onnx.ModelProto:
    g = begin()
    one = layer(g, "x", hidden)
    dense(g, g.op("Add", one, layer(g, one, hidden, inputs=hidden)), hidden)
    return g.model()


@pytest.fixture
def couple(tmp_path: Path):
    def call(model: onnx.ModelProto, resize_state: bool = False) -> Coupling:
        path = tmp_path / "model.onnx"
        path.write_bytes(model.SerializeToString())
        return coupled(OnnxModel(path), resize_state=resize_state)

    return call


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """Models that properties are tried on."""
    folder = tmp_path_factory.mktemp("units")
    models = {
        "one": one_layer(11),
        "bidirectional": one_layer(7, "bidirectional"),
        "two": two_layers(5, 12),
        "tied": tied_layers(8),
        "three": two_layers(4, 9, 2),
    }
    found = {}
    for name, model in models.items():
        (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
        found[name] = coupled(OnnxModel(folder / f"{name}.onnx"))
    return found


def names(coupling: Coupling) -> list[str]:
    return [layer.name for layer in coupling.layers]


def alike(coupling: Coupling, scores: np.ndarray) -> np.ndarray:
    """One score for each class."""
    return scores[coupling.classes.of(np.arange(len(coupling.classes)))]


def random_scores(coupling: Coupling, seed: int) -> np.ndarray:
    return alike(coupling, np.random.default_rng(seed).random(len(coupling.classes)))


def pick(
    coupling: Coupling, scores: np.ndarray, sparsity: float, scope: str = "layer", *only: str
) -> Chosen:
    return choose(coupling, scores, only or names(coupling), sparsity, scope)


def gone(coupling: Coupling, chosen: Chosen) -> list[np.ndarray]:
    """bool [directions, hidden] of each layer."""
    root = coupling.classes.of(np.arange(len(coupling.classes)))
    assert np.array_equal(chosen.removed, chosen.removed[root])
    return [chosen.removed[layer.labels] for layer in coupling.layers]


def assert_sound(coupling: Coupling, chosen: Chosen) -> None:
    """What every choice must be, whatever it was made by."""
    root = coupling.classes.of(np.arange(len(coupling.classes)))
    for rows in gone(coupling, chosen):
        assert len(set(rows.sum(axis=1).tolist())) == 1
        assert not rows.all(axis=1).any()
    for block in coupling.blocks:
        assert not chosen.removed[block.labels].any()
        assert not chosen.removed[np.isin(root, root[block.labels])].any()


MODELS = ["one", "bidirectional", "two", "tied", "three"]
FORWARD = [name for name in MODELS if name != "bidirectional"]
SHARES = st.floats(0, 0.999)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(FORWARD), seed=st.integers(0, 99), sparsity=SHARES)
def test_every_layer_loses_its_share_and_the_lowest_scores_go(ready, name, seed, sparsity):
    coupling = ready[name]
    scores = random_scores(coupling, seed)
    chosen = pick(coupling, scores, sparsity)
    assert_sound(coupling, chosen)
    assert not chosen.blocked
    for own, rows in zip(coupling.layers, gone(coupling, chosen), strict=True):
        hidden = own.labels.shape[1]
        wanted = min(round(sparsity * hidden), hidden - 1)
        for labels, row in zip(own.labels, rows, strict=True):
            assert row.sum() == wanted
            lowest = np.sort(scores[labels])[:wanted]
            assert np.array_equal(np.sort(scores[labels[row]]), lowest)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), sparsity=SHARES)
def test_both_directions_lose_equally_many_and_the_lowest_scores_go(ready, seed, sparsity):
    coupling = ready["bidirectional"]
    scores = random_scores(coupling, seed)
    chosen = pick(coupling, scores, sparsity)
    assert_sound(coupling, chosen)
    rows, labels = gone(coupling, chosen)[0], coupling.layers[0].labels
    for own, row in zip(labels, rows, strict=True):
        assert row.sum() == min(round(sparsity * 7), 6)
        assert np.array_equal(np.sort(scores[own[row]]), np.sort(scores[own])[: row.sum()])


def test_both_directions_lose_as_many_as_one_would(ready):
    coupling = ready["bidirectional"]
    rows = gone(coupling, pick(coupling, random_scores(coupling, 0), 0.5))[0]
    assert rows.sum(axis=1).tolist() == [4, 4]


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(MODELS), seed=st.integers(0, 99), sparsity=SHARES)
def test_global_removes_what_was_asked_for_and_no_more_than_a_step(ready, name, seed, sparsity):
    coupling = ready[name]
    chosen = pick(coupling, random_scores(coupling, seed), sparsity, "global")
    assert_sound(coupling, chosen)
    removed = sum(int(rows.sum()) for rows in gone(coupling, chosen))
    total = sum(own.labels.size for own in coupling.layers)
    possible = total - sum(own.labels.shape[0] for own in coupling.layers)
    step = {"tied": 2, "bidirectional": 2}.get(name, 1)
    assert min(sparsity * total, possible) <= removed < sparsity * total + step + 1e-9


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), sparsity=SHARES, scale=st.floats(1e-3, 1e3))
def test_global_does_not_depend_on_the_scale_of_a_layer(ready, seed, sparsity, scale):
    coupling = ready["two"]
    scores = random_scores(coupling, seed)
    scaled = scores.copy()
    scaled[coupling.layers[0].labels] *= scale
    one, two = (pick(coupling, s, sparsity, "global").removed for s in (scores, scaled))
    assert np.array_equal(one, two)


def test_global_takes_more_from_the_layer_that_has_more_to_spare(ready):
    coupling = ready["two"]
    scores = np.ones(len(coupling.classes))
    scores[coupling.layers[1].labels[0, :9]] = 1e-6
    rows = gone(coupling, pick(coupling, scores, 0.5, "global"))
    assert [int(r.sum()) for r in rows] == [0, 9]


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_scores_give_the_same_choice(ready, name, scope):
    coupling = ready[name]
    scores = random_scores(coupling, 5)
    one, two = (pick(coupling, scores, 0.6, scope).removed for _ in range(2))
    assert one.any() and np.array_equal(one, two)


def test_of_equal_scores_the_first_goes(ready):
    coupling = ready["one"]
    rows = gone(coupling, pick(coupling, np.ones(len(coupling.classes)), 0.3))[0]
    assert rows[0].tolist() == [True] * 3 + [False] * 8


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_scores_of_zero_are_an_order_too(ready, scope):
    coupling = ready["two"]
    chosen = pick(coupling, np.zeros(len(coupling.classes)), 0.5, scope)
    assert_sound(coupling, chosen)
    assert sum(int(rows.sum()) for rows in gone(coupling, chosen)) in (8, 9)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_nothing_goes_at_sparsity_zero(ready, scope):
    for coupling in ready.values():
        chosen = pick(coupling, random_scores(coupling, 0), 0.0, scope)
        assert not chosen.removed.any() and not chosen.blocked


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_one_unit_stays(ready, scope):
    for coupling in ready.values():
        chosen = pick(coupling, random_scores(coupling, 0), 0.999, scope)
        assert all(
            (~rows).sum(axis=1).tolist() == [1] * len(rows) for rows in gone(coupling, chosen)
        )


def test_a_share_that_rounds_to_nothing_is_not_called_blocked(ready):
    chosen = pick(ready["one"], random_scores(ready["one"], 0), 0.01)
    assert not chosen.removed.any() and not chosen.blocked


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_other_layers_than_the_selected_ones_stay(ready, scope):
    coupling = ready["two"]
    second = names(coupling)[1]
    chosen = pick(coupling, random_scores(coupling, 1), 0.5, scope, second)
    rows = gone(coupling, chosen)
    assert [int(r.sum()) for r in rows] == [0, 6]
    assert not chosen.blocked


def test_a_layer_tied_to_one_that_is_not_selected_is_blocked(ready):
    coupling = ready["tied"]
    first, second = names(coupling)
    chosen = pick(coupling, random_scores(coupling, 1), 0.5, "layer", second)
    assert not chosen.removed.any()
    assert chosen.blocked == {second: f"coupled with '{first}', which is not selected"}


def test_units_that_callers_see_stay_and_it_is_said(couple):
    g = begin()
    g.output(layer(g, "x", 6))
    coupling = couple(g.model())
    chosen = pick(coupling, random_scores(coupling, 1), 0.5)
    assert not chosen.removed.any()
    reason = chosen.blocked[names(coupling)[0]]
    assert reason.startswith("they are the model's output") and "; return what" in reason


def test_what_is_blocked_does_not_make_another_layer_lose_more_than_its_share(couple):
    g = begin()
    g.output(layer(g, "x", 8))
    dense(g, layer(g, "x", 8), 8)
    coupling = couple(g.model())
    chosen = pick(coupling, random_scores(coupling, 1), 0.5, "global")
    assert [int(rows.sum()) for rows in gone(coupling, chosen)] == [0, 4]


def test_units_that_are_blocked_in_part_are_counted(couple):
    g = begin()
    y = layer(g, "x", 8)
    g.output(g.op("Slice", y, np.array([0]), np.array([3]), np.array([2])))
    dense(g, y, 8)
    coupling = couple(g.model())
    chosen = pick(coupling, random_scores(coupling, 1), 0.5)
    assert_sound(coupling, chosen)
    rows = gone(coupling, chosen)[0]
    assert rows.sum() == 4 and not rows[0, :3].any()
    assert chosen.blocked[names(coupling)[0]].startswith("3 of 8 units: ")


def test_what_may_go_makes_up_for_what_is_blocked_as_far_as_it_can(couple):
    g = begin()
    y = layer(g, "x", 8)
    g.output(g.op("Slice", y, np.array([0]), np.array([6]), np.array([2])))
    dense(g, y, 8)
    coupling = couple(g.model())
    rows = gone(coupling, pick(coupling, random_scores(coupling, 1), 0.5))[0]
    assert rows[0].tolist() == [False] * 6 + [True] * 2


def test_directions_of_which_one_is_blocked_in_part_lose_equally_many(couple):
    g = begin()
    y = layer(g, "x", 6, direction="bidirectional")
    g.output(g.op("Slice", y, np.array([0]), np.array([4]), np.array([2])))  # of the first
    dense(g, y, 12)
    coupling = couple(g.model())
    chosen = pick(coupling, random_scores(coupling, 1), 0.5)
    assert_sound(coupling, chosen)
    assert gone(coupling, chosen)[0].sum(axis=1).tolist() == [2, 2]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 3000),
    sparsity=st.sampled_from([0.2, 0.5, 0.8, 0.99]),
    scope=st.sampled_from(["layer", "global"]),
)
def test_choices_are_sound_in_random_graphs(tmp_path_factory, seed, sparsity, scope):
    path = tmp_path_factory.mktemp("random") / "model.onnx"
    path.write_bytes(random_graph(seed).model.SerializeToString())
    coupling = coupled(OnnxModel(path))
    chosen = pick(coupling, random_scores(coupling, seed), sparsity, scope)
    assert_sound(coupling, chosen)
    untouched = [
        own.name
        for own, rows in zip(coupling.layers, gone(coupling, chosen), strict=True)
        if not rows.any() and round(sparsity * own.labels.shape[1]) > 0
    ]
    if scope == "layer":
        assert set(untouched) <= set(chosen.blocked)
    assert all(reason for reason in chosen.blocked.values())
