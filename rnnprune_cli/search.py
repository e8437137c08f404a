"""The sparsity that meets targets: measured, not estimated.

What is searched for is how much each layer loses. A path leads from nothing to everything: for one
layer its sparsity, for several the division that their sensitivities ask for
(:mod:`rnnprune_cli.allocate`). Along it what a model costs falls and what it loses rises, so that
bisection finds where a target is met. Then

- with nothing but ``metric-drop``, single layers are pruned further in steps, and those that hurt
  are backed off;
- where several targets cannot be met on the path, Optuna's TPE sampler (Bergstra et al. 2011) tries
  other divisions.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from rnnprune_cli import measure
from rnnprune_cli.allocate import MAX_SHARE, allocate
from rnnprune_cli.apply import Applied, Applier, Inputs, chosen_layers
from rnnprune_cli.errors import NothingRemovedError, RnnpruneError, UsageError, closest
from rnnprune_cli.metrics import drop
from rnnprune_cli.model import Curve, ExportOptions, Plan, Stage, Target, Trial
from rnnprune_cli.options import STRUCTURES
from rnnprune_cli.save import provenance
from rnnprune_cli.sensitivity import curves, measurable, runner_of
from rnnprune_cli.timing import interleaved_latency

DROP = "metric-drop"
TARGETS = {
    DROP: "what the metric may lose: points of a share, or relative to what it was",
    "latency": "latency, after ÷ before",
    "bytes": "size of the files, after ÷ before",
    "parameters": "parameters, after ÷ before; for units and layers",
    "nonzero": "parameters that are not zero, after ÷ before",
}
"""Name → what is limited."""
LEVELS = 64
"""Steps of the path that are told apart."""
_STEPS = (0.08, 0.04, 0.02)
"""By how much single layers are pruned further."""
_LATENCY_SECONDS = 0.6


def parse_target(text: str) -> Target:
    """Reads a target, ``NAME=LIMIT``.

    Raises:
        UsageError: If it is not of that form, or not known.
    """
    name, _, value = text.partition("=")
    check_name(name)
    try:
        limit = float(value)
    except ValueError as error:
        raise UsageError(
            f"target '{text}' has no limit", f"such as {name}={_EXAMPLES[name]:g}"
        ) from error
    return checked_target(Target(name, limit))


def check_name(name: str) -> None:
    """Raises UsageError if there is no such target."""
    if name not in TARGETS:
        raise UsageError(f"there is no target '{name}'", closest(name, TARGETS))


def checked_target(target: Target) -> Target:
    """Returns a target whose limit makes sense.

    Raises:
        UsageError: If it does not.
    """
    drop_only = target.name == DROP
    if not 0 < target.limit < (float("inf") if drop_only else 1):
        raise UsageError(
            f"target '{target.name}={target.limit:g}' is not "
            + ("above 0" if drop_only else "between 0 and 1: it is after ÷ before"),
            f"such as {target.name}={_EXAMPLES[target.name]:g}",
        )
    return target


_EXAMPLES = {DROP: 0.01, "latency": 0.5, "bytes": 0.3, "parameters": 0.3, "nonzero": 0.3}


@dataclasses.dataclass(frozen=True, eq=False)
class Reached:
    """What a search has found.

    Attributes:
        stage: The stage with the sparsities that meet the targets.
        trials: All models that were tried, in order.
        curves: How much layers lose, if that was measured.
    """

    stage: Stage
    trials: tuple[Trial, ...]
    curves: tuple[Curve, ...]


class Search:
    """A search for one stage of a plan.

    Args:
        applier: Applies the stage.
        done: The model, as earlier stages left it.
        inputs: What to measure on.
        stage: What to do; its sparsity is what is searched for.
        targets: What to reach.
        before: Bytes, parameters and parameters that are not zero of the original.
        export: How the model will be written.
        most: Models that are tried, at most.
        progress: Called with how far it is.

    Raises:
        UsageError: If a target needs data and there are none.
    """

    def __init__(
        self,
        applier: Applier,
        done: Applied,
        inputs: Inputs,
        stage: Stage,
        targets: Sequence[Target],
        before: Mapping[str, int],
        export: ExportOptions,
        most: int,
        progress: Callable[[str], None],
    ) -> None:
        self._applier = applier
        self._done = done
        self._inputs = inputs
        self._stage = stage
        self._before = before
        self._export = export
        self._most = most
        self._progress = progress
        self._threads = inputs.options.threads
        self._names = [layer.name for layer in chosen_layers(done.model.layers, stage)]
        if not self._names:
            raise UsageError(
                "targets are reached by recurrent layers, and none is selected",
                "leave one out of --exclude, or give --sparsity",
            )
        self._tried: dict[tuple[float, ...], Trial] = {}
        self._unchanged: set[tuple[float, ...]] = set()
        self._seconds = 0.0
        self._limits = {target.name: target.limit for target in targets}
        self._curves: tuple[Curve, ...] = ()
        if DROP in self._limits and inputs.data is None:
            raise UsageError(
                "target 'metric-drop' needs data to measure on",
                "give --data; labels are not needed: without, outputs are held against the"
                " original's",
            )
        data, self._quality = inputs.data, None
        if data is not None and DROP in self._limits:
            self._quality = measurable(inputs, data)
        elif data is not None and len(self._names) > 1:  # to divide by sensitivity
            self._quality = inputs.quality(data)
        applier.keep = True

    def run(self) -> Reached:
        """Searches.

        Raises:
            RnnpruneError: If a target is out of reach, with by how much.
        """
        if self._quality is not None and len(self._names) > 1:
            self._curves = curves(
                self._applier,
                self._done,
                self._stage,
                self._quality,
                self._threads,
                self._progress,
            )
        found = self._along_path()
        if found is None and len(self._names) > 1:
            found = self._optuna()
        if found is None:
            raise self._out_of_reach()
        if set(self._limits) == {DROP} and len(self._names) > 1:
            found = self._further(found)
        shares = dict(zip(self._names, found, strict=True))
        mean = self._mean(found)
        same = len(set(found)) == 1
        stage = dataclasses.replace(
            self._stage, sparsity=found[0] if same else mean, shares={} if same else shares
        )
        return Reached(stage, tuple(self._tried.values()), self._curves)

    # The path

    def _at(self, level: int) -> tuple[float, ...]:
        """Returns what each layer loses at a place of the path."""
        share = level / LEVELS
        whole = [curve for curve in self._curves if curve.gate is None]
        if {curve.layer for curve in whole} == set(self._names):
            shares = allocate(whole, share)
            return tuple(shares[name] for name in self._names)
        return tuple(min(share, MAX_SHARE) for _ in self._names)

    def _along_path(self) -> tuple[float, ...] | None:
        """Returns the first place where all limits of cost hold, or the last that loses little."""
        costs = [name for name in self._limits if name != DROP]
        low, high = 0, LEVELS - 1
        if costs:
            if not self._holds(self._trial(self._at(high)), costs):
                return None
            while high - low > 1:
                middle = (low + high) // 2
                if self._holds(self._trial(self._at(middle)), costs):
                    high = middle
                else:
                    low = middle
            found = self._at(high)
            return found if self._trial(found).met else None
        high = LEVELS
        while high - low > 1:
            middle = (low + high) // 2
            if self._trial(self._at(middle)).met:
                low = middle
            else:
                high = middle
        return self._at(low) if low and self._at(low) not in self._unchanged else None

    def _further(self, found: tuple[float, ...]) -> tuple[float, ...]:
        """Prunes single layers in steps, as long as the targets hold."""
        for step in _STEPS:
            for place in range(len(found)):
                more = list(found)
                more[place] = round(min(found[place] + step, MAX_SHARE), 4)
                if more[place] <= found[place] or len(self._tried) >= self._most:
                    continue
                if self._trial(tuple(more)).met:
                    found = tuple(more)
        return found

    def _optuna(self) -> tuple[float, ...] | None:
        """Tries other divisions between the layers."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        sampler = optuna.samplers.TPESampler(seed=self._inputs.options.seed)
        study = optuna.create_study(sampler=sampler)
        kinds: dict[str, optuna.distributions.BaseDistribution] = {
            name: optuna.distributions.FloatDistribution(0.0, MAX_SHARE) for name in self._names
        }
        for shares, trial in list(self._tried.items()):
            params = dict(zip(self._names, shares, strict=True))
            known = optuna.trial.create_trial(
                params=params, distributions=kinds, value=self._excess(trial)
            )
            study.add_trial(known)
        for _ in range(2 * self._most):  # some may be the same once they are rounded
            if len(self._tried) >= self._most:
                break
            asked = study.ask(kinds)
            shares = tuple(round(asked.params[name], 2) for name in self._names)
            trial = self._trial(shares)
            study.tell(asked, self._excess(trial))
            if trial.met:
                return shares
        return None

    # Trials

    def _trial(self, shares: tuple[float, ...]) -> Trial:
        """Makes a model and measures what the targets ask for."""
        if shares not in self._tried:
            self._progress(
                f"model {len(self._tried) + 1}: sparsity "
                + ", ".join(f"{share:.3g}" for share in dict.fromkeys(shares))
                + self._so_far()
            )
            begin = time.perf_counter()
            self._tried[shares] = self._measured(shares)
            self._seconds = time.perf_counter() - begin
        return self._tried[shares]

    def _so_far(self) -> str:
        if not self._tried:
            return ""
        last = next(reversed(self._tried.values()))
        told = ", ".join(f"{name} {value:.3g}" for name, value in last.figures.items())
        return f" (before: {told}; {self._seconds:.0f} s)"

    def _measured(self, shares: tuple[float, ...]) -> Trial:
        named = dict(zip(self._names, shares, strict=True))
        stage = dataclasses.replace(self._stage, sparsity=max(shares), shares=named)
        with self._applier.scratch():
            try:
                figures = self._figures(self._applier.add(self._done, stage), stage)
            except NothingRemovedError:
                figures = {name: 0.0 if name == DROP else 1.0 for name in self._limits}
                self._unchanged.add(shares)
        return Trial(named, figures, all(figures[n] <= x for n, x in self._limits.items()))

    def _figures(self, applied: Applied, stage: Stage) -> dict[str, float]:
        figures: dict[str, float] = {}
        runner = runner_of(applied, self._threads)
        inputs = self._inputs
        for name in self._limits:
            if name == DROP:
                assert self._quality is not None
                figures[name] = drop(self._quality.dense, self._quality.of(runner))
            elif name == "latency":
                data = inputs.data
                feed = inputs.feeds[0] if data is None else data.feed(0, 1)
                _, _, ratio = interleaved_latency(
                    (lambda: inputs.original, lambda: runner),
                    feed,
                    _LATENCY_SECONDS,
                    False,
                    inputs.options.seed,
                )
                figures[name] = ratio.high  # what is promised should hold when measured again
            elif name == "bytes":
                with tempfile.TemporaryDirectory(prefix="rnnprune-") as folder:
                    form = self._export if applied.pruned else ExportOptions("dense")
                    note = provenance(Plan((stage,), inputs.options.seed))
                    saved = applied.model.save(applied.pruned, Path(folder), "m.onnx", form, note)
                    figures[name] = measure.total_bytes(saved.files) / self._before["bytes"]
            else:
                figures[name] = self._count(applied, name) / self._before[name]
        return figures

    def _count(self, applied: Applied, name: str) -> int:
        count = applied.model.count()
        if name == "parameters":
            return count.parameters
        gone = sum(s.weight.nonzero - int(np.count_nonzero(s())) for s in applied.pruned.values())
        return count.nonzero - gone

    def _holds(self, trial: Trial, names: Sequence[str]) -> bool:
        return all(trial.figures[name] <= self._limits[name] for name in names)

    def _excess(self, trial: Trial) -> float:
        """Returns by how much targets are missed, each as a share of its limit."""
        return sum(
            max(0.0, trial.figures[name] / limit - 1) for name, limit in self._limits.items()
        )

    def _mean(self, shares: Sequence[float]) -> float:
        sizes = {layer.name: layer.macs_per_step for layer in self._done.model.layers}
        total = sum(sizes[name] for name in self._names)
        return sum(sizes[n] * s for n, s in zip(self._names, shares, strict=True)) / total

    def _out_of_reach(self) -> RnnpruneError:
        """Says which target is missed, and by how much."""
        trials = [trial for shares, trial in self._tried.items() if shares not in self._unchanged]
        if not trials:
            return RnnpruneError(
                "out of reach: nothing can be removed", "let more layers take part"
            )
        costs = [name for name in self._limits if name != DROP]
        least = {name: min(trial.figures[name] for trial in trials) for name in self._limits}
        alone = [name for name in costs if least[name] > self._limits[name]]
        hint = "relax one of them, or let more layers, another --method or --granularity take part"
        if alone:
            missed, where = alone, ", even with all that can go"
            if self._stage.granularity not in STRUCTURES and {"latency", "parameters"} & set(alone):
                hint = "zeros make nothing faster and no parameter less: --granularity unit does"
        elif not costs:
            missed, where = [DROP], ", however little goes"
        else:
            missed = [DROP]
            held = [trial for trial in trials if self._holds(trial, costs)]
            least[DROP] = min((trial.figures[DROP] for trial in held), default=least[DROP])
            limits = " and ".join(f"{name}<={self._limits[name]:g}" for name in costs)
            where = f" where {limits}"
        said = " and ".join(f"{n} reaches {least[n]:.3g}, not {self._limits[n]:g}" for n in missed)
        return RnnpruneError(f"out of reach: {said}{where} ({len(trials)} models tried)", hint)
