"""Criteria: what makes a weight worth keeping.

A criterion is one file in this folder that calls :func:`register`. It sees a weight and a random
generator, and returns a score for each element; the smallest scores are removed.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rnnprune_cli.errors import UsageError, closest
from rnnprune_cli.model import Array, Weight

Score = Callable[[Weight, np.random.Generator], Array]


@dataclass(frozen=True)
class Method:
    """A registered criterion.

    Attributes:
        name: What ``--method`` takes.
        summary: One line for ``rnnprune methods``.
        paper: Where it comes from.
        granularities: What it can score.
        score: ``(weight, generator) → scores`` of the weight's shape, float32 or float64, ≥ 0.
    """

    name: str
    summary: str
    paper: str
    granularities: tuple[str, ...]
    score: Score


_REGISTRY: dict[str, Method] = {}


def register(
    name: str, summary: str, paper: str, granularities: tuple[str, ...] = ("weight",)
) -> Callable[[Score], Score]:
    """Registers a scoring function under a name; used as a decorator."""

    def add(score: Score) -> Score:
        _REGISTRY[name] = Method(name, summary, paper, granularities, score)
        return score

    return add


def methods() -> dict[str, Method]:
    """Returns every criterion by name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(sorted(_REGISTRY.items()))


def method(name: str) -> Method:
    """Returns one criterion.

    Raises:
        UsageError: If there is none of that name.
    """
    known = methods()
    if name not in known:
        raise UsageError(f"there is no method '{name}'", closest(name, known))
    return known[name]
