"""Optimal Brain Surgeon: the error that is left after the best repair."""

from __future__ import annotations

import numpy as np

from rnnprune_cli.errors import UsageError
from rnnprune_cli.methods import Method, register
from rnnprune_cli.model import Array, LayerFigures, Read, UnitFigures, WeightFigures

DAMPING = 1e-4
"""Added to the diagonal of a covariance, times its mean."""
ROUNDS = 256
"""Above so many units, several go at once."""


def weights(figures: WeightFigures) -> Array:
    """Scores the root of the least error that losing a weight adds to its row.

    ``w_i² / [H⁻¹]_ii``, H being that of what is left of the row, and w refitted to it (Hassibi &
    Stork 1993, equation 5). Several weights go at once, in a few rounds. Where the inverses would
    take too long in early rounds, H's diagonal stands for it (OBD, LeCun et al. 1989; Wanda).

    Raises:
        UsageError: Without data.
    """
    if figures.reads is None:
        raise UsageError("method 'obs' needs data", "give --data or --calibration")
    if figures.inverse is None:
        return np.asarray(np.abs(figures.values) * np.sqrt(figures.reads))
    return np.asarray(np.abs(figures.values) / np.sqrt(figures.inverse))


def units(figures: UnitFigures, generator: np.random.Generator) -> Array:
    """Scores the error that removing a unit adds, after those that go before it.

    For a reader with output ``w · v`` the least error that is left when ``v_i`` goes and the others
    make up for it is ``‖w_i‖² / [C⁻¹]_ii``, C being the covariance of v (Hassibi & Stork 1993,
    equation 5; for structures, Kurtic et al. 2023, ZipLM, arXiv:2302.04089, section 3.1). The unit
    with the smallest sum over its readers, each as a share of the variance of its output, goes
    first; weights and inverses are then updated, and so on to the last.

    Raises:
        UsageError: Without data.
    """
    if not figures.reads:
        raise UsageError("method 'obs' needs data", "give --data or --calibration")
    readers = [_Reader(read) for read in figures.reads]
    read = np.unique(np.concatenate([reader.units for reader in readers]))
    left = read[figures.outgoing[read] > 0]
    scores = np.zeros(figures.outgoing.shape)
    at_once = -(-len(left) // ROUNDS)
    so_far = 0.0
    while len(left):
        costs = np.zeros(len(figures.outgoing))
        for reader in readers:
            np.add.at(costs, reader.units, reader.costs())
        gone = left[np.argsort(costs[left], kind="stable")[:at_once]]
        # What goes later never counts less: an order must stay one if some units may not go.
        scores[gone] = np.maximum(costs[gone], so_far)
        so_far = float(scores[gone].max())
        left = np.setdiff1d(left, gone)
        for reader in readers:
            reader.remove(gone)
    return scores


def layer(figures: LayerFigures, generator: np.random.Generator) -> float:
    """Scores what a linear map of its input leaves unexplained of a layer's output.

    Raises:
        UsageError: Without data.
    """
    if figures.unexplained is None:
        raise UsageError("method 'obs' needs data", "give --data or --calibration")
    return figures.unexplained


class _Reader:
    """One reader's weights, as their inner products, and inverse covariance, as units go."""

    def __init__(self, read: Read) -> None:
        covariance = read.covariance
        damping = DAMPING * max(float(np.diag(covariance).mean()), 1e-12)
        damped = covariance + damping * np.eye(len(covariance))
        weights = read.weights()
        self.units = read.units
        self._products = weights.T @ weights
        self._scale = 1 / max(float((self._products * damped).sum()), 1e-30)
        self._inverse = np.linalg.inv(damped)

    def costs(self) -> Array:
        """Returns the least error that is left without each place, as a share."""
        found: Array = self._scale * np.diag(self._products) / np.diag(self._inverse)
        return found

    def remove(self, units: Array) -> None:
        """Lets the others make up for units (Hassibi & Stork 1993, equation 5, for several)."""
        gone = np.isin(self.units, units)
        if not gone.any():
            return
        kept = ~gone
        inverse, products = self._inverse, self._products
        shift = np.linalg.solve(inverse[np.ix_(gone, gone)], inverse[np.ix_(gone, kept)]).T
        # w_kept becomes w_kept - w_gone · shiftᵀ; only the products of the columns are needed.
        across = shift @ products[np.ix_(gone, kept)]
        self._products = products[np.ix_(kept, kept)] - across - across.T
        self._products += shift @ products[np.ix_(gone, gone)] @ shift.T
        self._inverse = inverse[np.ix_(kept, kept)] - shift @ inverse[np.ix_(gone, kept)]
        self.units = self.units[kept]


register(
    Method(
        "obs",
        "error that is left after the best repair (Optimal Brain Surgeon)",
        "Hassibi & Stork 1993, Second Order Derivatives for Network Pruning, NeurIPS 5",
        weights,
        units,
        layer,
        needs_data=True,
        rounds=4,
    )
)
