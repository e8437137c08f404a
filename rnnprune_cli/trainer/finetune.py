"""Fine-tuning: from a pruned model and data to better weights for it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rnnprune_cli.data import Dataset
from rnnprune_cli.errors import UsageError
from rnnprune_cli.metrics import Quality, drop
from rnnprune_cli.model import (
    INTERRUPTED,
    Array,
    BoolArray,
    Epoch,
    FineTune,
    FineTuned,
    MetricValue,
    OtherLayer,
    Pruned,
    Runner,
)
from rnnprune_cli.onnx_model import OnnxModel
from rnnprune_cli.trainer import checkpoint
from rnnprune_cli.trainer.batches import Batch, Batches
from rnnprune_cli.trainer.call import tf
from rnnprune_cli.trainer.fade import Fading
from rnnprune_cli.trainer.graph import CARRIED
from rnnprune_cli.trainer.loop import (
    DIVERGED,
    LEAST_UPDATES,
    LOWER,
    MAX_ROLLBACKS,
    SMALL,
    SMOOTH,
    WORSE,
    Gradient,
    Optimizer,
    Progress,
    Teacher,
    rate_at,
    score_of,
)
from rnnprune_cli.trainer.objective import Objective
from rnnprune_cli.trainer.replicas import Replicas, SharedGradient, Stream, replicas_of
from rnnprune_cli.trainer.trainee import Trainee

CHECKPOINT_SECONDS = 60.0
"""Time between checkpoints within an epoch; when they are written changes nothing else."""

Values = Mapping[str, Array]


@dataclass(frozen=True, eq=False)
class Task:
    """What is trained, on what.

    Attributes:
        model: The model.
        pruned: What becomes of its weights before training: values to start from, and masks.
        train: Samples to train on.
        validation: Others, that decide which weights are kept.
        original: The model before anything was removed.
        quality: Measures models on the validation data.
        objective: What is minimized.
        states: Input → output that hold the same state.
        options: The user's.
        seed: Of the order of samples.
        threads: Of onnxruntime.
        folder: Existing folder for files.
        checkpoint: Where the state of the run goes.
        identity: Of the run.
        progress: Called with a short text from time to time.
        changes: Masks that change on the way.
        fading: Layer → units ``[directions, hidden]`` that fade away; the last weights are kept.
    """

    model: OnnxModel
    pruned: Pruned
    train: Dataset
    validation: Dataset
    original: Runner
    quality: Quality
    objective: Objective
    states: Mapping[str, str]
    options: FineTune
    seed: int
    threads: int
    folder: Path
    checkpoint: Path
    identity: str
    progress: Callable[[str], None]
    changes: Changes | None = None
    fading: Mapping[str, BoolArray] | None = None


@dataclass(frozen=True, eq=False)
class Changes:
    """Masks that become tighter during training.

    Attributes:
        names: Weights that get a mask.
        sparsity_at: (update, updates in all) → sparsity to reach before it; None: no change.
        final: The last of them.
        prune: (model with its weights so far, its masks, sparsity) → what becomes of the weights.
    """

    names: frozenset[str]
    sparsity_at: Callable[[int, int], float | None]
    final: float
    prune: Callable[[OnnxModel, Pruned, float], Pruned]


@dataclass(frozen=True, eq=False)
class Result:
    """What came of it.

    Attributes:
        model: The best model; None if none was better than the one at the start.
        pruned: Its masks.
        others: Finds other layers in it.
        log: How it went.
    """

    model: OnnxModel | None
    pruned: Pruned
    others: Callable[[OnnxModel, tuple[OtherLayer, ...]], tuple[OtherLayer, ...]]
    log: FineTuned


def finetune(task: Task) -> Result:
    """Trains a model.

    An interrupt (Ctrl-C) ends training after the current update, with the best weights so far; a
    second one is not caught.

    Raises:
        RnnpruneError: If it cannot be trained.
    """
    tf.config.experimental.enable_op_determinism()
    replicas = replicas_of(task.options.strategy, task.progress)
    scope = contextlib.nullcontext() if replicas is None else replicas.scope()
    with _interrupts() as interrupted, scope:
        return _Run(task, interrupted, replicas).result()


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether there was an interrupt; the second is not held back."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def first(number: int, frame: Any) -> None:  # noqa: ANN401  a frame
        seen.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, first)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass(eq=False)
class _Watch:
    """Time of updates, for what is left."""

    begin: float = field(default_factory=time.perf_counter)
    updates: int = 0
    told: float = 0.0

    def left(self, updates: int) -> str:
        """Says how long some more updates will take."""
        seconds = (time.perf_counter() - self.begin) / max(self.updates, 1) * updates
        return f"{seconds:.0f} s" if seconds < 180 else f"{seconds / 60:.0f} min"


class _Run:
    """A run of training."""

    def __init__(
        self, task: Task, interrupted: Callable[[], bool], replicas: Replicas | None
    ) -> None:
        self._task = task
        self._interrupted = interrupted
        self._interrupted_elsewhere = False
        self._replicas = replicas
        options = task.options
        task.progress("preparing for training")
        names = frozenset[str]() if task.changes is None else task.changes.names
        carry = options.bptt is not None
        self._trainee = Trainee(task.model, task.pruned, options.freeze, names, carry)
        runner = task.model.open(task.threads)
        self._prepare = runner.prepared
        self._batches = Batches(task.train, options.batch, runner, task.states, options.noise)
        self._held = Batches(task.validation, options.batch, runner, task.states)
        given = self._trainee, task.objective, self._batches, runner
        if replicas is None:
            self._gradient = Gradient(*given)
            self._optimizer = Optimizer(self._trainee, options.clip)
        else:
            self._check_replicas(replicas)
            self._agree()
            self._gradient = self._shared = SharedGradient(replicas, *given)
            self._optimizer = Optimizer(self._trainee, options.clip, replicas.all)
        self._teacher = Teacher(task.original, task.objective.taught, self._batches.handed)
        self._fading = None if task.fading is None else Fading(self._trainee, task.fading)
        self._states: dict[str, Array] = {}
        self._updates = options.epochs * self._batches.count
        self._at = Progress()
        self._best = self._anchor = self._trainee.values()
        self._best_masks = self._anchor_masks = dict(self._trainee.masks)
        self._sparsity = 0.0 if task.changes is not None else self._trainee.sparsity
        self._begin = self._saved = time.perf_counter()
        self._logs = None
        if options.logdir is not None and (replicas is None or replicas.chief):
            self._logs = tf.summary.create_file_writer(str(options.logdir))

    def result(self) -> Result:
        """Trains, and returns the best model."""
        task = self._task
        self._check_cut()
        self._start, lost, self._first_loss = self._measured(self._trainee.values())
        if task.changes is None:
            self._at.score = score_of(lost, self._first_loss)
            self._at.final = 0 if task.fading is None else None
        if task.options.resume and task.checkpoint.exists():
            self._restore()
            self._begin -= self._at.seconds
        self._watch = _Watch()
        while self._at.epoch < task.options.epochs and self._at.stopped is None:
            self._epoch()
        at = self._at
        log = FineTuned(
            loss=_in_words(task.objective, task.options),
            schedule=task.options.schedule,
            samples=(task.train.count, task.validation.count),
            parameters=self._trainee.parameters,
            steps=at.done,
            start=self._start,
            drop=lost,
            epochs=tuple(at.epochs),
            best=at.best,
            clipped=at.clipped,
            rollbacks=at.rollbacks,
            stopped=at.stopped,
            seconds=time.perf_counter() - self._begin,
        )
        trainee = self._trainee
        if at.best == 0:
            return Result(None, {}, trainee.others, log)
        model = trainee.write(task.folder / "finetuned.onnx", self._best)
        pruned = trainee.masked(model, self._best_masks, task.pruned)
        return Result(model, pruned, trainee.others, log)

    # -- an epoch ---------------------------------------------------------------------------------

    def _epoch(self) -> None:
        """Trains for an epoch, or what is left of it, and measures what came of it."""
        at, task = self._at, self._task
        order = self._batches.epoch([task.seed, at.epoch])
        if at.update == 0:
            self._states = {}
            self._teacher.states = {}
        started = time.perf_counter()
        for samples in order[at.update :]:
            self._change_masks()
            self._update(samples)
            if self._interrupted_elsewhere or (self._replicas is None and self._interrupted()):
                self._at.stopped = f"{INTERRUPTED} in epoch {at.epoch + 1}"
            late = time.perf_counter() > self._saved + CHECKPOINT_SECONDS
            if at.stopped is not None or late:
                self._save()
            if at.stopped is not None:
                return
        if at.epoch + 1 == task.options.epochs:
            self._change_masks()
        self._finish_epoch(len(order), time.perf_counter() - started)
        self._save()

    def _finish_epoch(self, updates: int, seconds: float) -> None:
        """Measures what an epoch came to, and keeps it, goes back, or ends training."""
        at, task = self._at, self._task
        values = self._trainee.values()
        metrics, lost, loss = self._measured(values)
        rate = rate_at(at, self._updates, task.options.lr)
        at.epochs.append(
            Epoch(at.total / updates, loss, metrics, lost, self._sparsity, rate, seconds)
        )
        at.epoch, at.update, at.total = at.epoch + 1, 0, 0.0
        self._log({"validation_loss": loss, "drop": lost, **{m.name: m.value for m in metrics}})
        final = self._final()
        score = score_of(lost, loss)
        if task.fading is not None:
            at.best, self._best = at.epoch, values
        elif final and score < tuple(at.score):
            at.best, at.score = at.epoch, score
            self._best, self._best_masks = values, dict(self._trainee.masks)
            self._anchor, self._anchor_masks = self._best, self._best_masks
        elif not np.isfinite(loss) or (final and loss > WORSE * self._fair_loss()):
            self._roll_back()
        elif final and at.epoch - max(at.best, self._unfinished()) >= task.options.patience:
            self._at.stopped = f"no better model in {task.options.patience} epochs"

    def _fair_loss(self) -> float:
        """Returns what losses on validation data are compared with, once masks are final.

        That at the start, or, if less was removed then, that of the best model since.
        """
        best = self._at.score[1]
        return max(self._first_loss, best if np.isfinite(best) else 0.0, SMALL)

    def _final(self) -> bool:
        """Tells whether the masks will not change any more."""
        changes = self._task.changes
        return changes is None or self._sparsity >= changes.final

    def _unfinished(self) -> int:
        """Returns how many epochs ended before the masks were final."""
        changes = self._task.changes
        return 0 if changes is None else sum(e.sparsity < changes.final for e in self._at.epochs)

    def _update(self, samples: Array) -> None:
        """Updates the weights once."""
        at, task = self._at, self._task
        loss, gradients = self._summed(samples)
        norm = self._optimizer(gradients, rate_at(at, self._updates, task.options.lr))
        at.clipped += int(norm > task.options.clip)
        at.update, at.done, at.since = at.update + 1, at.done + 1, at.since + 1
        if self._fading is not None:
            self._fading(1 - at.done / self._updates)
        if not (np.isfinite(loss) and np.isfinite(norm)):
            self._roll_back()
        else:
            at.total += loss
            self._watch_loss(loss)
        self._tell(loss, norm)

    def _summed(self, samples: Array) -> tuple[float, list[Any]]:
        """Returns the loss of a batch and its gradient."""
        objective, data = self._task.objective, self._task.train
        seed = [self._task.seed, self._at.epoch, self._at.update]
        parts = list(self._batches.parts(samples, seed))
        counts = np.sum([objective.counts(data, part) for part in parts], axis=0)
        loss, gradients = 0.0, list[Any]()
        if self._replicas is not None:
            streams = [self._stream(own, counts) for own in self._replicas.shares(data, parts)]
            self._interrupted_elsewhere, loss, gradients = self._shared.summed(
                streams, self._interrupted()
            )
            return loss, gradients
        for part in parts:
            for piece, given in self._pieces(part, self._batches, self._teacher):
                value, found, ends = self._gradient(*given, objective.totals(counts, piece))
                loss += float(value)
                gradients = (
                    [a + b for a, b in zip(gradients, found, strict=True)] if gradients else found
                )
                self._hand_on(ends)
        return loss, gradients

    def _stream(self, parts: Sequence[Batch], counts: Array) -> Stream:
        """Yields what one of several replicas does of a batch."""
        for part in parts:
            for piece, given in self._pieces(part, self._batches, self._teacher):
                ends = yield (*given, self._task.objective.totals(counts, piece))
                self._hand_on(ends)

    def _pieces(
        self, part: Batch, batches: Batches, teacher: Teacher, whole: bool = False
    ) -> Iterator[tuple[Batch, list[Any]]]:
        """Yields what goes through the model at once.

        With it come feed, labels, what the original gives, and valid steps. Each must be done, and
        its states handed on, before the next is asked for.
        """
        objective, steps = self._task.objective, self._task.options.bptt
        outputs = teacher(part)
        carried = self._trainee.module.carried
        if carried:
            shapes = {n: (d, len(part.samples), size) for n, (d, size) in carried.items()}
            self._states = {n: np.zeros(shape, np.float32) for n, shape in shapes.items()}
            self._states[CARRIED] = np.array(False)
        for piece in [part] if whole or steps is None else batches.cut(part, steps):
            feed = {**self._prepare(piece.feed), **self._states}
            labels = objective.labels(batches.data, piece)
            yield piece, [feed, labels, objective.given(piece, outputs), piece.valid]

    def _hand_on(self, ends: Values) -> None:
        """Takes over the states that a part ended with, for the next."""
        if self._trainee.module.carried:
            self._states = {**ends, CARRIED: np.array(True)}
        else:
            self._states = {name: ends[taken] for name, taken in self._batches.handed.items()}

    def _check_cut(self) -> None:
        """Raises UsageError if parts of sequences do not give what whole ones do."""
        if not self._trainee.module.carried:
            return
        self._task.progress("comparing parts of sequences with whole ones")
        part = next(self._batches.parts(self._batches.epoch(None)[0]))
        sums = []
        for whole in (True, False):
            total = np.zeros(len(self._task.objective.terms))
            for piece, given in self._pieces(part, self._batches, self._teacher, whole):
                found, ends = self._gradient.losses(*given)
                waits = np.isinf(self._task.objective.totals(total, piece))
                total += np.where(waits, 0, found)
                self._hand_on(ends)
            sums.append(total)
        one, two = sums
        if not np.allclose(one, two, rtol=1e-3, atol=1e-3 * len(part.samples)):
            raise UsageError(
                "sequences cannot be cut: in parts of"
                f" {self._task.options.bptt} steps the model gives something else",
                "leave out --bptt: something besides recurrent layers looks across steps",
            )

    def _change_masks(self) -> None:
        """Makes the masks tighter, if it is time to."""
        changes, task, at, trainee = self._task.changes, self._task, self._at, self._trainee
        if changes is None:
            return
        sparsity = changes.sparsity_at(at.done, self._updates)
        if sparsity is None or (sparsity <= self._sparsity and at.done > 0):
            return
        task.progress(f"epoch {at.epoch + 1}: pruning to sparsity {sparsity:.3g}")
        model = trainee.write(task.folder / "changing.onnx", trainee.values())
        pruned = trainee.masked(model, trainee.masks, task.pruned)
        trainee.prune(model, changes.prune(model, pruned, sparsity))
        self._agree()
        self._optimizer.mask(trainee.masks)
        self._sparsity = sparsity
        if self._final():
            at.final = at.done
        self._anchor, self._anchor_masks = trainee.values(), dict(trainee.masks)
        at.since, at.smooth, at.least = 0, None, float("inf")

    def _agree(self) -> None:
        """Takes over the chief's weights and masks, if there are several workers."""
        if self._replicas is not None:
            chiefs, trainee = self._replicas.chiefs, self._trainee
            trainee.assign({name: chiefs(array) for name, array in trainee.values().items()})
            trainee.masks = {name: chiefs(mask) for name, mask in trainee.masks.items()}

    def _check_replicas(self, replicas: Replicas) -> None:
        """Raises UsageError, on all workers, if one of them cannot work with the others."""
        task = self._task
        if self._batches.handed:
            raise UsageError(
                "states are handed from one sample to the next, which only one device can do",
                "leave out --strategy",
            )
        if not replicas.same(bytes.fromhex(task.identity)):
            raise UsageError(
                "the workers were started with other options, models or data, or have found other"
                " stages",
                "give all the same; after a search, train by what it has found (--save-recipe)",
            )
        resumes = task.options.resume and task.checkpoint.exists()
        saved = task.checkpoint.read_bytes() if resumes else b""
        if not replicas.same(hashlib.sha256(saved).digest()):
            raise UsageError(
                f"not all workers find the same in {task.checkpoint}",
                "to go on with --resume they need a folder that they share",
            )

    # -- stability --------------------------------------------------------------------------------

    def _watch_loss(self, loss: float) -> None:
        """Goes back if the loss has risen far above its least."""
        at = self._at
        at.smooth = loss if at.smooth is None else SMOOTH * at.smooth + (1 - SMOOTH) * loss
        if at.since <= LEAST_UPDATES or self._task.fading is not None:
            return
        at.least = min(at.least, at.smooth)
        if at.smooth > DIVERGED * max(at.least, self._first_loss, SMALL):
            self._roll_back()

    def _roll_back(self) -> None:
        """Goes back to the best weights, with a lower rate."""
        at, trainee = self._at, self._trainee
        trainee.assign(self._anchor)
        trainee.masks = dict(self._anchor_masks)
        self._optimizer.mask(trainee.masks)
        at.rollbacks += 1
        at.factor *= LOWER
        at.since, at.smooth, at.least = 0, None, float("inf")
        if at.rollbacks >= MAX_ROLLBACKS:
            self._at.stopped = f"training diverged {at.rollbacks} times, at ever lower rates"

    # -- measuring and saving ---------------------------------------------------------------------

    def _measured(self, values: Values) -> tuple[tuple[MetricValue, ...], float, float]:
        """Returns metrics, drop and loss on the validation data."""
        task = self._task
        task.progress(f"epoch {self._at.epoch + 1}: measuring on {task.validation.count} samples")
        runner = self._trainee.write(task.folder / "measured.onnx", values).open(task.threads)
        metrics = task.quality.of(runner)
        teacher = Teacher(task.original, task.objective.taught, self._held.handed)
        total, counts = np.zeros((2, len(task.objective.terms)))
        before, self._states = self._states, {}
        for samples in self._held.epoch(None):
            for part in self._held.parts(samples):
                counts += task.objective.counts(task.validation, part)
                for _, given in self._pieces(part, self._held, teacher, whole=True):
                    found, ends = self._gradient.losses(*given)
                    total += found
                    self._hand_on(ends)
        self._states = before
        loss = float(np.sum(total / np.maximum(counts, 1)))
        lost = drop(task.quality.dense, metrics)
        if self._replicas is not None:
            figures = np.array([lost, loss, *[m.value for m in metrics]])
            lost, loss, *measured = self._replicas.chiefs(figures).tolist()
            pairs = zip(metrics, measured, strict=True)
            metrics = tuple(dataclasses.replace(m, value=value) for m, value in pairs)
        return metrics, lost, loss

    def _tell(self, loss: float, norm: float) -> None:
        """Tells how far training is."""
        at, options, watch = self._at, self._task.options, self._watch
        watch.updates += 1
        rate = rate_at(at, self._updates, options.lr)
        figures = {"loss": loss, "gradient_norm": norm, "learning_rate": rate}
        self._log({**figures, "sparsity": self._sparsity})
        if time.perf_counter() < watch.told + 0.5:
            return
        watch.told = time.perf_counter()
        last = at.epochs[-1].metrics if at.epochs else self._start
        shown = ", ".join(f"{m.name} {m.value:.4g}" for m in last[:2])
        self._task.progress(
            f"epoch {at.epoch + 1} of {options.epochs}, update {at.update} of"
            f" {self._batches.count}: loss {loss:.4g}, {shown}, sparsity {self._sparsity:.3g},"
            f" about {watch.left(self._updates - at.done)} left"
        )

    def _log(self, figures: Mapping[str, float]) -> None:
        """Writes figures for TensorBoard."""
        if self._logs is not None:
            with self._logs.as_default(step=self._at.done):
                # tf.summary.scalar does the same, but not without TensorBoard.
                kind = tf.compat.v1.SummaryMetadata
                scalar = kind(plugin_data=kind.PluginData(plugin_name="scalars"), data_class=1)
                for name, figure in figures.items():
                    tf.summary.write(name, tf.constant(figure, tf.float32), metadata=scalar)

    def _save(self) -> None:
        """Writes a checkpoint."""
        if self._replicas is not None and not self._replicas.chief:
            return
        self._at.seconds = time.perf_counter() - self._begin
        groups: dict[str, Values] = {
            "weights": self._trainee.values(),
            "masks": self._trainee.masks,
            "best": self._best,
            "best_masks": self._best_masks,
            "anchor": self._anchor,
            "anchor_masks": self._anchor_masks,
            "optimizer": {str(k): array for k, array in enumerate(self._optimizer.state())},
            "states": self._states,
            "teacher": self._teacher.states,
            "run": {"sparsity": np.array(self._sparsity), "first": np.array(self._first_loss)},
        }
        checkpoint.save(self._task.checkpoint, self._task.identity, self._at, groups)
        self._saved = time.perf_counter()

    def _restore(self) -> None:
        """Goes on where a checkpoint says."""
        self._at, groups = checkpoint.load(self._task.checkpoint, self._task.identity)
        if (self._at.stopped or "").startswith(INTERRUPTED):
            self._at.stopped = None
        self._trainee.assign(groups["weights"])
        self._trainee.masks = groups.get("masks", {})
        self._best, self._best_masks = groups["best"], groups.get("best_masks", {})
        self._anchor, self._anchor_masks = groups["anchor"], groups.get("anchor_masks", {})
        self._optimizer.mask(self._trainee.masks)
        state = groups["optimizer"]
        self._optimizer.restore([state[str(k)] for k in range(len(state))])
        self._states = groups.get("states", {})
        self._teacher.states = groups.get("teacher", {})
        self._sparsity = float(groups["run"]["sparsity"])
        self._first_loss = float(groups["run"]["first"])


def _in_words(objective: Objective, options: FineTune) -> str:
    """Says what is minimized."""
    parts = []
    for term in objective.terms:
        target = term.target
        if term.taught:
            what = f"distance to the original's {target.output}"
            what += f" (temperature {options.temperature:g})" if target.classes else ""
        else:
            what = f"{'cross-entropy' if target.classes else 'squared error'} of {target.output}"
        parts.append(what if term.weight == 1 else f"{term.weight:g} x {what}")
    return " + ".join(parts)
