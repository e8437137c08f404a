"""Random: the baseline that every other criterion has to beat."""

from __future__ import annotations

import numpy as np

from rnnprune_cli.methods import register
from rnnprune_cli.model import Array, Weight


@register(
    "random",
    "seeded random numbers; the baseline to compare with",
    "Blalock et al. 2020, What is the State of Neural Network Pruning?, arXiv:2003.03033",
)
def random(weight: Weight, generator: np.random.Generator) -> Array:
    """Scores uniform random numbers in [0, 1) (the control of Blalock et al. 2020)."""
    return generator.random(weight.shape, dtype=np.float32)
