"""Training throughput of recurrent operators, held against the same layers of tf_keras.

    python tests/benchmarks/training.py

Forward, gradient and Adam on batches of 32 sequences of 100 steps, 64 inputs, 128 units. Steps of
both are interleaved in one process; the ratio is that of medians, above 1 where rnnprune is faster.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import tensorflow as tf
import tf_keras
from onnx import TensorProto, helper, numpy_helper

from rnnprune_cli.model import GATES
from rnnprune_cli.onnx_model import OnnxModel
from rnnprune_cli.trainer.trainee import Trainee

BATCH, STEPS, INPUTS, HIDDEN = 32, 100, 64, 128
ROUNDS = 40
LAYERS = {
    "LSTM": tf_keras.layers.LSTM,
    "GRU": tf_keras.layers.GRU,
    "RNN": tf_keras.layers.SimpleRNN,
}


def operator(op: str, folder: Path) -> OnnxModel:
    """Writes a model of one operator."""
    generator = np.random.default_rng(0)
    rows = GATES[op] * HIDDEN  # type: ignore[index]
    shapes = {"W": (1, rows, INPUTS), "R": (1, rows, HIDDEN), "B": (1, 2 * rows)}
    weights = [
        numpy_helper.from_array((0.1 * generator.standard_normal(s)).astype(np.float32), n)
        for n, s in shapes.items()
    ]
    more = {"linear_before_reset": 1} if op == "GRU" else {}
    node = helper.make_node(
        op, ["x", "W", "R", "B"], ["y"], name="layer", hidden_size=HIDDEN, **more
    )
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [STEPS, BATCH, INPUTS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [STEPS, 1, BATCH, HIDDEN])],
        weights,
    )
    path = folder / f"{op}.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)
    return OnnxModel(path)


def main() -> None:
    """Measures and prints all operators."""
    x = np.random.default_rng(1).standard_normal((BATCH, STEPS, INPUTS)).astype(np.float32)
    turned = tf.constant(x.transpose(1, 0, 2))
    x = tf.constant(x)
    for op, layer in LAYERS.items():
        with tempfile.TemporaryDirectory() as folder:
            trainee = Trainee(operator(op, Path(folder)), {})
        keras = layer(HIDDEN, return_sequences=True)
        keras.build((None, None, INPUTS))
        ways = {
            "rnnprune": (
                lambda module=trainee.module: module({"x": turned})["y"],
                list(trainee.variables.values()),
            ),
            "tf_keras": (lambda layer=keras: layer(x), keras.trainable_variables),
        }
        steps = {}
        for name, (forward, variables) in ways.items():
            adam = tf_keras.optimizers.Adam(jit_compile=False)
            adam.build(variables)

            def step(forward=forward, variables=variables, adam=adam):
                with tf.GradientTape() as tape:
                    loss = tf.reduce_mean(tf.square(forward()))
                adam.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
                return loss

            steps[name] = tf.function(step)
            for _ in range(3):
                steps[name]().numpy()
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(ROUNDS):
            for name, call in steps.items():
                begin = time.perf_counter()
                call().numpy()
                times[name].append(time.perf_counter() - begin)
        one, two = (1e3 * float(np.median(times[name])) for name in ("rnnprune", "tf_keras"))
        print(
            f"{op:5} rnnprune {one:6.1f} ms   tf_keras {two:6.1f} ms   throughput {two / one:.2f}"
        )


if __name__ == "__main__":
    main()
