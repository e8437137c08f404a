"""Random: the baseline that every other criterion has to beat."""

from __future__ import annotations

import numpy as np

from rnnprune_cli.methods import Method, register
from rnnprune_cli.model import Array, LayerFigures, UnitFigures, WeightFigures


def weights(figures: WeightFigures) -> Array:
    """Scores uniform random numbers in [0, 1) (the control of Blalock et al. 2020)."""
    return figures.generator.random(figures.weight.shape, dtype=np.float32)


def units(figures: UnitFigures, generator: np.random.Generator) -> Array:
    """Scores uniform random numbers in [0, 1)."""
    return generator.random(figures.outgoing.shape)


def layer(figures: LayerFigures, generator: np.random.Generator) -> float:
    """Scores a uniform random number in [0, 1)."""
    return float(generator.random())


register(
    Method(
        "random",
        "seeded random numbers; the baseline to compare with",
        "Blalock et al. 2020, What is the State of Neural Network Pruning?, arXiv:2003.03033",
        weights,
        units,
        layer,
        in_loss=True,
    )
)
