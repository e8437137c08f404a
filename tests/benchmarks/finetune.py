"""What training gives back after pruning, and what else could have been done: Markdown tables.

Usage: python tests/benchmarks/finetune.py language --train-folder DIR [--rows 'units*']
                                           [--columns 'one-shot' 'tfmot*'] [--json out.json]

For one sample model, on its test set: what each way of pruning costs at once, after the repair,
after fine-tuning with labels, and after learning from the original's outputs without labels. Beside
them, with the same training data, epochs and batch size: gradual pruning by the TensorFlow Model
Optimization toolkit, and a network of as many units as are left, trained from nothing; that one
also trained for as long as the sample model was. The baselines keep the dropout that the sample
models were trained with, which an ONNX file does not hold.

``sample_models/train.py all --data-only --full-train DIR`` writes the training splits. Latency is
that of batch 1 in stock onnxruntime on one thread, interleaved with the original's; medicine is
converted first. Cells that ``--json`` holds are not computed again as long as their settings stay
the same. Needs the extra ``tensorflow``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fnmatch
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tensorflow_model_optimization as tfmot  # before TensorFlow, so that both take Keras 2
import tf_keras

from rnnprune_cli.data import load_dataset
from rnnprune_cli.gate_order import onnx_to_keras
from rnnprune_cli.load import load
from rnnprune_cli.measure import environment, gzip_bytes, total_bytes
from rnnprune_cli.metrics import Quality
from rnnprune_cli.model import GATES, MetricValue
from rnnprune_cli.runtime import OnnxRunner
from rnnprune_cli.timing import interleaved_latency
from rnnprune_cli.trainer.objective import MIXED

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "sample_models"))

import train

SAMPLES = Path(train.__file__).parent


@dataclass(frozen=True)
class Budget:
    """How long everything trains that is compared; batches are those of the sample model.

    Attributes:
        epochs: Passes over the training split.
        rate: Learning rate of ``rnnprune``. All else has the highest of the sample model, which at
            90 % suits the toolkit better than 0.0003 and 0.001, as tried on the test sets (but not
            that of language).
        noise: Of ``rnnprune``: what the sample model itself was trained with.
    """

    epochs: int
    rate: float
    noise: float = 0.0


@dataclass(frozen=True)
class Row:
    """A way of pruning, as options of ``rnnprune prune``."""

    method: str
    granularity: str
    sparsity: float

    @property
    def block(self) -> tuple[int, int] | None:
        """Rows and columns of a kernel of Keras that go together; None for units."""
        if self.granularity == "unit":
            return None
        rows, columns = self.granularity.removeprefix("block:").replace("weight", "1x1").split("x")
        return int(columns), int(rows)


BUDGETS = {
    "language": Budget(2, 4e-3),
    "speech": Budget(30, 1e-3, 0.6),
    "timeseries": Budget(5, 1e-3, 0.1),
    "medicine": Budget(5, 1e-3, 0.5),
}
ROWS = {
    "magnitude 70 %": Row("magnitude", "weight", 0.7),
    "magnitude 90 %": Row("magnitude", "weight", 0.9),
    "block:16x1 90 %": Row("magnitude", "block:16x1", 0.9),
    "units 50 %": Row("obs", "unit", 0.5),
    "units 75 %": Row("obs", "unit", 0.75),
}
PRUNED = ("one-shot", "repaired", "fine-tuned", "distilled")
GRADUAL, SMALL, SMALL_IN_FULL = "tfmot gradual", "small from scratch", "small, trained in full"
COLUMNS = (*PRUNED, GRADUAL, SMALL, SMALL_IN_FULL)
METRICS = {"timeseries": ("mse", "mae")}
"""Metrics of models that have several."""
RAMP = 0.5
"""Share of the steps after which gradual pruning has reached its sparsity; then it only trains."""
MASK_UPDATES = 50
"""Of gradual pruning, until then."""
LATENCY_SECONDS = 2.0


@dataclass(frozen=True)
class Subject:
    """A sample model, and what belongs to it.

    Attributes:
        name: Of the task.
        model: The ONNX file.
        train_file: Its whole training split.
        task: Its task, with an ONNX file as result.
        data: Its data.
    """

    name: str
    model: Path
    train_file: Path
    task: train.Task
    data: train.DataSets

    @property
    def budget(self) -> Budget:
        """How long to train."""
        return BUDGETS[self.name]

    @property
    def test_file(self) -> Path:
        """What everything is measured on."""
        return SAMPLES / f"{self.name}.test.npz"


def open_subject(name: str, train_folder: Path, folder: Path) -> Subject:
    """Reads the data of a sample model; a SavedModel is converted into a folder."""
    model, train_file = SAMPLES / f"{name}.onnx", train_folder / f"{name}.train.npz"
    if not model.exists():
        model = folder / f"{name}.onnx"
        rnnprune(["prune", str(SAMPLES / name), "--sparsity", "0", "-o", str(model)])
    task = dataclasses.replace(
        train.TASKS[name], export=train.export_onnx(name), predict=train.predict_onnx(name)
    )
    splits = (dict(np.load(file)) for file in (train_file, SAMPLES / f"{name}.test.npz"))
    metadata = {entry.key: entry.value for entry in onnx.load(model).metadata_props}
    return Subject(name, model, train_file, task, train.DataSets(*splits, metadata))


# --------------------------------------------------------------------------------------------------
# Ways to a smaller model: each writes one, and returns what else is known about it
# --------------------------------------------------------------------------------------------------


def rnnprune(arguments: list[str]) -> dict[str, Any]:
    """Runs the command line and returns its report."""
    done = subprocess.run(
        [sys.executable, "-m", "rnnprune_cli.cli", *arguments, "--quiet", "--format", "json"],
        stdout=subprocess.PIPE,
        check=False,
        env={k: v for k, v in os.environ.items() if k != "TF_USE_LEGACY_KERAS"},  # tfmot sets it
    )
    if done.returncode:
        raise RuntimeError(f"rnnprune {shlex.join(arguments)} ended with {done.returncode}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def prune_arguments(subject: Subject, row: Row, column: str, folder: Path) -> list[str]:
    """Returns the command line of a cell, without the output."""
    train_file, budget = subject.train_file, subject.budget
    if column == "distilled":  # no label is there to be looked at
        train_file = folder / train_file.name
        arrays = {k: v for k, v in subject.data.train.items() if k != "labels"}
        train.save_arrays(train_file, arrays)
    training = ["--finetune", str(budget.epochs), "--train", str(train_file)]
    training += ["--lr", str(budget.rate), "--batch", str(subject.task.batch)]
    training += ["--noise", str(budget.noise)]
    more = {
        "one-shot": ["--no-compensate"],
        "repaired": [],
        # Said although it is the default: kept cells are known by their command line.
        "fine-tuned": [*training, "--distill", str(MIXED)],
        "distilled": [*training, "--distill", "1"],
    }
    return [
        *("prune", str(subject.model), "--data", str(subject.test_file)),
        *("--calibration", str(SAMPLES / f"{subject.name}.calibration.npz")),
        *("--method", row.method, "--granularity", row.granularity),
        *("--sparsity", str(row.sparsity), *more[column]),
    ]


def load_weights(model: tf_keras.Model, path: Path) -> None:
    """Puts the weights of an ONNX file into a Keras model of the same layers."""
    graph = onnx.load(path).graph
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes = (node for node in graph.node if node.op_type in GATES)
    for layer in model.layers:
        if recurrent(layer):
            node = next(nodes)
            w, r, b = (arrays[name] for name in node.input[1:4])
            layer.set_weights(
                [
                    weight
                    for d in range(len(w))
                    for weight in keras_weights(node.op_type, w[d], r[d], b[d])
                ]
            )
            continue
        found = []
        for weight in layer.get_weights():
            (same,) = (array for array in arrays.values() if array.shape == weight.shape)
            found.append(same)
        layer.set_weights(found)


def keras_weights(op: Any, w: np.ndarray, r: np.ndarray, b: np.ndarray) -> list[np.ndarray]:
    """Returns kernel, recurrent kernel and bias of one direction of an LSTM or a GRU."""
    biases = [onnx_to_keras(op, half.reshape(1, -1, 1)) for half in np.split(b, 2)]
    bias = np.concatenate(biases)
    return [
        onnx_to_keras(op, w[None]),
        onnx_to_keras(op, r[None]),
        bias if op == "GRU" else bias.sum(axis=0),
    ]


def recurrent(layer: tf_keras.layers.Layer) -> bool:
    """Tells whether a Keras layer is one that is pruned."""
    return isinstance(layer, tf_keras.layers.RNN | tf_keras.layers.Bidirectional)


def prune_gradually(subject: Subject, row: Row, folder: Path) -> dict[str, Any]:
    """Prunes the recurrent layers with the toolkit while they train on, and writes the result."""
    task, budget, sparsity = subject.task, subject.budget, row.sparsity
    tf_keras.backend.clear_session()
    tf_keras.utils.set_random_seed(train.SEED)
    network = task.build(tf_keras, subject.data, task.units)
    load_weights(network.model, subject.model)
    train.check_conversion(network.model, task.predict, subject.model.parent, subject.data.test)

    steps = budget.epochs * -(-len(subject.data.train["labels"]) // task.batch)
    frequency = max(1, round(RAMP * steps / MASK_UPDATES))
    end = round(RAMP * steps / frequency) * frequency  # masks change at multiples only
    schedule = tfmot.sparsity.keras.PolynomialDecay(0.0, sparsity, 0, end, frequency=frequency)

    def prunable(layer: tf_keras.layers.Layer) -> tf_keras.layers.Layer:
        copy = type(layer).from_config(layer.get_config())
        if not recurrent(layer):
            return copy
        if isinstance(copy, tf_keras.layers.Bidirectional):  # which the toolkit does not know
            copy.get_prunable_weights = lambda: [
                weight
                for side in (copy.forward_layer, copy.backward_layer)
                for weight in (side.cell.kernel, side.cell.recurrent_kernel)
            ]
        return tfmot.sparsity.keras.prune_low_magnitude(copy, schedule, block_size=row.block)

    model = tf_keras.models.clone_model(network.model, clone_function=prunable)
    pairs = list(zip(network.model.layers, model.layers, strict=True))
    for layer, twin in pairs:
        twin.set_weights(layer.get_weights())
    train.fit(
        tf_keras,
        model,
        subject.data.train,
        network.loss,
        batch=task.batch,
        epochs=budget.epochs,
        rate=task.rate,
        callbacks=[tfmot.sparsity.keras.UpdatePruningStep()],
    )
    zeros = []
    for layer, twin in pairs:  # into the layers without the toolkit's wrappers
        layer.set_weights(twin.get_weights())
        if recurrent(layer):
            kernels = [weight.numpy() for weight in layer.weights if "kernel" in weight.name]
            zeros += [float((kernel == 0).mean()) for kernel in kernels]
    if max(abs(share - sparsity) for share in zeros) > 0.02:  # blocks may be cut off
        raise RuntimeError(f"the toolkit pruned {zeros}, not {sparsity}")
    task.export(network, folder, subject.data.metadata)
    return {"steps": steps, "sparsity": zeros}


def train_small(subject: Subject, left: float, folder: Path, in_full: bool) -> dict[str, Any]:
    """Trains a network of fewer units from nothing, and writes it."""
    task = dataclasses.replace(subject.task, units=round(left * subject.task.units))
    if not in_full:
        task = dataclasses.replace(task, epochs=subject.budget.epochs, vary=dict)
    train.train(task, subject.data, folder)
    return {"units": task.units, "epochs": task.epochs}


def way(
    subject: Subject, row: Row, column: str, folder: Path
) -> tuple[str, Callable[[], dict[str, Any]]] | None:
    """Returns how a cell comes about, in words and as a function; None if it has no meaning."""
    budget = subject.budget
    trained = f"{budget.epochs} epochs, batch {subject.task.batch}, rate {subject.task.rate}"
    if column in PRUNED:
        arguments = prune_arguments(subject, row, column, folder)
        output = folder / f"{subject.name}.onnx"

        def run() -> dict[str, Any]:
            report = rnnprune([*arguments, "-o", str(output), "--force"])
            return {key: report[key] for key in ("finetune", "warnings") if key in report}

        return shlex.join(["rnnprune", *(part.rpartition("/")[2] for part in arguments)]), run
    if column == GRADUAL and row.block is not None:
        said = f"tfmot: {row.granularity}, PolynomialDecay to {row.sparsity} in {RAMP:.0%}"
        return f"{said} of {trained}", lambda: prune_gradually(subject, row, folder)
    if column in (SMALL, SMALL_IN_FULL) and row.granularity == "unit":
        in_full, left = column == SMALL_IN_FULL, 1 - row.sparsity
        said = f"{left:.0%} of the units, {'trained as the original' if in_full else trained}"
        return said, lambda: train_small(subject, left, folder, in_full)
    return None


# --------------------------------------------------------------------------------------------------
# Measuring and printing
# --------------------------------------------------------------------------------------------------


def measured(subject: Subject, path: Path) -> dict[str, Any]:
    """Measures a model beside the original."""
    source = load(subject.model)
    original = source.open(1)
    data = load_dataset(subject.test_file, original.inputs)

    def opened() -> OnnxRunner:
        return OnnxRunner(path, 1, original.inputs, original.outputs)

    def metrics(metric: str) -> tuple[MetricValue, MetricValue]:
        quality = Quality(original, data, metric)
        return quality.dense[0], quality.of(opened())[0]

    both = [metrics(metric) for metric in METRICS.get(subject.name, ("auto",))]
    before, _, ratio = interleaved_latency(
        (lambda: source.open(1), opened), data.feed(0, 1), LATENCY_SECONDS
    )
    return {
        "metrics": {value.name: value.value for _, value in both},
        "dense": {value.name: value.value for value, _ in both},
        "higher_is_better": both[0][0].higher_is_better,
        "bytes": total_bytes([path]),
        "size": total_bytes([path]) / total_bytes(source.files),
        "gzipped": gzip_bytes([path])[0] / gzip_bytes(source.files)[0],
        "latency": dataclasses.asdict(ratio),
        "dense_latency_ms": before.median,
    }


def compute(
    subject: Subject, row: Row, column: str, old: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Returns a cell, the old one if its settings are the same; None if there is none."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        known = way(subject, row, column, folder)
        if known is None:
            return None
        said, run = known
        if old is not None and old["how"] == said:
            return old
        print(f"{column}: {said}", file=sys.stderr, flush=True)
        begin = time.perf_counter()
        try:
            with contextlib.redirect_stdout(sys.stderr):  # only the table is for stdout
                more = run()
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return None
        seconds = time.perf_counter() - begin
        found = measured(subject, folder / f"{subject.name}.onnx")
    return {"how": said, "seconds": round(seconds, 1), **found, **more}


def lines(name: str, cells: dict[str, dict[str, Any]]) -> list[str]:
    """Returns the lines of the table that belong to a way of pruning."""
    (dense, better), *_ = [(c["dense"], c["higher_is_better"]) for c in cells.values()]
    arrow = "↑" if better else "↓"
    table = []
    for metric, before in dense.items():
        values = {c: cell["metrics"][metric] for c, cell in cells.items()}
        texts = {c: f"{v:.3f} ({100 * (v / before - 1):+.1f} %)" for c, v in values.items()}
        table.append((f"{metric} {arrow}", f"{before:.3f}", texts))
    sizes = {c: f"{cell['size']:.3f} ({cell['gzipped']:.3f})" for c, cell in cells.items()}
    table.append(("size (gzipped)", "1", sizes))
    latency = {c: f"{cell['latency']['median']:.2f}" for c, cell in cells.items()}
    table.append(("latency", "1", latency))
    return [
        f"| {name} | {figure} | {first} | {' | '.join(texts.get(c, '') for c in COLUMNS)} |"
        for figure, first, texts in table
    ]


def main() -> None:
    """Fills the table of one model, and prints it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=BUDGETS)
    parser.add_argument("--train-folder", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", default=["*"], help="globs over names of rows")
    parser.add_argument("--columns", nargs="+", default=["*"], help="globs over names of columns")
    parser.add_argument("--json", type=Path, help="where cells are kept")
    given = parser.parse_args()

    def chosen(names: Any, patterns: list[str]) -> list[str]:
        return [n for n in names if any(fnmatch.fnmatch(n, p) for p in patterns)]

    train.be_deterministic()
    kept: dict[str, Any] = {}
    if given.json is not None and given.json.exists():
        kept = json.loads(given.json.read_text())
    with tempfile.TemporaryDirectory() as temporary:
        subject = open_subject(given.model, given.train_folder, Path(temporary))
        rows = kept.setdefault(given.model, {"environment": environment(1), "rows": {}})["rows"]
        for name in chosen(ROWS, given.rows):
            cells = rows.setdefault(name, {})
            for column in chosen(COLUMNS, given.columns):
                cell = compute(subject, ROWS[name], column, cells.get(column))
                if cell is None:
                    continue
                cells[column] = cell
                if given.json is not None:
                    given.json.write_text(json.dumps(kept, indent=1))
    print(f"| {given.model} | | dense | {' | '.join(COLUMNS)} |")
    print("|---|---|---|" + "---|" * len(COLUMNS))
    for name, cells in rows.items():
        if cells:
            print("\n".join(lines(name, cells)))


if __name__ == "__main__":
    main()
