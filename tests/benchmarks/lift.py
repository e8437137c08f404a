"""Latency of a Keras GRU as a SavedModel, as an ONNX Loop, and lifted to the operator GRU.

Usage: python tests/benchmarks/lift.py [--units 128] [--steps 100] [--features 64] [--batch 1]
                                       [--rounds 10] [--samples 30] [--seed 0]

A seeded Keras 3 layer is exported, converted to ONNX and lifted, and all three are checked to give
the same. Then every round opens them anew and times them in turns, in random order, in one process
with one thread each. Printed are medians, and ratios of medians with a 95 % bootstrap interval over
rounds and over the samples in them. Needs the extra ``tensorflow``.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ["KERAS_BACKEND"] = "tensorflow"

import numpy as np
import onnx
import onnxruntime as ort

from rnnprune_cli.lift import attempt
from rnnprune_cli.onnx_file import graphs, read_proto

GOALS = {"Loop in onnxruntime": 6.0, "SavedModel in TensorFlow": 15.0}
"""What is compared with the lifted model, and how many times faster that should be."""
LIFTED = "lifted in onnxruntime"
SHORTEST = 2e-3
"""Seconds; faster calls are timed several at once."""
RESAMPLES = 2000

Call = Callable[[], np.ndarray]


def export(folder: Path, given: argparse.Namespace) -> Path:
    """Writes the SavedModel."""
    import keras

    keras.utils.set_random_seed(given.seed)
    x = keras.Input((given.steps, given.features), name="x")
    model = keras.Model(x, keras.layers.GRU(given.units, name="gru")(x))
    model.export(str(folder / "saved_model"), verbose=False)
    return folder / "saved_model"


def convert(saved: Path, folder: Path) -> dict[str, Path]:
    """Writes the model with the Loop and the lifted one."""
    from rnnprune_cli.tensorflow_model import load, to_onnx

    paths = {"Loop in onnxruntime": folder / "loop.onnx", LIFTED: folder / "lifted.onnx"}
    looped, lifted = paths.values()
    onnx.save(to_onnx(load(saved)), str(looped))
    proto = read_proto(looped)
    made = attempt(proto, looped, looped.stat().st_size)
    ops = [[n.op_type for g in graphs(p) for n in g.node] for p in (proto, made.proto)]
    if "Loop" not in ops[0] or "Loop" in ops[1] or ops[1].count("GRU") != 1:
        sys.exit(f"nothing to compare: {ops[0]} became {ops[1]}, {made.declined}")
    onnx.save(made.proto, str(lifted))
    return paths


def open_saved_model(path: Path, x: np.ndarray) -> Call:
    """Loads the SavedModel."""
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))
    function, given = loaded.signatures["serving_default"], tf.constant(x)
    (name,) = function.structured_input_signature[1]

    def call() -> np.ndarray:
        (result,) = function(**{name: given}).values()
        return np.asarray(result.numpy())

    call.loaded = loaded  # type: ignore[attr-defined]  # its variables must live
    return call


def open_onnx(path: Path, x: np.ndarray) -> Call:
    """Opens a model in onnxruntime."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x}
    return lambda: np.asarray(session.run(None, feed)[0])


def seconds(call: Call, times: int) -> float:
    """Times some calls, and returns what one of them took."""
    begin = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - begin) / times


def measure(
    openers: dict[str, Callable[[], Call]], given: argparse.Namespace
) -> dict[str, np.ndarray]:
    """Returns milliseconds ``[rounds, samples]`` of everything."""
    rng = np.random.default_rng(given.seed)
    found = {name: np.zeros((given.rounds, given.samples)) for name in openers}
    for k in range(given.rounds):
        names = [str(name) for name in rng.permutation(list(openers))]
        calls = {name: openers[name]() for name in names}
        times = {}
        for name in names:
            seconds(calls[name], 5)
            times[name] = max(1, round(SHORTEST / seconds(calls[name], 3)))
        for j in range(given.samples):
            for name in rng.permutation(names):
                found[str(name)][k, j] = 1e3 * seconds(calls[str(name)], times[str(name)])
    return found


def interval(slow: np.ndarray, fast: np.ndarray, seed: int) -> tuple[float, float]:
    """Returns a 95 % interval of the ratio of medians."""
    rng = np.random.default_rng(seed)
    rounds, samples = slow.shape
    ratios = []
    for _ in range(RESAMPLES):
        rows = rng.integers(rounds, size=(rounds, 1))
        columns = rng.integers(samples, size=(rounds, samples))
        ratios.append(np.median(slow[rows, columns]) / np.median(fast[rows, columns]))
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    defaults = {"units": 128, "steps": 100, "features": 64, "batch": 1, "rounds": 10}
    for name, default in {**defaults, "samples": 30, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    shape = (given.batch, given.steps, given.features)
    x = np.random.default_rng(given.seed).standard_normal(shape, dtype=np.float32)
    with tempfile.TemporaryDirectory() as name:
        saved = export(Path(name), given)
        openers: dict[str, Callable[[], Call]] = {
            "SavedModel in TensorFlow": lambda: open_saved_model(saved, x)
        }
        for label, path in convert(saved, Path(name)).items():
            openers[label] = lambda path=path: open_onnx(path, x)  # type: ignore[misc]
        results = {label: opener()() for label, opener in openers.items()}
        worst = max(float(np.abs(r - results[LIFTED]).max()) for r in results.values())
        if not worst <= 1e-5:
            sys.exit(f"their outputs differ by {worst:.2g}")
        found = measure(openers, given)
    print(
        f"GRU({given.units}), {given.steps} steps of {given.features} features, batch"
        f" {given.batch}; outputs differ by at most {worst:.1g}"
    )
    for label, times in found.items():
        print(f"{label:26} {np.median(times):8.3f} ms")
    for label, goal in GOALS.items():
        ratio = np.median(found[label]) / np.median(found[LIFTED])
        low, high = interval(found[label], found[LIFTED], given.seed)
        said = "met" if low >= goal else "met, but not by all of the interval"
        said = said if ratio >= goal else "missed"
        print(f"lifted is {ratio:5.1f} x [{low:.1f}, {high:.1f}] {label}: {goal:.0f} x {said}")


if __name__ == "__main__":
    main()
