"""Dividing what is to be removed among layers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rnnprune_cli.allocate import LEVELS, MAX_SHARE, allocate
from rnnprune_cli.model import Curve, Point


def curve(layer: str, size: int, points: dict[float, float]) -> Curve:
    return Curve(layer, None, size, tuple(Point(s, d, ()) for s, d in points.items()))


sizes = st.integers(1, 1000)
drops = st.lists(st.floats(-0.1, 3), min_size=3, max_size=3)


@given(st.lists(st.tuples(sizes, drops), min_size=1, max_size=4), st.floats(0, 0.95))
@settings(max_examples=200, deadline=None)
def test_layers_together_lose_the_asked_share(layers, share):
    curves = [
        curve(f"l{k}", size, dict(zip((0.3, 0.6, 0.9), sorted(d), strict=True)))
        for k, (size, d) in enumerate(layers)
    ]
    shares = allocate(curves, share)
    assert all(0 <= s <= MAX_SHARE for s in shares.values())
    total = sum(c.size for c in curves)
    removed = sum(c.size * shares[c.layer] for c in curves) / total
    assert share - 1e-9 <= removed < share + max(c.size for c in curves) / LEVELS / total + 1e-9


@given(st.lists(drops, min_size=2, max_size=2), st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_no_other_division_on_the_grid_costs_less_for_convex_curves(slopes, tenths):
    # Convex curves with kinks at multiples of 0.1; sizes are equal, so a step costs its slope.
    places = np.arange(1, 10) / 10
    costs = [np.cumsum(np.sort(np.interp(places, (0.1, 0.5, 0.9), np.abs(s)))) for s in slopes]
    curves = [
        curve(n, 100, dict(zip(places, c, strict=True))) for n, c in zip("ab", costs, strict=True)
    ]
    shares = allocate(curves, tenths / 10)

    def cost(a: float, b: float) -> float:
        return sum(np.interp(s, (0, *places), (0, *c)) for s, c in zip((a, b), costs, strict=True))

    grid = np.arange(0, 91) / 100
    best = min(
        cost(a, b) for a, b in itertools.product(grid, grid) if a + b >= 2 * tenths / 10 - 1e-9
    )
    if max(shares.values()) <= 0.9:
        assert cost(*shares.values()) <= best + 1e-4


def test_a_fragile_layer_keeps_more():
    tough = {0.5: 0.0, 0.7: 0.001, 0.9: 0.01}
    fragile = {0.5: 0.1, 0.7: 0.3, 0.9: 2.0}
    shares = allocate([curve("tough", 10, tough), curve("fragile", 10, fragile)], 0.5)
    assert shares["tough"] >= 0.9 and shares["fragile"] <= 0.1


def test_equal_layers_lose_the_same():
    some = {0.5: 0.01, 0.9: 0.2}
    shares = allocate([curve(n, 50, some) for n in "abc"], 0.7)
    assert max(shares.values()) - min(shares.values()) <= 1 / LEVELS + 1e-9


def test_layers_that_cost_nothing_lose_the_same():
    shares = allocate([curve(n, 50, {0.5: 0.0, 0.9: -0.01}) for n in "ab"], 0.6)
    assert shares == {"a": pytest.approx(0.6, abs=0.011), "b": pytest.approx(0.6, abs=0.011)}


def test_noise_that_makes_a_curve_fall_is_no_reason_to_remove_more():
    noisy = {0.5: 0.2, 0.7: 0.0, 0.9: 0.0}
    shares = allocate([curve("noisy", 10, noisy), curve("flat", 10, {0.5: 0.0, 0.9: 0.0})], 0.4)
    assert shares["flat"] > shares["noisy"]
