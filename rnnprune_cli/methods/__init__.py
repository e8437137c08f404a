"""Criteria: what makes a weight, or a hidden unit, worth keeping.

A criterion is one file in this folder that calls :func:`register`. It sees what is known about a
weight and returns a score for each element; or about units, or a layer. The smallest scores are
removed.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rnnprune_cli.errors import UsageError, closest
from rnnprune_cli.model import Array, LayerFigures, UnitFigures, WeightFigures

WeightScore = Callable[[WeightFigures], Array]
UnitScore = Callable[[UnitFigures, np.random.Generator], Array]
LayerScore = Callable[[LayerFigures, np.random.Generator], float]


@dataclass(frozen=True)
class Method:
    """A registered criterion.

    Attributes:
        name: What ``--method`` takes.
        summary: One line for ``rnnprune methods``.
        paper: Where it comes from.
        weight: ``figures → scores`` of the weight's shape, float32 or float64, ≥ 0; a new array.
        unit: ``(figures, generator) → scores`` like :attr:`UnitFigures.outgoing`, ≥ 0; those of
            units that go together are one.
        layer: ``(figures, generator) → score`` of a whole layer, ≥ 0.
        needs_data: Whether it scores by what data make of the model.
        needs_gradients: Whether it asks for :attr:`WeightFigures.gradients`.
        in_loss: Whether scores of weights are in units of the loss, the same for all gates.
        scope: Within what weights compete best, where that is not the default.
        rounds: In how many steps weights go, each scored and refitted after those before it.
    """

    name: str
    summary: str
    paper: str
    weight: WeightScore | None = None
    unit: UnitScore | None = None
    layer: LayerScore | None = None
    needs_data: bool = False
    needs_gradients: bool = False
    in_loss: bool = False
    scope: str | None = None
    rounds: int = 1

    @property
    def scores(self) -> tuple[str, ...]:
        """What it can score: ``weight`` (singly, in blocks and banks), ``unit``, ``layer``."""
        scored = {"weight": self.weight, "unit": self.unit, "layer": self.layer}
        return tuple(name for name, score in scored.items() if score is not None)


_REGISTRY: dict[str, Method] = {}


def register(method: Method) -> None:
    """Adds a criterion to those that :func:`methods` returns."""
    _REGISTRY[method.name] = method


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
