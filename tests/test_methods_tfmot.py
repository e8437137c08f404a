"""Magnitude at scope ``layer`` chooses what the TensorFlow Model Optimization toolkit does."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rnnprune_cli.gate_order import keras_to_onnx
from rnnprune_cli.model import GATES, RecurrentLayer, Stage, Weight
from rnnprune_cli.weights import WeightTask, prune_weights

if importlib.util.find_spec("tensorflow_model_optimization") is None:
    pytest.skip("TensorFlow is an optional dependency", allow_module_level=True)

INPUTS, HIDDEN = 10, 16
SPARSITIES = (0.1, 0.5, 0.7, 0.83, 0.95)
BLOCKS = ((1, 1), (4, 2), (8, 1))
"""Rows and columns in ONNX's layout; none is cut off, which the toolkit counts otherwise."""
CASES = [
    *((op, share, (1, 1), False) for op in GATES for share in SPARSITIES),
    *((op, 0.6, block, False) for op in GATES for block in BLOCKS[1:]),
    *((op, 0.7, (1, 1), True) for op in GATES),
]
"""Operator, sparsity, block, and whether the toolkit trains a whole model."""

TOOLKIT = """
import json, sys
import numpy as np
import tensorflow_model_optimization as tfmot  # wants Keras 2, and says so to TensorFlow
import tensorflow as tf
import tf_keras as keras
from tensorflow_model_optimization.python.core.sparsity.keras import pruning_impl

cases, folder, inputs, hidden = json.loads(sys.argv[1])
layers = {"LSTM": keras.layers.LSTM, "GRU": keras.layers.GRU, "RNN": keras.layers.SimpleRNN}
gates = {"LSTM": 4, "GRU": 3, "RNN": 1}
sparsity = tfmot.sparsity.keras


def trained(op, share):
    keras.utils.set_random_seed(0)
    plan = sparsity.PolynomialDecay(0.2, share, begin_step=0, end_step=2, frequency=1)
    wrapper = sparsity.prune_low_magnitude(layers[op](hidden), plan)
    model = keras.Sequential([keras.Input((None, inputs)), wrapper])
    before = [weight.numpy() for weight, _, _ in wrapper.pruning_vars]
    model.compile(keras.optimizers.SGD(0.0), "mse")  # only the masks change
    x = np.zeros((6, 3, inputs), np.float32)
    model.fit(x, np.zeros((6, hidden)), batch_size=2, verbose=0,
              callbacks=[sparsity.UpdatePruningStep()])
    return before, [mask.numpy() for _, mask, _ in wrapper.pruning_vars]


def applied(op, share, block, seed):
    generator = np.random.default_rng(seed)
    shapes = ((inputs, gates[op] * hidden), (hidden, gates[op] * hidden))
    before = [generator.standard_normal(s).astype(np.float32) for s in shapes]
    kept = [(tf.Variable(v), tf.Variable(tf.ones(v.shape)), tf.Variable(0.0)) for v in before]
    plan = sparsity.ConstantSparsity(share, begin_step=0, frequency=1)
    step = tf.constant(1, tf.int64)
    pruning = pruning_impl.Pruning(lambda: step, kept, plan, block[::-1], "AVG")
    tf.function(pruning.conditional_mask_update)()
    return before, [mask.numpy() for _, mask, _ in kept]


for number, (op, share, block, trains) in enumerate(cases):
    before, masks = trained(op, share) if trains else applied(op, share, block, number)
    np.savez(f"{folder}/{number}.npz", **dict(zip("wrmn", [*before, *masks])))
"""


@pytest.fixture(scope="module")
def toolkit(tmp_path_factory) -> Path:
    """What tfmot does, in a process of its own: it turns TensorFlow's Keras into Keras 2."""
    folder = tmp_path_factory.mktemp("tfmot")
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    arguments = json.dumps([CASES, str(folder), INPUTS, HIDDEN])
    done = subprocess.run(
        [sys.executable, "-c", TOOLKIT, arguments],
        env={**os.environ, **quiet},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def pruned(op: str, w: np.ndarray, r: np.ndarray, stage: Stage) -> list[np.ndarray]:
    """The masks of W and R."""

    def weight(name: str, values: np.ndarray) -> Weight:
        return Weight(name, values.shape, values.dtype, lambda: values, GATES[op])

    layer = RecurrentLayer("a", op, "forward", INPUTS, HIDDEN, weight("W", w), weight("R", r))
    result = prune_weights(WeightTask([layer], [layer], stage, 0, lambda step: None))
    return [result.pruned[name].mask for name in ("W", "R")]


@pytest.mark.parametrize(
    ("number", "case"), list(enumerate(CASES)), ids=[str(case) for case in CASES]
)
def test_masks_are_those_of_the_toolkit(number, case, toolkit):
    op, share, (rows, columns), _ = case
    with np.load(toolkit / f"{number}.npz") as arrays:
        w, r, wanted_w, wanted_r = (keras_to_onnx(op, arrays[name]) for name in "wrmn")
    granularity = "weight" if rows == columns == 1 else f"block:{rows}x{columns}"
    masks = pruned(op, w, r, Stage("magnitude", granularity, "layer", share))
    for mask, wanted in zip(masks, (wanted_w, wanted_r), strict=True):
        assert 0 < (~mask).sum() < mask.size
        assert np.array_equal(mask, wanted != 0)
