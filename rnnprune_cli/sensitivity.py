"""What a model loses as one layer at a time, or one gate, loses weights or units."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rnnprune_cli.allocate import allocate
from rnnprune_cli.apply import Applied, Applier, Inputs, chosen_layers
from rnnprune_cli.data import Dataset
from rnnprune_cli.errors import NothingRemovedError, RnnpruneError
from rnnprune_cli.gate_order import ONNX_ORDER
from rnnprune_cli.metrics import Quality, drop
from rnnprune_cli.model import Curve, Point, RecurrentLayer, Runner, Stage, StoredWeight
from rnnprune_cli.options import STRUCTURES, scopes_of
from rnnprune_cli.select import parse_pattern

SPARSITIES = (0.3, 0.5, 0.7, 0.8, 0.9)
"""Where curves are measured."""
BEARABLE = 0.01
"""A loss that nobody minds."""


def curves(
    applier: Applier,
    done: Applied,
    stage: Stage,
    quality: Quality,
    threads: int,
    progress: Callable[[str], None],
    sparsities: Sequence[float] = SPARSITIES,
    gates: bool = False,
) -> tuple[Curve, ...]:
    """Prunes one layer at a time, at several sparsities, and measures.

    Layers from which nothing can be removed have no curve.

    Args:
        applier: Applies the stage.
        done: The model, as far as it is pruned.
        stage: What to do to each layer.
        quality: Measures a model.
        threads: Threads to run with.
        progress: Called with how far it is.
        sparsities: Where to measure.
        gates: Whether to measure each gate of a layer, too; only for weights.
    """
    layers = chosen_layers(done.model.layers, stage)
    only = None if stage.granularity in STRUCTURES else parse_pattern(stage.granularity).sparsity
    if only is not None:
        sparsities = (only,)
    gates = gates and stage.granularity not in STRUCTURES
    told = _Told(progress, len(layers) * len(sparsities))
    found: list[Curve] = []
    for layer in layers:
        points: dict[str | None, list[Point]] = {}
        for sparsity in sparsities:
            told.begin(f"{layer.name} at {sparsity:g}")
            own = dataclasses.replace(
                stage, layers=(_literal(layer.name),), exclude=(), sparsity=sparsity, shares={}
            )
            with applier.scratch():
                try:
                    applied = applier.add(done, own)
                except RnnpruneError as error:
                    # Where nothing went, more may go; unless there is nothing at all.
                    if isinstance(error, NothingRemovedError) and sparsity < sparsities[-1]:
                        continue
                    break
                finally:
                    told.done()
                parts: dict[str | None, Applied] = {None: applied}
                for letter, pruned in _by_gate(layer, applied, done) if gates else ():
                    parts[letter] = dataclasses.replace(applied, pruned=pruned)
                for gate, part in parts.items():
                    point = _point(sparsity, quality, runner_of(part, threads))
                    points.setdefault(gate, []).append(point)
        size = _size(layer, stage)
        count = len(ONNX_ORDER[layer.op])
        found.extend(
            Curve(layer.name, gate, size if gate is None else size // count, tuple(some))
            for gate, some in points.items()
        )
    return tuple(found)


def advised(found: Sequence[Curve]) -> tuple[tuple[str, ...], str]:
    """Returns the layers to protect, and a sentence about them.

    A layer is to be protected if what it loses at the sparsity in the middle is over 1 % and more
    than twice the median of the others.
    """
    whole = [curve for curve in found if curve.gate is None and curve.points]
    if not whole:
        return (), "nothing could be removed from any layer"
    middle = {c.layer: c.points[len(c.points) // 2] for c in whole}
    if len(whole) == 1:
        bearable = [p.sparsity for p in whole[0].points if p.drop <= BEARABLE]
        most = f"up to {max(bearable):.0%} lose" if bearable else "even the least share loses more"
        than = f"at most {BEARABLE:.0%}" if bearable else f"than {BEARABLE:.0%}"
        return (), f"there is one layer: {most} {than}"
    usual = {
        name: float(np.median([p.drop for other, p in middle.items() if other != name]))
        for name in middle
    }
    fragile = sorted(
        (n for n, p in middle.items() if p.drop > max(BEARABLE, 2 * usual[n])),
        key=lambda name: -middle[name].drop,
    )
    if not fragile:
        return (), "no layer stands out: one --sparsity for all is fine"
    worst = fragile[0]
    return tuple(fragile), (
        f"protect '{worst}': at {middle[worst].sparsity:g} it costs {middle[worst].drop:.1%}, the"
        f" median of the others {max(usual[worst], 0.0):.1%}: --scope sensitivity divides"
        f" accordingly, or --exclude '{worst}'"
    )


def measurable(inputs: Inputs, data: Dataset) -> Quality:
    """Returns what measures models on a data set.

    Raises:
        RnnpruneError: If there is nothing to measure.
    """
    quality = inputs.quality(data)
    if quality is None:
        raise RnnpruneError(
            "the model has no output that could be measured without labels",
            "give labels, or --metric relative-error for a state: OUTPUT=relative-error",
        )
    return quality


def runner_of(applied: Applied, threads: int) -> Runner:
    """Returns a pruned model that has not been written, ready to run."""
    if applied.pruned:
        return applied.model.open_masked(applied.pruned, threads)
    return applied.model.open(threads)


def _literal(name: str) -> str:
    """Returns a glob that matches one name only."""
    return "".join(f"[{c}]" if c in "[]*?" else c for c in name)


def _size(layer: RecurrentLayer, stage: Stage) -> int:
    if stage.granularity == "unit":
        return layer.hidden_size * layer.w.shape[0]
    return layer.macs_per_step


def _point(sparsity: float, quality: Quality, runner: Runner) -> Point:
    metrics = quality.of(runner)
    return Point(sparsity, drop(quality.dense, metrics), metrics)


def _by_gate(
    layer: RecurrentLayer, applied: Applied, done: Applied
) -> list[tuple[str, Mapping[str, StoredWeight]]]:
    """Returns what is pruned if only one gate of a layer is, for each gate."""
    found: list[tuple[str, Mapping[str, StoredWeight]]] = []
    letters = ONNX_ORDER[layer.op]
    for number, letter in enumerate(letters):
        parts = dict(applied.pruned)
        for weight in layer.weights:
            stored = applied.pruned.get(weight.name)
            if stored is None:
                continue
            rows = np.arange(weight.shape[1]) * len(letters) // weight.shape[1] == number
            inside = rows[None, :, None]
            before = done.pruned.get(weight.name)
            old = weight.read() if before is None else before()
            values = None if stored.refitted is None else np.where(inside, stored.refitted, old)
            mask = stored.mask | ~inside
            parts[weight.name] = dataclasses.replace(stored, mask=mask, refitted=values)
        found.append((letter, parts))
    return found


class _Told:
    """Says how far it is, and how long it will take."""

    def __init__(self, progress: Callable[[str], None], count: int) -> None:
        self._progress = progress
        self._count = count
        self._done = 0
        self._start = time.perf_counter()

    def begin(self, what: str) -> None:
        """Says what is done next."""
        left = ""
        if self._done:
            elapsed = time.perf_counter() - self._start
            left = f", about {elapsed / self._done * (self._count - self._done):.0f} s left"
        self._progress(f"{what} ({self._done + 1} of {self._count}{left})")

    def done(self) -> None:
        """Counts what was begun."""
        self._done += 1


def divided(
    applier: Applier,
    done: Applied,
    stage: Stage,
    quality: Quality,
    threads: int,
    progress: Callable[[str], None],
) -> tuple[Stage, tuple[Curve, ...]]:
    """Returns a stage of scope ``sensitivity`` with what each layer is to lose, and the curves.

    Raises:
        RnnpruneError: If nothing can be removed.
    """
    plain = dataclasses.replace(stage, scope=next(iter(scopes_of(stage.granularity))))
    found = curves(applier, done, plain, quality, threads, progress)
    if not found:
        applier.add(done, plain)  # says why nothing can be removed
    return dataclasses.replace(plain, shares=allocate(found, stage.sparsity)), found
