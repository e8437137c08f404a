"""Models side by side: sizes, metrics, memory, and latency in one or several settings."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rnnprune_cli import measure
from rnnprune_cli.checks import OF_BENCH, check_measurable, judge, parse_requirements
from rnnprune_cli.data import feed_size, load_dataset, made_up_feeds, resized
from rnnprune_cli.errors import RnnpruneError, UsageError
from rnnprune_cli.load import load
from rnnprune_cli.memory import Call, peaks
from rnnprune_cli.metrics import LABEL_FREE, Quality, check_metric, parse_metrics
from rnnprune_cli.model import (
    Array,
    BenchModel,
    BenchRatio,
    BenchReport,
    Control,
    Feed,
    LoadedModel,
    MetricValue,
    Ratio,
    Runner,
    TensorSpec,
    Timing,
)
from rnnprune_cli.options import MAX_THREADS
from rnnprune_cli.timing import Budget, interleaved, latency, pinned, ratio
from rnnprune_cli.weights import distinct_weights

Progress = Callable[[str], None]

ABSOLUTE = ("latency-ms", "size", "metric")
"""Requirements of a model by itself."""
MAX_TOGETHER = 64
"""Models that are held in memory at once."""


@dataclass(frozen=True)
class BenchOptions:
    """Everything that ``bench`` can be told; see the command's help.

    ``batches`` and ``steps`` are empty for those of the data, or of what is made up.
    """

    models: tuple[Path, ...]
    data: Path | None = None
    metric: str = "auto"
    batches: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()
    threads: tuple[int, ...] = (1,)
    seconds: float = 20.0
    precision: float = 0.02
    step_seconds: float | None = None
    providers: tuple[str, ...] = ()
    signature: str | None = None
    seed: int = 0
    require: tuple[str, ...] = ()
    strict: bool = False


@dataclass(frozen=True, eq=False)
class Entry:
    """A model that takes part.

    Attributes:
        name: Unique.
        model: The model.
        how: How it was made, if that is known.
    """

    name: str
    model: LoadedModel
    how: str = ""


def bench(options: BenchOptions, arguments: Mapping[str, Any], progress: Progress) -> BenchReport:
    """Measures models side by side; the first is what the others are held against.

    Args:
        options: What to measure.
        arguments: The options as the user gave them, for the report.
        progress: Called with a short text at the beginning of each step.

    Raises:
        RnnpruneError: If a model cannot be read or run on the inputs of the first.
    """
    check(options)
    signature = options.signature
    entries = []
    for name, path in zip(names(options.models), options.models, strict=True):
        progress(f"reading {name}")
        own = signature if path.is_dir() else None
        entries.append(Entry(name, load(path, own, options.threads[0])))
    group = Group(entries, options, options.data, progress)
    return report([group], options, arguments)


def check(options: BenchOptions) -> None:
    """Raises UsageError if the options make no sense."""
    check_metric(options.metric)
    parse_requirements(options.require, OF_BENCH)
    labels = None if options.models else True  # the suite's data have some
    check_measurable(options.require, options.metric, bool(options.data or labels), labels)
    if len(options.models) > MAX_TOGETHER:
        raise UsageError(
            f"{len(options.models)} models are more than {MAX_TOGETHER}",
            "all are held in memory at once; take fewer",
        )
    for option, values in (("batch", options.batches), ("steps", options.steps)):
        if any(not 1 <= value <= 1 << 20 for value in values):
            raise UsageError(f"--{option} must be whole numbers from 1", f"such as --{option} 1,8")
    if any(not 1 <= value <= MAX_THREADS for value in options.threads):
        raise UsageError(
            f"--threads must be whole numbers from 1 to {MAX_THREADS}", "such as --threads 1,2"
        )
    if not 0 <= options.precision < 1:
        raise UsageError(
            f"--precision {options.precision:g} is not between 0 and 1",
            "it is the width of the interval, as a share of the ratio, such as 0.02",
        )
    if not 0 < options.seconds <= 86400:
        raise UsageError(f"--time {options.seconds:g} is no time to measure", "such as --time 20")
    if options.step_seconds is not None and not 0 < options.step_seconds < 1e6:
        raise UsageError(
            f"--step-seconds {options.step_seconds:g} is no duration", "such as 0.01 for 10 ms"
        )
    if options.providers:
        import onnxruntime as ort

        known = ort.get_available_providers()
        for name in options.providers:
            if name not in known:
                raise UsageError(
                    f"this onnxruntime has no execution provider '{name}'",
                    f"it has: {', '.join(known)}",
                )
    if not options.threads:
        raise UsageError("--threads names no number", "such as --threads 1,2")
    if options.signature and not any(p.is_dir() or not p.exists() for p in options.models):
        raise UsageError("--signature is for SavedModels", "none is given; leave it away")
    if len(options.models) == 1:
        for requirement in parse_requirements(options.require, OF_BENCH):
            if requirement.name not in ABSOLUTE:
                raise UsageError(
                    f"requirement '{requirement.text}' needs a second model",
                    "the first model is what the others are held against",
                )
    if options.data is None and options.metric != "auto":
        raise UsageError(f"metric '{options.metric}' needs data", "give --data")


def names(paths: Sequence[Path]) -> list[str]:
    """Returns a short name for each path, all of them different."""
    short = [path.name or str(path) for path in paths]
    if len(set(short)) < len({str(path) for path in paths}):
        short = [str(path) for path in paths]
    seen: dict[str, int] = {}
    for number, name in enumerate(short):
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
            short[number] = f"{name} ({seen[name]})"
    return short


class Group:
    """Models that are held against the first of them, on the same inputs.

    Everything is measured when it is made.

    Args:
        entries: The models.
        options: What to measure.
        data: The data set of all of them.
        progress: Called with a short text at the beginning of each step.
        name: Of the group, where there are several.

    Raises:
        RnnpruneError: If a model cannot be run on the inputs of the first.
    """

    models: tuple[BenchModel, ...]
    timings: list[Timing]
    ratios: list[BenchRatio]
    controls: list[Control]
    warnings: list[str]

    def __init__(
        self,
        entries: Sequence[Entry],
        options: BenchOptions,
        data: Path | None,
        progress: Progress,
        name: str = "",
    ) -> None:
        self._entries, self._options, self._name = entries, options, name
        self._progress = progress
        self._load_seconds: list[list[float]] = [[] for _ in entries]
        self._kept: dict[tuple[int, int], Runner] = {}
        self.timings, self.ratios, self.controls, self.warnings = [], [], [], []
        first, own = entries[0], options.threads
        if len(own) > 1 and any(entry.model.format != "onnx" for entry in entries):
            raise UsageError(
                "TensorFlow cannot change its number of threads", "give one number with --threads"
            )
        if options.providers and any(entry.model.format != "onnx" for entry in entries):
            self.warnings.append("--providers are onnxruntime's: TensorFlow runs on its own")
        self._progress(f"running {first.name}")
        self._reference = self._open(0, own[0])
        self._data = None if data is None else load_dataset(data, self._reference.inputs)
        asked = [*itertools.product(options.batches or (None,), options.steps or (None,))]
        self._feeds = [self._feed(batch, steps) for batch, steps in asked]
        self._try(asked)
        self._metrics = self._measured()
        self._peaks = self._memory()
        for threads, feed in itertools.product(own, self._feeds):
            with pinned(threads):
                self._time(threads, feed)
        self.models = tuple(self._described())

    # What each model is

    def _described(self) -> Iterator[BenchModel]:
        first = {timing.model: timing for timing in reversed(self.timings)}
        for number, entry in enumerate(self._entries):
            model, metrics = entry.model, self._metrics[number]
            count = model.count()
            macs, read = work_per_step(model)
            yield BenchModel(
                name=entry.name,
                path=str(model.path),
                format=model.format,
                sha256=measure.sha256(model.files),
                parameters=count.parameters,
                nonzero=count.nonzero,
                bytes=measure.total_bytes(model.files),
                gzip_bytes=measure.gzip_bytes(model.files)[0],
                macs_per_step=macs,
                bytes_per_step=read,
                load_ms=1e3 * statistics.median(self._load_seconds[number]),
                peak_bytes=self._peaks[number],
                metric=metrics[0] if metrics else None,
                metrics=metrics,
                latency_ms=first[entry.name].latency_ms,
                group=self._name,
                how=entry.how,
            )

    def _measured(self) -> list[tuple[MetricValue, ...]]:
        """Returns the metrics of each model, if the data or the user name any."""
        data, options = self._data, self._options
        if data is None:
            return [()] * len(self._entries)
        asked = parse_metrics([options.metric])
        kept = asked if data.targets else {o: m for o, m in asked.items() if m in LABEL_FREE}
        if len(kept) < len(asked):
            said = "the data has no labels, so there is no metric"
            hint = "add an array 'labels' to it, or take --metric agreement"
            for requirement in parse_requirements(options.require):
                if requirement.name in ("metric", "metric-drop") and not kept:
                    raise UsageError(f"requirement '{requirement.text}': {said}", hint)
            self.warnings.append(f"{said}{' that needs them' if kept else ''}: {hint}")
        if not kept:
            return [()] * len(self._entries)
        self._progress("running the data through all models")
        quality = Quality(self._reference, data, kept)
        others = range(1, len(self._entries))
        threads = options.threads[0]
        return [quality.dense, *(quality.of(self._open(k, threads)) for k in others)]

    def _memory(self) -> list[int | None]:
        """Returns what each model needs in memory."""
        threads, calls = self._options.threads[0], []
        for number, entry in enumerate(self._entries):
            feed = self._open(number, threads).prepared(self._feeds[0])
            own = self._options.signature if entry.model.format == "savedmodel" else None
            calls.append(Call(entry.model, feed, threads, self._providers, own))
        self._progress("measuring memory")
        found = peaks(calls)
        for entry, size in zip(self._entries, found, strict=True):
            if isinstance(size, str):
                self.warnings.append(f"the memory of {entry.name} was not measured: {size}")
        return [size if isinstance(size, int) else None for size in found]

    # Running

    @property
    def _providers(self) -> tuple[str, ...]:
        return self._options.providers or ("CPUExecutionProvider",)

    def _open(self, number: int, threads: int) -> Runner:
        """Opens a model, fed as the first one; what is slow to open stays open."""
        if (number, threads) in self._kept:
            return self._kept[number, threads]
        entry = self._entries[number]
        begin = time.perf_counter()
        runner = model_runner(entry.model, threads, self._providers)
        self._load_seconds[number].append(time.perf_counter() - begin)
        if number:
            runner = _named(adapted, entry.name)(runner, self._reference)
        if entry.model.format != "onnx" or entry.model.big:
            self._kept = {key: kept for key, kept in self._kept.items() if key[1] == threads}
            self._kept[number, threads] = runner
        return runner

    def _try(self, asked: Sequence[tuple[int | None, int | None]]) -> None:
        """Runs all models on all feeds, so that nobody waits for what fails at the end."""
        for number, entry in enumerate(self._entries):
            runner = self._open(number, self._options.threads[0])
            for (batch, steps), feed in zip(asked, self._feeds, strict=True):
                given = {"--batch": batch, "--steps": steps}
                said = [f"{key} {size}" for key, size in given.items() if size is not None]
                name = " ".join([entry.name, *(["with", *said] if said else [])])
                hint = "give sizes that it accepts, or leave them out" if said else None
                _named(runner.run, name, hint)(feed)
            runner.reset()

    def _feed(self, batch: int | None, steps: int | None) -> Feed:
        """Returns the input of one call."""
        data, runner = self._data, self._reference
        if data is None:
            feed: Feed = self._made_up
        else:
            feed = data.feed(0, 1 if batch is None or data.single else min(batch, data.count))
        return resized(feed, runner.inputs, batch, steps)

    @functools.cached_property
    def _made_up(self) -> Feed:
        return made_up_feeds(self._reference, self._options.seed)[0]

    def _time(self, threads: int, feed: Feed) -> None:
        """Times all models, and the first one against itself, in one setting."""
        options, entries = self._options, self._entries
        size = feed_size(feed, self._reference.inputs)
        batch, steps = size.batch, size.steps
        where = ", ".join(
            f"{what} {value}"
            for what, value in (("batch", batch), ("steps", steps), ("threads", threads))
            if value is not None
        )

        def told(step: str) -> None:
            self._progress(f"timing {self._name} ({where}): {step}".replace("  ", " "))

        told(f"up to {options.seconds:g} s")
        openers = [functools.partial(self._open, k, threads) for k in (*range(len(entries)), 0)]
        samples = interleaved(
            openers,
            [feed] * len(openers),
            Budget(options.seconds, options.precision),
            not any(entry.model.big for entry in entries),
            options.seed,
            told,
        )
        first, control = samples.rounds[0], samples.rounds[-1]
        for entry, rounds in zip(entries, samples.rounds[:-1], strict=True):
            own = latency(rounds)
            seconds = own.median / 1e3
            known = options.step_seconds is not None and (batch, steps) != (None, None)
            # Inputs that have no axis of steps are those of one step.
            covered = (steps or 1) * (options.step_seconds or 1) if known else None
            self.timings.append(
                Timing(
                    entry.name,
                    batch,
                    steps,
                    threads,
                    own,
                    None if batch is None else batch / seconds,
                    None if size.total is None else size.total / seconds,
                    None if covered is None else seconds / covered,
                )
            )
            if rounds is not first:
                held = ratio(first, rounds)
                self.ratios.append(
                    BenchRatio(entry.name, entries[0].name, batch, steps, threads, held)
                )
        itself = ratio(first, control)
        self.controls.append(
            Control(entries[0].name, batch, steps, threads, itself, len(first), samples.seconds)
        )
        self.warnings += self._doubts(itself, where)

    def _doubts(self, control: Ratio, where: str) -> Iterator[str]:
        """Yields what speaks against the figures of a setting."""
        group = f"{self._name}, " if self._name else ""
        if not control.low <= 1 <= control.high:
            yield (
                f"{group}{where}: the reference against itself is {control.median:.3f}"
                f" [{control.low:.3f}, {control.high:.3f}], which should hold 1: the machine is"
                " noisy; close other programs and measure again"
            )
        precision = self._options.precision
        own = [r.latency for r in self.ratios[len(self.ratios) - len(self._entries) + 1 :]]
        width = max((r.high - r.low) / r.median for r in [control, *own])
        if precision and width > precision:
            yield (
                f"{group}{where}: intervals are up to {100 * width:.1f} % wide, not"
                f" {100 * precision:g} %: the time was up; give more with --time"
            )


def report(
    groups: Sequence[Group], options: BenchOptions, arguments: Mapping[str, Any]
) -> BenchReport:
    """Returns the report of one or several groups, with the requirements judged."""
    controls = [control for group in groups for control in group.controls]
    found = BenchReport(
        arguments=dict(arguments),
        models=tuple(model for group in groups for model in group.models),
        timings=tuple(timing for group in groups for timing in group.timings),
        ratios=tuple(ratio for group in groups for ratio in group.ratios),
        control=controls[0],
        controls=tuple(controls),
        checks=(),
        warnings=tuple(dict.fromkeys(w for group in groups for w in group.warnings)),
        environment=measure.environment(options.threads[0]),
    )
    return dataclasses.replace(found, checks=judge(found, options.require, options.strict))


def work_per_step(model: LoadedModel) -> tuple[int | None, int | None]:
    """Returns multiply-accumulates, and bytes of weights read, of a step of all recurrent layers.

    Layers that share a weight read it once each. None if no layer is known.
    """
    from rnnprune_cli.onnx_model import OnnxModel

    quantized = model.quantized_sizes() if isinstance(model, OnnxModel) else ()
    if not model.layers and not quantized:
        return None, None
    macs = sum(layer.macs_per_step for layer in model.layers) + sum(quantized)
    read = sum(w.size * w.dtype.itemsize for w in distinct_weights(model.layers))
    return macs, read + sum(quantized)


def model_runner(model: LoadedModel, threads: int, providers: Sequence[str]) -> Runner:
    """Opens a model; ONNX models with execution providers."""
    from rnnprune_cli.onnx_model import OnnxModel

    if isinstance(model, OnnxModel):
        return model.open(threads, providers)
    return model.open(threads)


def _named(call: Callable[..., Any], name: str, hint: str | None = None) -> Callable[..., Any]:
    """Returns a function whose errors say which model they are about, and maybe what to do."""

    def named(*given: Any) -> Any:  # noqa: ANN401  as the function's
        try:
            return call(*given)
        except RnnpruneError as error:
            raise RnnpruneError(
                f"{name}: {error.message}", hint or error.hint, error.code
            ) from error

    return named


# Feeding one model as another


def adapted(runner: Runner, reference: Runner) -> Runner:
    """Returns a model that takes the reference's inputs and has its outputs' names.

    Inputs and outputs belong together by name, or else by place. States that have fewer units are
    cut, and those that have more begin again.

    Raises:
        RnnpruneError: If the two have not as many inputs and outputs.
    """
    inputs = _paired(runner.inputs, reference.inputs, "inputs")
    outputs = _paired(runner.outputs, reference.outputs, "outputs")
    same = all(own == other.name for own, other in {**inputs, **outputs}.items())
    if same and all(_sizes_fit(spec, inputs[spec.name]) for spec in runner.inputs):
        return runner
    return _Adapted(runner, inputs, outputs)


def _paired(
    own: Sequence[TensorSpec], others: Sequence[TensorSpec], what: str
) -> dict[str, TensorSpec]:
    """Returns name → the spec of the other model that belongs to it."""
    named = {spec.name: spec for spec in others}
    if {spec.name for spec in own} == named.keys():
        return {spec.name: named[spec.name] for spec in own}
    if len(own) != len(others):
        raise RnnpruneError(
            f"it has {len(own)} {what}, the first model has {len(others)}",
            "models that are held against each other take and return the same things",
        )
    return {spec.name: other for spec, other in zip(own, others, strict=True)}


def _sizes_fit(spec: TensorSpec, other: TensorSpec) -> bool:
    """Tells whether what one input takes can be given to the other as it is."""
    if spec.shape is None or other.shape is None or len(spec.shape) != len(other.shape):
        return True
    pairs = zip(spec.shape, other.shape, strict=True)
    return spec.dtype == other.dtype and all(
        one == two for one, two in pairs if isinstance(one, int)
    )


class _Adapted(Runner):
    def __init__(
        self,
        runner: Runner,
        inputs: Mapping[str, TensorSpec],
        outputs: Mapping[str, TensorSpec],
    ) -> None:
        self._runner, self._from = runner, {name: spec.name for name, spec in inputs.items()}
        self._own = {spec.name: spec for spec in runner.inputs}
        self.inputs = tuple(inputs[spec.name] for spec in runner.inputs)
        self.outputs = tuple(outputs[spec.name] for spec in runner.outputs)
        self.size_hints = runner.size_hints

    def prepared(self, feed: Feed) -> Feed:
        if feed.keys() == self._own.keys() and all(
            _as_wanted(feed[name], spec) for name, spec in self._own.items()
        ):
            return feed
        return {
            name: _made_to_fit(feed[self._from.get(name, name)], spec, number > 0)
            for number, (name, spec) in enumerate(self._own.items())
        }

    def run(self, feed: Feed) -> list[Array]:
        return self._runner.run(self.prepared(feed))

    def call(self, feed: Feed) -> Callable[[], object]:
        return self._runner.call(self.prepared(feed))

    def reset(self) -> None:
        self._runner.reset()


def _as_wanted(array: Array, spec: TensorSpec) -> bool:
    return array.dtype == spec.dtype and _units(spec) in (None, array.shape[-1:])


def _made_to_fit(array: Array, spec: TensorSpec, state: bool) -> Array:
    """Returns what a model is given for an input; of states, as many units as it takes."""
    units = _units(spec)
    if state and units is not None and array.ndim == len(spec.shape or ()):
        array = np.take(array, np.arange(units[0]) % array.shape[-1], -1)
    return array.astype(spec.dtype, copy=False)


def _units(spec: TensorSpec) -> tuple[int] | None:
    """Returns the size of an input's last axis; None if it is not fixed."""
    last = spec.shape[-1] if spec.shape else None
    return (last,) if isinstance(last, int) else None
