"""Fine-tuning of what the stages made: gives training what it needs, and judges what comes back."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rnnprune_cli.apply import Applied, Applier, Inputs
from rnnprune_cli.cluster import helps
from rnnprune_cli.data import thinned, with_lengths
from rnnprune_cli.errors import HelpedError, NothingRemovedError, UsageError
from rnnprune_cli.load import model_files
from rnnprune_cli.measure import sha256
from rnnprune_cli.metrics import drop
from rnnprune_cli.model import BoolArray, FineTune, FineTuned, Pruned, Stage
from rnnprune_cli.onnx_model import OnnxModel
from rnnprune_cli.options import STRUCTURES, PruneOptions
from rnnprune_cli.sensitivity import measurable, runner_of

if TYPE_CHECKING:
    from rnnprune_cli.trainer.finetune import Changes, Result

FADING = 0.5
"""Share of the epochs in which units fade away before they are cut."""


@dataclass(frozen=True, eq=False)
class Job:
    """What is to be fine-tuned.

    Attributes:
        options: The user's.
        inputs: The original, and the data.
        applier: Applies stages.
        before: The model without the last stage.
        stage: The last stage.
        one_shot: The model with all of them.
        folder: Where the state of the run is kept.
        scratch: Existing folder for files.
        progress: Called with a short text from time to time.
    """

    options: PruneOptions
    inputs: Inputs
    applier: Callable[[], Applier]
    before: Applied
    stage: Stage
    one_shot: Applied
    folder: Path
    scratch: Path
    progress: Callable[[str], None]

    @functools.cached_property
    def files(self) -> tuple[str, ...]:
        """Digests of the files of the model and the data."""
        own = self.options
        data = (own.finetune.train, own.finetune.validation, own.calibration, own.data)
        self.progress("reading the data for a digest")
        return (
            sha256(model_files(own.model)),
            *("" if path is None else sha256(_files(path)) for path in data),
        )


def state_folder(output: Path) -> Path:
    """Returns where the state of a run is kept that writes to some place."""
    return output.with_name(f"{output.name}.training")


def set_up(options: PruneOptions, progress: Callable[[str], None]) -> None:
    """Makes TensorFlow ready to train, with all other workers if there are some.

    Args:
        options: The user's.
        progress: Called with a short text at the beginning of each step.

    Raises:
        RnnpruneError: If they do not answer.
    """
    from rnnprune_cli.tensorflow.runtime import set_threads

    set_threads(options.threads if options.threads > 1 else os.cpu_count() or 1)
    if options.finetune.strategy != "single":
        from rnnprune_cli.trainer.replicas import replicas_of

        replicas_of(options.finetune.strategy, progress)


def finetuned(job: Job) -> tuple[Applied, FineTuned]:
    """Trains what the stages made; returns it, or what they made if training made it no better.

    Raises:
        RnnpruneError: If it cannot be trained.
        HelpedError: If it was, and another worker has the result.
    """
    options, inputs = job.options, job.inputs
    set_up(options, job.progress)
    _, held = inputs.training
    quality = measurable(inputs, held)
    gradual = options.finetune.schedule != "one-shot"
    if not gradual:
        result = _trained(job, "weights", job.one_shot, options.finetune.epochs)
        done, log = job.one_shot, result.log
    elif job.stage.granularity in STRUCTURES:
        result, log, done = _faded(job)
    else:
        result = _trained(job, "weights", job.before, options.finetune.epochs, _changes(job))
        done, log = job.one_shot, result.log
    if helps(options.finetune):
        raise HelpedError("this worker has done its part; the first one writes the model")
    if gradual:
        start = quality.of(runner_of(job.one_shot, options.threads))
        lost = drop(quality.dense, start)
        log = dataclasses.replace(log, start=start, drop=lost)
        if log.best and not log.epochs[log.best - 1].drop < lost:
            log = dataclasses.replace(log, best=0)
    if log.best == 0 or result.model is None:
        why = f": {log.stopped}" if log.stopped else ""
        warning = f"fine-tuning found no better weights than those it started with{why}"
        return _warned(job.one_shot, warning, log), log
    changed = dataclasses.replace(
        done,
        model=result.model,
        pruned=result.pruned,
        others=result.others(result.model, done.others),
    )
    return _warned(changed, None, log), log


def _warned(applied: Applied, warning: str | None, log: FineTuned) -> Applied:
    texts = [] if warning is None else [warning]
    if log.rollbacks:
        texts.append(
            f"training diverged {log.rollbacks} time{'s' if log.rollbacks > 1 else ''} and went on"
            " from the best weights at a lower rate: give a lower --lr"
        )
    if log.interrupted:
        texts.append(f"training was {log.stopped}: go on with --resume")
    return dataclasses.replace(applied, warnings=(*applied.warnings, *texts))


def _trained(
    job: Job,
    name: str,
    applied: Applied,
    epochs: int,
    changes: Changes | None = None,
    fading: dict[str, BoolArray] | None = None,
) -> Result:
    """Trains a model.

    Args:
        job: The job.
        name: Of this part of it.
        applied: The model.
        epochs: For so long.
        changes: Of masks, on the way.
        fading: Layer → units that fade away.
    """
    from rnnprune_cli.hessians import handed_states
    from rnnprune_cli.trainer.batches import LOOKED_AT
    from rnnprune_cli.trainer.finetune import Task, finetune
    from rnnprune_cli.trainer.objective import objective

    options, inputs = job.options, job.inputs
    train, held = inputs.training
    assert isinstance(applied.model, OnnxModel)
    states = handed_states(applied.model, train)
    if options.finetune.bptt is not None:
        if states:
            raise UsageError(
                "states are handed from one sample to the next, and gradients stop there already",
                "leave out --bptt",
            )
        train, held = with_lengths(train), with_lengths(held)
    elif (train.lengths is None) != (held.lengths is None) and not train.stacked | held.stacked:
        train, held = with_lengths(train), with_lengths(held)
    own = dataclasses.replace(options.finetune, epochs=epochs)
    looked = thinned(train, LOOKED_AT)
    aim = objective(train, looked, inputs.original, sorted(inputs.states), own)
    aim.check(train, "training")
    aim.check(held, "validation")
    task = Task(
        model=applied.model,
        pruned=applied.pruned,
        train=train,
        validation=held,
        original=inputs.original,
        quality=measurable(inputs, held),
        objective=aim,
        states=states,
        options=own,
        seed=options.seed,
        threads=options.threads,
        folder=job.scratch,
        checkpoint=job.folder / f"{name}.npz",
        identity=_identity(job, name),
        progress=job.progress,
        changes=changes,
        fading=fading,
    )
    return finetune(task)


def _changes(job: Job) -> Changes:
    """Returns how masks become tighter, up to what the last stage asks for."""
    from rnnprune_cli.trainer.finetune import Changes
    from rnnprune_cli.trainer.schedule import SCHEDULES

    stage = job.stage
    final = max([stage.sparsity, *stage.shares.values()])
    if not final:
        raise UsageError("a schedule has nothing to reach", "give --sparsity, or leave it out")

    def prune(model: OnnxModel, masks: Pruned, sparsity: float) -> Pruned:
        part = sparsity / final
        shares = {name: share * part for name, share in stage.shares.items()}
        now = dataclasses.replace(stage, sparsity=stage.sparsity * part, shares=shares)
        try:
            return job.applier().add(Applied(model, masks), now if part < 1 else stage).pruned
        except NothingRemovedError:
            return masks

    names = frozenset(job.one_shot.pruned)
    return Changes(names, SCHEDULES[job.options.finetune.schedule](final), final, prune)


def _faded(job: Job) -> tuple[Result, FineTuned, Applied]:
    """Lets units fade away, cuts them, and trains on."""
    if job.before.units:
        raise UsageError(
            "units can fade away in one stage only", "leave out --schedule, or the earlier stage"
        )
    if job.stage.granularity != "unit":
        raise UsageError("layers do not fade away", "leave out --schedule")
    gone = {}
    for layer in job.one_shot.units:
        size = next(x.hidden_size for x in job.before.model.layers if x.name == layer.layer)
        gone[layer.layer] = np.array([~np.isin(np.arange(size), row) for row in layer.kept])
    epochs = job.options.finetune.epochs
    first = max(1, round(epochs * FADING)) if epochs > 1 else 1
    faded = _trained(job, "fading", job.before, first, fading=gone)
    if faded.model is None or faded.log.stopped or epochs == first:
        return faded, dataclasses.replace(faded.log, best=0), job.one_shot
    job.progress("cutting the units that faded away")
    done = job.applier().add(dataclasses.replace(job.before, model=faded.model), job.stage, gone)
    result = _trained(job, "weights", done, epochs - first)
    before, log = faded.log, result.log
    log = dataclasses.replace(
        log,
        epochs=(*before.epochs, *log.epochs),
        best=log.best and log.best + len(before.epochs),
        steps=before.steps + log.steps,
        clipped=before.clipped + log.clipped,
        rollbacks=before.rollbacks + log.rollbacks,
        seconds=before.seconds + log.seconds,
    )
    return result, log, done


def _identity(job: Job, name: str) -> str:
    """Identifies a run by all that decides what comes out of it."""
    options = job.options
    same = dataclasses.replace(
        options.finetune, resume=False, logdir=None, strategy="", train=None, validation=None
    )
    told = (name, same, options.stages, options.seed, options.metric, options.targets, job.files)
    return hashlib.sha256(repr(told).encode()).hexdigest()


def _files(path: Path) -> Sequence[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def check_state(output: Path, finetune: FineTune, force: bool) -> None:
    """Raises UsageError if there is a state of an earlier run that nobody asked for."""
    folder = state_folder(output)
    if folder.exists() and any(folder.iterdir()) and not finetune.resume and not force:
        raise UsageError(
            f"{folder} holds a run that was interrupted",
            "go on with --resume, or start again with --force",
        )
