"""The trainer: TensorFlow computes what onnxruntime computes, and gradients are what they claim."""

from __future__ import annotations

import dataclasses
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import GRAPHS, SAMPLES, Graph, run, two_layers, weights
from onnx import helper, numpy_helper

from rnnprune_cli.calibrate import prepared
from rnnprune_cli.data import Dataset, load_dataset, made_up_feeds
from rnnprune_cli.errors import RnnpruneError
from rnnprune_cli.model import GATES
from rnnprune_cli.onnx_model import OnnxModel
from rnnprune_cli.trainer.call import tf
from rnnprune_cli.trainer.gradient import saliencies
from rnnprune_cli.trainer.graph import OPERATORS, GraphModule

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the package computes infinities on import
    from onnx.backend.test.case.node import collect_testcases

    ALL_CASES = collect_testcases("")

PLAIN_TYPES = {1, 2, 6, 7, 9, 11}  # float, uint8, int32, int64, bool, double
# Cases of supported operators that ask for more than the trainer does, and what it says.
REFUSED_CASES = {
    "test_batchnorm_epsilon_training_mode": "training_mode",
    "test_batchnorm_example_training_mode": "training_mode",
    "test_convtranspose_autopad_same": "unknown size",  # at fixed sizes it works, see below
    "test_convtranspose_kernel_shape": "unknown size",
    "test_convtranspose_output_shape": "unknown size",
    "test_dequantizelinear_blocked": "blocks",
    "test_maxpool_with_argmax_2d_precomputed_pads": "Indices",
    "test_maxpool_with_argmax_2d_precomputed_strides": "Indices",
    "test_reduce_max_bool_inputs": "bool",
    "test_reduce_max_empty_set_bool": "bool",
    "test_reduce_min_bool_inputs": "bool",
    "test_scan_sum": "opset 8",
    "test_scatter_elements_with_reduction_mul": "mul",
    "test_scatternd_multiply": "mul",
    "test_training_dropout": "training_mode",
    "test_training_dropout_default": "training_mode",
    "test_training_dropout_default_mask": "training_mode",
    "test_training_dropout_mask": "training_mode",
    "test_training_dropout_zero_ratio": "training_mode",
    "test_training_dropout_zero_ratio_mask": "training_mode",
}
# Its expected values are written down with five digits.
ROUNDED_CASES = {"test_averagepool_2d_ceil_last_window_starts_on_pad"}
# Models that onnxruntime runs and the trainer refuses, and the operator that it names.
REFUSED_MODELS = {
    "int8_channels_ts_lstm_directions": "com.microsoft.DynamicQuantizeLSTM",
    "int8_ts_lstm_packed": "com.microsoft.DynamicQuantizeLSTM",
    "int8_ts_lstm_streaming": "com.microsoft.DynamicQuantizeLSTM",
    "int8_ts_mixed_stack": "ConvInteger",
    "ts_script_list": "SequenceEmpty",
    "ts_script_unbound": "SequenceEmpty",
}


def node_cases() -> dict[str, list]:
    """Operator → its cases with inputs of plain types."""
    found = defaultdict(list)
    for case in ALL_CASES:
        ops = {node.op_type for node in case.model.graph.node}
        main = [op for op in ops if op in ("If", "Loop", "Scan")] or sorted(ops)
        values = [*case.model.graph.input, *case.model.graph.output]
        types = {v.type.tensor_type.elem_type for v in values}
        if (
            case.name.endswith("_expanded")
            or not ops <= OPERATORS.keys()
            or not types <= PLAIN_TYPES
        ):
            continue
        if len(case.model.graph.node) == 1 and {n.domain for n in case.model.graph.node} == {""}:
            found[main[0]].append(case)
    return dict(found)


CASES = node_cases()


def array(value: object) -> np.ndarray:
    """The array of a case's input or output, which may be a proto."""
    return (
        numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)
    )


def call(model: onnx.ModelProto | ir.Model, feed: dict, fixed: bool = False) -> list[np.ndarray]:
    """Traces a model, with sizes known or not, and runs it."""
    module = GraphModule(ir.from_proto(model) if isinstance(model, onnx.ModelProto) else model)
    specs = {
        k: tf.TensorSpec(v.shape if fixed else [None] * v.ndim, v.dtype) for k, v in feed.items()
    }
    traced = tf.function(module, input_signature=[specs], autograph=False)
    return [v.numpy() for v in traced({k: tf.constant(v) for k, v in feed.items()}).values()]


def assert_close(results, expected, relative: float = 1e-5) -> None:
    """Equal up to a share of the largest entry; NaN and infinities in the same places."""
    assert len(results) == len(expected)
    for result, wanted in zip(results, expected, strict=True):
        assert result.shape == wanted.shape
        if wanted.size == 0:
            continue
        largest = np.abs(wanted[np.isfinite(wanted)].astype(np.float64)).max(initial=0.0)
        np.testing.assert_allclose(
            result.astype(np.float64), wanted.astype(np.float64), rtol=0, atol=relative * largest
        )


# Operators


def test_every_operator_has_cases():
    assert CASES.keys() == OPERATORS.keys()
    assert sum(len(cases) for cases in CASES.values()) > 650


@pytest.mark.parametrize("op", sorted(CASES))
def test_operator_computes_what_its_cases_expect(op):
    refused = {}
    for case in CASES[op]:
        model = onnx.ModelProto()
        model.CopyFrom(case.model)
        inputs, outputs = ([array(v) for v in values] for values in case.data_sets[0])
        # The first input changes from call to call, in size too; the others are stored.
        for value, given in list(zip(model.graph.input, inputs, strict=True))[1:]:
            model.graph.initializer.append(numpy_helper.from_array(given, value.name))
        feed = {model.graph.input[0].name: inputs[0]} if inputs else {}
        del model.graph.input[1:]
        try:
            results = call(model, feed)
        except RnnpruneError as error:
            refused[case.name] = error.message
            continue
        digits = 1e-3 if case.name in ROUNDED_CASES else 1e-5
        for result, wanted in zip(results, outputs, strict=True):
            assert result.shape == wanted.shape, case.name
            np.testing.assert_allclose(result, wanted, rtol=digits, atol=1e-5, err_msg=case.name)
    names = {case.name for case in CASES[op]}
    assert refused.keys() == REFUSED_CASES.keys() & names
    for name, message in refused.items():
        assert REFUSED_CASES[name] in message
        assert op in message


@pytest.mark.parametrize("case", CASES["ConvTranspose"], ids=lambda c: c.name)
def test_transposed_convolution_at_fixed_sizes(case):
    inputs, outputs = ([array(v) for v in values] for values in case.data_sets[0])
    names = [v.name for v in case.model.graph.input]
    results = call(case.model, dict(zip(names, inputs, strict=True)), fixed=True)
    np.testing.assert_allclose(results[0], outputs[0], rtol=1e-5, atol=1e-5)


def test_semantics_of_earlier_opsets():
    # Attributes that became inputs, and softmax over all axes from the first on.
    x = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
    g = Graph(["a", 4, 5], opset=8)
    v = g.op("Slice", "x", starts=[1, 0], ends=[4, -1], axes=[1, 2])
    v = g.op("Pad", v, pads=[0, 0, 1, 0, 1, 0], value=0.5)
    v = g.op("Clip", v, min=-0.7, max=0.9)
    v = g.op("Unsqueeze", v, axes=[0])
    v = g.op("Squeeze", v, axes=[0])
    v = g.op("ReduceSum", v, axes=[1], keepdims=1)
    g.output(g.op("Softmax", v, axis=1))
    g.output(g.op("LogSoftmax", "x", axis=1))
    g.output(g.op("TopK", "x", k=2, outs=2))
    assert_close(call(g.model(), {"x": x}), run(g.model(), {"x": x}))


def test_row_is_added_to_a_product_with_a_transposed_matrix():
    # TensorFlow 2.21 fuses these into a kernel that refuses the row's shape.
    rng = np.random.default_rng(0)
    g = Graph([6, 3])
    b, row = (rng.standard_normal(s).astype(np.float32) for s in ((6, 4), (1, 4)))
    g.output(g.op("Add", g.op("MatMul", g.op("Transpose", "x", perm=[1, 0]), b), row))
    g.output(g.op("Gemm", "x", b, row, transA=1))
    x = rng.standard_normal((6, 3)).astype(np.float32)
    assert_close(call(g.model(), {"x": x}, fixed=True), run(g.model(), {"x": x}))


def test_unknown_operator_is_refused_by_name():
    g = Graph([1, 1, 4, 4])
    scales = np.array([1, 1, 2, 2], np.float32)
    g.output(g.op("Resize", "x", None, scales))
    with pytest.raises(RnnpruneError, match=r"Resize \('n0'\)") as caught:
        GraphModule(ir.from_proto(g.model()))
    assert caught.value.hint


# Recurrent operators

ACTIVATIONS = ("Relu", "Tanh", "Sigmoid", "LeakyRelu", "ThresholdedRelu", "ScaledTanh", "Affine")
ACTIVATIONS += ("HardSigmoid", "Elu", "Softsign", "Softplus")
STATES = {"LSTM": 2, "GRU": 1, "RNN": 1}
FUNCTIONS = {"LSTM": 3, "GRU": 2, "RNN": 1}


def variant(
    op: str,
    direction: str,
    *,
    bias: bool = True,
    lengths: bool = False,
    states: bool = False,
    peepholes: bool = False,
    seed: int = 0,
    **attributes: object,
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """One operator with everything that it can have, x [steps, batch, inputs], and a feed."""
    hidden, inputs, steps, batch = 5, 3, 7, 4
    directions = 2 if direction == "bidirectional" else 1
    rng = np.random.default_rng(seed)
    values = weights(op, hidden, inputs, directions, seed)
    g = Graph(["steps", "batch", inputs])
    given: list = ["x", values["W"], values["R"], values["B"] if bias else None]
    given.append(np.array([7, 2, 1, 5], np.int32) if lengths else None)
    for _ in range(STATES[op]):
        state = rng.standard_normal((directions, batch, hidden)).astype(np.float32)
        given.append(state if states else None)
    if peepholes:
        given.append(rng.standard_normal((directions, 3 * hidden)).astype(np.float32))
    outs = 1 + STATES[op]
    first = g.op(op, *given, outs=outs, hidden_size=hidden, direction=direction, **attributes)
    for k in range(outs):
        g.output(f"{first[:-1]}{k}")
    return g.model(), {"x": rng.standard_normal((steps, batch, inputs)).astype(np.float32)}


VARIANTS: list[tuple[str, dict]] = [
    *((op, {}) for op in GATES),
    *((op, {"bias": False}) for op in GATES),
    *((op, {"lengths": True}) for op in GATES),
    *((op, {"lengths": True, "states": True}) for op in GATES),
    *((op, {"states": True, "clip": 0.3}) for op in GATES),
    ("LSTM", {"peepholes": True, "states": True}),
    ("LSTM", {"input_forget": 1}),
    ("GRU", {"linear_before_reset": 1, "states": True, "clip": 0.5}),
    ("GRU", {"linear_before_reset": 1, "bias": False}),
]


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize(
    ("op", "what"), VARIANTS, ids=lambda v: v if isinstance(v, str) else "-".join(v)
)
def test_recurrent_variant(op, what, direction):
    model, feed = variant(op, direction, **what)
    assert_close(call(model, feed), run(model, feed))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("op", GATES)
@pytest.mark.parametrize("given", [False, True], ids=["defaults", "alpha-beta"])
def test_activation(op, name, given):
    # A state whose gates are not between 0 and 1 grows beyond all bounds.
    functions = ["Sigmoid", name, name] if op == "LSTM" else ["Sigmoid", name][-FUNCTIONS[op] :]
    parameters: dict[str, object] = {"activations": functions}
    count = functions.count(name)
    if given or name in ("ScaledTanh", "Affine"):  # which have no defaults
        one = name in ("LeakyRelu", "ThresholdedRelu", "Elu")
        two = name in ("ScaledTanh", "Affine", "HardSigmoid")
        if one or two:
            parameters["activation_alpha"] = [1.3, 1.2][:count]
        if two:
            parameters["activation_beta"] = [0.9, 0.8][:count]
    model, feed = variant(op, "forward", **parameters)
    assert_close(call(model, feed), run(model, feed))


def test_batch_first_layout():
    # onnxruntime has none; the same operator with time first, turned around, must agree.
    for op in GATES:
        model, feed = variant(op, "bidirectional", states=True)
        turned = onnx.ModelProto()
        turned.CopyFrom(model)
        node = turned.graph.node[0]
        node.attribute.append(helper.make_attribute("layout", 1))
        for tensor in turned.graph.initializer:
            if tensor.name in node.input[5:7]:
                state = numpy_helper.to_array(tensor).transpose(1, 0, 2)
                tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(state), tensor.name))
        y, *last = call(turned, {"x": feed["x"].transpose(1, 0, 2)})
        results = [y.transpose(1, 2, 0, 3), *(s.transpose(1, 0, 2) for s in last)]
        assert_close(results, run(model, feed))


def test_unknown_activation_is_refused_by_name():
    model, feed = variant("RNN", "forward")
    model.graph.node[0].attribute.append(helper.make_attribute("activations", ["Cosine"]))
    with pytest.raises(RnnpruneError, match=r"RNN 'n0' with activation 'Cosine'"):
        call(model, feed)


# Whole models


def models() -> list[Path]:
    return sorted([*GRAPHS.rglob("*.onnx"), *SAMPLES.glob("*.onnx")])


def feed_of(path: Path, model: OnnxModel) -> dict[str, np.ndarray]:
    stored = path.with_suffix(".npz")
    if stored.exists():
        data = np.load(stored)
        return {k.removeprefix("input:"): data[k] for k in data.files if k.startswith("input:")}
    return dict(made_up_feeds(model.open(), 0, longest=20)[0])


@pytest.mark.parametrize("path", models(), ids=lambda p: p.stem)
def test_model_agrees_with_onnxruntime_or_is_refused_by_name(path):
    model = OnnxModel(path)
    if path.stem in REFUSED_MODELS:
        with pytest.raises(RnnpruneError) as caught:
            GraphModule(prepared(model))
        assert f"operator {REFUSED_MODELS[path.stem]} (" in caught.value.message
        return
    feed = feed_of(path, model)
    expected = model.open().run(feed)
    half = any(layer.w.dtype == np.float16 for layer in model.layers) or "half" in path.stem
    results = GraphModule(prepared(model))(feed)
    # What is half precision in the file is single precision in the trainer.
    assert_close([r.numpy() for r in results.values()], expected, 1e-3 if half else 1e-5)


def test_refused_models_exist():
    assert REFUSED_MODELS.keys() <= {path.stem for path in models()}


TRACED = (
    "dyn_*",
    "hand_if*",
    "keras3_gru",
    "keras3_words",
    "ts_script_loop*",
    "scan*",
    "sp*",
    "la*",
)


@pytest.mark.parametrize(
    "path", [p for p in models() if any(p.match(t + ".onnx") for t in TRACED)], ids=lambda p: p.stem
)
def test_one_traced_function_takes_all_sizes(path):
    model = OnnxModel(path)
    runner = model.open()
    specs = {
        s.name: tf.TensorSpec([d if isinstance(d, int) else None for d in s.shape], s.dtype)
        for s in runner.inputs
    }
    traced = tf.function(GraphModule(prepared(model)), input_signature=[specs], autograph=False)
    half = any(layer.w.dtype == np.float16 for layer in model.layers)
    for feed in (feed_of(path, model), *made_up_feeds(runner, 0, longest=6)):
        results = traced({k: tf.constant(v) for k, v in feed.items()})
        ours = [results[spec.name].numpy() for spec in runner.outputs]
        assert_close(ours, runner.run(feed), 1e-3 if half else 1e-5)


# Gradients


def differentiated() -> dict[str, onnx.ModelProto]:
    """Small models that use what is easily differentiated wrongly."""
    found = {}
    for op, direction, what in (
        ("LSTM", "bidirectional", {"lengths": True, "states": True, "peepholes": True}),
        ("LSTM", "reverse", {"input_forget": 1, "clip": 0.6}),
        ("GRU", "bidirectional", {"linear_before_reset": 1, "lengths": True}),
        ("GRU", "forward", {"states": True}),
        ("RNN", "bidirectional", {"lengths": True, "activations": ["Softsign", "Elu"]}),
    ):
        found["-".join([op, direction, *what])] = variant(op, direction, **what)[0]
    rng = np.random.default_rng(3)

    def some(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    g = Graph(["steps", "batch", 3])  # attention over an LSTM's steps
    w = weights("LSTM", 4, 3, 1, 5)
    y = g.op("LSTM", "x", w["W"], w["R"], w["B"], hidden_size=4)
    y = g.op("Transpose", g.op("Squeeze", y, np.array([1])), perm=[1, 0, 2])
    y = g.op("LayerNormalization", y, some(4), some(4), axis=-1)
    scores = g.op("Softmax", g.op("MatMul", y, some(4, 1)), axis=1)
    mixed = g.op("ReduceSum", g.op("Mul", scores, y), np.array([1]), keepdims=0)
    g.output(g.op("Gemm", mixed, some(2, 4), some(2), transB=1))
    found["attention"] = g.model()
    g = Graph(["steps", "batch", 3])  # convolution, pooling, normalisation
    y = g.op("Transpose", "x", perm=[1, 2, 0])
    y = g.op("Conv", y, some(4, 3, 3), some(4), pads=[1, 1], kernel_shape=[3])
    y = g.op("BatchNormalization", y, some(4), some(4), some(4), np.abs(some(4)) + 0.5)
    y = g.op("MaxPool", g.op("Sigmoid", y), kernel_shape=[2], strides=[2])
    y = g.op("Conv", y, some(4, 1, 2), group=4, kernel_shape=[2])
    y = g.op("ConvTranspose", y, some(4, 2, 3), strides=[2], kernel_shape=[3])
    g.output(g.op("ReduceMean", y, axes=[2]))
    found["convolutions"] = g.model()
    return found


@pytest.mark.parametrize("name", differentiated())
def test_gradient_is_that_of_finite_differences(name):
    model = ir.from_proto(differentiated()[name])
    module = GraphModule(model, dtype=np.dtype(np.float64))
    feed = {"x": tf.constant(np.random.default_rng(1).standard_normal((7, 4, 3)))}
    rng = np.random.default_rng(2)

    @tf.function(autograph=False)
    def loss():
        return tf.add_n([tf.reduce_sum(tf.sin(v + 0.3)) for v in module(feed).values()])

    @tf.function(autograph=False)
    def gradients():
        with tf.GradientTape() as tape:
            value = loss()
        return tape.gradient(value, {v.ref(): v for v in module.trainable_variables})

    found = gradients()
    assert len(found) >= 3
    for reference, gradient in found.items():
        variable = reference.deref()
        before, direction = variable.numpy(), rng.standard_normal(variable.shape)
        values = []
        for step in (1e-5, -1e-5):
            variable.assign(before + step * direction)
            values.append(float(loss()))
        variable.assign(before)
        slope = (values[0] - values[1]) / 2e-5
        np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-5, atol=1e-7)


def test_statistics_of_batch_normalisation_are_not_trained():
    module = GraphModule(ir.from_proto(differentiated()["convolutions"]))
    fixed = {k for k, v in module.weights.items() if not v.trainable}
    node = next(n for n in differentiated()["convolutions"].graph.node if "Batch" in n.op_type)
    assert fixed == set(node.input[3:])
    assert len(module.trainable_variables) == len(module.weights) - 2


def test_weights_that_are_computed_can_be_replaced():
    path = GRAPHS / "hand_w_torch_chain.onnx"
    model = OnnxModel(path)
    (layer,) = model.layers
    doubled = tf.Variable(2 * layer.w.read())
    module = GraphModule(prepared(model), {(layer.name, 1): doubled})
    feed = feed_of(path, model)
    with tf.GradientTape() as tape:
        outputs = module(feed)
        loss = tf.add_n([tf.reduce_sum(v) for v in outputs.values()])
    masked = model.open_masked({layer.w.name: lambda: 2 * layer.w.read()})
    assert_close([r.numpy() for r in outputs.values()], masked.run(feed))
    gradient = tape.gradient(loss, doubled)
    assert gradient.shape == layer.w.shape
    assert np.abs(gradient).min() > 0


def test_node_that_is_named_like_a_layer_keeps_its_own_weight():
    model, feed = variant("GRU", "forward")
    node = helper.make_node("Mul", ["v0_1", "factor"], ["out"], name=model.graph.node[0].name)
    model.graph.node.append(node)
    model.graph.initializer.append(numpy_helper.from_array(np.full(5, 2, np.float32), "factor"))
    model.graph.output[1].name = "out"
    zeros = tf.zeros([1, 15, 3])
    module = GraphModule(ir.from_proto(model), {(node.name, 1): tf.Variable(zeros)})
    y, last = (v.numpy() for v in module(feed).values())
    np.testing.assert_array_equal(last, 2 * y[-1])


# The gradient of the loss on data

INPUTS, HIDDEN, CLASSES = 2, 3, 4


def classifier(
    tmp_path: Path,
    op: str = "LSTM",
    direction: str = "forward",
    by_step: bool = True,
    head: str | None = None,
    steps: int | str = "time",
    columns: int = CLASSES,
) -> OnnxModel:
    """x [batch, time, inputs] → y [batch, time, classes], or of the last step [batch, classes]."""
    directions = 2 if direction == "bidirectional" else 1
    rng = np.random.default_rng(4)
    g = Graph(["batch", steps, INPUTS])
    x = g.op("Transpose", "x", perm=[1, 0, 2])
    w = weights(op, HIDDEN, INPUTS, directions, 4)
    y = g.op(op, x, w["W"], w["R"], w["B"], hidden_size=HIDDEN, direction=direction)
    y = g.op("Transpose", y, perm=[2, 0, 1, 3])
    y = g.op("Reshape", y, np.array([0, 0, -1]))
    if not by_step:
        y = g.op("Gather", y, np.array(-1), axis=1)
    head_weights = 4 * rng.standard_normal((HIDDEN * directions, columns))
    y = g.op("MatMul", y, head_weights.astype(np.float32))
    y = (
        g.op(head, y, **({"axis": -1} if head == "Softmax" else {}))
        if head
        else g.op("Identity", y)
    )
    g.output(y)
    path = tmp_path / "model.onnx"
    path.write_bytes(g.model().SerializeToString())
    return OnnxModel(path)


def dataset(
    count: int = 40, steps: int = 6, lengths: bool = False, seed: int = 0, **targets: np.ndarray
) -> Dataset:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, steps, INPUTS)).astype(np.float32)
    own = np.where(np.arange(count) % 3 == 0, 4, steps) if lengths else None
    return Dataset(
        {"x": x},
        frozenset({"x"}),
        frozenset(),
        False,
        count,
        {"": targets["labels"]} if targets else {},
        own,
    )


def brute_force(model: OnnxModel, batches: list, loss) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean and mean square of finite differences of each batch's loss; batch: (feed, *targets)."""
    (layer,) = model.layers
    variables = {
        index: tf.Variable(weight.read().astype(np.float64))
        for index, weight in ((1, layer.w), (2, layer.r))
    }
    overrides = {(layer.name, index): variable for index, variable in variables.items()}
    module = GraphModule(prepared(model), overrides, np.dtype(np.float64))
    module = tf.function(module, autograph=False)
    found = {}
    for index, weight in ((1, layer.w), (2, layer.r)):
        start = variables[index].numpy()
        mean, square, total = np.zeros(weight.shape), np.zeros(weight.shape), 0
        for feed, *targets in batches:
            gradient = np.zeros(weight.shape)
            for place in np.ndindex(weight.shape):
                ends = []
                for step in (1e-5, -1e-5):
                    moved = start.copy()
                    moved[place] += step
                    variables[index].assign(moved)
                    (prediction,) = module(feed).values()
                    value, items = loss(prediction.numpy(), *targets)
                    ends.append(value)
                gradient[place] = (ends[0] - ends[1]) / 2e-5
            variables[index].assign(start)
            mean, square, total = (
                mean + items * gradient,
                square + items * gradient**2,
                total + items,
            )
        found[weight.name] = mean / total, square / total
    return found


def cross_entropy(prediction: np.ndarray, labels: np.ndarray, probabilities: bool = False):
    """Mean over labels that are not negative, and their number."""
    if not probabilities:
        prediction = np.exp(prediction)
    logs = np.log(prediction / prediction.sum(-1, keepdims=True))
    counts = labels >= 0
    picked = np.take_along_axis(logs, np.maximum(labels, 0)[..., None], -1)[..., 0]
    return -picked[counts].mean(), counts.sum()


def assert_gradients(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, (mean, square) in expected.items():
        assert found[name].mean.shape == mean.shape
        assert_close([found[name].mean, found[name].square], [mean, square], 1e-4)


def names(model: OnnxModel) -> list[str]:
    return [layer.name for layer in model.layers]


@pytest.mark.parametrize("op", GATES)
def test_saliencies_are_finite_differences_of_the_loss_of_each_batch(tmp_path, op):
    model = classifier(tmp_path, op, "bidirectional")
    labels = np.random.default_rng(1).integers(-1, CLASSES, (20, 6))
    data = dataset(20, labels=labels)
    x = data.inputs["x"]
    batches = [({"x": x[k : k + 16]}, labels[k : k + 16]) for k in (0, 16)]
    found = saliencies(model, data, names(model))
    assert_gradients(found, brute_force(model, batches, cross_entropy))


def test_saliencies_of_probabilities(tmp_path):
    model = classifier(tmp_path, head="Softmax", by_step=False)
    labels = np.random.default_rng(1).integers(0, CLASSES, 8)
    data = dataset(8, labels=labels)
    expected = brute_force(
        model, [(dict(data.inputs), labels)], lambda p, t: cross_entropy(p, t, probabilities=True)
    )
    assert_gradients(saliencies(model, data, names(model)), expected)


def test_number_of_classes_that_the_graph_does_not_tell(tmp_path):
    model = classifier(tmp_path, by_step=False)
    labels = np.random.default_rng(1).integers(0, CLASSES, 8)
    proto = onnx.load(str(model.path))
    last = proto.graph.node[-1]
    last.op_type = "Reshape"
    last.input.append("sizes")
    proto.graph.node.insert(
        len(proto.graph.node) - 1, helper.make_node("Shape", last.input[:1], ["sizes"])
    )
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "classes"
    path = tmp_path / "reshaped.onnx"
    path.write_bytes(proto.SerializeToString())
    for data in (dataset(8, labels=labels), dataset(8)):
        one, two = (saliencies(m, data, names(m)) for m in (model, OnnxModel(path)))
        assert one.keys() == two.keys()
        for name in one:
            assert_close([two[name].square], [one[name].square])


@pytest.mark.parametrize("head", [None, "Sigmoid"])
def test_saliencies_of_two_classes_in_one_column(tmp_path, head):
    model = classifier(tmp_path, head=head, by_step=False, columns=1)
    labels = np.random.default_rng(1).integers(0, 2, 8)
    data = dataset(8, labels=labels)

    def loss(prediction, labels):
        own = prediction[:, 0] if head else 1 / (1 + np.exp(-prediction[:, 0]))
        return cross_entropy(np.stack([1 - own, own], -1), labels, probabilities=True)

    expected = brute_force(model, [(dict(data.inputs), labels)], loss)
    assert_gradients(saliencies(model, data, names(model)), expected)


def test_saliencies_of_a_regression(tmp_path):
    model = classifier(tmp_path, by_step=False)
    target = np.random.default_rng(1).standard_normal((8, CLASSES)).astype(np.float32)
    data = dataset(8, labels=target)
    expected = brute_force(
        model, [(dict(data.inputs), target)], lambda p, t: (((p - t) ** 2).mean(), len(p))
    )
    assert_gradients(saliencies(model, data, names(model)), expected)


@pytest.mark.parametrize("real", [False, True], ids=["classes", "values"])
@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "drawn"])
def test_padded_steps_change_nothing(tmp_path, real, labelled):
    model = classifier(tmp_path, direction="reverse")
    rng = np.random.default_rng(1)
    labels = rng.standard_normal((20, 6, CLASSES)) if real else rng.integers(0, CLASSES, (20, 6))
    data = dataset(20, lengths=True, **({"labels": labels} if labelled else {}))
    short = data.lengths == 4
    x, other = data.inputs["x"].copy(), labels.copy()
    x[short, 4:] = 9
    other[short, 4:] = 1
    changed = dataclasses.replace(data, inputs={"x": x}, targets={"": other} if labelled else {})
    found, again = (saliencies(model, d, names(model)) for d in (data, changed))
    for name, gradients in found.items():
        np.testing.assert_array_equal(gradients.square, again[name].square)
        assert gradients.square.max() > 0
    if labelled and not real:  # and they count nowhere
        batches = [({"x": data.inputs["x"][short, :4]}, labels[short, :4])]
        batches.append(({"x": data.inputs["x"][~short]}, labels[~short]))
        assert_gradients(found, brute_force(model, batches, cross_entropy))


def test_padded_steps_are_left_out_of_the_loss_of_a_model_that_insists_on_them(tmp_path):
    model = classifier(tmp_path, steps=6)
    labels = np.random.default_rng(1).integers(0, CLASSES, (12, 6))
    data = dataset(12, lengths=True, labels=labels)
    masked = np.where(np.arange(6) < data.lengths[:, None], labels, -1)
    short = data.lengths == 4
    x = data.inputs["x"]
    batches = [({"x": x[short]}, masked[short]), ({"x": x[~short]}, masked[~short])]
    assert_gradients(
        saliencies(model, data, names(model)), brute_force(model, batches, cross_entropy)
    )


@pytest.mark.parametrize("head", ["Softmax", None], ids=["classes", "values"])
def test_without_labels_the_squares_are_the_fisher_information(tmp_path, head):
    model = classifier(tmp_path, head=head, by_step=False)
    (layer,) = model.layers
    one = dataset(1).inputs["x"]
    count = 600
    data = dataclasses.replace(
        dataset(1), inputs={"x": np.repeat(one, count, 0)}, count=count, single=True
    )
    found = saliencies(model, data, names(model))
    # Of classes Σ p (∂ log p)²; of a Gaussian of unit variance Σ (∂ y)².
    variable = tf.Variable(layer.w.read())
    module = GraphModule(prepared(model), {(layer.name, 1): variable})
    with tf.GradientTape() as tape:
        (y,) = module({"x": one}).values()
        value = tf.math.log(y[0]) if head else y[0]
    jacobian = tape.jacobian(value, variable).numpy()
    share = y.numpy()[0] if head else np.ones(CLASSES)
    expected = np.einsum("c,cdij->dij", share, jacobian**2)
    assert_close([found[layer.w.name].square], [expected], 0.15)
    again = saliencies(model, data, names(model))
    np.testing.assert_array_equal(found[layer.w.name].square, again[layer.w.name].square)
    other = saliencies(model, data, names(model), seed=1)
    assert (found[layer.w.name].square != other[layer.w.name].square).any()


def test_layers_that_share_a_weight_and_several_targets_add_up(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(two_layers(share_r=True).SerializeToString())
    model = OnnxModel(path)
    shared = model.layers[0].r
    assert shared is model.layers[1].r
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 3, 7)).astype(np.float32)
    targets = {name: rng.standard_normal((5, 1, 3, 12)) for name in ("y", "y2")}
    # [steps, batch, …]: the arrays are one feed as they are.
    data = Dataset({"x": x}, frozenset(), frozenset(), False, 5, targets, None)
    data = dataclasses.replace(data, single=False, per_sample=frozenset(), count=5)
    variable = tf.Variable(shared.read())
    module = GraphModule(prepared(model), {(layer.name, 2): variable for layer in model.layers})
    with tf.GradientTape() as tape:
        outputs = module({"x": x})
        loss = tf.add_n([tf.reduce_mean((outputs[k] - t) ** 2) for k, t in targets.items()])
    found = saliencies(model, data, [model.layers[0].name])
    assert found.keys() == {weight.name for weight in model.layers[0].weights}
    assert_close([found[shared.name].mean], [tape.gradient(loss, variable).numpy()])


def test_states_are_handed_from_one_sample_to_the_next(tmp_path):
    # A step at a time from zero states, R would never matter.
    w = weights("GRU", HIDDEN, INPUTS, 1, 4)
    g = Graph([1, 1, INPUTS])
    g.inputs.append(helper.make_tensor_value_info("h", 1, [1, 1, HIDDEN]))
    y = g.op("GRU", "x", w["W"], w["R"], w["B"], None, "h", outs=2, hidden_size=HIDDEN)
    g.output(y)
    g.output(y[:-1] + "1")
    path = tmp_path / "model.onnx"
    path.write_bytes(g.model().SerializeToString())
    model = OnnxModel(path)
    (layer,) = model.layers
    x = np.random.default_rng(0).standard_normal((9, 1, 1, INPUTS)).astype(np.float32)
    inputs = {"x": x, "h": np.zeros((1, 1, HIDDEN), np.float32)}
    data = Dataset(inputs, frozenset({"x"}), frozenset({"x"}), True, 9, {}, None)
    assert saliencies(model, data, [layer.name])[layer.r.name].square.max() == 0
    found = saliencies(model, data, [layer.name], states={"h": model.open().outputs[1].name})
    assert found[layer.r.name].square.min() > 0


@pytest.mark.parametrize("name", ["speech", "timeseries", "language"])
@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "drawn"])
def test_sample_models(name, labelled):
    model = OnnxModel(SAMPLES / f"{name}.onnx")
    data = load_dataset(SAMPLES / f"{name}.calibration.npz", model.open().inputs)
    chosen = slice(0, 48)
    data = dataclasses.replace(
        data,
        inputs={k: v[chosen] for k, v in data.inputs.items()},
        count=48,
        targets={k: v[chosen] for k, v in data.targets.items()} if labelled else {},
        lengths=None if data.lengths is None else data.lengths[chosen],
    )
    said: list[str] = []
    found = saliencies(model, data, names(model), progress=said.append)
    assert any("48 samples" in text for text in said)
    for weight in model.layers[0].weights:
        assert found[weight.name].mean.shape == weight.shape
        assert np.isfinite(found[weight.name].square).all()
        assert (found[weight.name].square > 0).mean() > 0.9


def test_labels_that_do_not_fit_are_refused(tmp_path):
    model = classifier(tmp_path)
    with pytest.raises(RnnpruneError, match="do not fit an output"):
        saliencies(model, dataset(8, labels=np.zeros((8, 5), int)), names(model))
    with pytest.raises(RnnpruneError, match="no labelled step"):
        saliencies(model, dataset(8, labels=np.full((8, 6), -1)), names(model))
