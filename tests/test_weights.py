"""Weights go as they were asked to, whatever the criterion, scope and granularity."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rnnprune_cli.compensate import Moments
from rnnprune_cli.errors import RnnpruneError
from rnnprune_cli.hessians import UNREACHED, LayerInputs
from rnnprune_cli.methods import methods
from rnnprune_cli.model import GATES, Pruned, RecurrentLayer, Stage, StoredWeight, Weight
from rnnprune_cli.refit import DAMPING, RowInputs, refit, surgeon
from rnnprune_cli.select import SCOPES, parse_pattern
from rnnprune_cli.weights import PrunedWeights, WeightTask, prune_weights

METHODS = [n for n, m in methods().items() if m.weight is not None and not m.needs_gradients]
"""Gradients come from TensorFlow, through the whole pipeline: ``test_contract.py``."""
WITH_DATA = [name for name in METHODS if methods()[name].needs_data]
PATTERNS = ("weight", "block:4x2", "block:1x3", "bank:4", "nm:2:4", "nm:1:3")
CHOICES = [(g, scope) for g in PATTERNS for scope in parse_pattern(g).scopes]
INPUTS, HIDDEN = 7, 9
"""No multiples of any block or bank above but one."""


def weight(name: str, values: np.ndarray, gates: int) -> Weight:
    values.setflags(write=False)
    return Weight(name, values.shape, values.dtype, lambda: values, gates)


def layer_of(
    op: str,
    directions: int = 1,
    seed: int = 0,
    hidden: int = HIDDEN,
    inputs: int = INPUTS,
    dtype: type = np.float32,
    zeros: float = 0.0,
    scale: float = 1.0,
) -> RecurrentLayer:
    rng = np.random.default_rng(seed)
    rows = GATES[op] * hidden
    w, r = (
        scale
        * rng.standard_normal((directions, rows, n))
        * (rng.random((directions, rows, n)) >= zeros)
        for n in (inputs, hidden)
    )
    name = f"{op}{seed}"
    parts = [weight(f"{name}.{k}", v.astype(dtype), GATES[op]) for k, v in (("W", w), ("R", r))]
    direction = "bidirectional" if directions == 2 else "forward"
    return RecurrentLayer(name, op, direction, inputs, hidden, *parts)


def inputs_of(layer: RecurrentLayer, seed: int = 0, count: int = 200) -> LayerInputs:
    """What a layer could read: correlated, with a mean."""
    rng = np.random.default_rng(seed)
    n = layer.input_size + layer.hidden_size
    found = []
    for _ in range(2 if layer.op == "GRU" else 1):
        moments = Moments(layer.w.shape[0], n)
        mixing = rng.standard_normal((n, n)) / np.sqrt(n) + np.eye(n)
        moments.add(rng.standard_normal((layer.w.shape[0], count, n)) @ mixing + 0.3)
        found.append(moments)
    return LayerInputs(found[0], found[1] if layer.op == "GRU" else None)


def pruned(
    layers: list[RecurrentLayer],
    method: str = "magnitude",
    sparsity: float = 0.6,
    granularity: str = "weight",
    scope: str = "row",
    data: bool = True,
    earlier: Pruned | None = None,
    chosen: list[RecurrentLayer] | None = None,
    problems: dict[str, str] | None = None,
    **more: object,
) -> PrunedWeights:
    chosen = layers if chosen is None else chosen
    inputs = {layer.name: inputs_of(layer, k) for k, layer in enumerate(chosen)} if data else {}
    for name, problem in (problems or {}).items():
        inputs[name] = replace(inputs[name], problem=problem)
    stage = Stage(method, granularity, scope, sparsity, **more)
    return prune_weights(
        WeightTask(layers, chosen, stage, 0, lambda step: None, earlier or {}, inputs)
    )


def joint(result: PrunedWeights, layer: RecurrentLayer) -> tuple[np.ndarray, np.ndarray]:
    """Mask and values of [W R]."""
    own = [result.pruned[w.name] for w in layer.weights]
    masks = np.concatenate([s.mask for s in own], axis=2)
    return masks, np.concatenate([s() for s in own], axis=2)


def blocks_of(mask: np.ndarray, gates: int, rows: int, columns: int) -> list[np.ndarray]:
    """Cuts one direction of a weight into blocks, gate by gate."""
    each = len(mask) // gates
    return [
        mask[start : min(start + rows, (g + 1) * each), column : column + columns]
        for g in range(gates)
        for start in range(g * each, (g + 1) * each, rows)
        for column in range(0, mask.shape[1], columns)
    ]


def largest_block(granularity: str) -> int:
    return {"block:4x2": 8, "block:1x3": 3}.get(granularity, 1)


@pytest.mark.parametrize(("granularity", "scope"), CHOICES)
@pytest.mark.parametrize("method", METHODS)
def test_the_asked_share_goes_in_the_asked_pattern(method, granularity, scope):
    pattern = parse_pattern(granularity)
    asked = 0.6 if pattern.sparsity is None else pattern.sparsity
    slack = largest_block(granularity)
    for op, directions in itertools.product(GATES, (1, 2)):
        layer = layer_of(op, directions)
        result = pruned([layer], method, asked, granularity, scope)
        assert not result.blocked
        masks = {w.name: result.pruned[w.name].mask for w in layer.weights}
        whole, values = joint(result, layer)
        assert np.isfinite(values).all() and not values[~whole].any()
        if pattern.bank:
            for mask in masks.values():
                banks = np.split(mask, range(pattern.bank, mask.shape[2], pattern.bank), axis=2)
                for bank in banks:
                    n = bank.shape[2]
                    share = round(n * asked) if pattern.kept is None else max(0, n - pattern.kept)
                    assert np.all((~bank).sum(axis=2) == min(share, n - 1))
            continue
        groups = {
            "row": whole.reshape(-1, whole.shape[2]),
            "cell": whole.reshape(directions, -1),
            "layer": [m[d].reshape(-1) for m in masks.values() for d in range(directions)],
            "global": whole.reshape(1, -1),
        }[scope]
        if scope == "row" and pattern.rows > 1:
            groups = [
                np.concatenate([m[d, start:end].reshape(-1) for m in masks.values()])
                for d in range(directions)
                for g in range(GATES[op])
                for start in range(g * HIDDEN, (g + 1) * HIDDEN, pattern.rows)
                for end in [min(start + pattern.rows, (g + 1) * HIDDEN)]
            ]
        for group in groups:
            assert abs((~group).sum() - asked * group.size) <= slack
        assert abs((~whole).mean() - asked) <= slack / (whole.size / directions / 2)
        for mask in masks.values():
            for block in blocks_of(mask[0], GATES[op], pattern.rows, pattern.columns):
                assert block.all() or not block.any()


@pytest.mark.parametrize(("granularity", "scope"), CHOICES)
@pytest.mark.parametrize("method", METHODS)
def test_the_same_again_gives_the_same(method, granularity, scope):
    asked = parse_pattern(granularity).sparsity or 0.7
    one, two = (
        pruned([layer_of("LSTM"), layer_of("GRU", 2, 1)], method, asked, granularity, scope)
        for _ in range(2)
    )
    for name, stored in one.pruned.items():
        assert stored().tobytes() == two.pruned[name]().tobytes()


@pytest.mark.parametrize("scope", sorted(SCOPES))
@pytest.mark.parametrize("method", METHODS)
def test_sparsity_zero_keeps_every_weight_to_the_bit(method, scope):
    layer = layer_of("GRU", 2)
    result = pruned([layer], method, 0.0, scope=scope)
    for own in layer.weights:
        assert np.array_equal(result.pruned[own.name](), own.read())


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(sorted(GATES)),
    st.integers(1, 11),
    st.integers(1, 11),
    st.integers(1, 5),
    st.integers(1, 5),
    st.floats(0.05, 0.95),
    st.sampled_from(["cell", "layer", "global"]),
)
def test_blocks_that_end_early_count_by_their_weights(
    op, hidden, inputs, rows, columns, share, scope
):
    """A block is cut off where its gate ends; what counts is how many weights are gone."""
    layer = layer_of(op, 1, hidden=hidden, inputs=inputs)
    granularity = f"block:{rows}x{columns}"
    try:
        result = pruned([layer], "random", share, granularity, scope, data=False)
    except RnnpruneError:
        # Nothing went: then half of some block is more than was asked for.
        assert share * layer.macs_per_step <= rows * columns
        return
    masks = [result.pruned[w.name].mask for w in layer.weights]
    for group in masks if scope == "layer" else [np.concatenate(masks, axis=2)]:
        assert abs((~group).sum() - share * group.size) <= rows * columns / 2 + 1e-6
    for mask in masks:
        assert all(b.all() or not b.any() for b in blocks_of(mask[0], GATES[op], rows, columns))


def test_obs_leaves_of_a_short_bank_what_the_pattern_leaves():
    """Six columns of W: banks of four and two, of which 2:4 takes nothing; in no round."""
    layer = layer_of("LSTM", inputs=6, hidden=4)
    masks = [pruned([layer], m, 0.5, "nm:2:4").pruned["LSTM0.W"].mask for m in METHODS]
    for mask in masks:
        assert mask[:, :, 4:].all()
        assert np.all(mask[:, :, :4].sum(axis=2) == 2)


def test_obs_goes_to_a_pattern_in_rounds():
    """Of 2:4, one weight of each bank goes, and then one more, seen what the first one left."""
    layer = layer_of("RNN", inputs=8, hidden=8)
    result = pruned([layer], "obs", 0.5, "nm:2:4")
    found, _ = joint(result, layer)
    moments = inputs_of(layer).moments
    every = sum(moments.sums(held)[0][0] for held in (False, True)) / moments.count
    own = np.concatenate([w.read()[0] for w in layer.weights], axis=1)
    part = RowInputs(np.arange(len(own)), every, None, every, moments.count)
    mask = np.ones(own.shape, bool)
    at_once = None
    for _ in range(2):
        values, inverse = surgeon(own, mask, part)
        scores = np.where(mask, np.abs(values) / np.sqrt(inverse), np.inf).reshape(8, 4, 4)
        if at_once is None:
            at_once = np.argsort(np.argsort(scores, axis=2), axis=2).reshape(own.shape) >= 2
        lowest = scores == scores.min(axis=2, keepdims=True)
        mask &= ~lowest.reshape(own.shape)
    assert np.array_equal(found[0], mask)
    assert not np.array_equal(mask, at_once)


def test_gates_with_a_sigmoid_lose_more_of_a_cell():
    layer = layer_of("LSTM", hidden=30, inputs=30)
    mask, _ = joint(pruned([layer], scope="cell", data=False), layer)
    gone = (~mask).reshape(4, -1).mean(axis=1)
    assert np.ptp(gone[:3]) < 0.1 and gone[:3].min() > gone[3] + 0.2
    counted = np.abs(np.concatenate([w.read() for w in layer.weights], axis=2)[0])
    counted[:90] /= 2
    assert counted[~mask[0]].max() <= counted[mask[0]].min()


# What is shared


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_of_two_layers_is_chosen_and_refitted_for_both(method):
    one, other = layer_of("LSTM", seed=1), layer_of("LSTM", seed=2)
    two = replace(other, r=one.r)
    result = pruned([one, two], method, 0.5, scope="row")
    assert set(result.pruned) == {"LSTM1.W", "LSTM1.R", "LSTM2.W"}
    gone = sum((~s.mask).sum(axis=2) for s in result.pruned.values())
    assert np.all(np.abs(gone - 0.5 * (2 * INPUTS + HIDDEN)) < 1)


def test_what_two_layers_share_is_refitted_to_what_both_read():
    """Against least squares on the samples of both, W of the other one being zero in each."""
    rng = np.random.default_rng(0)
    one, other = (layer_of("RNN", seed=k, hidden=3, inputs=2) for k in (1, 2))
    two = replace(other, r=one.r)
    n = 5
    parts = [rng.standard_normal((1, 50, n)) @ rng.standard_normal((n, n)) for _ in range(2)]
    inputs = {}
    for layer, samples in zip((one, two), parts, strict=True):
        moments = Moments(1, n)
        moments.add(samples)
        inputs[layer.name] = LayerInputs(moments, None)
    stage = Stage("magnitude", "weight", "row", 0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rnnprune_cli.refit.RIDGES", (1e-9,))
        task = WeightTask([one, two], [one, two], stage, 0, lambda step: None, {}, inputs)
        result = prune_weights(task)
    a, b = (part[0] for part in parts)  # columns: inputs, states
    wide = np.zeros((100, 7))  # W of one, R, W of two
    wide[:50, :5] = a
    wide[50:, 5:], wide[50:, 2:5] = b[:, :2], b[:, 2:]
    names = ("RNN1.W", "RNN1.R", "RNN2.W")
    own = np.concatenate([one.w.read()[0], one.r.read()[0], two.w.read()[0]], axis=1)
    mask = np.concatenate([result.pruned[k].mask[0] for k in names], axis=1)
    found = np.concatenate([result.pruned[k]()[0] for k in names], axis=1)
    for row in range(3):
        wanted = np.zeros(7)
        stays = mask[row]
        wanted[stays], *_ = np.linalg.lstsq(wide[:, stays], wide @ own[row], rcond=None)
        np.testing.assert_allclose(found[row], wanted, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_weights_of_layers_that_are_not_selected_stay(method):
    one, other = layer_of("LSTM", seed=1), layer_of("LSTM", seed=2)
    two = replace(other, r=one.r)
    result = pruned([one, two], method, 0.5, chosen=[two])
    assert set(result.pruned) == {"LSTM2.W"}
    assert result.blocked == {
        "LSTM1": "not selected",
        "LSTM2": "shares weights with 'LSTM1', not selected",
    }


# What cannot be watched


@pytest.mark.parametrize("method", METHODS)
def test_layers_that_cannot_be_watched_are_blocked_or_pruned_without(method):
    one, two = layer_of("LSTM", seed=1), layer_of("GRU", seed=2)
    result = pruned([one, two], method, 0.5, problems={"LSTM1": "it is in a loop"})
    if method in WITH_DATA:
        assert result.blocked == {
            "LSTM1": f"method '{method}' cannot see what it reads: it is in a loop"
        }
        assert set(result.pruned) == {"GRU2.W", "GRU2.R"}
    else:
        assert not result.blocked
        mask, values = joint(result, one)
        original = np.concatenate([w.read() for w in one.weights], axis=2)
        assert np.array_equal(values[mask], original[mask])
    said = {repair.reader: repair.problem for repair in result.repairs}
    assert said["GRU2"] is None
    assert said.get("LSTM1", "it is in a loop") == "it is in a loop"


@pytest.mark.parametrize("method", METHODS)
def test_what_the_data_never_reach_is_known_from_layers_that_share_it(method):
    """Copies of a layer in two branches, of which one is never taken."""
    one, other = layer_of("LSTM", seed=1), layer_of("LSTM", seed=2)
    both = replace(one, name="both")
    only_r = replace(other, name="only R", r=one.r)
    never = dict.fromkeys(("both", "only R"), UNREACHED)
    result = pruned([one, both, only_r], method, problems=never)
    if method in WITH_DATA:
        assert set(result.pruned) == {"LSTM1.W", "LSTM1.R"}
        assert list(result.blocked) == ["only R"]
        alone = pruned([one], method)
        for name, stored in alone.pruned.items():
            assert np.array_equal(stored(), result.pruned[name]())
    else:
        assert not result.blocked
        # Nothing is known of what W of the third layer reads: what stays of it stays as it was.
        stored = result.pruned["LSTM2.W"]
        np.testing.assert_allclose(stored()[stored.mask], other.w.read()[stored.mask], rtol=1e-6)
    assert all(repair.problem is None for repair in result.repairs)


@pytest.mark.parametrize("method", WITH_DATA)
def test_a_model_in_which_nothing_can_be_watched_is_refused(method):
    with pytest.raises(RnnpruneError, match=r"nothing can be pruned: 'LSTM0': .* it is in a loop"):
        pruned([layer_of("LSTM")], method, problems={"LSTM0": "it is in a loop"})


# What is zero already


@pytest.mark.parametrize("scope", sorted(SCOPES))
@pytest.mark.parametrize("method", METHODS)
def test_zeros_of_the_file_stay_zeros(method, scope):
    """The mask may keep some, the refit has no use for them: no layer becomes denser."""
    sparse, dense = layer_of("LSTM", seed=1, zeros=0.8), layer_of("LSTM", seed=2)
    result = pruned([sparse, dense], method, 0.5, scope=scope)
    for own in sparse.weights:
        assert not result.pruned[own.name]()[own.read() == 0].any()
    mask, values = joint(result, dense)
    assert np.count_nonzero(values) == np.count_nonzero(mask) <= 0.5 * mask.size + 60 or (
        scope == "global"
    )


@pytest.mark.parametrize("method", [m for m in METHODS if m != "random"])
def test_zeros_go_before_anything_else(method):
    layer = layer_of("GRU", zeros=0.3)
    result = pruned([layer], method, 0.5, scope="cell")
    mask, values = joint(result, layer)
    original = np.concatenate([w.read() for w in layer.weights], axis=2)
    assert not mask[original == 0].any()
    assert np.count_nonzero(values) == mask.sum() == round(0.5 * mask.size)


def test_less_than_is_gone_already_removes_nothing():
    with pytest.raises(RnnpruneError, match=r"removes not a single weight: 0\.80 of them"):
        pruned([layer_of("LSTM", hidden=40, inputs=40, zeros=0.8)], "magnitude", 0.3, scope="cell")


# Stage after stage


@pytest.mark.parametrize("second", METHODS)
@pytest.mark.parametrize("first", METHODS)
def test_what_one_stage_removed_no_later_one_brings_back(first, second):
    layer = layer_of("GRU", 2)
    one = pruned([layer], first, 0.4, scope="row")
    two = pruned([layer], second, 0.7, scope="cell", earlier=one.pruned)
    before, _ = joint(one, layer)
    after, values = joint(two, layer)
    assert not (after & ~before).any()
    assert not values[~before].any()
    assert abs((~after).mean() - 0.7) < 1 / after[0].size + 1e-9


def test_a_later_stage_that_asks_for_less_changes_no_mask():
    layer = layer_of("LSTM")
    one = pruned([layer], "magnitude", 0.7, scope="row")
    with pytest.raises(RnnpruneError, match=r"removes not a single weight: 0\.70"):
        pruned([layer], "magnitude", 0.3, scope="row", earlier=one.pruned)


def test_refitting_twice_is_refitting_once(monkeypatch):
    """The best fit of a part of what stays is that of the best fit of all that stays."""
    monkeypatch.setattr("rnnprune_cli.refit.RIDGES", (DAMPING,))
    layer = layer_of("LSTM", dtype=np.float64)
    one = pruned([layer], "magnitude", 0.3)
    two = pruned([layer], "magnitude", 0.6, earlier=one.pruned)
    mask, values = joint(two, layer)
    moments = inputs_of(layer).moments
    every = sum(moments.sums(held)[0][0] for held in (False, True)) / moments.count
    own = np.concatenate([w.read()[0] for w in layer.weights], axis=1)
    part = RowInputs(np.arange(len(own)), every, None, every, moments.count)
    np.testing.assert_allclose(values[0], refit(own, mask[0], [part])[0], atol=1e-9)


def test_blocks_with_gaps_count_by_what_is_left_of_them():
    """Small weights, of which an earlier stage took some from the block that matters most."""
    values = np.full((1, 4, 8), 1e-3, np.float32)
    values[0, :, :2] = 1e-2
    layer = RecurrentLayer(
        "a", "RNN", "forward", 8, 4, weight("W", values, 1), weight("R", values[:, :, :4].copy(), 1)
    )
    mask = np.ones(values.shape, bool)
    mask[0, 0, 0] = False
    earlier = {"W": StoredWeight(layer.w, mask), "R": StoredWeight(layer.r, mask[:, :, 4:])}
    found = pruned(
        [layer], "magnitude", 0.5, "block:2x2", "layer", data=False, earlier=earlier
    ).pruned["W"]
    assert np.array_equal(found.mask[:, :, :2], mask[:, :, :2])


# Numbers


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
@pytest.mark.parametrize("method", METHODS)
def test_weights_keep_their_type(method, dtype):
    layer = layer_of("GRU", dtype=dtype)
    mask, values = joint(pruned([layer], method), layer)
    assert values.dtype == dtype and np.isfinite(values).all()
    assert np.all(np.abs((~mask).sum(axis=2) - 0.6 * mask.shape[2]) < 1)


def test_a_refit_that_half_precision_cannot_hold_is_left_out():
    layer = layer_of("RNN", hidden=2, inputs=2, dtype=np.float16, scale=20000.0)
    moments = Moments(1, 4)
    # Each of two columns is the other, ten times as large: what goes would be made up for tenfold.
    base = np.random.default_rng(0).standard_normal((1, 100, 2))
    moments.add(np.concatenate([10 * base, base], axis=2))
    stage = Stage("random", "weight", "layer", 0.5)
    said = []
    for seed in range(5):
        task = WeightTask(
            [layer],
            [layer],
            stage,
            seed,
            lambda step: None,
            {},
            {"RNN0": LayerInputs(moments, None)},
        )
        result = prune_weights(task)
        said += [repair.problem for repair in result.repairs]
        assert all(np.isfinite(stored()).all() for stored in result.pruned.values())
    assert "what it reads, or its repair, is not finite" in said


def test_layers_with_shares_of_their_own_do_not_compete():
    layers = [layer_of("LSTM", seed=1), layer_of("LSTM", seed=2, scale=9.0)]
    shares = {"LSTM1": 0.2, "LSTM2": 0.8}
    for scope in SCOPES:
        result = pruned(layers, "magnitude", 0.5, scope=scope, shares=shares)
        for layer in layers:
            mask, _ = joint(result, layer)
            assert (~mask).mean() == pytest.approx(shares[layer.name], abs=0.01)


@pytest.mark.parametrize("scope", sorted(SCOPES))
def test_refitting_leaves_less_error_than_not(scope):
    """On what the layer reads, for every method: the mask is the same, the values are better."""
    layer = layer_of("GRU", 2)
    inputs = inputs_of(layer)
    original = np.concatenate([w.read() for w in layer.weights], axis=2).astype(np.float64)

    def lost(result: PrunedWeights) -> float:
        _, values = joint(result, layer)
        total = 0.0
        for d, g in itertools.product(range(2), range(3)):
            rows = slice(g * HIDDEN, (g + 1) * HIDDEN)
            change = values[d, rows] - original[d, rows]
            moments = inputs.of_gate(g)
            h = sum(moments.sums(held)[0][d] for held in (False, True))
            total += np.einsum("ij,jk,ik->", change, h, change)
        return total

    for method in METHODS:
        with_refit = lost(pruned([layer], method, scope=scope))
        without = lost(pruned([layer], method, scope=scope, compensate=False))
        assert with_refit < without
