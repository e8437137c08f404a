from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rnnprune_cli.errors import UsageError
from rnnprune_cli.model import RecurrentLayer, Weight
from rnnprune_cli.select import (
    SCOPES,
    Pattern,
    families,
    parse_pattern,
    removed_per_group,
    select,
)


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


@given(
    st.integers(0, 1 << 20),
    st.integers(0, 4),
    st.floats(0, 0.999),
    st.sampled_from(["cell", "layer", "global"]),
    st.sampled_from([np.float32, np.float64]),
)
@settings(max_examples=150, deadline=None)
def test_long_rows_are_selected_as_short_ones_are(seed, levels, sparsity, scope, dtype):
    """With ties, zeros, what is gone already, and scores of very different sizes."""
    rng = np.random.default_rng(seed)
    scores = {}
    for name, width in (("W", 13), ("R", 8)):
        own = rng.integers(0, levels, (2, 8, width)) if levels else rng.random((2, 8, width))
        own = own * 10.0 ** rng.integers(-3, 4, own.shape) if seed % 2 else own
        scores[name] = np.where(rng.random(own.shape) < 0.1, -1, own).astype(dtype)
    family = [weight(n, s) for n, s in scores.items()]
    whole = select(scores, family, scope, sparsity)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rnnprune_cli.select._CHUNK_ELEMENTS", 24)
        parts = select(scores, family, scope, sparsity)
    for name in scores:
        assert np.array_equal(whole[name], parts[name])


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


# Blocks and banks


def naive_blocks(values: np.ndarray, gates: int, rows: int, columns: int) -> list[tuple]:
    """The places of each block, gate by gate, in order."""
    each = values.shape[0] // gates
    return [
        (slice(top, min(top + rows, (g + 1) * each)), slice(left, left + columns))
        for g in range(gates)
        for top in range(g * each, (g + 1) * each, rows)
        for left in range(0, values.shape[1], columns)
    ]


@given(
    st.sampled_from([1, 3, 4]),
    st.integers(1, 7),
    st.integers(1, 9),
    st.integers(1, 8),
    st.integers(1, 10),
)
@settings(max_examples=100, deadline=None)
def test_a_block_counts_by_its_mean_and_ends_with_its_gate(gates, hidden, width, rows, columns):
    values = np.random.default_rng(hidden).random((1, gates * hidden, width))
    pattern = Pattern(rows, columns)
    places = naive_blocks(values[0], gates, rows, columns)
    found = pattern.pool(values, gates)
    np.testing.assert_allclose(found.reshape(-1), [values[0][place].mean() for place in places])
    assert pattern.sizes(values.shape, gates).reshape(-1).tolist() == [
        values[0][place].size for place in places
    ]
    chosen = found > 0.5
    mask = pattern.spread(chosen, values.shape, gates)
    for place, kept in zip(places, chosen.reshape(-1), strict=True):
        assert np.all(mask[0][place] == kept)


@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(2, 5),
    st.integers(1, 5),
    st.floats(0, 0.99),
)
@settings(max_examples=100, deadline=None)
def test_of_blocks_the_smallest_go_whatever_their_size(hidden, width, rows, columns, sparsity):
    scores = np.random.default_rng(width).random((1, hidden, width))
    own = weight("W", scores)
    pattern = Pattern(rows, columns)
    (mask,) = select({"W": scores}, [own], "layer", sparsity, pattern).values()
    pooled = pattern.pool(scores, 1)
    kept = pattern.pool(mask.astype(np.float32), 1) == 1
    assert pooled[~kept].max(initial=-1) <= pooled[kept].min(initial=2)
    largest = pattern.sizes(scores.shape, 1).max()
    assert abs((~mask).sum() - sparsity * mask.size) <= largest / 2 + 1e-9


def test_rows_of_uneven_blocks_make_up_for_each_other():
    """Each row of nine wants 4.5, in blocks of 4, 4 and 1: rounding alone would take 4 of each."""
    scores = np.random.default_rng(0).random((1, 40, 9))
    (mask,) = select({"W": scores}, [weight("W", scores)], "row", 0.5, Pattern(1, 4)).values()
    assert abs((~mask).sum() - 180) <= 2


@given(st.integers(1, 20), st.integers(2, 8), st.integers(1, 7), st.floats(0, 0.99))
@settings(max_examples=100, deadline=None)
def test_every_bank_loses_as_many(width, bank, kept, sparsity):
    scores = np.random.default_rng(width).random((2, 6, width))
    kept = min(kept, bank - 1)
    for pattern in (Pattern(bank=bank), Pattern(bank=bank, kept=kept)):
        (mask,) = select({"W": scores}, [weight("W", scores)], "row", sparsity, pattern).values()
        for start in range(0, width, bank):
            own, score = mask[:, :, start : start + bank], scores[:, :, start : start + bank]
            n = own.shape[2]
            gone = round(n * sparsity) if pattern.kept is None else max(0, n - kept)
            assert np.all((~own).sum(axis=2) == min(gone, n - 1))
            lowest = np.where(own, score, 2).min(axis=2)
            assert np.all(np.where(own, -1, score).max(axis=2) <= lowest)


@given(st.integers(1, 8), st.integers(2, 9), st.floats(0, 1), st.floats(0, 1))
def test_on_the_way_to_n_of_m_no_more_goes_than_in_the_end(kept, bank, one, two):
    pattern = Pattern(bank=bank, kept=min(kept, bank - 1))
    early, late = (pattern.part(share).kept for share in sorted((one, two)))
    assert bank >= early >= late >= pattern.kept
    assert pattern.part(1.0) == pattern
    assert Pattern(2, 3).part(one) == Pattern(2, 3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("block:0x2", "not of the form block:RxC"),
        ("block:4", "not of the form block:RxC"),
        ("bank:1", "not of the form bank:N"),
        ("nm:4:4", "not of the form nm:N:M"),
        ("nm:0:4", "not of the form nm:N:M"),
        ("blocks:2x2", "there is no granularity 'blocks:2x2'"),
    ],
)
def test_patterns_that_make_no_sense_are_refused(text, words):
    with pytest.raises(UsageError) as error:
        parse_pattern(text)
    assert words in error.value.message and error.value.hint
