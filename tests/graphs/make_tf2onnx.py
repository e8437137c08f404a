"""Graphs converted by tf2onnx: `keras2_*` from tf_keras layers, `keras3_*` from Keras 3 layers.

Weights are seeded; expected outputs are those of the Keras model. The names of some tensors and
which of several equal nodes is kept differ from run to run.
"""

from __future__ import annotations

import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
import tf2onnx
import tf_keras
from common import Arrays, Case, strip_notes, write_cases

T, N, IN, H = 7, 3, 5, 6
LIBRARIES: dict[str, Any] = {"keras2": tf_keras, "keras3": keras}
OPSETS = (13, 18)
BOTH = tuple(LIBRARIES)


@dataclass(frozen=True)
class Plan:
    """A model, the opsets to convert it to and the Keras versions to make it with."""

    name: str
    idiom: str
    build: Callable[[Any], Any]
    feeds: Arrays
    opsets: tuple[int, ...] = (18,)
    libraries: tuple[str, ...] = ("keras3",)


def sequence() -> np.ndarray:
    """Draw an input `[N, T, IN]`."""
    return np.random.default_rng(1).standard_normal((N, T, IN)).astype(np.float32)


def padded() -> np.ndarray:
    """Draw an input whose last steps are zero, a different number in each sequence."""
    x = sequence()
    x[1, 5:] = 0
    x[2, 2:] = 0
    return x


def stack(*layers: Callable[[Any], Any], steps: int | None = None) -> Callable[[Any], Any]:
    """Make a builder of a model with one input, a stack of layers and a dense layer."""

    def build(lib: Any) -> Any:
        x = y = lib.Input((steps, IN), name="x")
        for layer in layers:
            y = layer(lib.layers)(y)
        return lib.Model(x, lib.layers.Dense(2, name="out")(y))

    return build


def streaming(lib: Any) -> Any:
    """States are inputs and outputs."""
    x = lib.Input((None, IN), name="x")
    h, c = lib.Input((H,), name="h"), lib.Input((H,), name="c")
    layer = lib.layers.LSTM(H, return_sequences=True, return_state=True)
    y, h1, c1 = layer(x, initial_state=[h, c])
    return lib.Model([x, h, c], [lib.layers.Dense(2)(y), h1, c1])


def encoder_decoder(lib: Any) -> Any:
    """The states of one LSTM start another."""
    x, z = lib.Input((None, IN), name="x"), lib.Input((None, 4), name="z")
    _, h, c = lib.layers.LSTM(H, return_state=True)(x)
    y = lib.layers.LSTM(H, return_sequences=True)(z, initial_state=[h, c])
    return lib.Model([x, z], lib.layers.Dense(2)(y))


def residual(lib: Any) -> Any:
    """The outputs of two layers are added and normalised."""
    x = lib.Input((None, IN), name="x")
    first = lib.layers.LSTM(H, return_sequences=True)(x)
    second = lib.layers.LSTM(H, return_sequences=True)(first)
    y = lib.layers.LayerNormalization()(lib.layers.Add()([first, second]))
    return lib.Model(x, lib.layers.Dense(2)(lib.layers.GlobalAveragePooling1D()(y)))


def words(lib: Any) -> Any:
    """Integer words, an embedding that masks zeros, an LSTM."""
    x = lib.Input((T,), dtype="int32", name="words")
    y = lib.layers.Embedding(11, IN, mask_zero=True)(x)
    return lib.Model(x, lib.layers.Dense(2)(lib.layers.LSTM(H)(y)))


def plans() -> Iterator[Plan]:
    """Plans: both versions of Keras where they are converted differently or often met."""
    x = {"x": sequence()}
    yield Plan(
        "lstm",
        "LSTM, all steps.",
        stack(lambda k: k.LSTM(H, return_sequences=True)),
        x,
        OPSETS,
        libraries=BOTH,
    )
    yield Plan("lstm_last", "LSTM, last step.", stack(lambda k: k.LSTM(H)), x, libraries=BOTH)
    yield Plan(
        "lstm_fixed_steps",
        "LSTM, fixed number of steps, no bias.",
        stack(lambda k: k.LSTM(H, use_bias=False), steps=T),
        x,
    )
    yield Plan(
        "lstm_stack",
        "LSTM, dense layer with relu, dropout, LSTM.",
        stack(
            lambda k: k.LSTM(8, return_sequences=True),
            lambda k: k.Dense(4, activation="relu"),
            lambda k: k.Dropout(0.5),
            lambda k: k.LSTM(H, return_sequences=True),
        ),
        x,
    )
    yield Plan(
        "gru",
        "GRU, `reset_after=True`.",
        stack(lambda k: k.GRU(H, return_sequences=True)),
        x,
        OPSETS,
        libraries=BOTH,
    )
    yield Plan(
        "gru_reset_before",
        "GRU, `reset_after=False`.",
        stack(lambda k: k.GRU(H, reset_after=False)),
        x,
        libraries=BOTH,
    )
    yield Plan(
        "simple_rnn",
        "SimpleRNN.",
        stack(lambda k: k.SimpleRNN(H, return_sequences=True)),
        x,
        libraries=BOTH,
    )
    yield Plan(
        "bi_lstm",
        "Bidirectional LSTM, directions joined.",
        stack(lambda k: k.Bidirectional(k.LSTM(H, return_sequences=True))),
        x,
        libraries=BOTH,
    )
    yield Plan(
        "bi_lstm_sum",
        "Bidirectional LSTM, directions added, last step.",
        stack(lambda k: k.Bidirectional(k.LSTM(H), merge_mode="sum")),
        x,
    )
    yield Plan(
        "bi_gru",
        "Bidirectional GRU.",
        stack(lambda k: k.Bidirectional(k.GRU(H))),
        x,
        libraries=BOTH,
    )
    yield Plan(
        "masked_lstm",
        "Masking before an LSTM.",
        stack(lambda k: k.Masking(), lambda k: k.LSTM(H)),
        {"x": padded()},
        libraries=BOTH,
    )
    yield Plan(
        "words",
        "Embedding with `mask_zero`, LSTM.",
        words,
        {"words": np.array([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 0, 0, 0], [8, 0, 0, 0, 0, 0, 0]])},
    )
    yield Plan(
        "hard_sigmoid_lstm",
        "LSTM with hard_sigmoid gates.",
        stack(lambda k: k.LSTM(H, recurrent_activation="hard_sigmoid")),
        x,
        libraries=BOTH,
    )
    yield Plan(
        "relu_lstm",
        "LSTM with relu.",
        stack(lambda k: k.LSTM(H, activation="relu", return_sequences=True)),
        x,
    )
    yield Plan(
        "backwards_lstm", "`go_backwards=True`.", stack(lambda k: k.LSTM(H, go_backwards=True)), x
    )
    yield Plan(
        "unrolled_gru",
        "`unroll=True` over three steps: dense operators.",
        stack(lambda k: k.GRU(H, unroll=True), steps=3),
        {"x": sequence()[:, :3]},
    )
    yield Plan(
        "cell_stack",
        "RNN over a list of two LSTM cells.",
        stack(lambda k: k.RNN([k.LSTMCell(H), k.LSTMCell(8)])),
        x,
    )
    rng = np.random.default_rng(2)
    states = {name: rng.standard_normal((N, H)).astype(np.float32) for name in ("h", "c")}
    yield Plan("streaming", "States are inputs and outputs.", streaming, x | states, libraries=BOTH)
    z = rng.standard_normal((N, 4, 4)).astype(np.float32)
    yield Plan("encoder_decoder", "States start another LSTM.", encoder_decoder, x | {"z": z})
    yield Plan("residual", "Outputs of two layers added, LayerNormalization.", residual, x)


def draw_weights(model: Any) -> None:
    """Give a model seeded weights."""
    rng = np.random.default_rng(7)
    drawn = []
    for old in model.get_weights():
        fan = old.shape[0] if old.ndim > 1 else 9
        drawn.append((rng.standard_normal(old.shape) * 1.2 / fan**0.5).astype(np.float32))
    model.set_weights(drawn)


def make(prefix: str, plan: Plan, opset: int) -> Case:
    """Build a model, run it and convert it."""
    lib = LIBRARIES[prefix]
    lib.backend.clear_session()
    model = plan.build(lib)
    draw_weights(model)
    feeds = {
        i.name: plan.feeds[i.name].astype(i.dtype if isinstance(i.dtype, str) else i.dtype.name)
        for i in model.inputs
    }
    signature = [tf.TensorSpec(i.shape, feeds[i.name].dtype, name=i.name) for i in model.inputs]
    converted, _ = tf2onnx.convert.from_keras(model, signature, opset=opset)
    strip_notes(converted)
    results = model(list(feeds.values()) if len(feeds) > 1 else next(iter(feeds.values())))
    results = results if isinstance(results, (list, tuple)) else [results]
    names = [o.name for o in converted.graph.output]
    return Case(
        name=f"{prefix}_{plan.name}" + ("" if opset == OPSETS[-1] else f"_opset{opset}"),
        model=converted,
        feeds=feeds,
        outputs={n: np.asarray(r) for n, r in zip(names, results, strict=True)},
        exporter=f"tf2onnx {tf2onnx.__version__}, {lib.__name__} {lib.__version__}, "
        f"tensorflow {tf.__version__}",
        idiom=plan.idiom,
    )


def make_all() -> Iterator[Case]:
    """Carry out all plans with both versions of Keras."""
    for prefix in LIBRARIES:
        for plan in plans():
            if prefix not in plan.libraries:
                continue
            for opset in plan.opsets:
                yield make(prefix, plan, opset)


if __name__ == "__main__":
    write_cases(make_all(), "make_tf2onnx.py")
