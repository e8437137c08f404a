"""How much each layer loses, so that together they lose a given share at the least cost."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from rnnprune_cli.model import Array, Curve

LEVELS = 100
"""Steps of sparsity that are told apart."""
MAX_SHARE = 0.98
_SLOPE = 1e-6
"""Cost of a layer that costs nothing: of equal ones, all lose the same."""


def allocate(curves: Sequence[Curve], share: float) -> dict[str, float]:
    """Divides what is to be removed among layers.

    The losses of single layers are taken to add up. Each layer's curve becomes the convex one below
    it, so that taking the cheapest step next, again and again, is the best division (the greedy
    solution of a separable convex problem; Fox 1966, Discrete Optimization via Marginal Analysis).

    Args:
        curves: One for each layer, with no gate.
        share: Of all weights (or units), 0 ≤ s < 1.

    Returns:
        Layer name → sparsity, at most :data:`MAX_SHARE`.
    """
    sizes = {curve.layer: curve.size for curve in curves}
    costs = {curve.layer: _convex(curve) for curve in curves}
    levels = dict.fromkeys(sizes, 0)
    wanted = share * sum(sizes.values()) * LEVELS
    queue: list[tuple[float, int, str]] = []

    def push(layer: str) -> None:
        level = levels[layer]
        if level + 1 <= MAX_SHARE * LEVELS:
            step = float(costs[layer][level + 1] - costs[layer][level]) / sizes[layer]
            heapq.heappush(queue, (step, level, layer))

    for layer in sizes:
        push(layer)
    removed = 0
    while queue and removed < wanted:
        _, _, layer = heapq.heappop(queue)
        levels[layer] += 1
        removed += sizes[layer]
        push(layer)
    return {layer: level / LEVELS for layer, level in levels.items()}


def _convex(curve: Curve) -> Array:
    """Returns the greatest convex function below a curve, at every level up to 1."""
    known = {0.0: 0.0, **{p.sparsity: max(p.drop, 0.0) for p in curve.points}}
    places = np.array(sorted(known))
    drops = np.maximum.accumulate([known[x] for x in places])  # noise may make a curve fall
    if places[-1] < 1:  # beyond what was measured, at least as steep as just before
        last = (drops[-1] - drops[-2]) / (places[-1] - places[-2]) if len(places) > 1 else 1.0
        places = np.append(places, 1.0)
        drops = np.append(drops, drops[-1] + 2 * last * (1 - places[-2]))
    hull: list[int] = []
    for k in range(len(places)):
        while len(hull) > 1 and _above(places, drops, hull[-2], hull[-1], k):
            hull.pop()
        hull.append(k)
    levels = np.arange(LEVELS + 1) / LEVELS
    found: Array = np.interp(levels, places[hull], drops[hull]) + _SLOPE * levels**2
    return found


def _above(x: Array, y: Array, first: int, middle: int, last: int) -> bool:
    """Tells whether a point lies on or above the line between two others."""
    line = y[first] + (y[last] - y[first]) * (x[middle] - x[first]) / (x[last] - x[first])
    return bool(y[middle] >= line)
