"""Statistics that ask only for the order of figures: right for noise of any shape.

Wilcoxon (1945), Mann & Whitney (1947), the estimates of Hodges & Lehmann (1963), Holm (1979).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Figures = NDArray[np.float64]

MAX_EXACT = 2500
"""Pairs up to which the distribution of U is worked out exactly; the normal is as good beyond."""


def chance_of_greater(one: Figures, two: Figures) -> float:
    """Returns the one-sided p-value of Mann and Whitney's test.

    Args:
        one: Independent figures.
        two: Others.

    Returns:
        The chance that ``one`` looks this much greater than ``two`` where it is not.
    """
    differences = np.subtract.outer(one, two)
    u = float((differences > 0).sum() + (differences == 0).sum() / 2)
    n, m = differences.shape
    pooled = np.concatenate([one, two])
    ties = np.unique(pooled, return_counts=True)[1].astype(np.float64)
    if ties.max() == 1 and n * m <= MAX_EXACT:
        return float(_distribution(n, m)[int(u) :].sum())
    everything = n + m
    spread = n * m / 12 * (everything + 1 - (ties**3 - ties).sum() / (everything**2 - everything))
    if spread <= 0:  # all are equal
        return 1.0
    return math.erfc((u - n * m / 2 - 0.5) / math.sqrt(2 * spread)) / 2


def shift(one: Figures, two: Figures) -> tuple[float, float, float]:
    """Returns by how much ``one`` is greater than ``two``, and the ends of the 95 % interval.

    The interval holds the shifts that the two-sided test does not refuse; with fewer than four
    figures each there is none so narrow, and it spans all differences.
    """
    differences = np.sort(np.subtract.outer(one, two), axis=None)
    n, m = len(one), len(two)
    if n * m <= MAX_EXACT:
        out = int(np.searchsorted(np.cumsum(_distribution(n, m)), 0.025, side="right"))
    else:
        out = int(n * m / 2 - 1.96 * math.sqrt(n * m * (n + m + 1) / 12))
    out = max(out - 1, 0)
    return float(np.median(differences)), float(differences[out]), float(differences[-1 - out])


def signed_rank(values: Figures, confidence: float) -> tuple[float, float, float]:
    """Returns the Hodges-Lehmann estimate of a centre, and its signed-rank interval.

    Args:
        values: float64 ``[n]``: independent, symmetric about the centre; need not be alike.
        confidence: Of the interval, exactly or a little more; for n < 6 it is all that there is.
    """
    one, two = np.triu_indices(len(values))
    means = np.sort((values[one] + values[two]) / 2)
    outside = int(np.searchsorted(_signed_ranks(len(values)), (1 - confidence) / 2, "right"))
    place = max(outside - 1, 0)
    return float(np.median(means)), float(means[place]), float(means[-1 - place])


@functools.lru_cache(maxsize=64)
def _signed_ranks(n: int) -> NDArray[Any]:
    """Distribution function of Wilcoxon's signed-rank statistic for n values."""
    chances = np.ones(1)
    for rank in range(1, n + 1):
        longer = np.zeros(len(chances) + rank)
        longer[: len(chances)] += chances / 2
        longer[rank:] += chances / 2
        chances = longer
    return np.asarray(np.cumsum(chances))


def median_interval(figures: Figures) -> tuple[float, float]:
    """Returns the 95 % interval of the median; all that there is of fewer than six figures."""
    ordered, n = np.sort(figures), len(figures)
    below, out = 0.0, -1
    while below <= 0.025 and out < (n - 1) // 2:
        out += 1
        below += math.comb(n, out) / 2**n
    out = max(out - 1, 0)
    return float(ordered[out]), float(ordered[-1 - out])


def adjusted(chances: Sequence[float]) -> list[float]:
    """Returns Holm's p-values: the chance of one such false alarm in all tests together."""
    order = np.argsort(chances)
    found, highest = [0.0] * len(chances), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(chances) - rank) * chances[place]))
        found[place] = highest
    return found


@functools.lru_cache(maxsize=64)
def _distribution(n: int, m: int) -> NDArray[Any]:
    """Returns the chance of each U, 0 to n·m, of n and m figures from one distribution.

    The greatest of all is one of the n (and beats all m) or one of the m (and beats none).
    """
    rows = [np.ones(1) for _ in range(m + 1)]  # of none and of 0 … m
    for k in range(1, n + 1):
        new = [np.ones(1)]
        for j in range(1, m + 1):
            chances = np.zeros(k * j + 1)
            chances[j:] = k / (k + j) * rows[j]
            chances[: k * (j - 1) + 1] += j / (k + j) * new[j - 1]
            new.append(chances)
        rows = new
    return rows[m]
