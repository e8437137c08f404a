"""Magnitude: small weights matter least, and units that little is read from."""

from __future__ import annotations

import numpy as np

from rnnprune_cli.methods import Method, register
from rnnprune_cli.model import Array, LayerFigures, UnitFigures, WeightFigures


def weights(figures: WeightFigures) -> Array:
    """Scores ``|w|`` (Han et al. 2015, section 3.1; See et al. 2016 for recurrent models)."""
    values = figures.values
    if values.dtype.itemsize < 4:
        values = values.astype(np.float32)
    return np.abs(values)


def units(figures: UnitFigures, generator: np.random.Generator) -> Array:
    """Scores the squared norm of all weights that multiply a unit (Li et al. 2017, section 3.1)."""
    return figures.outgoing


def layer(figures: LayerFigures, generator: np.random.Generator) -> float:
    """Scores the mean square of a layer's weights."""
    return figures.mean_square


register(
    Method(
        "magnitude",
        "size of a weight, of the weights that read a unit, or of a layer's; needs no data",
        "Han et al. 2015, Learning both Weights and Connections, arXiv:1506.02626",
        weights,
        units,
        layer,
    )
)
