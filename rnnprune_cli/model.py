"""The frozen dataclasses that travel between the stages.

A model file becomes a :class:`LoadedModel`: its recurrent layers, what had to be skipped, and how
to run and to save it. Everything after that (scoring, selecting, verifying, measuring, reporting)
sees only the types of this module, whether the file was ONNX or TensorFlow.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
BoolArray = NDArray[np.bool_]

Op = Literal["LSTM", "GRU", "RNN"]
GATES: dict[Op, int] = {"LSTM": 4, "GRU": 3, "RNN": 1}
"""Gates per operator: rows of W and R are ``gates * hidden_size``."""


def compress(array: Array, keep: BoolArray, axis: int) -> Array:
    """Returns the places of an array that stay.

    Args:
        array: Any array.
        keep: Broadcastable to it, or with axes in front that it has not yet; as many are True
            along ``axis`` at every place.
        axis: Of ``keep``, the one that becomes shorter.
    """
    if keep.all():
        return array
    wide = array.reshape((1,) * (keep.ndim - array.ndim) + array.shape)
    wide = np.broadcast_to(wide, np.broadcast_shapes(wide.shape, keep.shape))
    mask = np.moveaxis(np.broadcast_to(keep, wide.shape), axis, -1)
    moved = np.moveaxis(wide, axis, -1)
    left = moved[mask].reshape(*moved.shape[:-1], -1)
    return np.moveaxis(left, -1, axis)


@dataclass(frozen=True, eq=False)
class Weight:
    """One prunable matrix in ONNX layout: W or R of a recurrent layer.

    Layers that share a weight, or hold equal copies of it, hold the same object.

    Attributes:
        name: Unique within the model, such as ``lstm_4.W``.
        shape: ``(directions, gates * hidden_size, columns)``.
        dtype: Floating-point type in which it is stored.
        read: Returns the values, read-only; may be a view of a memory map.
        gates: Into how many blocks of ``hidden_size`` rows it falls.
    """

    name: str
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    read: Callable[[], Array]
    gates: int = 1

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @functools.cached_property
    def nonzero(self) -> int:
        """Number of elements that are not zero."""
        return sum(self.nonzero_by_gate)

    @functools.cached_property
    def nonzero_by_gate(self) -> tuple[int, ...]:
        """The same for each block of rows, over both directions."""
        values, rows = self.read(), self.shape[1] // self.gates
        return tuple(
            sum(int(np.count_nonzero(part[k * rows : (k + 1) * rows])) for part in values)
            for k in range(self.gates)
        )


@dataclass(frozen=True, eq=False)
class RecurrentLayer:
    """A recurrent layer whose weights are known constants.

    Attributes:
        name: Unique name, shown to the user and matched by ``--layers``.
        op: ONNX operator that describes it.
        direction: ``forward``, ``reverse`` or ``bidirectional``.
        input_size: Features per time step.
        hidden_size: Hidden units per direction.
        w: Input weights, ``(directions, gates * hidden_size, input_size)``.
        r: Recurrent weights, ``(directions, gates * hidden_size, hidden_size)``.
    """

    name: str
    op: Op
    direction: str
    input_size: int
    hidden_size: int
    w: Weight
    r: Weight

    @property
    def weights(self) -> tuple[Weight, Weight]:
        """W and R."""
        return self.w, self.r

    @property
    def macs_per_step(self) -> int:
        """Multiply-accumulates of W and R that a dense kernel executes per time step."""
        return self.w.size + self.r.size


OTHER_KINDS = {
    "dense": "weights of Dense layers: MatMul or Gemm with a constant matrix",
    "embedding": "rows of embeddings that the data never use (Gather of a constant matrix)",
}
"""What else can be pruned on request; name → summary."""


@dataclass(frozen=True, eq=False)
class OtherLayer:
    """A Dense layer or an embedding, whose weight is a known constant.

    Attributes:
        name: Unique name, also among recurrent layers; matched by ``--include``.
        op: ONNX operator that reads the weight: ``MatMul``, ``Gemm`` or ``Gather``.
        w: ``(1, outputs, inputs)`` of a Dense layer, ``(1, entries, features)`` of an embedding,
            however it is stored.
    """

    name: str
    op: str
    w: Weight

    direction = ""

    @property
    def kind(self) -> str:
        """``dense`` or ``embedding``."""
        return "embedding" if self.op == "Gather" else "dense"

    @property
    def input_size(self) -> int:
        """What each row reads, or holds."""
        return self.w.shape[2]

    @property
    def hidden_size(self) -> int:
        """Rows: outputs of a Dense layer, entries of an embedding."""
        return self.w.shape[1]

    @property
    def weights(self) -> tuple[Weight]:
        """Its only weight."""
        return (self.w,)

    @property
    def macs_per_step(self) -> int:
        """Multiply-accumulates for each vector that it reads."""
        return self.w.size if self.kind == "dense" else 0


Layer = RecurrentLayer | OtherLayer


@dataclass(frozen=True)
class Skipped:
    """Something recurrent that cannot be pruned, why, and what would help."""

    name: str
    reason: str
    hint: str


@dataclass(frozen=True)
class Lift:
    """A recurrent operator that stands for what was a loop, a hand-written cell or a chain.

    Attributes:
        name: The operator.
        pattern: ``cell``, ``loop``, ``chain`` or ``directions`` (two operators made one).
        op: LSTM, GRU or RNN.
        source: The node, or nodes, that it stands for.
    """

    name: str
    pattern: str
    op: Op
    source: str


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a model.

    Attributes:
        name: Public name.
        dtype: NumPy type.
        shape: Fixed sizes as ``int``, symbolic dimensions as their name, unknown ones as None;
            None instead of a tuple where not even the rank is known.
        minimum: Smallest valid value of an integer input, where the graph tells.
        maximum: Largest valid value of an integer input (inclusive), where the graph tells.
        choices: Values that the graph compares the input with (a sample rate, a mode).
        is_length: The input gives the lengths of padded sequences.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...] | None
    minimum: int | None = None
    maximum: int | None = None
    choices: tuple[int | float, ...] = ()
    is_length: bool = False


Feed = Mapping[str, Array]


class Runner(ABC):
    """An executable model: an onnxruntime session or a TensorFlow function.

    Attributes:
        inputs: What :meth:`run` must be given.
        outputs: What it returns.
        size_hints: Sizes that may be the only ones accepted for dimensions declared dynamic.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    size_hints: tuple[int, ...] = ()

    @abstractmethod
    def run(self, feed: Feed) -> list[Array]:
        """Runs the model once.

        Args:
            feed: An array for each input, under its name.

        Returns:
            The outputs, in the order of :attr:`outputs`.

        Raises:
            RnnpruneError: If the runtime rejects the feed.
        """

    def prepared(self, feed: Feed) -> Feed:
        """Returns a feed as the model itself takes it."""
        return feed

    def call(self, feed: Feed) -> Callable[[], object]:
        """Returns a function that runs the model once, so that only the model's work is timed."""
        return functools.partial(self.run, self.prepared(feed))

    def reset(self) -> None:  # noqa: B027  most models hold no state between calls
        """Restores the state that a stateful model keeps between calls."""


@dataclass(frozen=True)
class ParameterCount:
    """How many floating-point weights a model has, and how many are not zero."""

    parameters: int
    nonzero: int


@dataclass(frozen=True)
class ExportOptions:
    """How the pruned weights are stored.

    Attributes:
        export: ``auto``, ``dense``, ``sparse`` or ``packed``.
        values: ``float32`` (as they are), ``float16`` or ``int8``: precision of packed values.
    """

    export: str = "auto"
    values: str = "float32"


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """The values that a written file is meant to hold for a weight.

    Attributes:
        weight: The original.
        mask: True where it is kept.
        refitted: Shape and type of the weight: what the kept ones became; None if they stay.
        rounding: Applied to the masked values where ``--values`` asked for less precision; maps
            ``[…, rows, columns]`` to the same shape, row by row.
    """

    weight: Weight
    mask: BoolArray
    refitted: Array | None = None
    rounding: Callable[[Array], Array] | None = None

    def __call__(self) -> Array:
        """Returns all values, in the shape of the weight."""
        return self._values(self._unmasked(), self.mask)

    def rows(self, start: int, stop: int) -> Array:
        """Returns some rows, counted over both directions, as ``[rows, columns]``."""
        columns = self.weight.shape[2]
        values = self._unmasked().reshape(-1, columns)[start:stop]
        return self._values(values, self.mask.reshape(-1, columns)[start:stop])

    def _unmasked(self) -> Array:
        return self.weight.read() if self.refitted is None else self.refitted

    def _values(self, values: Array, mask: BoolArray) -> Array:
        masked = np.where(mask, values, values.dtype.type(0))  # a product would leave -0.0
        return masked if self.rounding is None else self.rounding(masked)


Pruned = Mapping[str, StoredWeight]
"""Weight name → what becomes of it."""


@dataclass(frozen=True)
class Saved:
    """What a save wrote.

    Attributes:
        path: The model file or directory.
        files: Everything that belongs to it (external data, variables), for size and moving.
        format: ``onnx``, ``savedmodel``, ``keras`` or ``h5``.
        exports: Weight name → how it was stored: ``dense``, ``sparse`` or ``packed``.
        stored: Weight name → the values that the file is meant to hold.
        warnings: What the user should know about the way it was stored.
    """

    path: Path
    files: tuple[Path, ...]
    format: str
    exports: Mapping[str, str]
    stored: Mapping[str, StoredWeight]
    warnings: tuple[str, ...] = ()


class LoadedModel(ABC):
    """A model file that was read and searched for recurrent layers.

    Attributes:
        path: What the user named.
        format: ``onnx``, ``savedmodel``, ``keras`` or ``h5``.
        producer: The exporter, as the file says.
        opset: Version of the default operator set; None for TensorFlow.
        files: All files of the model.
        layers: What can be pruned.
        skipped: What is recurrent but cannot be pruned.
        warnings: What the user should know about the file.
        lifts: Operators that stand for what the file has not as operators.
    """

    path: Path
    format: str
    producer: str
    opset: int | None
    files: tuple[Path, ...]
    layers: tuple[RecurrentLayer, ...]
    skipped: tuple[Skipped, ...]
    warnings: tuple[str, ...]
    lifts: tuple[Lift, ...] = ()
    big: bool = False
    """So large that a run must not hold more copies of it than it needs."""

    @abstractmethod
    def open(self, threads: int = 1) -> Runner:
        """Returns the original model, ready to run."""

    @abstractmethod
    def open_masked(self, stored: Mapping[str, Callable[[], Array]], threads: int = 1) -> Runner:
        """Returns the reference: the original graph with other values for its weights.

        It binds new tensors to the inputs of the recurrent operators instead of putting weights
        where they are stored, as :meth:`save` does, so that the two can be held against each other.
        """

    @abstractmethod
    def save(
        self, pruned: Pruned, directory: Path, name: str, options: ExportOptions, note: str
    ) -> Saved:
        """Writes the pruned model into a directory.

        Args:
            pruned: What becomes of weights; those that are not named stay as they are.
            directory: Existing empty directory.
            name: File or directory name of the model in there.
            options: How pruned weights are stored.
            note: Provenance (tool, version, plan) for the model's metadata.
        """

    @abstractmethod
    def reopen(self, saved: Saved, threads: int = 1) -> Runner:
        """Returns what :meth:`save` wrote, read back from its files, ready to run."""

    @abstractmethod
    def read_back(self, saved: Saved) -> Iterable[tuple[str, Array]]:
        """Yields (weight name, values) as the written files hold them, in the layout of Weight.

        A weight that is stored in several places comes several times.
        """

    def verify_untouched(self, saved: Saved) -> list[Claim]:
        """Checks what only the format can tell; :data:`UNCHANGED` is among the claims if it can."""
        return []

    @abstractmethod
    def count(self) -> ParameterCount:
        """Counts the floating-point weights of the original."""


@dataclass(frozen=True)
class Stage:
    """One pruning step of a plan.

    Attributes:
        method: Name of a criterion.
        granularity: What is removed together.
        scope: Within what scores compete.
        sparsity: Share to remove, 0 ≤ s < 1.
        layers: Globs of the layers that may lose something; all if there are none.
        exclude: Globs of those that may not.
        compensate: Whether what is gone is made up for, where there are data.
        resize_state: For units: states may change their public shape.
        allow_inexact: For units: those that are normalised together may go, too.
        shares: Layer name → sparsity, where it is another than that of the stage.
        include: What else may lose weights: globs of names, or keys of :data:`OTHER_KINDS`.
    """

    method: str
    granularity: str
    scope: str
    sparsity: float
    layers: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    compensate: bool = True
    resize_state: bool = False
    allow_inexact: bool = False
    shares: Mapping[str, float] = field(default_factory=dict)
    include: tuple[str, ...] = ()


@dataclass(frozen=True)
class Point:
    """What a model loses at one sparsity of one part of it; see :func:`metrics.drop`."""

    sparsity: float
    drop: float
    metrics: tuple[MetricValue, ...]


@dataclass(frozen=True)
class Curve:
    """How much a model loses as one layer, or one gate of it, loses weights or units.

    Attributes:
        layer: The layer.
        gate: Its letter in ONNX's order; None for the whole layer.
        size: How many weights, or units, it has.
        points: By rising sparsity.
    """

    layer: str
    gate: str | None
    size: int
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Target:
    """Something that a search is to reach: an upper limit.

    Attributes:
        name: ``metric-drop``, or of a ratio after ÷ before.
        limit: It holds if the figure is not above.
    """

    name: str
    limit: float


@dataclass(frozen=True)
class Check:
    """A condition that the result was held against.

    Attributes:
        expression: As the user wrote it, or what was compared with a baseline.
        limit: The number in it.
        actual: The figure.
        passed: Whether it holds; a figure with an interval fails only if all of it does.
        low: Lower end of the figure's 95 % interval; None if it has no noise.
        high: Its upper end.
        p: Of a rank test: the chance of such a difference where there is none.
        subject: Whose figure it is, where a report is about several models.
        hint: What to do if it fails.
    """

    expression: str
    limit: float
    actual: float
    passed: bool
    low: float | None = None
    high: float | None = None
    p: float | None = None
    subject: str = ""
    hint: str = ""


@dataclass(frozen=True)
class Trial:
    """One model that a search has tried.

    Attributes:
        shares: Layer name → sparsity.
        figures: Target name → what was measured.
        met: Whether all targets were.
    """

    shares: Mapping[str, float]
    figures: Mapping[str, float]
    met: bool


@dataclass(frozen=True)
class FineTune:
    """How a pruned model is trained.

    Attributes:
        epochs: At most so many; 0 for no training.
        train: What to train on; None for the calibration data, or else the data.
        validation: What decides which weights are kept; None for a part of the training data.
        distill: Share of the loss that holds outputs against the original's, 0 to 1; None: all of
            it without labels, nine tenths with them.
        temperature: Of distillation.
        lr: Learning rate after the warm-up.
        batch: Samples of an update.
        schedule: A key of :data:`rnnprune_cli.options.SCHEDULES`.
        patience: Epochs without a better model after which training ends.
        clip: Norm to which gradients are cut.
        bptt: Steps of a sequence after which gradients stop; None for the whole sequence.
        noise: Added to real inputs, in units of the standard deviation of each feature.
        balance: Whether rare classes count more, so that each counts the same in all.
        output_weights: ``OUTPUT=WEIGHT`` of losses; 1 for others.
        freeze: Globs of weights, or nodes that read them, that stay as they are.
        resume: Go on where an earlier run was interrupted.
        logdir: Where TensorBoard's logs go.
        strategy: A key of :data:`rnnprune_cli.options.STRATEGIES`.
    """

    epochs: int = 0
    train: Path | None = None
    validation: Path | None = None
    distill: float | None = None
    temperature: float = 2.0
    lr: float = 1e-3
    batch: int = 32
    schedule: str = "one-shot"
    patience: int = 10
    clip: float = 1.0
    bptt: int | None = None
    noise: float = 0.0
    balance: bool = False
    output_weights: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ()
    resume: bool = False
    logdir: Path | None = None
    strategy: str = "single"


@dataclass(frozen=True)
class Epoch:
    """What an epoch of training came to.

    Attributes:
        loss: Mean over its updates.
        validation_loss: On data that were not trained on.
        metrics: On the same.
        drop: What they are worse than the original's; see :func:`metrics.drop`.
        sparsity: Of what is pruned, at its end.
        lr: Learning rate at its end.
        seconds: What it took.
    """

    loss: float
    validation_loss: float
    metrics: tuple[MetricValue, ...]
    drop: float
    sparsity: float
    lr: float
    seconds: float


INTERRUPTED = "interrupted"
"""What the reason begins with if the user ended training."""


@dataclass(frozen=True)
class FineTuned:
    """How a model was trained.

    Attributes:
        loss: What was minimized, in words.
        schedule: As in :class:`FineTune`.
        samples: Trained on, and validated on.
        parameters: Of the model: how many were trained, and how many it has.
        steps: Updates that were made.
        start: Metrics of the pruned model before, on the validation data.
        drop: What they were worse than the original's.
        epochs: What was measured after each.
        best: Number of the epoch whose weights are kept; 0 for the ones before training.
        clipped: Updates whose gradient was cut to the norm allowed.
        rollbacks: How often training diverged and went back to the best weights.
        stopped: Why it ended before its time; None if it did not.
        seconds: What all of it took.
    """

    loss: str
    schedule: str
    samples: tuple[int, int]
    parameters: tuple[int, int]
    steps: int
    start: tuple[MetricValue, ...]
    drop: float
    epochs: tuple[Epoch, ...]
    best: int
    clipped: int
    rollbacks: int
    stopped: str | None
    seconds: float

    @property
    def interrupted(self) -> bool:
        """Whether the user ended training, and can go on with it."""
        return (self.stopped or "").startswith(INTERRUPTED)


@dataclass(frozen=True)
class Plan:
    """What is to be done: stages in order, training after them, and the seed of all randomness."""

    stages: tuple[Stage, ...]
    seed: int = 0
    finetune: FineTune | None = None


@dataclass(frozen=True)
class Latency:
    """Wall-clock time of one call in milliseconds, with the raw samples.

    Attributes:
        median: Of all samples.
        p5: 5th percentile.
        p95: 95th percentile.
        samples: In the order of their measurement; those of models that were timed side by side
            belong together one by one.
        p99: 99th percentile; None in reports that have it not.
        rounds: How many of the samples each round has; models are opened anew in each.
    """

    median: float
    p5: float
    p95: float
    samples: tuple[float, ...]
    p99: float | None = None
    rounds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Ratio:
    """A ratio of latencies with its 95 % interval; see :func:`rnnprune_cli.timing.ratio`."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class MetricValue:
    """A quality figure of one output of a model on the user's data."""

    name: str
    value: float
    higher_is_better: bool
    output: str = ""


@dataclass(frozen=True)
class Measurement:
    """The figures of one model. See the README for how each is made.

    ``metric`` is the first of ``metrics``, which has one for each output that is measured; None if
    there are no labels and no other metric was asked for.
    """

    parameters: int
    nonzero: int
    recurrent_parameters: int
    recurrent_nonzero: int
    bytes: int
    gzip_bytes: int
    macs_per_step: int
    latency_ms: Latency | None = None
    metric: MetricValue | None = None
    metrics: tuple[MetricValue, ...] = ()


@dataclass(frozen=True)
class Ratios:
    """After divided by before."""

    parameters: float
    nonzero: float
    bytes: float
    gzip_bytes: float
    latency: Ratio | None


@dataclass(frozen=True)
class OutputFidelity:
    """How much pruning changed one output: original against pruned.

    ``agreement`` is the share of positions with the same largest entry along the last axis; None
    where an output has no such axis.
    """

    name: str
    max_abs: float
    mean_abs: float
    cosine: float
    agreement: float | None


@dataclass(frozen=True)
class Claim:
    """One verified statement about the rewrite."""

    claim: str
    passed: bool
    max_abs: float
    tolerance: float


UNCHANGED = "nothing but the pruned weights differs from the original files"
"""Claim of :meth:`LoadedModel.verify_untouched`."""


@dataclass(frozen=True)
class Picture:
    """Where a weight is zero or gone, at a size to look at.

    Attributes:
        weight: ``W`` or ``R``.
        direction: 0 forward (or the only one), 1 reverse.
        gates: Letters of its gates, in ONNX's order: as many equal parts of the rows.
        shape: Of the matrix before, ``(gates * hidden_size, columns)``.
        cells: One string a row of cells, one character a cell: ``0`` (all zero) to ``9`` (none is)
            for the share that is not zero of what is left there, ``x`` where all is cut out.
    """

    weight: str
    direction: int
    gates: str
    shape: tuple[int, int]
    cells: tuple[str, ...]


@dataclass(frozen=True)
class LayerRow:
    """What happened to one layer.

    Attributes:
        stored: The form of W and of R in the written file.
        blocked: Why it was not pruned, or not all of it.
        gates: The gate's letter, in ONNX's order → its share of ``sparsity``: of the weights that
            it had at first, how many are gone or zero, over both directions.
        pictures: Of each weight and direction.
    """

    name: str
    op: str
    direction: str
    hidden_before: int
    hidden_after: int
    weights_before: int
    weights_after: int
    nonzero_after: int
    sparsity: float
    stored: tuple[str, ...]
    blocked: str | None = None
    gates: Mapping[str, float] = field(default_factory=dict)
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class RemovableUnits:
    """How many units of a layer can be removed, and what holds the others.

    Attributes:
        layer: The layer.
        removable: Of each direction, at most; at least one stays.
        coupled: Other layers whose units go with them.
        blocked: What holds units that cannot go, and why; None if nothing does.
        hint: What would help.
    """

    layer: str
    removable: int
    coupled: tuple[str, ...]
    blocked: str | None
    hint: str


@dataclass(frozen=True)
class KeptUnits:
    """The units of a layer that stay, for each direction, in their old numbers and order."""

    layer: str
    kept: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ResizedState:
    """A state that changed its public shape.

    Attributes:
        input: Model input; None if the state is only handed out.
        output: Model output.
        axis: The axis that became shorter.
        kept: Old places along it, for each place along the other axes where these differ.
    """

    input: str | None
    output: str
    axis: int
    kept: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Gradients:
    """What a loss says about a weight, over batches of data.

    Attributes:
        mean: Shaped like the weight: the mean gradient.
        square: Shaped like the weight: the mean of its square.
    """

    mean: Array
    square: Array


@dataclass(frozen=True, eq=False)
class WeightFigures:
    """What is known about a weight.

    Attributes:
        weight: The weight.
        values: ``[directions, rows, columns]``: what it is now; removed elements do not matter.
        generator: For random scores; of its own for each weight.
        reads: ``[directions, rows, columns]``: mean square of what each element multiplies on data;
            None without data.
        inverse: Same shape: diagonals of the inverse Hessians of what is left of each row; None
            without data, and where they would take too long.
        gradients: None for methods that do not ask for them.
    """

    weight: Weight
    values: Array
    generator: np.random.Generator
    reads: Array | None = None
    inverse: Array | None = None
    gradients: Gradients | None = None


@dataclass(frozen=True, eq=False)
class Read:
    """What one reader reads, and how: its output is ``weights · v``.

    Attributes:
        units: int64 ``[n]``: whose unit each element of ``v`` is; equal ones go together.
        covariance: float64 ``[n, n]``: of ``v`` on data.
        weights: Returns float64 ``[outputs, n]``.
    """

    units: Array
    covariance: Array
    weights: Callable[[], Array]


@dataclass(frozen=True, eq=False)
class UnitFigures:
    """What is known about hidden units; those that go together have one number.

    Attributes:
        outgoing: float64 ``[numbers]``: squared norm of all weights that multiply the unit.
        group: float64 ``[numbers]``: squared norm of all weights that go with it.
        variance: float64 ``[numbers]``: of its hidden state on data; None without data.
        reads: What is read of units on data; empty without data.
    """

    outgoing: Array
    group: Array
    variance: Array | None
    reads: tuple[Read, ...] = ()


@dataclass(frozen=True)
class LayerFigures:
    """What is known about a layer that may be removed.

    Attributes:
        mean_square: Of its weights W and R.
        unexplained: Share of the variance of its output on data that no linear map of its input
            explains; None without data.
    """

    mean_square: float
    unexplained: float | None


@dataclass(frozen=True)
class Repair:
    """How well what one reader read of removed units or weights is made up for by the others.

    Attributes:
        reader: The node, and which of its weights.
        samples: Steps or rows of data that it was worked out on; 0 if it is not repaired.
        unexplained: On held-out samples, the share of the removed units' variance that the kept
            ones cannot predict, or by how much of their mean square the outputs of a layer's rows
            change; None if there were too few samples to hold some out.
        problem: Why it is not repaired, or not in all parts.
    """

    reader: str
    samples: int
    unexplained: float | None
    problem: str | None = None


@dataclass(frozen=True)
class ModelInfo:
    """Identity of the input model."""

    path: str
    format: str
    sha256: str
    producer: str
    opset: int | None


@dataclass(frozen=True)
class OutputInfo:
    """Identity of the written model."""

    path: str
    format: str
    sha256: str


@dataclass(frozen=True)
class Quantized:
    """What ``--quantize`` did to a pruned model.

    ``Report.after`` is the quantized model; this tells pruning and quantization apart.

    Attributes:
        kind: ``int8``.
        before: The pruned model, before it was quantized.
        ratios: Quantized ÷ pruned.
        fidelity: The pruned model's outputs against the quantized one's.
        operators: Operators that were quantized → how many.
        left: Recurrent operators that were left as they are, each with the reason.
    """

    kind: str
    before: Measurement
    ratios: Ratios
    fidelity: tuple[OutputFidelity, ...]
    operators: Mapping[str, int]
    left: tuple[Skipped, ...]


@dataclass(frozen=True)
class Report:
    """Everything that ``prune`` has to say; ``report/`` renders it.

    ``key`` is a digest of everything that the output depends on: model, data, plan, versions.
    """

    arguments: Mapping[str, Any]
    model: ModelInfo
    output: OutputInfo
    plan: Plan
    layers: tuple[LayerRow, ...]
    skipped: tuple[Skipped, ...]
    before: Measurement
    after: Measurement
    ratios: Ratios
    fidelity: tuple[OutputFidelity, ...]
    verification: tuple[Claim, ...]
    warnings: tuple[str, ...]
    environment: Mapping[str, Any]
    lifts: tuple[Lift, ...] = ()
    units: tuple[KeptUnits, ...] = ()
    states: tuple[ResizedState, ...] = ()
    repairs: tuple[Repair, ...] = ()
    sensitivity: tuple[Curve, ...] = ()
    trials: tuple[Trial, ...] = ()
    checks: tuple[Check, ...] = ()
    finetune: FineTuned | None = None
    quantized: Quantized | None = None
    key: str = ""


@dataclass(frozen=True)
class SensitivityReport:
    """Everything that ``sensitivity`` has to say.

    Attributes:
        arguments: The options as the user gave them.
        model: What was looked at.
        stage: What was done to one layer at a time.
        dense: The figures of the original.
        curves: By layer and gate.
        protect: Layers that lose much more than others.
        advice: What to do about it, in a sentence.
        warnings: What the user should know.
        environment: The machine and versions.
    """

    arguments: Mapping[str, Any]
    model: ModelInfo
    stage: Stage
    dense: tuple[MetricValue, ...]
    curves: tuple[Curve, ...]
    protect: tuple[str, ...]
    advice: str
    warnings: tuple[str, ...]
    environment: Mapping[str, Any]


@dataclass(frozen=True)
class BenchModel:
    """One model of a benchmark.

    Attributes:
        name: Unique in the report.
        path: The file or directory.
        format: ``onnx``, ``savedmodel``, ``keras`` or ``h5``.
        sha256: Of all its files.
        parameters: Floating-point (or quantized) weights.
        nonzero: Those that are not zero.
        bytes: Size of all its files.
        gzip_bytes: The same after gzip.
        macs_per_step: Multiply-accumulates of its recurrent layers for one step; None if it has
            none that is known.
        bytes_per_step: Bytes of weights that these read for one step.
        load_ms: Time to open it: the median over all rounds.
        peak_bytes: Memory that a process of its own needs to open and to run it, more than before.
        metrics: On the data.
        latency_ms: In the first setting.
        group: Models of one group are compared with each other.
        how: How it was made, for models of the built-in suite.
    """

    name: str
    path: str
    format: str
    sha256: str
    parameters: int
    nonzero: int
    bytes: int
    gzip_bytes: int
    macs_per_step: int | None
    bytes_per_step: int | None
    load_ms: float
    peak_bytes: int | None
    metric: MetricValue | None
    metrics: tuple[MetricValue, ...]
    latency_ms: Latency
    group: str = ""
    how: str = ""


@dataclass(frozen=True)
class Timing:
    """What one model takes in one setting.

    Attributes:
        model: Its name.
        batch: Samples of a call; None if they cannot be told.
        steps: Steps of each of them; None if they cannot be told.
        threads: That it ran with.
        latency_ms: Of a call.
        samples_per_second: Throughput; None without batch.
        steps_per_second: The same in steps; None without steps.
        real_time_factor: Latency ÷ the time that the steps stand for; None if that is not given.
    """

    model: str
    batch: int | None
    steps: int | None
    threads: int
    latency_ms: Latency
    samples_per_second: float | None
    steps_per_second: float | None
    real_time_factor: float | None


@dataclass(frozen=True)
class BenchRatio:
    """The latency of a model divided by that of the reference of its group, in one setting."""

    model: str
    reference: str
    batch: int | None
    steps: int | None
    threads: int
    latency: Ratio


@dataclass(frozen=True)
class Control:
    """The reference against itself in one setting: what the machine's noise amounts to.

    Attributes:
        reference: The model.
        batch: As in :class:`Timing`.
        steps: As in :class:`Timing`.
        threads: As in :class:`Timing`.
        latency: Should hold 1 in its interval.
        rounds: How often all models were opened.
        seconds: What all of it took.
    """

    reference: str
    batch: int | None
    steps: int | None
    threads: int
    latency: Ratio
    rounds: int
    seconds: float


@dataclass(frozen=True)
class BenchReport:
    """Everything that ``bench`` has to say; ``control`` is the first of ``controls``."""

    arguments: Mapping[str, Any]
    models: tuple[BenchModel, ...]
    timings: tuple[Timing, ...]
    ratios: tuple[BenchRatio, ...]
    control: Control
    controls: tuple[Control, ...]
    checks: tuple[Check, ...]
    warnings: tuple[str, ...]
    environment: Mapping[str, Any]


@dataclass(frozen=True)
class CheckReport:
    """Everything that ``check`` has to say.

    Attributes:
        arguments: The options as the user gave them.
        report: What was judged.
        baseline: What it was held against.
        checks: In the order of ``--require``, then the comparisons with the baseline.
        warnings: What could not be judged, and why.
    """

    arguments: Mapping[str, Any]
    report: str
    baseline: str | None
    checks: tuple[Check, ...]
    warnings: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Tells whether all checks hold."""
        return all(check.passed for check in self.checks)
