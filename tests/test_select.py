from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rnnprune_cli.model import RecurrentLayer, Weight
from rnnprune_cli.select import SCOPES, families, removed_per_group, select


def weight(name: str, values: np.ndarray) -> Weight:
    return Weight(name, values.shape, values.dtype, lambda: values)


shapes = st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 12), st.integers(1, 9))


@given(shapes, st.floats(0, 0.999), st.integers(0, 5), st.sampled_from(sorted(SCOPES)))
@settings(max_examples=300, deadline=None)
def test_each_group_loses_the_asked_share_within_one_weight(shape, sparsity, levels, scope):
    directions, rows, inputs, hidden = shape
    rng = np.random.default_rng(levels)
    # Few levels make many ties; none makes them all equal.
    scores = [
        rng.integers(0, levels + 1, (directions, rows, k)).astype(np.float32)
        for k in (inputs, hidden)
    ]
    family = [weight("W", scores[0]), weight("R", scores[1])]
    masks = select({"W": scores[0], "R": scores[1]}, family, scope, sparsity)
    joint = np.concatenate([masks["W"], masks["R"]], axis=2)
    groups = {
        "row": list(joint.reshape(directions * rows, -1)),
        "cell": list(joint.reshape(directions, -1)),
        "layer": [m[d].ravel() for m in masks.values() for d in range(directions)],
        "global": [joint.ravel()],
    }[scope]
    for group in groups:
        assert abs((~group).sum() - sparsity * group.size) < 1 + 1e-9
    total = joint.size * sparsity
    assert abs((~joint).sum() - total) <= 0.5 * (2 * directions) + 1e-6


@given(shapes, st.floats(0, 0.999), st.sampled_from(sorted(SCOPES)))
@settings(max_examples=100, deadline=None)
def test_no_removed_score_exceeds_a_kept_one_of_its_group(shape, sparsity, scope):
    directions, rows, inputs, hidden = shape
    rng = np.random.default_rng(rows)
    scores = {
        "W": rng.random((directions, rows, inputs)),
        "R": rng.random((directions, rows, hidden)),
    }
    family = [weight(n, s) for n, s in scores.items()]
    masks = select(scores, family, scope, sparsity)
    flat_scores = np.concatenate([scores["W"], scores["R"]], axis=2)
    flat_masks = np.concatenate([masks["W"], masks["R"]], axis=2)
    pairs = {
        "row": zip(
            flat_scores.reshape(-1, inputs + hidden),
            flat_masks.reshape(-1, inputs + hidden),
            strict=True,
        ),
        "cell": zip(
            flat_scores.reshape(directions, -1), flat_masks.reshape(directions, -1), strict=True
        ),
        "layer": (
            (scores[n][d].ravel(), masks[n][d].ravel()) for n in scores for d in range(directions)
        ),
        "global": [(flat_scores.ravel(), flat_masks.ravel())],
    }[scope]
    for group, kept in pairs:
        assert group[~kept].max(initial=-1) <= group[kept].min(initial=2)


def test_of_equal_scores_the_first_go():
    scores = np.ones((1, 2, 8), np.float32)
    masks = select({"W": scores}, [weight("W", scores)], "row", 0.5)
    assert masks["W"].tolist() == [[[False] * 4 + [True] * 4] * 2]


def test_many_rows_are_selected_as_few_are(monkeypatch):
    scores = np.random.default_rng(0).random((2, 50, 8)).astype(np.float32)
    family = [weight("W", scores)]
    whole = select({"W": scores}, family, "row", 0.7)["W"]
    monkeypatch.setattr("rnnprune_cli.select._CHUNK_ELEMENTS", 24)
    assert np.array_equal(whole, select({"W": scores}, family, "row", 0.7)["W"])


def test_sparsity_zero_keeps_everything():
    scores = np.zeros((1, 4, 4), np.float32)
    for scope in SCOPES:
        assert select({"W": scores}, [weight("W", scores)], scope, 0.0)["W"].all()


def test_both_directions_lose_the_same():
    scores = np.random.default_rng(1).random((2, 5, 7))
    mask = select({"W": scores}, [weight("W", scores)], "row", 0.33)["W"]
    assert mask[0].sum() == mask[1].sum()


def test_rounding_is_spread_over_groups():
    assert removed_per_group(4, 3, 0.5).tolist() == [1, 2, 1, 2]


def test_layers_that_share_a_weight_are_one_family():
    one, two, shared = (weight(n, np.zeros((1, 4, 3), np.float32)) for n in ("a.W", "b.W", "R"))
    alone = weight("c.W", np.zeros((1, 4, 3), np.float32))
    layers = [
        RecurrentLayer("a", "RNN", "forward", 3, 4, one, shared),
        RecurrentLayer("c", "RNN", "forward", 3, 4, alone, alone),
        RecurrentLayer("b", "RNN", "forward", 3, 4, two, shared),
    ]
    assert [[w.name for w in f] for f in families(layers)] == [["c.W"], ["a.W", "R", "b.W"]]
