"""What ``prune`` does, from the file to the report."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rnnprune_cli import measure
from rnnprune_cli.apply import Applied, Progress
from rnnprune_cli.checks import check_measurable, judge
from rnnprune_cli.cluster import helps
from rnnprune_cli.errors import HelpedError, UsageError
from rnnprune_cli.finetune import Job, check_state, finetuned, state_folder
from rnnprune_cli.model import (
    Curve,
    FineTuned,
    ModelInfo,
    Plan,
    Report,
    SensitivityReport,
    Stage,
    Target,
    Trial,
)
from rnnprune_cli.options import (
    SENSITIVITY,
    PruneOptions,
    check_options,
    check_output,
    member_path,
    output_path,
    protect,
    scopes_of,
)
from rnnprune_cli.search import Search, checked_target
from rnnprune_cli.sensitivity import advised, curves, divided, measurable
from rnnprune_cli.session import Opened, opened
from rnnprune_cli.tensorflow.store import check_dense
from rnnprune_cli.unchanged import key_of
from rnnprune_cli.written import written


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
        reached = [f"{target.name}<={target.limit!r}" for target in options.targets]
        checks = judge(report, reached)
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
