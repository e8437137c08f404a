"""What ``prune`` does, from the file to the report."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnnprune_cli import measure
from rnnprune_cli.apply import VERIFIED_SAMPLES, Applied, Applier, Inputs, Progress
from rnnprune_cli.checks import check_measurable, judge
from rnnprune_cli.cluster import helps
from rnnprune_cli.data import Dataset, load_dataset, padded_on_the_right, varied_feeds
from rnnprune_cli.errors import HelpedError, RnnpruneError, UsageError
from rnnprune_cli.finetune import Job, check_state, finetuned, set_up, state_folder
from rnnprune_cli.gate_order import ONNX_ORDER
from rnnprune_cli.load import load
from rnnprune_cli.methods import method as find_method
from rnnprune_cli.metrics import BATCH, LABEL_FREE, Comparison, drop, parse_metrics
from rnnprune_cli.model import (
    UNCHANGED,
    BoolArray,
    Claim,
    Curve,
    ExportOptions,
    Feed,
    FineTuned,
    Latency,
    Layer,
    LayerRow,
    LoadedModel,
    Measurement,
    MetricValue,
    ModelInfo,
    OtherLayer,
    OutputFidelity,
    OutputInfo,
    ParameterCount,
    Plan,
    Quantized,
    Ratio,
    Ratios,
    RecurrentLayer,
    RemovableUnits,
    Report,
    Runner,
    Saved,
    SensitivityReport,
    Stage,
    Target,
    Trial,
)
from rnnprune_cli.options import (
    SENSITIVITY,
    STRUCTURES,
    PruneOptions,
    check_options,
    check_output,
    data_file,
    member_path,
    output_path,
    protect,
    scopes_of,
)
from rnnprune_cli.pictures import pictures
from rnnprune_cli.save import provenance
from rnnprune_cli.search import DROP, Search, checked, checked_target
from rnnprune_cli.sensitivity import advised, curves, divided, measurable
from rnnprune_cli.tensorflow.store import check_dense
from rnnprune_cli.timing import interleaved_latency
from rnnprune_cli.unchanged import key_of
from rnnprune_cli.verify import require, run_all, verify_same, verify_weights
from rnnprune_cli.weights import distinct_weights

if TYPE_CHECKING:
    from rnnprune_cli.quantize import QuantizedFile
    from rnnprune_cli.trainer.export import Exporter

_SLOWER = 1.02
"""Latency ÷ latency above which quantizing is said to make a model slower."""
_FEW = 0.2
"""Share of weights below which four bytes for each, and a bit for its place, are less than one."""
LOOK = Stage("magnitude", "weight", "row", 0.0)
"""A stage that does nothing, for a look at a model as ``prune`` sees it."""


@contextlib.contextmanager
def inspected(
    path: Path, signature: str | None, right_padding: bool
) -> Iterator[tuple[LoadedModel, tuple[RemovableUnits, ...], tuple[OtherLayer, ...]]]:
    """Loads a model for a look, lifted as ``prune`` would lift it.

    ONNX models come with their units, and the other layers that ``--include`` can name.

    Raises:
        RnnpruneError: If it cannot be read, or nothing in it is recurrent.
    """
    with contextlib.ExitStack() as stack:
        source = load(path, signature)
        options = PruneOptions(path, None, (LOOK,), right_padding=right_padding)
        model, _ = lift_model(source, options, stack)
        if not model.layers and not model.skipped:
            require_layers(model)
        from rnnprune_cli.onnx_model import OnnxModel
        from rnnprune_cli.shrink.units import removable_units

        if isinstance(model, OnnxModel):
            yield model, removable_units(model) if model.layers else (), model.others.layers
        else:
            yield model, (), ()


@dataclass(frozen=True, eq=False)
class Opened:
    """A model that was read, converted and lifted, and what is known about it.

    Attributes:
        options: The user's.
        source: What the user named.
        base: What is pruned: the source, converted and lifted.
        lifted: What was verified about lifting.
        limits: What the user should know about the source.
        count: The parameters of the source.
        files: Identity of the source's files.
        inputs: What to calibrate, to verify and to measure on.
        applier: Applies stages.
        pool: For work beside the main thread.
        progress: Called with a short text at the beginning of each step.
        exporter: Makes a SavedModel of what was written as ONNX, if that is asked for.
    """

    options: PruneOptions
    source: LoadedModel
    base: LoadedModel
    lifted: tuple[Claim, ...]
    limits: tuple[str, ...]
    count: ParameterCount
    files: Future[_Files]
    inputs: Inputs
    applier: Applier
    pool: ThreadPoolExecutor
    progress: Progress
    exporter: Exporter | None = None


@contextlib.contextmanager
def opened(options: PruneOptions, output_format: str, progress: Progress) -> Iterator[Opened]:
    """Loads a model; converts it, if it is to become ONNX; lifts loops and cells to operators.

    Args:
        options: The user's, checked.
        output_format: Of what is to be written.
        progress: Called with a short text at the beginning of each step.

    Raises:
        RnnpruneError: If it cannot be read, or nothing in it can be pruned.
    """
    if options.finetune.strategy == "multiworker":  # before anything else in TensorFlow
        set_up(options, progress)
    progress(f"reading {options.model}")
    source = load(options.model, options.signature, options.threads)
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(1))
        described = pool.submit(_describe, source.files)
        base, limits = source, tuple[str, ...]()
        if source.format != "onnx" and (output_format == "onnx" or options.rebuilds):
            progress("converting to ONNX")
            base = _converted(source, stack)
        elif source.format != "onnx":
            progress("trying whether it converts to ONNX")
            limits = _not_convertible(source)
        progress("looking for loops and cells to lift")
        base, lifted = lift_model(base, options, stack)
        if not options.stages:
            _require_lifts(base)
        require_layers(base)
        if options.quantize is not None:
            _require_quantizable(base)
        exporter = None
        if output_format == "savedmodel" and base.format == "onnx":
            from rnnprune_cli.trainer.export import Exporter

            progress("trying whether it can be written as TensorFlow")
            exporter = Exporter(source, base, options.threads)
            limits += exporter.warnings
        converts = base.format != source.format and exporter is None
        count = base.count() if converts else source.count()
        inputs = Inputs(options, source, base)

        def as_onnx(model: LoadedModel) -> LoadedModel:
            return lift_model(_converted(model, stack), options, stack)[0]

        yield Opened(
            options,
            source,
            base,
            tuple(lifted),
            limits,
            count,
            described,
            inputs,
            Applier(inputs, as_onnx, stack, progress),
            pool,
            progress,
            exporter,
        )


def prune(options: PruneOptions, arguments: Mapping[str, Any], progress: Progress) -> Report:
    """Prunes one model.

    1. Check the options, then load the model; lift loops and cells to operators.
    2. Load or make up data.
    3. Score and select; units are cut, and held against the masked model, at once.
    4. Write into a temporary folder beside the output.
    5. Verify what was written there against the masked model.
    6. Measure it against the original.
    7. Move it to its place.

    Args:
        options: What to do.
        arguments: The options as the user gave them, for the report.
        progress: Called with a short text at the beginning of each step.

    Raises:
        RnnpruneError: If anything prevents a verified result; nothing is written then.
    """
    check_options(options)
    output, output_format = checked_output(options)
    with opened(options, output_format, progress) as session:
        protect(session.source, output)
        _check_labels(session)
        key = session.pool.submit(key_of, options)
        report = _finished(session, options, output, arguments)
        return dataclasses.replace(report, key=key.result())


def prune_family(
    options: PruneOptions, arguments: Mapping[str, Any], progress: Progress
) -> tuple[Report, ...]:
    """Prunes one model several times; what is known about it is worked out once.

    Args:
        options: What to do, with a family.
        arguments: The options as the user gave them, for the reports.
        progress: Called with a short text at the beginning of each step.

    Raises:
        RnnpruneError: If one of them cannot be made; those before it are written.
    """
    check_options(options)
    target, values = options.family_of, options.family
    members = [_member(options, value) for value in values]
    for member in members:
        check_options(member)
    places = [checked_output(member) for member in members]
    reports = []
    with opened(options, places[0][1], progress) as session:
        session.applier.keep = True
        _check_labels(session)
        key = session.pool.submit(key_of, options)
        for value, member, (output, _) in zip(values, members, places, strict=True):
            protect(session.source, output)

            def told(step: str, value: float = value) -> None:
                progress(f"{target or 'sparsity'} {value:g}: {step}")

            own = dataclasses.replace(session, options=member, progress=told)
            try:
                reports.append(_finished(own, member, output, {**arguments, "family": value}))
            except HelpedError:
                if member is members[-1]:
                    raise
    return tuple(dataclasses.replace(report, key=key.result()) for report in reports)


def _member(options: PruneOptions, value: float) -> PruneOptions:
    """Returns the options of one member of a family; its output has the value in its name."""
    stages, targets, target = options.stages, options.targets, options.family_of
    if target is None:
        last = dataclasses.replace(stages[-1], sparsity=value)
        stages = (*stages[:-1], last)
    else:
        targets = (*targets, checked_target(Target(target, value)))
    output, _ = output_path(options.model, options.output, rebuilds=options.rebuilds)
    named = member_path(output, value)
    return dataclasses.replace(options, stages=stages, targets=targets, output=named, family=())


def _check_labels(session: Opened) -> None:
    """Raises UsageError, before the work, for requirements on a metric that the data have not."""
    options = session.options
    if options.require:
        data = session.inputs.data
        labels = data is not None and bool(data.targets)
        check_measurable(options.require, options.metric, data is not None, labels)


def _finished(
    session: Opened, options: PruneOptions, output: Path, arguments: Mapping[str, Any]
) -> Report:
    """Applies the stages, and writes, verifies and measures the result."""
    planned = _planned(session, options)
    applied, log = planned.applied, None
    with contextlib.ExitStack() as stack:
        training = options.finetune.epochs > 0
        plan = Plan(planned.stages, options.seed, options.finetune if training else None)
        if training:
            applied, log = _finetuned(session, planned, output, stack)
        result = stack.enter_context(written(session, applied, output, plan))
        report = result.report(arguments)
        lost = None
        if options.targets and report.before.metrics:
            lost = drop(report.before.metrics, report.after.metrics)
        checks = checked(options.targets, report.ratios, lost)
        required = judge(report, options.require, options.strict)
        warnings = [
            f"measured again at the end: {check.expression} is missed ({check.actual:.3g})"
            for check in checks
            if not check.passed
        ]
        report = dataclasses.replace(
            report,
            checks=(*checks, *required),
            sensitivity=planned.curves,
            trials=planned.trials,
            warnings=(*report.warnings, *warnings),
            finetune=log,
        )
        result.move()
    if log is not None and not log.interrupted:
        shutil.rmtree(state_folder(output), ignore_errors=True)
    return report


def _finetuned(
    session: Opened, planned: _Planned, output: Path, stack: contextlib.ExitStack
) -> tuple[Applied, FineTuned]:
    """Trains what the stages made; its files live as long as the stack."""
    folder = state_folder(output)
    if not helps(session.options.finetune):
        if folder.exists() and not session.options.finetune.resume:
            shutil.rmtree(folder)  # checked_output refuses without --force
        folder.mkdir(exist_ok=True)
    scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="rnnprune-"))
    job = Job(
        dataclasses.replace(session.options, stages=planned.stages),
        session.inputs,
        session.applier.again,
        planned.before,
        planned.stages[-1],
        planned.applied,
        folder,
        Path(scratch),
        session.progress,
    )
    try:
        return finetuned(job)
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # unless there is something in it to resume


@dataclass(frozen=True, eq=False)
class _Planned:
    """The stages as they were applied, with the shares that were found for layers."""

    stages: tuple[Stage, ...]
    applied: Applied
    before: Applied
    """Without the last of them."""
    curves: tuple[Curve, ...] = ()
    trials: tuple[Trial, ...] = ()


def _planned(session: Opened, options: PruneOptions) -> _Planned:
    """Applies the stages; finds what each layer is to lose, where that is asked for."""
    applier, threads = session.applier, options.threads
    done, stages = Applied(session.base), list[Stage]()
    before = done
    found, trials = tuple[Curve, ...](), tuple[Trial, ...]()
    for stage in options.stages:
        if options.targets and stage is options.stages[-1]:
            plain = stage
            if stage.scope == SENSITIVITY:
                plain = dataclasses.replace(stage, scope=next(iter(scopes_of(stage.granularity))))
            sizes = {
                "bytes": session.files.result().bytes,
                "parameters": session.count.parameters,
                "nonzero": session.count.nonzero,
            }
            reached = Search(
                applier,
                done,
                session.inputs,
                plain,
                options.targets,
                sizes,
                options.export,
                options.trials,
                session.progress,
            ).run()
            stage, trials, found = reached.stage, reached.trials, reached.curves
        elif stage.scope == SENSITIVITY:
            data = session.inputs.calibration
            if data is None:
                raise UsageError("scope 'sensitivity' measures what layers can bear", "give --data")
            quality = measurable(session.inputs, data)
            stage, found = divided(applier, done, stage, quality, threads, session.progress)
        before, done = done, applier.add(done, stage)
        stages.append(stage)
    return _Planned(tuple(stages), done, before, found, trials)


def sensitivity(
    options: PruneOptions,
    sparsities: Sequence[float],
    gates: bool,
    arguments: Mapping[str, Any],
    progress: Progress,
) -> SensitivityReport:
    """Measures what a model loses as one layer at a time is pruned.

    Args:
        options: What to do, with one stage, and data.
        sparsities: Where to measure.
        gates: Whether to measure each gate by itself, too.
        arguments: The options as the user gave them, for the report.
        progress: Called with a short text at the beginning of each step.

    Raises:
        RnnpruneError: If nothing can be measured.
    """
    check_options(options)
    (stage,) = options.stages
    if stage.granularity == "layer":
        raise UsageError("sensitivity is of weights and units", "leave out --granularity layer")
    for sparsity in sparsities:
        if not 0 < sparsity < 1:
            raise UsageError(
                f"sparsity {sparsity:g} is not between 0 and 1", "such as --sparsities 0.5,0.7"
            )
    with opened(options, "onnx" if options.cuts else _own_format(options), progress) as session:
        data = session.inputs.data
        if data is None:
            raise UsageError("sensitivity is measured on data", "give --data")
        quality = measurable(session.inputs, data)
        session.applier.keep = True
        found = curves(
            session.applier,
            Applied(session.base),
            stage,
            quality,
            options.threads,
            progress,
            sorted(set(sparsities)),
            gates,
        )
        protect, advice = advised(found)
        source = session.source
        return SensitivityReport(
            dict(arguments),
            ModelInfo(
                str(source.path),
                source.format,
                session.files.result().sha256,
                source.producer,
                source.opset,
            ),
            stage,
            quality.dense,
            found,
            protect,
            advice,
            tuple(dict.fromkeys((*source.warnings, *session.base.warnings, *session.limits))),
            measure.environment(options.threads),
        )


def _own_format(options: PruneOptions) -> str:
    return output_path(options.model, None)[1]


def checked_output(options: PruneOptions) -> tuple[Path, str]:
    """Returns where the result goes and its format.

    Raises:
        UsageError: If it cannot go there, or cannot hold what is asked for.
    """
    what = "pruned" if options.stages else "lifted"
    output, output_format = output_path(options.model, options.output, what, options.rebuilds)
    if not options.stages and output_format != "onnx":
        raise UsageError(
            "only ONNX models hold recurrent operators", "give an output with -o X.onnx"
        )
    if output_format == "savedmodel" and (options.rebuilds or _own_format(options) == "onnx"):
        check_dense(options.export)
        only_onnx = [t.name for t in options.targets if t.name in ("latency", "bytes")]
        if only_onnx:
            raise UsageError(
                f"target '{only_onnx[0]}' cannot be searched for in a SavedModel that is rebuilt",
                f"give an output with -o {options.model.resolve().name}.onnx",
            )
    elif any(stage.include for stage in options.stages) and output_format != "onnx":
        raise UsageError(
            "--include is for ONNX models",
            f"give an output with -o {options.model.resolve().name}.onnx: the model is converted",
        )
    if options.quantize is not None and output_format != "onnx":
        raise UsageError(
            "only ONNX models are quantized: onnxruntime does it",
            f"give an output with -o {options.model.resolve().name}.onnx: the model is converted",
        )
    if helps(options.finetune):
        return output, output_format
    check_output(options, output, output_format)
    if options.finetune.epochs:
        check_state(output, options.finetune, options.force)
    return output, output_format


@dataclass(frozen=True, eq=False)
class Written:
    """A pruned model that was written into a temporary folder, and verified."""

    session: Opened
    applied: Applied
    plan: Plan
    output: Path
    folder: Path
    saved: Saved
    nonzero: Mapping[str, tuple[int, ...]]
    claims: tuple[Claim, ...]
    count: ParameterCount
    files: Future[_Files]
    reopen: Callable[[], Runner]
    floats: Written | None = None
    """What was quantized, if anything was."""
    quantized: QuantizedFile | None = None

    def report(self, arguments: Mapping[str, Any]) -> Report:
        """Compares it with the original, measures both, and says all there is to say."""
        session, applied, saved = self.session, self.applied, self.saved
        run = _Run(
            dataclasses.replace(session.options, stages=self.plan.stages),  # as they were done
            session.source,
            session.base,
            applied.model,
            saved,
            session.inputs,
            self.nonzero,
            (session.count, self.count),
            self.reopen,
        )
        files_before, files_after = session.files.result(), self.files.result()
        session.progress("comparing the models' outputs")
        quality = _quality(run)
        session.progress("timing")
        before, now, ratios, warnings = _measured(run, quality, files_before, files_after)
        quantized = self._quantized(run, now, quality.asked)
        if quantized is not None:
            warnings += tuple(_quantized_advice(quantized, now))
        source, base, model = session.source, session.base, applied.model
        return Report(
            arguments=dict(arguments),
            model=ModelInfo(
                str(source.path),
                source.format,
                files_before.sha256,
                source.producer,
                source.opset,
            ),
            output=OutputInfo(str(self.output), saved.format, files_after.sha256),
            plan=self.plan,
            layers=_layer_rows(
                (*base.layers, *_others_before(base, applied.others)),
                (*model.layers, *applied.others),
                saved,
                self.nonzero,
                applied,
            ),
            skipped=model.skipped,
            before=before,
            after=now,
            ratios=ratios,
            fidelity=quality.fidelity,
            verification=self.claims,
            warnings=tuple(
                dict.fromkeys(
                    (
                        *source.warnings,
                        *base.warnings,
                        *session.limits,
                        *applied.warnings,
                        *saved.warnings,
                        *warnings,
                    )
                )
            ),
            environment=measure.environment(session.options.threads),
            lifts=model.lifts,
            units=applied.units,
            states=applied.states,
            repairs=applied.repairs,
            quantized=quantized,
        )

    def _quantized(self, run: _Run, after: Measurement, asked: bool) -> Quantized | None:
        """Tells what quantizing did from what pruning did: measures the float model by itself."""
        made, floats = self.quantized, self.floats
        if made is None or floats is None:
            return None
        self.session.progress("comparing the quantized model with the pruned one")
        own = dataclasses.replace(
            run,
            saved=floats.saved,
            nonzero=floats.nonzero,
            counts=(run.counts[0], floats.count),
            reopen=floats.reopen,
        )
        quality = None if run.data is None else run.inputs.quality(run.data)
        metrics = () if quality is None else quality.of(own.pruned)
        fidelity = _differences(run, own.pruned, run.pruned)
        self.session.progress("timing both")
        latency, _, ratio = interleaved_latency(
            (floats.reopen, self.reopen),
            run.feeds[0] if run.data is None else run.data.feed(0, 1),
            run.options.latency_seconds,
            not run.source.big,
            run.options.seed,
        )
        before = _measurement(own, floats.files.result(), latency, metrics, asked)
        return Quantized(
            str(run.options.quantize),
            before,
            _ratios(before, after, ratio),
            fidelity,
            made.operators,
            made.left,
        )

    def move(self) -> None:
        """Moves it to its place."""
        _move(self.saved, self.output, self.folder)


@contextlib.contextmanager
def written(session: Opened, applied: Applied, output: Path, plan: Plan) -> Iterator[Written]:
    """Writes a pruned model into a temporary folder beside its place, and verifies it.

    Args:
        session: The model.
        applied: What the stages made of it.
        output: Where it is to go.
        plan: The stages.

    Raises:
        RnnpruneError: If it is not equivalent to the masked model.
    """
    model, progress, inputs = applied.model, session.progress, session.inputs
    threads, exporter, note = session.options.threads, session.exporter, provenance(plan)
    quantize = session.options.quantize is not None
    changed = model is not session.source
    count = model.count() if changed else session.count  # before runtimes hold copies
    with _folder_beside(output) as folder:
        progress(f"writing {output.name}")
        plain = exporter is not None or quantize or not applied.pruned
        form = ExportOptions("dense") if plain else session.options.export
        name = output.name if exporter is None else f"{output.name}.onnx"
        saved = model.save(applied.pruned, folder, name, form, note)
        reopen: Callable[[], Runner] = functools.partial(model.reopen, saved, threads)
        progress("verifying")
        described = session.pool.submit(_describe, saved.files)
        claim, nonzero = verify_weights(model, saved)
        require([claim])
        claims = (
            *session.lifted,
            *inputs.converted(),
            *applied.claims,
            *([claim] if applied.pruned else []),
            *_verify(model, saved, inputs, threads),
        )
        require(claims)
        count = ParameterCount(
            count.parameters,
            count.nonzero
            - sum(stored.weight.nonzero for stored in saved.stored.values())
            + sum(map(sum, nonzero.values())),
        )
        if exporter is not None:
            progress(f"writing {output.name} as TensorFlow")
            exported = exporter.write(model, saved, folder / output.name, note)
            names = [o.name for o in inputs.original.outputs]
            held = exported.verify(reopen(), inputs.feeds, names, inputs.data is None)
            claims = (*claims, *held)
            require(claims)
            saved, count, reopen = exported.saved, exported.count(), exported.open
            described = session.pool.submit(_describe, saved.files)
        made = Written(
            session, applied, plan, output, folder, saved, nonzero, claims, count, described, reopen
        )
        if quantize:
            progress(f"quantizing {output.name}")
            made = _quantized_copy(made)
        yield made


def _quantized_copy(floats: Written) -> Written:
    """Writes a quantized copy beside a model that was written and verified; verifies it, too."""
    from rnnprune_cli.onnx_model import OnnxModel
    from rnnprune_cli.quantize import quantize

    session, model = floats.session, floats.applied.model
    assert isinstance(model, OnnxModel)
    options = session.options
    folder = floats.folder / "quantized"
    folder.mkdir()
    note = provenance(floats.plan, options.quantize)
    made = quantize(model, floats.saved, folder, note, session.inputs.feeds, options.threads)
    require(made.claims)
    return dataclasses.replace(
        floats,
        saved=made.saved,
        nonzero={**floats.nonzero, **made.nonzero},
        claims=(*floats.claims, *made.claims),
        count=dataclasses.replace(
            floats.count,
            nonzero=floats.count.nonzero
            - made.float_nonzero
            + sum(sum(counts) for counts in made.nonzero.values()),
        ),
        files=session.pool.submit(_describe, made.saved.files),
        reopen=made.reopen,
        floats=floats,
        quantized=made,
    )


@contextlib.contextmanager
def _folder_beside(output: Path) -> Iterator[Path]:
    """A temporary folder on the output's file system, so that results can be renamed."""
    try:
        folder = tempfile.TemporaryDirectory(prefix=".rnnprune-", dir=output.parent)
    except OSError as error:
        raise UsageError(
            f"cannot write in {output.parent}: {error.strerror}", "give another path with -o"
        ) from error
    with folder as name:
        try:
            yield Path(name)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise RnnpruneError(
                    f"no space left in {output.parent}", "free some, or give another path with -o"
                ) from error
            raise


def _move(saved: Saved, output: Path, folder: Path) -> None:
    """Moves what was written to its place, the model file last."""
    if saved.path.is_dir():
        older = folder / "replaced"
        if output.is_dir():
            output.rename(older)
        try:
            saved.path.rename(output)
        except BaseException:
            if older.exists():
                older.rename(output)
            raise
        return
    replaced = output.exists()
    if len(saved.files) > 1:
        output.unlink(missing_ok=True)  # an older model must never meet the new one's data
    for file in reversed(saved.files):
        file.replace(output.with_name(file.name))
    if replaced and saved.format == "onnx" and len(saved.files) == 1:
        data_file(output).unlink(missing_ok=True)  # of the model that --force replaced


def _converted(source: LoadedModel, stack: contextlib.ExitStack) -> LoadedModel:
    """Converts a TensorFlow model to an ONNX file that lives as long as the stack."""
    from rnnprune_cli.onnx_model import OnnxModel
    from rnnprune_cli.tensorflow_model import TensorFlowModel, to_onnx

    assert isinstance(source, TensorFlowModel)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rnnprune-")))
    path = folder / "model.onnx"
    path.write_bytes(to_onnx(source).SerializeToString(deterministic=True))
    return OnnxModel(path, shown_path=source.path)


def lift_model(
    model: LoadedModel, options: PruneOptions, stack: contextlib.ExitStack
) -> tuple[LoadedModel, list[Claim]]:
    """Lifts an ONNX model to a file that lives as long as the stack.

    Args:
        model: The model; others than ONNX are returned as they are.
        options: The user's; it is compared on their data, besides made-up inputs.
        stack: Keeps the file.

    Returns:
        The model to work on, and the claims that it is the same if it is another.
    """
    from rnnprune_cli.lift.apply import lift
    from rnnprune_cli.onnx_model import OnnxModel

    if not isinstance(model, OnnxModel):
        return model, []

    def made_up(runner: Runner) -> list[Feed]:
        feeds = varied_feeds(runner, options.seed)
        return [*map(padded_on_the_right, feeds)] if options.right_padding else feeds

    def given(runner: Runner) -> list[Feed]:
        if options.data is None:
            return []
        data = load_dataset(options.data, runner.inputs)
        bounds = list(data.batches(VERIFIED_SAMPLES))
        bounds = bounds[: VERIFIED_SAMPLES if data.single else 1]
        return [data.feed(start, stop) for start, stop in bounds]

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rnnprune-")))
    return lift(
        model,
        folder,
        made_up,
        given,
        options.right_padding,
        options.threads,
        inside_loops=bool(options.stages),
    )


def _not_convertible(source: LoadedModel) -> tuple[str, ...]:
    """Says what is not possible for a TensorFlow model that cannot become ONNX, and why."""
    from rnnprune_cli.tensorflow_model import TensorFlowModel, to_onnx

    assert isinstance(source, TensorFlowModel)
    try:
        to_onnx(source)
    except RnnpruneError as error:
        return (f"only weights can be pruned, in place: {error.message}",)
    return ()


# Selecting


def _require_lifts(model: LoadedModel) -> None:
    """Raises RnnpruneError if there was nothing to lift, with the first reason."""
    if model.lifts:
        return
    reasons = [f"'{item.name}': {item.reason}" for item in model.skipped]
    hints = [item.hint for item in model.skipped if item.hint]
    reasons += [w for w in model.warnings if "is not lifted" in w]
    if not reasons:
        raise RnnpruneError(
            f"nothing in {model.path} has to be lifted: no loop, cell or unrolled chain is written"
            " out in it",
            "'rnnprune inspect' shows its recurrent operators",
        )
    raise RnnpruneError(
        f"nothing in {model.path} can be lifted: {reasons[0]}", next(iter(hints), "")
    )


def _require_quantizable(model: LoadedModel) -> None:
    """Raises RnnpruneError if nothing in a model can be quantized: better now than after all."""
    from rnnprune_cli.onnx_model import OnnxModel
    from rnnprune_cli.quantize import require_quantizable

    assert isinstance(model, OnnxModel)
    require_quantizable(model)


def require_layers(model: LoadedModel) -> None:
    """Raises RnnpruneError if nothing in a model can be pruned, with the first reason."""
    if model.layers:
        return
    if model.skipped:
        first = model.skipped[0]
        more = f" ({len(model.skipped) - 1} more like it)" if len(model.skipped) > 1 else ""
        raise RnnpruneError(
            f"nothing in {model.path} can be pruned: '{first.name}': {first.reason}{more}",
            first.hint,
        )
    raise RnnpruneError(
        f"{model.path} has no recurrent layer: no LSTM, GRU or RNN was found",
        "rnnprune prunes recurrent layers only, and what can be lifted to one",
    )


def _others_before(base: LoadedModel, others: Sequence[OtherLayer]) -> tuple[OtherLayer, ...]:
    """Returns what Dense layers and embeddings were before units went."""
    from rnnprune_cli.onnx_model import OnnxModel

    if not others or not isinstance(base, OnnxModel):
        return ()
    known = {layer.name: layer for layer in base.others.layers}
    return tuple(known.get(layer.name, layer) for layer in others)


def _layer_rows(
    before: Sequence[Layer],
    after: Sequence[Layer],
    saved: Saved,
    nonzero: Mapping[str, tuple[int, ...]],
    applied: Applied,
) -> tuple[LayerRow, ...]:
    rows = []
    now = {layer.name: layer for layer in after}
    for old in before:
        layer = now.get(old.name)
        weights = () if layer is None else layer.weights
        counts = [nonzero.get(w.name, w.nonzero_by_gate) for w in weights]
        left = sum(map(sum, counts))
        size = sum(w.size for w in weights)
        size_before = sum(w.size for w in old.weights)
        rows.append(
            LayerRow(
                name=old.name,
                op=old.op,
                direction=old.direction,
                hidden_before=old.hidden_size,
                hidden_after=0 if layer is None else layer.hidden_size,
                weights_before=size_before,
                weights_after=size,
                nonzero_after=left,
                sparsity=1 - left / size_before,
                stored=tuple(saved.exports.get(w.name, "dense") for w in weights),
                blocked=applied.blocked.get(old.name),
                gates={
                    letter: 1 - sum(c[k] for c in counts) * old.w.gates / size_before
                    for k, letter in enumerate(
                        ONNX_ORDER[old.op] if isinstance(old, RecurrentLayer) else ""
                    )
                },
            )
        )
    seen = pictures(
        [layer for layer in before if isinstance(layer, RecurrentLayer)],
        [layer for layer in after if isinstance(layer, RecurrentLayer)],
        {**applied.pruned, **saved.stored},
        applied.units,
        {row.name: row.nonzero_after for row in rows},
    )
    return tuple(dataclasses.replace(row, pictures=seen.get(row.name, ())) for row in rows)


# Verifying and measuring


def _verify(model: LoadedModel, saved: Saved, inputs: Inputs, threads: int) -> list[Claim]:
    claims = model.verify_untouched(saved)
    names, feeds = [o.name for o in inputs.original.outputs], inputs.feeds
    if model.big and any(claim.claim == UNCHANGED for claim in claims):
        # Held against each other bit by bit; two more copies in memory would prove no more.
        return claims
    if model.format == "onnx" and saved.stored:
        unpruned = {weight.name: weight.read for weight in distinct_weights(model.layers)}
        unpruned |= {name: stored.weight.read for name, stored in saved.stored.items()}
        claims.append(
            verify_same(
                "with nothing removed, the weights that were found give the original's outputs",
                run_all(model.open(threads), feeds, names),
                run_all(model.open_masked(unpruned, threads), feeds, names),
            )
        )
    if saved.stored:
        reference, claim = model.open_masked(saved.stored, threads), "the masked model computes"
    else:
        reference, claim = model.open(threads), "was verified"
    claims.append(
        verify_same(
            f"the written model computes what {claim}",
            run_all(reference, feeds, names),
            run_all(model.reopen(saved, threads), feeds, names),
        )
    )
    return claims


@dataclass(frozen=True, eq=False)
class _Run:
    """What a run holds when everything is written and verified."""

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
class _Quality:
    """What both models make of the data: the metrics of each, and how far they are apart.

    ``asked`` is whether the user gave labels, or named a metric that needs none.
    """

    before: tuple[MetricValue, ...]
    after: tuple[MetricValue, ...]
    asked: bool
    fidelity: tuple[OutputFidelity, ...]


def _quality(run: _Run) -> _Quality:
    data = run.data
    quality = None if data is None else run.inputs.quality(data)
    if quality is None:
        return _Quality((), (), False, _differences(run, run.original, run.pruned))
    after, comparison = quality.compared(run.pruned)
    named = any(name in LABEL_FREE for name in parse_metrics([run.options.metric]).values())
    asked = named or (data is not None and bool(data.targets))
    return _Quality(quality.dense, after, asked, comparison.rows())


def _differences(run: _Run, one: Runner, two: Runner) -> tuple[OutputFidelity, ...]:
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


@dataclass(frozen=True)
class _Files:
    """Identity and size of a model's files."""

    sha256: str
    bytes: int
    gzip_bytes: int
    gzip_estimated: bool


def _describe(files: Sequence[Path]) -> _Files:
    return _Files(measure.sha256(files), measure.total_bytes(files), *measure.gzip_bytes(files))


def _measured(
    run: _Run, quality: _Quality, files_before: _Files, files_after: _Files
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
    after = _measurement(run, files_after, latency_after, quality.after, quality.asked)
    estimated = files_before.gzip_estimated or files_after.gzip_estimated
    return before, after, _ratios(before, after, ratio), tuple(_advice(run, estimated, ratio))


def _measurement(
    run: _Run, files: _Files, latency: Latency, metrics: tuple[MetricValue, ...], asked: bool
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


def _ratios(before: Measurement, after: Measurement, latency: Ratio) -> Ratios:
    return Ratios(
        parameters=after.parameters / max(before.parameters, 1),
        nonzero=after.nonzero / max(before.nonzero, 1),
        bytes=after.bytes / before.bytes,
        gzip_bytes=after.gzip_bytes / before.gzip_bytes,
        latency=latency,
    )


def _quantized_advice(quantized: Quantized, after: Measurement) -> Iterator[str]:
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


NOISY = 0.2
"""Width of a latency ratio's interval from which on the machine is said to be noisy."""


def _advice(run: _Run, gzip_estimated: bool, latency: Ratio) -> Iterator[str]:
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
