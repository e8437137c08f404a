"""Recurrent Keras layers converted by tf2onnx, mostly to `Loop`s, in the folder `keras_loops`.

`keras2_*` are made from tf_keras layers, `keras3_*` from Keras 3 layers. Weights are seeded;
expected outputs are those of the Keras model. Most graphs hold several layers side by side, each
with its own input `NAME_x` and output `NAME`. Layers have short names and names of tensors are
shortened, since they would be most of a file; nodes other than recurrent ones and loops lose
theirs. Which of several equal nodes is kept, and some names, differ from run to run.

Left out:

- `activation="gelu"`: tf2onnx has no `Erfc`.
- `TimeDistributed` over any number of steps, Keras 3: tf2onnx fails. Fixed here in both libraries.
- `time_major=True`, Keras 3: there is no such argument.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import tensorflow as tf
from common import HERE, LOOPS, RECURRENT, Arrays, Case, write_cases
from make_tf2onnx import BOTH, IN, LIBRARIES, OPSETS, H, N, Plan, T, make

FOLDER = HERE / "keras_loops"
ATOL = 1e-5
LENGTHS = (T, 4, 1)
WORDS = np.array([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 0, 0, 0], [8, 0, 0, 0, 0, 0, 0]])

SHORTER = {
    r"^\w+_while_cond_frozen_\d+_(.*)/while/": r"\1/first/",
    r"^cond___(.*)/while/": r"\1/again/",
    r"_graph_outputs_Identity": "",
    r"(gru|lstm|simple_rnn)_cell": "cell",
    r"ReadVariableOp/resource|readvariableop_resource": "value",
    r"/TensorList\w+": "",
}
"""What is long in names of tensors, and what to say instead."""

Layer = Callable[..., Any]
"""Makes a layer out of the layers of a library and further arguments of the layer."""
Branch = Callable[[Any, Any], Any]
"""Makes the outputs of a branch out of the layers of a library and the branch's input."""
Builder = Callable[[Any], Any]
"""Makes a model with a library."""

CELLS: dict[str, Layer] = {
    "lstm": lambda k, **more: k.LSTM(H, **more),
    "gru_after": lambda k, **more: k.GRU(H, reset_after=True, **more),
    "gru_before": lambda k, **more: k.GRU(H, reset_after=False, **more),
    "rnn": lambda k, **more: k.SimpleRNN(H, **more),
}


@dataclass(frozen=True)
class Named(Plan):
    """A plan with names for the outputs of the graph, by default made for both libraries."""

    libraries: tuple[str, ...] = BOTH
    outputs: tuple[str, ...] = ("y",)


def branches(parts: Mapping[str, Branch], steps: int | None = None) -> Builder:
    """Make a builder of a model with independent branches, each with its own input."""

    def build(lib: Any) -> Any:
        inputs, outputs = [], []
        for name, part in parts.items():
            inputs.append(lib.Input((steps, IN), name=f"{name}_x"))
            made = part(lib.layers, inputs[-1])
            outputs += made if isinstance(made, (list, tuple)) else [made]
        return lib.Model(inputs, outputs, name="m")

    return build


def chain(*layers: Layer) -> Branch:
    """Make a branch that is a stack of layers."""

    def part(k: Any, x: Any) -> Any:
        for layer in layers:
            x = layer(k)(x)
        return x

    return part


def draw(seed: int, *shape: int) -> np.ndarray:
    """Draw an array."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def sequences(names: Iterable[str], steps: int = T, masked: bool = False) -> Arrays:
    """Draw an input `[N, steps, IN]` for each branch, with zeros at the end if masked."""
    drawn = {f"{name}_x": draw(seed, N, steps, IN) for seed, name in enumerate(names, 11)}
    if masked:
        for array in drawn.values():
            for row, length in zip(array, LENGTHS, strict=True):
                row[length:] = 0
    return drawn


def plan(
    name: str, idiom: str, parts: Mapping[str, Branch], steps: int | None = None, **more: Any
) -> Named:
    """Plan a model with one output for each branch, unless outputs are named."""
    more = {"feeds": sequences(parts, steps or T), "outputs": tuple(parts)} | more
    return Named(name, idiom, branches(parts, steps), **more)


def four(layer: Layer, masked: bool = False, **options: Any) -> dict[str, Branch]:
    """Make branches with a plain and a bidirectional layer, last step and all steps."""

    def branch(way: str, what: str) -> Branch:
        def part(k: Any, x: Any) -> Any:
            name = way[0] + what[0]
            if masked:
                x = k.Masking(name=f"m{name}")(x)
            made = layer(k, return_sequences=what == "seq", name=name, **options)
            return (k.Bidirectional(made, name=name) if way == "bi" else made)(x)

        return part

    return {f"{way}_{what}": branch(way, what) for way in ("uni", "bi") for what in ("last", "seq")}


def table() -> Iterator[Named]:
    """Plan all cells with their usual activations and others, over a fixed and any length."""
    for cell, layer in CELLS.items():
        gates = "activation" if cell == "rnn" else "recurrent_activation"
        variants: dict[str, dict[str, str]] = {
            "default": {},
            "hard_sigmoid": {gates: "hard_sigmoid"},
            "relu": {"activation": "relu"},
        }
        for variant, options in variants.items():
            for length, steps in {"static": T, "dynamic": None}.items():
                yield plan(
                    f"{cell}_{variant}_{length}",
                    f"{cell}, {variant} activations, {length} length.",
                    four(layer, **options),
                    steps,
                )


def masked() -> Iterator[Named]:
    """Plan layers with a mask."""
    for cell, layer in CELLS.items():
        parts = four(layer, masked=True)
        yield plan(
            f"masked_{cell}",
            f"Masking before {cell}.",
            parts,
            feeds=sequences(parts, masked=True),
        )
    parts = {
        what: chain(
            lambda k: k.Masking(),
            lambda k, s=what == "seq": k.LSTM(H, go_backwards=True, return_sequences=s),
        )
        for what in ("last", "seq")
    }
    yield plan(
        "masked_go_backwards",
        "Masking before LSTM with `go_backwards=True`.",
        parts,
        feeds=sequences(parts, masked=True),
    )

    def words(lib: Any) -> Any:
        x = lib.Input((T,), dtype="int32", name="words")
        y = lib.layers.Embedding(11, IN, mask_zero=True)(x)
        y = lib.layers.LSTM(H, return_sequences=True)(y)
        return lib.Model(x, lib.layers.GRU(H)(y), name="m")

    yield Named("masked_words", "Embedding with `mask_zero`, LSTM, GRU.", words, {"words": WORDS})


def initial_state(lib: Any) -> Any:
    """States of a SimpleRNN and of a GRU are inputs."""
    k = lib.layers
    inputs, outputs = [], []
    for name, layer in {"rnn": k.SimpleRNN(H), "gru": k.GRU(H, reset_after=False)}.items():
        x, h = lib.Input((None, IN), name=f"{name}_x"), lib.Input((H,), name=f"{name}_h")
        inputs += [x, h]
        outputs.append(layer(x, initial_state=[h]))
    return lib.Model(inputs, outputs, name="m")


def streaming(lib: Any) -> Any:
    """The state of a GRU is an input and an output."""
    x, h = lib.Input((None, IN), name="x"), lib.Input((H,), name="h")
    layer = lib.layers.GRU(H, return_sequences=True, return_state=True)
    return lib.Model([x, h], layer(x, initial_state=[h]), name="m")


def initial_state_bidirectional(lib: Any) -> Any:
    """Inputs are the states of both directions of a GRU."""
    x = lib.Input((None, IN), name="x")
    states = [lib.Input((H,), name=name) for name in ("h", "g")]
    layer = lib.layers.Bidirectional(lib.layers.GRU(H, return_sequences=True))
    return lib.Model([x, *states], layer(x, initial_state=states), name="m")


def encoder_decoder(lib: Any) -> Any:
    """The state of one GRU starts another."""
    x, z = lib.Input((None, IN), name="x"), lib.Input((None, 4), name="z")
    _, h = lib.layers.GRU(H, reset_after=False, return_state=True)(x)
    layer = lib.layers.GRU(H, reset_after=False, return_sequences=True)
    return lib.Model([x, z], layer(z, initial_state=[h]), name="m")


def shared(lib: Any) -> Any:
    """One SimpleRNN over two inputs."""
    inputs = [lib.Input((None, IN), name=name) for name in ("x", "z")]
    layer = lib.layers.SimpleRNN(H)
    return lib.Model(inputs, [layer(x) for x in inputs], name="m")


def time_major(lib: Any) -> Any:
    """GRUs whose first axis is time."""
    inputs = [lib.Input(batch_shape=(None, None, IN), name=f"{w}_x") for w in ("last", "seq")]
    layers = [
        lib.layers.GRU(H, reset_after=False, time_major=True, return_sequences=sequence)
        for sequence in (False, True)
    ]
    return lib.Model(inputs, [f(x) for f, x in zip(layers, inputs, strict=True)], name="m")


def stateful(lib: Any) -> Any:
    """A GRU of fixed batch that keeps its state."""
    x = lib.Input(batch_shape=(N, T, IN), name="x")
    return lib.Model(x, lib.layers.GRU(H, reset_after=False, stateful=True)(x), name="m")


def embedded(lib: Any) -> Any:
    """Words, a SimpleRNN and a dense layer at each step."""
    x = lib.Input((T,), dtype="int32", name="words")
    y = lib.layers.SimpleRNN(H, return_sequences=True)(lib.layers.Embedding(11, IN)(x))
    return lib.Model(x, lib.layers.TimeDistributed(lib.layers.Dense(3))(y), name="m")


def nested(lib: Any) -> Any:
    """A SimpleRNN over each of four parts of a sequence and a GRU over their last steps."""
    x = lib.Input((4, T, IN), name="x")
    y = lib.layers.TimeDistributed(lib.layers.SimpleRNN(H))(x)
    return lib.Model(x, lib.layers.GRU(H, reset_after=False)(y), name="m")


def minimal_cell(k: Any) -> Any:
    """Make a cell with one gate."""

    class Minimal(k.Layer):
        """A minimal gated unit."""

        state_size = output_size = H

        def build(self, shape: Any) -> None:
            """Make the weights."""
            self.kernel = self.add_weight(shape=(IN, 2 * H), name="kernel")
            self.recurrent = self.add_weight(shape=(H, 2 * H), name="recurrent")
            self.built = True

        def call(self, x: Any, states: Any) -> Any:
            """Take a step."""
            h = states[0]
            gate, candidate = tf.split(tf.matmul(x, self.kernel), 2, axis=1)
            z = tf.sigmoid(gate + tf.matmul(h, self.recurrent[:, :H]))
            new = tf.tanh(candidate + tf.matmul(z * h, self.recurrent[:, H:]))
            y = z * h + (1 - z) * new
            return y, [y]

    return Minimal(name="cell")


def norm_cell(k: Any) -> Any:
    """Make an LSTM cell that normalises its gates."""

    class Normal(k.Layer):
        """An LSTM cell with a LayerNormalization."""

        state_size = (H, H)
        output_size = H

        def build(self, shape: Any) -> None:
            """Make the weights."""
            self.kernel = self.add_weight(shape=(IN, 4 * H), name="kernel")
            self.recurrent = self.add_weight(shape=(H, 4 * H), name="recurrent")
            self.norm = k.LayerNormalization(name="norm")
            self.norm.build((None, 4 * H))
            self.built = True

        def call(self, x: Any, states: Any) -> Any:
            """Take a step."""
            h, c = states
            gates = self.norm(tf.matmul(x, self.kernel) + tf.matmul(h, self.recurrent))
            i, f, o, new = tf.split(gates, 4, axis=1)
            c = tf.sigmoid(f) * c + tf.sigmoid(i) * tf.tanh(new)
            h = tf.sigmoid(o) * tf.tanh(c)
            return h, [h, c]

    return Normal(name="cell")


def over(layer: Layer, key: str, *values: Any, **options: Any) -> dict[str, Branch]:
    """Make branches that differ in one argument of a layer."""
    return {
        str(value): chain(lambda k, v=value: layer(k, **{key: v}, **options)) for value in values
    }


def options() -> Iterator[Named]:
    """Plan layers with arguments seldom given."""
    seq = {"return_sequences": True}
    parts = {
        f"{cell}_{what}": chain(
            lambda k, c=cell, w=what: CELLS[f"gru_{c}"](
                k, go_backwards=True, return_sequences=w == "seq"
            )
        )
        for cell in ("after", "before")
        for what in ("last", "seq")
    }
    yield plan("go_backwards", "GRUs with `go_backwards=True`.", parts)

    def both(k: Any, **more: Any) -> Any:
        return k.Bidirectional(k.GRU(H, reset_after=False, **seq), **more)

    yield plan("merge_modes", "Merge modes.", over(both, "merge_mode", "sum", "mul", "ave"))
    yield plan(
        "merge_none",
        "Bidirectional GRU, merge mode None.",
        {"none": chain(lambda k: both(k, merge_mode=None))},
        outputs=("forward", "backward"),
    )
    state = seq | {"return_state": True}
    yield plan(
        "return_state_gru",
        "GRU, steps and state.",
        {"gru": chain(lambda k: CELLS["gru_before"](k, **state))},
        outputs=("seq", "h"),
    )
    yield plan(
        "return_state_lstm",
        "LSTM with hard_sigmoid, steps and states.",
        {"lstm": chain(lambda k: k.LSTM(H, recurrent_activation="hard_sigmoid", **state))},
        outputs=("seq", "h", "c"),
    )
    yield plan(
        "return_state_bi",
        "Bidirectional GRU, steps and states.",
        {"bi": chain(lambda k: k.Bidirectional(CELLS["gru_before"](k, **state)))},
        outputs=("seq", "forward", "backward"),
    )
    hard = {"recurrent_activation": "hard_sigmoid"}
    parts = {
        cell: chain(
            lambda k, f=layer, c=cell: f(k, use_bias=False, **seq, **(hard if c == "lstm" else {}))
        )
        for cell, layer in CELLS.items()
    }
    yield plan("no_bias", "`use_bias=False`.", parts)
    parts = {
        f"{cell}_{what}": chain(
            lambda k, f=layer, w=what: f(k, unroll=True, return_sequences=w == "seq")
        )
        for cell, layer in CELLS.items()
        for what in ("last", "seq")
    }
    yield plan("unroll", "`unroll=True` over five steps.", parts, 5)
    kinds = ("elu", "softsign", "softplus", "sigmoid")
    parts = over(CELLS["lstm"], "activation", *kinds, **seq)
    parts |= over(CELLS["lstm"], "recurrent_activation", "tanh", **seq)
    yield plan("activations_lstm", "LSTM, other activations.", parts)
    parts = over(CELLS["gru_before"], "activation", *kinds, **seq)
    parts |= over(CELLS["gru_before"], "recurrent_activation", "tanh", **seq)
    yield plan("activations_gru", "GRU, other activations.", parts)
    parts = over(CELLS["rnn"], "activation", *kinds, "linear", "swish", **seq)
    yield plan("activations_rnn", "SimpleRNN, other activations.", parts)
    yield plan(
        "dropout",
        "GRU with dropout, not applied.",
        {"y": chain(lambda k: k.GRU(H, dropout=0.3, recurrent_dropout=0.2, **seq))},
    )


def models() -> Iterator[Named]:
    """Plan models of several layers, with other inputs or cells."""
    seq = {"return_sequences": True}
    x = {"x": draw(1, N, T, IN)}
    h = {"h": draw(2, N, H)}
    z = {"z": draw(3, N, 4, 4)}
    yield Named(
        "initial_state",
        "States are inputs.",
        initial_state,
        sequences(("rnn", "gru")) | {"rnn_h": draw(4, N, H), "gru_h": draw(5, N, H)},
        outputs=("rnn", "gru"),
    )
    yield Named(
        "initial_state_bi",
        "States of both directions of a GRU are inputs.",
        initial_state_bidirectional,
        x | h | {"g": draw(6, N, H)},
    )
    yield Named(
        "streaming", "State of a GRU is input and output.", streaming, x | h, outputs=("seq", "h1")
    )
    yield Named("encoder_decoder", "The state of a GRU starts another.", encoder_decoder, x | z)
    yield Named(
        "shared",
        "One SimpleRNN over two inputs.",
        shared,
        x | {"z": draw(7, N, 4, IN)},
        outputs=("of_x", "of_z"),
    )
    yield plan(
        "stack",
        "GRU, SimpleRNN, GRU.",
        {
            "y": chain(
                lambda k: k.GRU(H, **seq), lambda k: k.SimpleRNN(4, **seq), lambda k: k.GRU(H)
            )
        },
    )
    yield plan(
        "stack_bi",
        "Two bidirectional GRUs.",
        {
            "y": chain(
                lambda k: k.Bidirectional(k.GRU(H, reset_after=False, **seq)),
                lambda k: k.Bidirectional(k.GRU(4, reset_after=False, **seq)),
            )
        },
    )
    yield plan(
        "cell_stack",
        "RNN over a list of two GRU cells.",
        {"y": chain(lambda k: k.RNN([k.GRUCell(H), k.GRUCell(4)], **seq))},
    )
    yield plan(
        "conv",
        "Convolution, GRU.",
        {"y": chain(lambda k: k.Conv1D(4, 3, padding="same"), lambda k: k.GRU(H))},
    )
    yield plan(
        "time_distributed",
        "Dense layer at each step, SimpleRNN.",
        {"y": chain(lambda k: k.TimeDistributed(k.Dense(4)), lambda k: k.SimpleRNN(H, **seq))},
        T,
    )
    yield Named("embedded", "Embedding, SimpleRNN, dense layer.", embedded, {"words": WORDS})
    yield Named(
        "nested", "SimpleRNN over parts of a sequence.", nested, {"x": draw(8, N, 4, T, IN)}
    )
    yield Named("stateful", "`stateful=True`, fixed batch.", stateful, x)
    yield Named(
        "time_major",
        "`time_major=True`.",
        time_major,
        {"last_x": draw(9, T, N, IN), "seq_x": draw(10, T, N, IN)},
        libraries=("keras2",),
        outputs=("last", "seq"),
    )
    yield plan(
        "not_a_cell",
        "RNN over a minimal gated unit.",
        {"y": chain(lambda k: k.RNN(minimal_cell(k), **seq))},
    )
    yield plan(
        "norm_cell",
        "RNN over an LSTM cell with LayerNormalization.",
        {"y": chain(lambda k: k.RNN(norm_cell(k), **seq))},
    )


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph and the graphs nested in it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from graphs(attribute.g)


def rename(model: onnx.ModelProto, outputs: Mapping[str, str]) -> None:
    """Rename outputs and shorten other names; nodes that are not recurrent lose theirs."""
    names = {"": ""} | dict(outputs)

    def change(name: str) -> str:
        if name not in names:
            short = name
            for long, instead in SHORTER.items():
                short = re.sub(long, instead, short)
            while short in names.values():
                short += "_"
            names[name] = short
        return names[name]

    for graph in graphs(model.graph):
        for node in graph.node:
            if node.op_type not in RECURRENT + LOOPS:
                node.name = ""  # it repeats the name of an output
            node.input[:] = [change(name) for name in node.input]
            node.output[:] = [change(name) for name in node.output]
        for held in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
            held.name = change(held.name)
        graph.name = "g"


def finish(case: Case, names: tuple[str, ...]) -> Case:
    """Name the outputs of a graph and check with onnxruntime that they are as expected."""
    new = dict(zip(case.outputs, names, strict=True))
    rename(case.model, new)
    outputs = {new[name]: array for name, array in case.outputs.items()}
    session = onnxruntime.InferenceSession(case.model.SerializeToString())
    for name, got in zip(outputs, session.run(list(outputs), dict(case.feeds)), strict=True):
        np.testing.assert_allclose(got, outputs[name], rtol=0, atol=ATOL, err_msg=case.name)
    return replace(case, outputs=outputs)


def make_all() -> Iterator[Case]:
    """Carry out all plans with both versions of Keras."""
    for prefix in LIBRARIES:
        for one in (*table(), *masked(), *options(), *models()):
            if prefix in one.libraries:
                yield finish(make(prefix, one, OPSETS[-1]), one.outputs)


if __name__ == "__main__":
    write_cases(make_all(), "make_keras_loops.py", FOLDER)
