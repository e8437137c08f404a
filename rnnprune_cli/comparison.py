"""The original and a written model side by side: figures, outputs, advice."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rnnprune_cli.apply import Inputs
from rnnprune_cli.data import Dataset
from rnnprune_cli.methods import method as find_method
from rnnprune_cli.metrics import BATCH, LABEL_FREE, Comparison, parse_metrics
from rnnprune_cli.model import (
    BoolArray,
    Feed,
    Latency,
    LoadedModel,
    Measurement,
    MetricValue,
    OutputFidelity,
    ParameterCount,
    Quantized,
    Ratio,
    Ratios,
    Runner,
    Saved,
)
from rnnprune_cli.options import (
    STRUCTURES,
    PruneOptions,
)
from rnnprune_cli.search import DROP
from rnnprune_cli.session import FileFigures
from rnnprune_cli.timing import interleaved_latency
from rnnprune_cli.verify import run_all
from rnnprune_cli.weights import distinct_weights

_SLOWER = 1.02
"""Latency ÷ latency above which quantizing is said to make a model slower."""
_FEW = 0.2
"""Share of weights below which four bytes for each, and a bit for its place, are less than one."""
NOISY = 0.2
"""Width of a latency ratio's interval from which on the machine is said to be noisy."""


@dataclass(frozen=True, eq=False)
class Pair:
    """The original and what was made of it, when everything is written and verified."""

    options: PruneOptions
    source: LoadedModel
    base: LoadedModel
    """The model that was pruned: the source, converted and lifted."""
    model: LoadedModel
    """The same without removed units."""
    saved: Saved
    inputs: Inputs
    nonzero: Mapping[str, tuple[int, ...]]
    counts: tuple[ParameterCount, ParameterCount]
    """Of the original, and of the written model."""
    reopen: Callable[[], Runner]
    """Opens the written model."""

    @property
    def original(self) -> Runner:
        """The model that the user named."""
        return self.inputs.original

    @property
    def data(self) -> Dataset | None:
        """The user's data."""
        return self.inputs.data

    @property
    def feeds(self) -> Sequence[Feed]:
        """What to compare on where there are no data."""
        return self.inputs.feeds

    @functools.cached_property
    def pruned(self) -> Runner:
        """The written model."""
        return self.reopen()


@dataclass(frozen=True)
class Qualities:
    """What both models make of the data: the metrics of each, and how far they are apart.

    ``asked`` is whether the user gave labels, or named a metric that needs none.
    """

    before: tuple[MetricValue, ...]
    after: tuple[MetricValue, ...]
    asked: bool
    fidelity: tuple[OutputFidelity, ...]


def quality_of(run: Pair) -> Qualities:
    """Runs both models over the data, or over made-up inputs."""
    data = run.data
    quality = None if data is None else run.inputs.quality(data)
    if quality is None:
        return Qualities((), (), False, fidelity_of(run, run.original, run.pruned))
    after, comparison = quality.compared(run.pruned)
    named = any(name in LABEL_FREE for name in parse_metrics([run.options.metric]).values())
    asked = named or (data is not None and bool(data.targets))
    return Qualities(quality.dense, after, asked, comparison.rows())


def fidelity_of(run: Pair, one: Runner, two: Runner) -> tuple[OutputFidelity, ...]:
    """Returns how far apart two models are on the data, or on made-up inputs."""
    outputs, data = run.original.outputs, run.data
    comparison = Comparison(outputs)
    given: Iterable[tuple[Feed, BoolArray | None]] = ((feed, None) for feed in run.feeds)
    if data is not None:
        given = ((data.feed(*some), data.valid(*some)) for some in data.batches(BATCH))
    for feed, valid in given:
        names = [o.name for o in outputs]
        first, second = (run_all(runner, [feed], names)[0] for runner in (one, two))
        comparison.add(first, second, valid)
    return comparison.rows()


def measure_both(
    run: Pair, quality: Qualities, files_before: FileFigures, files_after: FileFigures
) -> tuple[Measurement, Measurement, Ratios, tuple[str, ...]]:
    """Measures the original and the written model, side by side."""
    options, data = run.options, run.data
    feed = run.feeds[0] if data is None else data.feed(0, 1)
    openers: tuple[Callable[[], Runner], Callable[[], Runner]]
    openers = (lambda: run.original, lambda: run.pruned)
    both = run.source.format == run.saved.format == "onnx"
    reopen = both and not run.source.big  # others take seconds to open
    if reopen:
        openers = (lambda: run.source.open(options.threads), run.reopen)
    latency_before, latency_after, ratio = interleaved_latency(
        openers, feed, options.latency_seconds, reopen, options.seed
    )
    weights = distinct_weights(run.base.layers)
    before = Measurement(
        parameters=run.counts[0].parameters,
        nonzero=run.counts[0].nonzero,
        recurrent_parameters=sum(w.size for w in weights),
        recurrent_nonzero=sum(w.nonzero for w in weights),
        bytes=files_before.bytes,
        gzip_bytes=files_before.gzip_bytes,
        macs_per_step=sum(layer.macs_per_step for layer in run.base.layers),
        latency_ms=latency_before,
        metric=quality.before[0] if quality.asked else None,
        metrics=quality.before,
    )
    after = measurement_of(run, files_after, latency_after, quality.after, quality.asked)
    estimated = files_before.gzip_estimated or files_after.gzip_estimated
    return (
        before,
        after,
        ratios_of(before, after, ratio),
        (
            *_advice(run, estimated, ratio),
            *_boundless(quality.after),
        ),
    )


def measurement_of(
    run: Pair, files: FileFigures, latency: Latency, metrics: tuple[MetricValue, ...], asked: bool
) -> Measurement:
    """Returns the figures of the written model."""
    left = distinct_weights(run.model.layers)
    return Measurement(
        parameters=run.counts[1].parameters,
        nonzero=run.counts[1].nonzero,
        recurrent_parameters=sum(w.size for w in left),
        recurrent_nonzero=sum(sum(run.nonzero.get(w.name, w.nonzero_by_gate)) for w in left),
        bytes=files.bytes,
        gzip_bytes=files.gzip_bytes,
        macs_per_step=sum(layer.macs_per_step for layer in run.model.layers),
        latency_ms=latency,
        metric=metrics[0] if asked else None,
        metrics=metrics,
    )


def _boundless(metrics: Sequence[MetricValue]) -> Iterator[str]:
    """Yields which metrics say nothing."""
    for metric in metrics:
        if not math.isfinite(metric.value):
            whose = f" of '{metric.output}'" if metric.output else ""
            yield (
                f"{metric.name}{whose} is no finite number: on these data the original's output"
                " does not vary, or a model's is not finite; give more samples"
            )


def ratios_of(before: Measurement, after: Measurement, latency: Ratio) -> Ratios:
    """Returns what was measured after, divided by what was before."""
    return Ratios(
        parameters=after.parameters / max(before.parameters, 1),
        nonzero=after.nonzero / max(before.nonzero, 1),
        bytes=after.bytes / before.bytes,
        gzip_bytes=after.gzip_bytes / before.gzip_bytes,
        latency=latency,
    )


def quantized_advice(quantized: Quantized, after: Measurement) -> Iterator[str]:
    """Yields what the user should know about quantization: where it did not pay."""
    latency = quantized.ratios.latency
    if latency is not None and latency.low > _SLOWER:
        yield (
            f"quantizing makes the pruned model slower ({latency.median:.2f} times its latency):"
            " leave out --quantize unless its size matters more"
        )
    if after.recurrent_nonzero < _FEW * after.recurrent_parameters:
        yield (
            "so few weights are left that they take less room without --quantize, with --export"
            " packed; they are not faster then"
        )


def _advice(run: Pair, gzip_estimated: bool, latency: Ratio) -> Iterator[str]:
    stages = run.options.stages
    removing = [stage for stage in stages if stage.sparsity > 0]
    for stage in stages:
        if stage.sparsity == 0 and not stage.include and run.options.quantize is None:
            what = f"{stage.granularity}s" if stage.granularity in STRUCTURES else "weights"
            yield f"sparsity 0 removes nothing; give --sparsity 0.5 to remove half of the {what}"
    for stage in stages:
        if stage.granularity.startswith("bank:"):
            bank = int(stage.granularity[5:])
            reached = min(round(bank * stage.sparsity), bank - 1) / bank
            if abs(reached - stage.sparsity) > 0.01:
                yield (
                    f"every bank of {bank} loses as many whole weights: {reached:g} of them, not"
                    f" {stage.sparsity:g}; larger banks come closer"
                )
    if run.data is None and not stages:
        yield "inputs were made up: give --data to compare on real ones"
    elif run.data is None:
        yield "inputs were made up: give --data for outputs and a metric that mean something"
    elif stages and not run.data.targets:
        yield (
            "the data has no labels, so outputs were only held against the original's: add an array"
            " 'labels' for a metric"
        )
    plain = run.options.export.export == "dense" and run.options.quantize is None
    if removing and run.options.masks and plain:
        yield "zeros are stored like any weight: --export packed makes the file smaller"
    learns = any(s.compensate or find_method(s.method).needs_data for s in removing)
    if learns and run.data is not None and run.inputs.calibration is run.data:
        yield (
            "outputs and metric are measured on the data that the choice or the repair was worked"
            " out on, which flatters them: give other data with --calibration"
        )
    if run.options.finetune.epochs and run.data is run.inputs.training[1]:
        yield (
            "outputs and metric are measured on the samples that decided which weights are kept,"
            " which flatters them: train on other data than --data, with --train"
        )
    if any(target.name == DROP for target in run.options.targets):
        yield (
            "the sparsity was searched for on the data that the metric is measured on, which"
            " flatters it: measure again on other data"
        )
    if run.source.format != run.saved.format == "onnx":
        yield (
            "latency before is TensorFlow's, after onnxruntime's: to see what pruning alone brings,"
            " convert first (--sparsity 0 -o model.onnx)"
        )
    elif run.source.format == "onnx" != run.saved.format:
        yield "latency before is onnxruntime's, after TensorFlow's"
    if stages and not run.options.cuts and run.source.format == run.saved.format:
        yield (
            "runtimes multiply zeros too: removing single weights does not change latency,"
            " --granularity unit does"
        )
    if (latency.high - latency.low) / latency.median > NOISY:
        yield (
            "other programs make the latency uncertain: close them, or measure longer with"
            " 'rnnprune bench'"
        )
    if gzip_estimated:
        yield "the gzipped sizes are estimated from a sample of the files"
