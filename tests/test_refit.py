"""Refitting rows, against least squares on the raw samples."""

from __future__ import annotations

import numpy as np
import pytest
from cells import layer_model, second_moment, trace
from conftest import initializers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hessians import HIDDEN, VARIANTS, sequences, tensors_of

from rnnprune_cli import refit as module
from rnnprune_cli.model import GATES
from rnnprune_cli.refit import DAMPING, RowInputs, refit, surgeon

TOLERANCE = 1e-8


def ridge_of(samples: np.ndarray, ridge: float) -> float:
    """What is added to the diagonal: a share of the mean square of what is read."""
    return ridge * float(np.square(samples).mean())


def least_squares(
    samples: np.ndarray, own: np.ndarray, stays: np.ndarray, ridge: float
) -> tuple[np.ndarray, float]:
    """The row that stays closest on the samples, and to itself; and the squared distance."""
    extra = np.sqrt(ridge_of(samples, ridge)) * np.eye(len(own))
    design = np.concatenate([samples / np.sqrt(len(samples)), extra])
    new = np.zeros(len(own))
    new[stays], *_ = np.linalg.lstsq(design[:, stays], design @ own, rcond=None)
    return new, float(np.square(design @ (new - own)).sum())


def drawn(seed: int, rows: int, n: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Correlated samples with a mean, and rows."""
    rng = np.random.default_rng(seed)
    samples = rng.standard_normal((count, n)) @ rng.standard_normal((n, n)) + 0.5
    return samples, rng.standard_normal((rows, n))


def inputs_of(samples: np.ndarray, rows: np.ndarray, held: np.ndarray | None = None) -> RowInputs:
    if held is None:
        moment = second_moment(samples)
        return RowInputs(rows, moment, None, moment, len(samples))
    every = second_moment(np.concatenate([samples, held]))
    both = len(samples) + len(held)
    return RowInputs(rows, second_moment(samples), second_moment(held), every, both)


cases = st.tuples(st.integers(0, 1 << 20), st.integers(2, 9), st.integers(1, 40))


@settings(max_examples=60, deadline=None)
@given(cases, st.data())
def test_refit_is_the_constrained_least_squares_solution(case, data):
    seed, n, count = case
    samples, values = drawn(seed, 3, n, count)
    row = st.lists(st.booleans(), min_size=n, max_size=n)
    mask = np.array([data.draw(row) for _ in values])
    new, _ = refit(values, mask, [inputs_of(samples, np.arange(3))])
    for own, stays, found in zip(values, mask, new, strict=True):
        wanted, _ = least_squares(samples, own, stays, DAMPING)
        np.testing.assert_allclose(found, wanted, atol=TOLERANCE * max(1, np.abs(wanted).max()))
        assert not found[~stays].any()


@settings(max_examples=60, deadline=None)
@given(cases, st.data())
def test_surgeon_tells_the_error_of_every_further_removal(case, data):
    """``w_i² / [(H_SS)⁻¹]_ii`` is what brute force finds, for each weight that is left."""
    seed, n, count = case
    samples, values = drawn(seed, 1, n, count)
    stays = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    new, diagonals = surgeon(values, stays[None], inputs_of(samples, np.arange(1)))
    wanted, so_far = least_squares(samples, values[0], stays, DAMPING)
    np.testing.assert_allclose(new[0], wanted, atol=TOLERANCE * max(1, np.abs(wanted).max()))
    assert np.array_equal(diagonals[0, ~stays], np.ones((~stays).sum()))
    scale = least_squares(samples, values[0], np.zeros(n, bool), DAMPING)[1]
    for place in np.flatnonzero(stays):
        fewer = stays.copy()
        fewer[place] = False
        _, then = least_squares(samples, values[0], fewer, DAMPING)
        cost = new[0, place] ** 2 / diagonals[0, place]
        assert cost == pytest.approx(then - so_far, abs=1e-7 * scale)


def test_rows_that_read_different_things_are_solved_with_their_own(monkeypatch):
    monkeypatch.setattr(module, "RIDGES", (1e-3,))
    one, values = drawn(0, 4, 6, 30)
    two, _ = drawn(1, 4, 6, 30)
    held = drawn(2, 4, 6, 10)[0]
    mask = np.random.default_rng(3).random((4, 6)) < 0.5
    parts = [inputs_of(one, np.array([3, 0]), held), inputs_of(two, np.array([1, 2]), held)]
    new, _ = refit(values, mask, parts)
    for row, samples in enumerate((one, two, two, one)):
        every = np.concatenate([samples, held])
        wanted, _ = least_squares(every, values[row], mask[row], 1e-3)
        np.testing.assert_allclose(new[row], wanted, atol=TOLERANCE * 10)


def test_the_ridge_is_the_one_that_does_best_on_held_out_samples():
    """Fewer samples than columns: the more they are trusted, the worse."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((5, 30))
    samples, held = (rng.standard_normal((k, 5)) @ mixing for k in (12, 200))
    samples += 1.5 * rng.standard_normal(samples.shape)
    held += 1.5 * rng.standard_normal(held.shape)
    values = rng.standard_normal((20, 30))
    mask = rng.random((20, 30)) < 0.4
    part = inputs_of(samples, np.arange(20), held)
    losses = []
    for ridge in module.RIDGES:
        change = np.stack(
            [
                least_squares(samples, own, stays, ridge)[0] - own
                for own, stays in zip(values, mask, strict=True)
            ]
        )
        losses.append(np.square(held @ change.T).sum())
    best = module.RIDGES[int(np.argmin(losses))]
    assert best != module.RIDGES[0]
    every = np.concatenate([samples, held])
    new, _ = refit(values, mask, [part])
    for own, stays, found in zip(values, mask, new, strict=True):
        wanted, _ = least_squares(every, own, stays, best)
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_what_is_said_of_the_error_comes_from_samples_that_were_not_fitted(monkeypatch):
    monkeypatch.setattr(module, "RIDGES", (1e-2,))
    samples, values = drawn(0, 4, 6, 8)
    held = drawn(1, 4, 6, 50)[0]
    mask = np.random.default_rng(3).random((4, 6)) < 0.5
    _, left = refit(values, mask, [inputs_of(samples, np.arange(4), held)])
    fitted = [least_squares(samples, v, m, 1e-2)[0] for v, m in zip(values, mask, strict=True)]
    share = np.square(held @ (fitted - values).T).sum() / np.square(held @ values.T).sum()
    assert left == pytest.approx(share)
    assert refit(values, mask, [inputs_of(samples, np.arange(4))])[1] is None


def test_columns_that_are_never_read_do_no_harm():
    samples, values = drawn(0, 2, 5, 30)
    samples[:, 2:] = 0
    mask = np.array([[True, False, True, False, True], [False] * 5])
    new, _ = refit(values, mask, [inputs_of(samples, np.arange(2))])
    assert np.isfinite(new).all() and not new[1].any()
    np.testing.assert_allclose(new[0, [2, 4]], values[0, [2, 4]])  # nothing pulls at them
    nothing, _ = refit(values, mask, [inputs_of(np.zeros_like(samples), np.arange(2))])
    np.testing.assert_allclose(nothing, np.where(mask, values, 0))


def test_whole_rows_stay_to_the_bit():
    samples, values = drawn(0, 2, 5, 30)
    mask = np.array([[True] * 5, [True, False, True, True, True]])
    new, _ = refit(values, mask, [inputs_of(samples, np.arange(2))])
    assert np.array_equal(new[0], values[0]) and not np.array_equal(new[1], values[1])


# Through the whole pipeline


def reads(op, direction, reset, tensors) -> list[list[np.ndarray]]:
    """What each gate of each direction reads, by simulation."""
    found = []
    for one in trace(op, tensors, sequences().transpose(1, 0, 2), direction, reset):
        gate = one.reset.mean(axis=1, keepdims=True) if reset else one.reset
        gated = np.concatenate([one.x, gate * one.h], axis=1)
        plain = one.read
        found.append([gated if op == "GRU" and g == 2 else plain for g in range(GATES[op])])
    return found


def brute_force(samples: np.ndarray, own: np.ndarray, count: int) -> np.ndarray:
    """Removes one weight after the other, each time the one whose loss costs least."""
    stays = np.ones(len(own), bool)
    for _ in range(count):
        costs = np.full(len(own), np.inf)
        for place in np.flatnonzero(stays):
            fewer = stays.copy()
            fewer[place] = False
            _, costs[place] = least_squares(samples, own, fewer, DAMPING)
        stays[int(np.argmin(costs))] = False
    return stays


@pytest.mark.parametrize(("op", "direction", "bias", "reset"), VARIANTS)
def test_obs_removes_and_refits_what_brute_force_does(
    op, direction, bias, reset, prune_model, tmp_path, monkeypatch
):
    """Seven weights a row, four of them to go in four rounds: one in each."""
    monkeypatch.setattr(module, "RIDGES", (DAMPING,))
    tensors = tensors_of(op, direction, bias)
    np.savez(tmp_path / "data.npz", x=sequences())
    prune_model(
        layer_model(op, direction, tensors, reset),
        4 / 7,
        method="obs",
        export="dense",
        calibration=tmp_path / "data.npz",
    )
    written = {v.shape: v for v in initializers(tmp_path / "out.onnx").values()}
    found = np.concatenate([written[tensors[k].shape] for k in "WR"], axis=2)
    original = np.concatenate([tensors[k] for k in "WR"], axis=2).astype(np.float64)
    for d, gates in enumerate(reads(op, direction, reset, tensors)):
        for row, own in enumerate(original[d]):
            samples = gates[row // HIDDEN]
            stays = brute_force(samples, own, 4)
            wanted, _ = least_squares(samples, own, stays, DAMPING)
            assert np.array_equal(found[d, row] != 0, stays)
            np.testing.assert_allclose(found[d, row], wanted, atol=1e-4)
