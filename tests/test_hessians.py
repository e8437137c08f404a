"""What rows read, held against a simulation of the cells that shares no code with it."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from cells import layer_model, second_moment, sigmoid, trace
from conftest import GRAPHS, Graph, run, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from rnnprune_cli import hessians
from rnnprune_cli.data import Dataset, load_dataset
from rnnprune_cli.hessians import LayerInputs, layer_inputs
from rnnprune_cli.model import GATES
from rnnprune_cli.onnx_model import OnnxModel

INPUTS, HIDDEN, STEPS, BATCH = 3, 4, 6, 7
TOLERANCE = 1e-5
"""States are those of onnxruntime, in float32."""
VARIANTS = [
    (op, direction, bias, reset)
    for op, direction, bias in itertools.product(
        GATES, ("forward", "reverse", "bidirectional"), (True, False)
    )
    for reset in ((0, 1) if op == "GRU" else (0,))
]


def sequences(seed: int = 0, batch: int = BATCH) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((batch, STEPS, INPUTS)) + 0.3).astype(np.float32)


def tensors_of(op: str, direction: str, bias: bool, seed: int = 1) -> dict[str, np.ndarray]:
    made = weights(op, HIDDEN, INPUTS, 2 if direction == "bidirectional" else 1, seed)
    made = {name: 2 * values for name, values in made.items()}  # gates that are far from 1 / 2
    if not bias:
        del made["B"]
    return made


def watched(
    model: onnx.ModelProto | Path, folder: Path, arrays: dict[str, np.ndarray]
) -> dict[str, LayerInputs]:
    """What all layers of a model read on an .npz of these arrays."""
    if isinstance(model, onnx.ModelProto):
        path = folder / "model.onnx"
        path.write_bytes(model.SerializeToString())
    else:
        path = model
    loaded = OnnxModel(path)
    np.savez(folder / "data.npz", **arrays)
    data: Dataset = load_dataset(folder / "data.npz", loaded.open().inputs)
    return layer_inputs(loaded, loaded.layers, data, folder, 1, lambda step: None)


def only(found: dict[str, LayerInputs]) -> LayerInputs:
    (inputs,) = found.values()
    assert inputs.problem is None
    return inputs


def mean_square(moments, direction: int) -> np.ndarray:
    sums = sum(moments.sums(held)[0] for held in (False, True))
    return sums[direction] / moments.count


def assert_reads(inputs: LayerInputs, traces, reset: int, op: str) -> None:
    for d, one in enumerate(traces):
        assert inputs.moments.count == len(one.x)
        wanted = second_moment(one.read)
        np.testing.assert_allclose(mean_square(inputs.of_gate(0), d), wanted, atol=TOLERANCE)
        if op == "GRU":
            gate = one.reset.mean(axis=1, keepdims=True) if reset else one.reset
            wanted = second_moment(np.concatenate([one.x, gate * one.h], axis=1))
            np.testing.assert_allclose(mean_square(inputs.of_gate(2), d), wanted, atol=TOLERANCE)


@pytest.mark.parametrize(("op", "direction", "bias", "reset"), VARIANTS)
def test_rows_read_what_a_simulation_of_the_cell_reads(op, direction, bias, reset, tmp_path):
    tensors = tensors_of(op, direction, bias)
    x = sequences()
    found = watched(layer_model(op, direction, tensors, reset), tmp_path, {"x": x})
    traces = trace(op, tensors, x.transpose(1, 0, 2), direction, reset)
    assert_reads(only(found), traces, reset, op)


@pytest.mark.parametrize("op", sorted(GATES))
@pytest.mark.parametrize("layout", [0, 1])
def test_given_states_and_both_layouts_are_read_as_they_are(op, layout, tmp_path):
    tensors = tensors_of(op, "bidirectional", True)
    x = sequences()
    rng = np.random.default_rng(3)
    extra = ((5, "start_h"), (6, "start_c"))[: 2 if op == "LSTM" else 1]
    states = {name: rng.standard_normal((BATCH, 2, HIDDEN)).astype(np.float32) for _, name in extra}
    model = layer_model(op, "bidirectional", tensors, extra=extra, layout=layout)
    found = watched(model, tmp_path, {"x": x, **states})
    given = {f"{name[-1]}0": values.transpose(1, 0, 2) for name, values in states.items()}
    traces = trace(op, tensors, x.transpose(1, 0, 2), "bidirectional", **given)
    assert_reads(only(found), traces, 0, op)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("op", sorted(GATES))
@pytest.mark.parametrize("told", ["name", "other name"])
def test_steps_beyond_sequence_lens_are_not_read(op, direction, told, tmp_path):
    """Whether the data set knows the input for lengths (by its name) or not."""
    tensors = tensors_of(op, direction, True)
    lengths = np.array([6, 1, 3, 4, 3, 2, 5], np.int32)
    name = {"name": "lengths", "other name": "n"}[told]
    model = layer_model(op, direction, tensors, extra=((4, name), (5, "h0")))
    h0 = np.random.default_rng(3).standard_normal((BATCH, len(tensors["W"]), HIDDEN))
    h0 = h0.astype(np.float32)
    x = sequences()
    traces = trace(op, tensors, x.transpose(1, 0, 2), direction, 0, lengths, h0.swapaxes(0, 1))
    found = watched(model, tmp_path, {"x": x, name: lengths, "h0": h0})
    assert_reads(only(found), traces, 0, op)


@pytest.mark.parametrize("op", sorted(GATES))
def test_sequence_lens_made_by_the_graph_end_sequences(op, tmp_path):
    """No input tells them: only the operator's own lengths do."""
    tensors = tensors_of(op, "bidirectional", True)
    lengths = np.array([6, 1, 3, 4, 3, 2, 5], np.int32)
    x = sequences()
    x *= np.arange(STEPS)[None, :, None] < lengths[:, None, None]
    g = Graph(["batch", "time", INPUTS])
    used = g.op("ReduceMax", g.op("Abs", "x"), axes=[2], keepdims=0)
    used = g.op("Cast", g.op("Greater", used, np.float32(0)), to=TensorProto.INT32)
    lens = g.op("ReduceSum", used, np.array([1]), keepdims=0)
    turned = g.op("Transpose", "x", perm=[1, 0, 2])
    values = [tensors[k] for k in "WRB"]
    g.inputs.append(helper.make_tensor_value_info("h0", 1, ["batch", 2, HIDDEN]))
    start = g.op("Transpose", "h0", perm=[1, 0, 2])
    g.output(g.op(op, turned, *values, lens, start, hidden_size=HIDDEN, direction="bidirectional"))
    h0 = np.random.default_rng(3).standard_normal((BATCH, 2, HIDDEN)).astype(np.float32)
    found = watched(g.model(), tmp_path, {"x": x, "h0": h0})
    h0 = h0.swapaxes(0, 1)
    traces = trace(op, tensors, x.transpose(1, 0, 2), "bidirectional", 0, lengths, h0)
    assert_reads(only(found), traces, 0, op)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, STEPS), min_size=BATCH, max_size=BATCH), junk=st.floats(-9, 9)
)
@pytest.mark.parametrize("op", ["LSTM", "GRU"])
def test_what_padding_holds_changes_nothing(op, tmp_path_factory, lengths, junk):
    tensors = tensors_of(op, "bidirectional", True)
    model, x = layer_model(op, "bidirectional", tensors), sequences()
    padding = np.arange(STEPS)[None, :, None] >= np.array(lengths)[:, None, None]
    found = []
    for values in (x, np.where(padding, np.float32(junk), x)):
        folder = tmp_path_factory.mktemp("padding")
        found.append(only(watched(model, folder, {"x": values, "lengths": np.array(lengths)})))
    one, two = found
    for gate in range(GATES[op]):
        for held in (False, True):
            (a, m), (b, n) = (each.of_gate(gate).sums(held) for each in (one, two))
            assert m == n and np.array_equal(a, b)
    traces = trace(op, tensors, x.transpose(1, 0, 2), "bidirectional", lengths=np.array(lengths))
    assert_reads(one, traces, 0, op)


def streaming_model(op: str, tensors: dict[str, np.ndarray]) -> onnx.ModelProto:
    """A frame at a time: x [1, 1, inputs] and states in, y and states out."""
    g = Graph([1, 1, INPUTS])
    names = ["h", "c"][: 2 if op == "LSTM" else 1]
    for name in names:
        g.inputs.append(helper.make_tensor_value_info(name, 1, [1, 1, HIDDEN]))
    y = g.op(op, "x", *(tensors[k] for k in "WRB"), "", *names, outs=3, hidden_size=HIDDEN)
    g.nodes[-1].output[:] = [y, "h_out", "c_out"][: 1 + len(names)]
    for output in g.nodes[-1].output:
        g.output(output)
    return g.model()


@pytest.mark.parametrize("op", sorted(GATES))
def test_states_that_callers_hand_back_are_those_of_the_sample_before(op, tmp_path):
    tensors = tensors_of(op, "forward", True)
    frames = sequences(batch=5).reshape(-1, 1, 1, INPUTS)
    zeros = {
        name: np.zeros((1, 1, HIDDEN), np.float32) for name in "hc"[: 2 if op == "LSTM" else 1]
    }
    found = watched(streaming_model(op, tensors), tmp_path, {"x": frames, **zeros})
    traces = trace(op, tensors, frames[:, 0])
    assert_reads(only(found), traces, 0, op)


def test_states_that_are_given_are_not_replaced(tmp_path):
    tensors = tensors_of("GRU", "forward", True)
    frames = sequences(batch=5).reshape(-1, 1, 1, INPUTS)
    h = np.random.default_rng(0).standard_normal((len(frames), 1, 1, HIDDEN)).astype(np.float32)
    found = watched(streaming_model("GRU", tensors), tmp_path, {"x": frames, "h": h})
    traces = trace("GRU", tensors, frames.reshape(1, -1, INPUTS), h0=h.reshape(1, -1, HIDDEN))
    assert_reads(only(found), traces, 0, "GRU")


@pytest.mark.parametrize("reset", [0, 1])
@pytest.mark.parametrize(
    ("attributes", "function"),
    [
        ({"clip": 0.5}, lambda a: sigmoid(np.clip(a, -0.5, 0.5))),
        ({"activations": ["HardSigmoid", "Tanh"]}, lambda a: np.clip(0.2 * a + 0.5, 0, 1)),
        ({"activations": ["Relu", "Tanh"]}, lambda a: np.maximum(a, 0)),
        ({"activations": ["sigmoid", "tanh"]}, sigmoid),
    ],
    ids=["clip", "hard", "relu", "lower case"],
)
def test_reset_gates_are_those_of_the_operator(reset, attributes, function, tmp_path):
    tensors = {k: v / 2 for k, v in tensors_of("GRU", "forward", True).items()}
    model = layer_model("GRU", "forward", tensors, reset, **attributes)
    x = sequences()
    inputs = only(watched(model, tmp_path, {"x": x}))
    (y,) = run(model, {"x": x})
    before = np.concatenate([np.zeros_like(y[:1]), y[:-1]])[:, 0].astype(np.float64)
    w, r, b = (tensors[k][0].astype(np.float64) for k in "WRB")
    gate = slice(HIDDEN, 2 * HIDDEN)
    total = x.transpose(1, 0, 2) @ w[gate].T + before @ r[gate].T
    through = function(total + b[gate] + b[4 * HIDDEN : 5 * HIDDEN])
    through = through.mean(axis=2, keepdims=True) if reset else through
    read = np.concatenate([x.transpose(1, 0, 2), through * before], axis=2)
    wanted = second_moment(read.reshape(-1, INPUTS + HIDDEN))
    np.testing.assert_allclose(mean_square(inputs.of_gate(2), 0), wanted, atol=TOLERANCE)


def test_reset_gates_of_unknown_functions_are_a_problem(tmp_path):
    model = layer_model(
        "GRU", "forward", tensors_of("GRU", "forward", True), activations=["Softsign", "Tanh"]
    )
    (inputs,) = watched(model, tmp_path, {"x": sequences()}).values()
    assert inputs.problem == "its reset gate has an activation of its own"


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_precisions_are_read_in_float64(dtype, tmp_path):
    tensors = {k: v.astype(dtype) for k, v in tensors_of("GRU", "reverse", True).items()}
    model = layer_model("GRU", "reverse", tensors, dtype=dtype)
    x = sequences().astype(dtype)
    inputs = only(watched(model, tmp_path, {"x": x}))
    (one,) = trace("GRU", tensors, x.transpose(1, 0, 2), "reverse")
    tolerance = 5e-3 if dtype == np.float16 else TOLERANCE
    np.testing.assert_allclose(
        mean_square(inputs.of_gate(0), 0), second_moment(one.read), atol=tolerance
    )


@pytest.mark.parametrize("kind", ["Constant", "Concat"])
def test_a_bias_may_be_a_constant_or_made_of_constants(kind, tmp_path):
    tensors = tensors_of("GRU", "forward", True)
    model = layer_model("GRU", "forward", tensors)
    parts = [tensors["B"]] if kind == "Constant" else np.split(tensors["B"], 2, axis=1)
    for k, part in enumerate(parts):
        value = numpy_helper.from_array(part)
        model.graph.node.insert(k, helper.make_node("Constant", [], [f"b{k}"], value=value))
    if kind == "Concat":
        model.graph.node.insert(2, helper.make_node("Concat", ["b0", "b1"], ["b"], axis=1))
    node = next(n for n in model.graph.node if n.op_type == "GRU")
    node.input[3] = {"Constant": "b0", "Concat": "b"}[kind]
    x = sequences()
    traces = trace("GRU", tensors, x.transpose(1, 0, 2))
    assert_reads(only(watched(model, tmp_path, {"x": x})), traces, 0, "GRU")


def test_one_direction_of_a_layer_is_its_part(tmp_path):
    tensors = tensors_of("GRU", "bidirectional", True)
    both = only(watched(layer_model("GRU", "bidirectional", tensors), tmp_path, {"x": sequences()}))
    for d in (0, 1):
        for gate in (0, 2):
            one = both.of_direction(d).of_gate(gate)
            assert one.count == both.of_gate(gate).count
            assert np.array_equal(mean_square(one, 0), mean_square(both.of_gate(gate), d))


def test_layers_that_read_too_much_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(hessians, "MAX_FEATURES", INPUTS + HIDDEN - 1)
    model = layer_model("LSTM", "forward", tensors_of("LSTM", "forward", True))
    (inputs,) = watched(model, tmp_path, {"x": sequences()}).values()
    assert inputs.problem == "it reads more than 6 values at once"


# Where layers are


def branching() -> tuple[onnx.ModelProto, dict[str, dict[str, np.ndarray]]]:
    """Two LSTMs, one in each branch of an If on the sign of the sum of x."""
    g = Graph(["time", 1, INPUTS])
    positive = g.op("Greater", g.op("ReduceSum", "x", keepdims=0), np.float32(0))
    branches, made = [], {}
    for k, name in enumerate(("then", "else")):
        made[name] = tensors_of("LSTM", "forward", True, seed=k)
        own = [numpy_helper.from_array(v, f"{name}{n}") for n, v in made[name].items()]
        node = helper.make_node(
            "LSTM", ["x", *(t.name for t in own)], [f"{name}_y"], name=name, hidden_size=HIDDEN
        )
        info = helper.make_tensor_value_info(f"{name}_y", 1, ["time", 1, 1, HIDDEN])
        branches.append(helper.make_graph([node], name, [], [info], own))
    g.output(g.op("If", positive, then_branch=branches[0], else_branch=branches[1]))
    return g.model(), made


def test_a_branch_that_no_sample_takes_is_never_reached(tmp_path):
    model, made = branching()
    x = np.abs(sequences())[:, :, None]
    found = watched(model, tmp_path, {"x": x})
    assert found["else"].problem == "the data never reach it"
    assert found["then"].problem is None
    x[:2] *= -1
    found = watched(model, tmp_path, {"x": x})
    for name, part in (("else", x[:2]), ("then", x[2:])):
        traces = trace("LSTM", made[name], part[:, :, 0].transpose(1, 0, 2))
        assert_reads(found[name], traces, 0, "LSTM")


@pytest.mark.parametrize("name", ["hand_loop_step", "hand_scan_step"])
def test_layers_in_loops_are_named(name, tmp_path):
    stored = np.load(GRAPHS / f"{name}.npz")
    given = {k.removeprefix("input:"): stored[k][None] for k in stored if k.startswith("input:")}
    (inputs,) = watched(GRAPHS / f"{name}.onnx", tmp_path, given).values()
    assert inputs.problem == "it is in a loop, where it cannot be watched"


def test_both_calls_of_a_function_are_read(tmp_path):
    """One layer of the model, two operators once its functions are inlined."""
    tensors = tensors_of("GRU", "forward", True)
    model = layer_model("GRU", "forward", tensors)
    names = [t.name for t in model.graph.initializer]
    function = helper.make_function(
        "tests", "net", ["x", *names], ["y"], [*model.graph.node], model.opset_import
    )
    function.node[-1].output[0] = "y"
    del model.graph.node[:]
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("tests", 1))
    double = helper.make_node("Add", ["x", "x"], ["x2"])
    calls = [
        helper.make_node("net", [given, *names], [made], domain="tests", name=made)
        for given, made in (("x", "one"), ("x2", "two"))
    ]
    model.graph.node.extend([calls[0], double, calls[1]])
    del model.graph.output[:]
    shape = ["time", 1, "batch", HIDDEN]
    model.graph.output.extend(helper.make_tensor_value_info(n, 1, shape) for n in ("one", "two"))
    x = sequences()
    inputs = only(watched(model, tmp_path, {"x": x}))
    parts = [trace("GRU", tensors, k * x.transpose(1, 0, 2))[0] for k in (1, 2)]
    wanted = second_moment(np.concatenate([part.read for part in parts]))
    assert inputs.moments.count == 2 * BATCH * STEPS
    np.testing.assert_allclose(mean_square(inputs.of_gate(0), 0), wanted, atol=TOLERANCE)
