"""Gradient: how much the loss would change, to first order."""

from __future__ import annotations

import numpy as np

from rnnprune_cli.errors import UsageError
from rnnprune_cli.methods import Method, register
from rnnprune_cli.model import Array, WeightFigures


def weights(figures: WeightFigures) -> Array:
    """Scores the root mean square, over batches, of ``w · ∂L/∂w`` (Molchanov et al. 2019, eq. 8).

    The mean of the gradient itself (SNIP, Lee et al. 2019) nearly vanishes in a trained model.

    Raises:
        UsageError: Without data.
    """
    if figures.gradients is None:
        raise UsageError("method 'gradient' needs data", "give --data or --calibration")
    return np.asarray(np.abs(figures.values) * np.sqrt(figures.gradients.square))


register(
    Method(
        "gradient",
        "change of the loss without a weight, to first order; labels, or the model's own answers",
        "Molchanov et al. 2019, Importance Estimation for Pruning, arXiv:1906.10771",
        weights,
        needs_data=True,
        needs_gradients=True,
        in_loss=True,
        scope="row",  # units whose gradient is small lose nearly all in wider ones
    )
)
