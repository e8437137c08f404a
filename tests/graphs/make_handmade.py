"""Graphs written by hand with onnx alone: idioms that exporters or rewriters may leave.

The docstring of each function says what its graph is there for. Expected outputs come from
onnx's reference evaluator with the recurrent operators of `reference.py`. Where that evaluator
cannot run the graph (sparse tensors, Loop without a condition, function attributes, an empty
output and an empty input), they come from a plain graph that must be equal.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from common import Arrays, Case, write_cases
from onnx import helper, inliner, numpy_helper, parser
from onnx.reference import ReferenceEvaluator
from reference import GRU, LSTM, RNN

Array = np.ndarray
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
T, N, IN, H = 7, 3, 5, 6
X = "float[T,N,5] X"
Y = "float[T,1,N,6] Y"
LAST = "float[1,N,6] Y_h"
PLAIN = f"({X}) => ({Y}) {{ Y = LSTM<hidden_size=6>(X, W, R, B) }}"


class Draw:
    """Seeded random tensors."""

    def __init__(self, seed: int) -> None:
        """Start from a seed."""
        self.rng = np.random.default_rng(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Array:
        """Normal values in float32."""
        return (scale * self.rng.standard_normal(shape)).astype(np.float32)

    def weights(
        self,
        op: str = "LSTM",
        inputs: int = IN,
        hidden: int = H,
        *,
        dirs: int = 1,
        names: str = "WRB",
        suffix: str = "",
    ) -> dict[str, Array]:
        """The chosen ones of W, R and B."""
        rows = GATES[op] * hidden
        every = {
            "W": self.normal(dirs, rows, inputs, scale=0.6),
            "R": self.normal(dirs, rows, hidden, scale=0.9 / hidden**0.5),
            "B": self.normal(dirs, 2 * rows, scale=0.3),
        }
        return {name + suffix: every[name] for name in names}

    def x(self, *shape: int) -> Array:
        """An input sequence, `[T, N, IN]` unless said otherwise."""
        return self.normal(*(shape or (T, N, IN)))


def build(
    text: str,
    tensors: Arrays | None = None,
    *,
    opset: int = 18,
    ir: int = 10,
    functions: str = "",
    name: str = "main",
) -> onnx.ModelProto:
    """Parse a graph and give it initializers; `graph::W` is put in a subgraph of that name.

    In a function, which has no initializers, the tensor becomes a Constant node.
    """
    local = ', "local": 1' if functions else ""
    header = f'<ir_version: {ir}, opset_import: ["": {opset}{local}]>'
    model = parser.parse_model(f"{header}\n{name} {text}\n{functions}")
    for key, array in (tensors or {}).items():
        place, _, tensor = key.rpartition("::")
        value = numpy_helper.from_array(array, tensor)
        function = next((f for f in model.functions if f.name == place), None)
        if function is None:
            find_graph(model.graph, place or name).initializer.append(value)
        else:
            function.node.insert(0, helper.make_node("Constant", [], [tensor], value=value))
    return model


def find_graph(graph: onnx.GraphProto, name: str) -> onnx.GraphProto:
    """Find the graph or nested graph of a name."""
    graphs = [graph]
    while graphs:
        current = graphs.pop()
        if current.name == name:
            return current
        attributes = [a for node in current.node for a in node.attribute]
        graphs += [a.g for a in attributes if a.type == onnx.AttributeProto.GRAPH]
    raise KeyError(name)


def function(text: str, opset: int = 18) -> str:
    """The text of a model-local function."""
    return f'<opset_import: ["": {opset}, "local": 1], domain: "local"> {text}'


Made = tuple[onnx.ModelProto, Arrays] | tuple[onnx.ModelProto, Arrays, dict[str, Any]]
Maker = Callable[[Draw], Made]


# How W, R and B arrive


def w_constant_nodes(draw: Draw) -> Made:
    """W, R and B are Constant nodes."""
    model = build(PLAIN)
    for name, array in draw.weights().items():
        value = numpy_helper.from_array(array, name)
        model.graph.node.insert(0, helper.make_node("Constant", [], [name], value=value))
    return model, {"X": draw.x()}


def w_torch_chain(draw: Draw) -> Made:
    """Weights in PyTorch's layout and gate order (i, f, g, o), put in order at run time."""
    text = f"""({X}) => ({Y}) {{
        wi = Slice(w_ih, c0, c6, axis0)
        wfg = Slice(w_ih, c6, c18, axis0)
        wo = Slice(w_ih, c18, c24, axis0)
        ri, rfg, ro = Split(w_hh, parts)
        wf, wg = Split(wfg, halves)
        rf, rg = Split(rfg, halves)
        w2 = Concat<axis=0>(wi, wo, wf, wg)
        r2 = Concat<axis=0>(ri, ro, rf, rg)
        W = Unsqueeze(w2, axis0)
        R = Unsqueeze(r2, axis0)
        bi, bfg, bo = Split(b_ih, parts)
        zeros = ConstantOfShape(c24)
        b1 = Concat<axis=0>(bi, bo, bfg, zeros)
        B = Unsqueeze(b1, axis0)
        Y = LSTM<hidden_size=6>(X, W, R, B)
    }}"""
    numbers = {f"c{i}": np.array([i]) for i in (0, 6, 18, 24)}
    tensors = {
        "w_ih": draw.normal(4 * H, IN, scale=0.6),
        "w_hh": draw.normal(4 * H, H, scale=0.4),
        "b_ih": draw.normal(4 * H, scale=0.3),
        "axis0": np.array([0]),
        "parts": np.array([H, 2 * H, H]),
        "halves": np.array([H, H]),
    }
    return build(text, numbers | tensors), {"X": draw.x()}


def w_keras_kernel(draw: Draw) -> Made:
    """Weights as `[inputs, 4H]` kernels, turned by Transpose and Reshape."""
    text = f"""({X}) => ({Y}) {{
        kernel_t = Transpose<perm=[1, 0]>(kernel)
        W = Reshape(kernel_t, w_shape)
        recurrent_t = Transpose<perm=[1, 0]>(recurrent)
        R = Unsqueeze(recurrent_t, axis0)
        B = Reshape(bias, b_shape)
        Y = LSTM<hidden_size=6>(X, W, R, B)
    }}"""
    tensors = {
        "kernel": draw.normal(IN, 4 * H, scale=0.6),
        "recurrent": draw.normal(H, 4 * H, scale=0.4),
        "bias": draw.normal(2, 4 * H, scale=0.3),
        "w_shape": np.array([1, 4 * H, -1]),
        "b_shape": np.array([1, -1]),
        "axis0": np.array([0]),
    }
    return build(text, tensors), {"X": draw.x()}


def w_cast_identity(draw: Draw) -> Made:
    """W and R stored in float16 behind Cast, B behind two Identity nodes."""
    text = f"""({X}) => ({Y}) {{
        W = Cast<to=1>(W_half)
        R_full = Cast<to=1>(R_half)
        R = Identity(R_full)
        B_one = Identity(B_zero)
        B = Identity(B_one)
        Y = LSTM<hidden_size=6>(X, W, R, B)
    }}"""
    w = draw.weights()
    tensors = {
        "W_half": w["W"].astype(np.float16),
        "R_half": w["R"].astype(np.float16),
        "B_zero": w["B"],
    }
    return build(text, tensors), {"X": draw.x()}


def w_dequantize(draw: Draw) -> Made:
    """W (per row) and R (per tensor) stored in int8 behind DequantizeLinear."""
    text = f"""({X}) => ({Y}) {{
        W = DequantizeLinear<axis=1>(W_q, W_scale, W_zero)
        R = DequantizeLinear(R_q, R_scale)
        Y = LSTM<hidden_size=6>(X, W, R, B)
    }}"""
    w = draw.weights()
    w_scale = np.abs(w["W"]).max(axis=(0, 2)) / 127
    r_scale = np.abs(w["R"]).max() / 127
    tensors = {
        "W_q": np.round(w["W"] / w_scale[:, None]).astype(np.int8),
        "W_scale": w_scale,
        "W_zero": np.zeros(4 * H, np.int8),
        "R_q": np.round(w["R"] / r_scale).astype(np.int8),
        "R_scale": np.float32(r_scale),
        "B": w["B"],
    }
    arrays = {k: np.asarray(v) for k, v in tensors.items()}
    return build(text, arrays, opset=19), {"X": draw.x()}


def w_stacked_layers(draw: Draw) -> Made:
    """One tensor holds the weights of two layers, taken apart by Gather and Split."""
    text = f"""(float[T,N,6] X) => ({Y}) {{
        W0 = Gather(W_all, zero)
        W1 = Gather(W_all, one)
        R0, R1 = Split<axis=0>(R_all, ones)
        Y0 = LSTM<hidden_size=6>(X, W0, R0)
        X1 = Squeeze(Y0, dirs)
        Y = LSTM<hidden_size=6>(X1, W1, R1)
    }}"""
    w = draw.weights(inputs=H, dirs=2, names="WR")
    tensors = {
        "W_all": w["W"][:, None],
        "R_all": w["R"],
        "zero": np.array(0),
        "one": np.array(1),
        "ones": np.array([1, 1]),
        "dirs": np.array([1]),
    }
    return build(text, tensors), {"X": draw.x(T, N, H)}


def w_directions_concat(draw: Draw) -> Made:
    """A bidirectional GRU whose weights are joined from those of each direction."""
    text = f"""({X}) => (float[T,2,N,6] Y) {{
        W = Concat<axis=0>(W_fw, W_bw)
        R = Concat<axis=0>(R_fw, R_bw)
        B = Concat<axis=0>(B_fw, B_bw)
        Y = GRU<hidden_size=6, direction="bidirectional">(X, W, R, B)
    }}"""
    tensors = draw.weights("GRU", suffix="_fw") | draw.weights("GRU", suffix="_bw")
    return build(text, tensors), {"X": draw.x()}


def w_masked(draw: Draw) -> Made:
    """W is a stored weight times a stored 0/1 mask: an earlier pruning left in the graph."""
    text = f"""({X}) => ({Y}) {{
        W = Mul(W_raw, mask)
        Y = LSTM<hidden_size=6>(X, W, R, B)
    }}"""
    w = draw.weights()
    tensors = {
        "W_raw": w["W"],
        "mask": (draw.rng.random(w["W"].shape) > 0.5).astype(np.float32),
        "R": w["R"],
        "B": w["B"],
    }
    return build(text, tensors), {"X": draw.x()}


def w_low_rank(draw: Draw) -> Made:
    """W and R are a stored weight plus a product of two thin ones (an unmerged adapter)."""
    text = f"""({X}) => ({Y}) {{
        W_step = MatMul(W_up, W_down)
        W = Add(W_base, W_step)
        R_step = MatMul(R_up, R_down)
        R = Add(R_base, R_step)
        Y = LSTM<hidden_size=6>(X, W, R, B)
    }}"""
    w = draw.weights()
    tensors = {
        "W_base": w["W"],
        "W_up": draw.normal(4 * H, 2, scale=0.4),
        "W_down": draw.normal(2, IN, scale=0.4),
        "R_base": w["R"],
        "R_up": draw.normal(4 * H, 2, scale=0.3),
        "R_down": draw.normal(2, H, scale=0.3),
        "B": w["B"],
    }
    return build(text, tensors), {"X": draw.x()}


def w_weight_norm(draw: Draw) -> Made:
    """W is direction times length of each row (weight normalisation left in the graph)."""
    text = f"""({X}) => ({Y}) {{
        norm = ReduceL2(v, axis)
        unit = Div(v, norm)
        W = Mul(unit, g)
        Y = GRU<hidden_size=6>(X, W, R, B)
    }}"""
    w = draw.weights("GRU")
    tensors = {
        "v": w["W"],
        "g": 1 + draw.normal(1, 3 * H, 1, scale=0.2),
        "axis": np.array([2]),
        "R": w["R"],
        "B": w["B"],
    }
    return build(text, tensors), {"X": draw.x()}


def w_sparse_initializer(draw: Draw) -> Made:
    """W and R are `sparse_initializer`s, which strict shape inference does not accept."""
    w = draw.weights()
    w |= {name: drop(draw, w[name]) for name in "WR"}
    model = build(PLAIN, {"B": w["B"]})
    for name in "WR":
        model.graph.sparse_initializer.append(to_sparse(w[name], name))
    return model, {"X": draw.x()}, {"equal": build(PLAIN, w), "full_check": False}


def drop(draw: Draw, array: Array) -> Array:
    """Zero about 70 % of the values."""
    return np.where(draw.rng.random(array.shape) < 0.7, 0, array).astype(array.dtype)


def to_sparse(array: Array, name: str) -> onnx.SparseTensorProto:
    """Store a tensor as its nonzero values and their positions in the flat tensor."""
    (places,) = np.nonzero(array.ravel())
    values = numpy_helper.from_array(array.ravel()[places], name)
    indices = numpy_helper.from_array(places.astype(np.int64), f"{name}_indices")
    return helper.make_sparse_tensor(values, indices, list(array.shape))


def w_sparse_constant(draw: Draw) -> Made:
    """W is a Constant node with a `sparse_value`."""
    w = draw.weights()
    w["W"] = drop(draw, w["W"])
    model = build(PLAIN, {"R": w["R"], "B": w["B"]})
    node = helper.make_node("Constant", [], ["W"], sparse_value=to_sparse(w["W"], "W"))
    model.graph.node.insert(0, node)
    return model, {"X": draw.x()}, {"equal": build(PLAIN, w)}


def w_external(draw: Draw) -> Made:
    """W and R are external data in a `.bin` beside the model, B is inside."""
    w = draw.weights()
    outside = {name: w[name] for name in "WR"}
    return build(PLAIN, w), {"X": draw.x()}, {"external": outside}


def w_typed_field(draw: Draw) -> Made:
    """Weights stored in `float_data` and shapes in `int64_data`, not in `raw_data`."""
    text = f"""({X}) => (float[T,N,6] Z) {{
        Y = GRU<hidden_size=6>(X, W, R, B)
        Z = Squeeze(Y, axis)
    }}"""
    model = build(text)
    for name, array in (draw.weights("GRU") | {"axis": np.array([1])}).items():
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        model.graph.initializer.append(
            helper.make_tensor(name, kind, array.shape, array.ravel().tolist())
        )
    return model, {"X": draw.x()}


def w_graph_inputs(draw: Draw) -> Made:
    """W, R and B are inputs of the graph: there is nothing to prune."""
    text = f"""({X}, float[1,24,5] W, float[1,24,6] R, float[1,48] B) => ({Y}) {{
        Y = LSTM<hidden_size=6>(X, W, R, B)
    }}"""
    return build(text), {"X": draw.x()} | draw.weights()


def w_chosen_at_run_time(draw: Draw) -> Made:
    """An input chooses one of three stored W; R is fixed."""
    text = f"""({X}, int64 which) => ({Y}) {{
        W = Gather(W_bank, which)
        Y = LSTM<hidden_size=6>(X, W, R, B)
    }}"""
    w = draw.weights()
    tensors = {"W_bank": draw.normal(3, 1, 4 * H, IN, scale=0.6), "R": w["R"], "B": w["B"]}
    return build(text, tensors), {"X": draw.x(), "which": np.array(1)}


def w_from_input(draw: Draw) -> Made:
    """A network computes W from an input (hypernetwork): not prunable."""
    text = f"""({X}, float[1,4] code) => ({Y}) {{
        flat = MatMul(code, hyper)
        W = Reshape(flat, w_shape)
        Y = LSTM<hidden_size=6>(X, W, R)
    }}"""
    tensors = draw.weights(names="R") | {
        "hyper": draw.normal(4, 4 * H * IN, scale=0.3),
        "w_shape": np.array([1, 4 * H, IN]),
    }
    return build(text, tensors), {"X": draw.x(), "code": draw.normal(1, 4)}


def w_is_output(draw: Draw) -> Made:
    """W is also an output of the graph, and R is read by an Add as well."""
    text = f"""({X}) => ({Y}, float[1,24,5] W_out, float[1,24,6] R_plus) {{
        Y = LSTM<hidden_size=6>(X, W, R, B)
        W_out = Identity(W)
        R_plus = Add(R, one)
    }}"""
    return build(text, draw.weights() | {"one": np.ones(1, np.float32)}), {"X": draw.x()}


def w_shared(draw: Draw) -> Made:
    """Two LSTM nodes read the same W, R and B, on different inputs."""
    text = f"""({X}, float[U,N,5] Z) => ({Y}, float[U,1,N,6] Y_z) {{
        [left] Y = LSTM<hidden_size=6>(X, W, R, B)
        [right] Y_z = LSTM<hidden_size=6>(Z, W, R, B)
    }}"""
    return build(text, draw.weights()), {"X": draw.x(), "Z": draw.x(4, N, IN)}


def w_partly_shared(draw: Draw) -> Made:
    """Two LSTM nodes share R, but each has its own W and B."""
    text = f"""({X}, float[T,N,4] Z) => ({Y}, float[T,1,N,6] Y_z) {{
        Y = LSTM<hidden_size=6>(X, W, R, B)
        Y_z = LSTM<hidden_size=6>(Z, W_z, R, B_z)
    }}"""
    tensors = draw.weights() | draw.weights(inputs=4, names="WB", suffix="_z")
    return build(text, tensors), {"X": draw.x(), "Z": draw.x(T, N, 4)}


def w_double(draw: Draw) -> Made:
    """A GRU in double."""
    text = "(double[T,N,5] X) => (double[T,1,N,6] Y) { Y = GRU<hidden_size=6>(X, W, R, B) }"
    tensors = {k: v.astype(np.float64) for k, v in draw.weights("GRU").items()}
    return build(text, tensors), {"X": draw.x().astype(np.float64)}, {"onnxruntime": False}


# Control flow and functions


def if_outer_weights(draw: Draw) -> Made:
    """Both branches hold an LSTM, the weights lie in the outer graph."""
    text = f"""({X}, bool forward) => ({Y}) {{
        Y = If(forward) <
            then_branch = then () => (float[T,1,N,6] a) {{
                [run] a = LSTM<hidden_size=6>(X, W, R, B)
            }},
            else_branch = other () => (float[T,1,N,6] b) {{
                [run] b = LSTM<hidden_size=6, direction="reverse">(X, W, R, B)
            }}>
    }}"""
    return build(text, draw.weights()), {"X": draw.x(), "forward": np.array(False)}


def if_equal_copies(draw: Draw) -> Made:
    """Each branch has its own initializers, equal in value and in name."""
    w = draw.weights()
    tensors = {f"{place}::{k}": v for place in ("then", "other") for k, v in w.items()}
    text = f"""({X}, bool many) => ({LAST}) {{
        Y_h = If(many) <
            then_branch = then () => (float[1,N,6] a) {{
                , a = LSTM<hidden_size=6>(X, W, R, B)
            }},
            else_branch = other () => (float[1,N,6] b) {{
                first = Slice(X, zero, one, zero)
                , b = LSTM<hidden_size=6>(first, W, R, B)
            }}>
    }}"""
    tensors |= {"zero": np.array([0]), "one": np.array([1])}
    return build(text, tensors), {"X": draw.x(), "many": np.array(True)}


def if_same_names(draw: Draw) -> Made:
    """Branches whose initializers and nodes have the same names and different values and H."""
    text = f"""({X}, bool big) => (float[N,2] out) {{
        out = If(big) <
            then_branch = then () => (float[N,2] a) {{
                [lstm] , last = LSTM<hidden_size=8>(X, W, R, B)
                flat = Squeeze(last, axis)
                [head] a = Gemm(flat, V)
            }},
            else_branch = other () => (float[N,2] b) {{
                [lstm] , last = LSTM<hidden_size=6>(X, W, R, B)
                flat = Squeeze(last, axis)
                [head] b = Gemm(flat, V)
            }}>
    }}"""
    tensors: dict[str, Array] = {"axis": np.array([0])}
    for place, hidden in (("then", 8), ("other", 6)):
        w = draw.weights(hidden=hidden) | {"V": draw.normal(hidden, 2)}
        tensors |= {f"{place}::{k}": v for k, v in w.items()}
    return build(text, tensors), {"X": draw.x(), "big": np.array(True)}


def if_one_branch(draw: Draw) -> Made:
    """Only one branch is recurrent, the other gives zeros of a constant shape holding H."""
    text = f"""({X}, bool speech) => ({Y}) {{
        Y = If(speech) <
            then_branch = then () => (float[T,1,N,6] a) {{
                a = GRU<hidden_size=6>(X, W, R, B)
            }},
            else_branch = other () => (float[T,1,N,6] b) {{
                size = Shape<start=0, end=2>(X)
                steps, batch = Split(size, ones)
                shape = Concat<axis=0>(steps, one, batch, six)
                b = Expand(fill, shape)
            }}>
    }}"""
    tensors = draw.weights("GRU") | {
        "ones": np.array([1, 1]),
        "one": np.array([1]),
        "six": np.array([6]),
        "fill": np.zeros(1, np.float32),
    }
    return build(text, tensors), {"X": draw.x(), "speech": np.array(True)}


def loop_step(draw: Draw) -> Made:
    """One LSTM step in each turn of a Loop, states carried, outputs scanned."""
    text = f"""({X}) => (float[T,N,6] Z, {LAST}) {{
        size = Shape(X)
        steps = Gather(size, zero)
        Y_h, c_last, Z = Loop(steps, go, h_start, c_start) <
            body = body (int64 t, bool on, float[1,N,6] h, float[1,N,6] c)
                => (bool on_out, float[1,N,6] h_out, float[1,N,6] c_out, float[N,6] y) {{
                step = Gather(X, t)
                x = Unsqueeze(step, axis0)
                , h_out, c_out = LSTM<hidden_size=6>(x, W, R, B, , h, c)
                y = Squeeze(h_out, axis0)
                on_out = Identity(on)
            }}>
    }}"""
    tensors = draw.weights() | {
        "zero": np.array(0),
        "axis0": np.array([0]),
        "go": np.array(True),
        "h_start": np.zeros((1, N, H), np.float32),
        "c_start": np.zeros((1, N, H), np.float32),
    }
    plain = f"""({X}) => (float[T,N,6] Z, {LAST}) {{
        y, Y_h = LSTM<hidden_size=6>(X, W, R, B)
        Z = Squeeze(y, axis1)
    }}"""
    equal = build(plain, tensors | {"axis1": np.array([1])})
    return build(text, tensors), {"X": draw.x()}, {"equal": equal}


def loop_body_weights(draw: Draw) -> Made:
    """The body of a Loop holds the initializers; the carried value is a whole sequence."""
    text = """(float[T,N,6] X) => (float[T,N,6] Z) {
        Z = Loop(turns, , X) <
            body = body (int64 t, bool on, float[T,N,6] z) => (bool on_out, float[T,N,6] z_out) {
                y = GRU<hidden_size=6>(z, W, R, B)
                flat = Squeeze(y, axis)
                z_out = Add(z, flat)
                on_out = Identity(on)
            }>
    }"""
    turn = """y{0} = GRU<hidden_size=6>({1}, W, R, B)
        flat{0} = Squeeze(y{0}, axis)
        {2} = Add({1}, flat{0})"""
    turns = "\n".join([turn.format(*names) for names in ("1Xa", "2ab", "3bZ")])
    equal = f"(float[T,N,6] X) => (float[T,N,6] Z) {{ {turns} }}"
    w = draw.weights("GRU", inputs=H)
    outside = {"turns": np.array(3), "axis": np.array([1])}
    model = build(text, {f"body::{k}": v for k, v in w.items()} | outside)
    return model, {"X": draw.x(T, N, H)}, {"equal": build(equal, w | outside)}


def scan_step(draw: Draw) -> Made:
    """One GRU step in the body of a Scan."""
    text = f"""({X}, float[1,N,6] h0) => (float[T,N,6] Z, {LAST}) {{
        Y_h, Z = Scan<num_scan_inputs=1, body = body (float[1,N,6] h, float[N,5] x)
            => (float[1,N,6] h_out, float[N,6] z) {{
                x3 = Unsqueeze(x, axis0)
                , h_out = GRU<hidden_size=6, linear_before_reset=1>(x3, W, R, B, , h)
                z = Squeeze(h_out, axis0)
            }}>(h0, X)
    }}"""
    tensors = draw.weights("GRU") | {"axis0": np.array([0])}
    plain = f"""({X}, float[1,N,6] h0) => (float[T,N,6] Z, {LAST}) {{
        y, Y_h = GRU<hidden_size=6, linear_before_reset=1>(X, W, R, B, , h0)
        Z = Squeeze(y, axis1)
    }}"""
    equal = build(plain, tensors | {"axis1": np.array([1])})
    return build(text, tensors), {"X": draw.x(), "h0": draw.normal(1, N, H)}, {"equal": equal}


def if_in_loop(draw: Draw) -> Made:
    """An LSTM in an If in a Loop reads weights two scopes out; the other branch skips the step."""
    text = f"""({X}) => (float[T,N,6] Z) {{
        size = Shape(X)
        steps = Gather(size, zero)
        h_last, c_last, Z = Loop(steps, , h_start, c_start) <
            body = body (int64 t, bool on, float[1,N,6] h, float[1,N,6] c)
                => (bool on_out, float[1,N,6] h_out, float[1,N,6] c_out, float[N,6] y) {{
                rest = Mod(t, two)
                even = Equal(rest, zero)
                h_out, c_out = If(even) <
                    then_branch = run () => (float[1,N,6] h1, float[1,N,6] c1) {{
                        step = Gather(X, t)
                        x = Unsqueeze(step, axis0)
                        , h1, c1 = LSTM<hidden_size=6>(x, W, R, B, , h, c)
                    }},
                    else_branch = skip () => (float[1,N,6] h2, float[1,N,6] c2) {{
                        h2 = Identity(h)
                        c2 = Identity(c)
                    }}>
                y = Squeeze(h_out, axis0)
                on_out = Identity(on)
            }}>
    }}"""
    tensors = draw.weights() | {
        "zero": np.array(0),
        "two": np.array(2),
        "axis0": np.array([0]),
        "h_start": np.zeros((1, N, H), np.float32),
        "c_start": np.zeros((1, N, H), np.float32),
    }
    plain = f"""({X}) => (float[T,N,6] Z) {{
        even = Gather(X, evens)
        y = LSTM<hidden_size=6>(even, W, R, B)
        flat = Squeeze(y, axis1)
        Z = Gather(flat, spread)
    }}"""
    places = {"evens": np.arange(0, T, 2), "spread": np.arange(T) // 2, "axis1": np.array([1])}
    return build(text, tensors), {"X": draw.x()}, {"equal": build(plain, tensors | places)}


def function_weight_inputs(draw: Draw) -> Made:
    """A model-local function takes W, R, B as inputs; called with two sets, one of them twice."""
    text = """(float[T,N,6] X) => (float[T,N,6] Z) {
        a = local.layer(X, W1, R1, B1)
        b = local.layer(a, W2, R2, B2)
        Z = local.layer(b, W1, R1, B1)
    }"""
    body = function("""layer (x, w, r, b) => (z) {
        axis = Constant<value_ints=[1]>()
        y = LSTM<hidden_size=6>(x, w, r, b)
        z = Squeeze(y, axis)
    }""")
    tensors = draw.weights(inputs=H, suffix="1") | draw.weights(inputs=H, suffix="2")
    return build(text, tensors, functions=body), {"X": draw.x(T, N, H)}


def function_constants(draw: Draw) -> Made:
    """A model-local function holds its weights as Constant nodes and is called twice."""
    text = """(float[T,N,6] X) => (float[T,N,6] Z) {
        a = local.layer(X)
        Z = local.layer(a)
    }"""
    body = function("""layer (x) => (z) {
        axis = Constant<value_ints=[1]>()
        y = GRU<hidden_size=6>(x, W, R, B)
        z = Squeeze(y, axis)
    }""")
    tensors = {f"layer::{k}": v for k, v in draw.weights("GRU", inputs=H).items()}
    return build(text, tensors, functions=body), {"X": draw.x(T, N, H)}


def function_attribute(draw: Draw) -> Made:
    """`hidden_size` and `direction` of the node in a function refer to attributes of the call."""
    text = f"""({X}) => (float[T,1,N,4] Z) {{
        a = local.layer<size=6, way="forward">(X, W1, R1)
        a3 = Squeeze(a, axis)
        Z = local.layer<size=4, way="reverse">(a3, W2, R2)
    }}"""
    body = function("""layer <size, way> (x, w, r) => (y) {
        y = LSTM<hidden_size: int = @size, direction: string = @way>(x, w, r)
    }""")
    tensors = draw.weights(names="WR", suffix="1")
    tensors |= draw.weights(inputs=H, hidden=4, names="WR", suffix="2")
    model = build(text, tensors | {"axis": np.array([1])}, functions=body)
    return model, {"X": draw.x()}, {"equal": inliner.inline_local_functions(model)}


def function_nested(draw: Draw) -> Made:
    """A function calls a function; raw weights come in, the inner one unsqueezes them."""
    text = f"({X}) => (float[N,2] Z) {{ Z = local.model(X, w, r, head) }}"
    inner = function("""cell (x, w, r) => (h) {
        axis = Constant<value_ints=[0]>()
        w3 = Unsqueeze(w, axis)
        r3 = Unsqueeze(r, axis)
        y, h = RNN<hidden_size=6>(x, w3, r3)
    }""")
    outer = function("""model (x, w, r, head) => (z) {
        axis = Constant<value_ints=[0]>()
        h = local.cell(x, w, r)
        h2 = Squeeze(h, axis)
        z = MatMul(h2, head)
    }""")
    w = draw.weights("RNN", names="WR")
    tensors = {"w": w["W"][0], "r": w["R"][0], "head": draw.normal(H, 2)}
    return build(text, tensors, functions=inner + outer), {"X": draw.x()}


# Attributes, optional inputs and outputs


def peephole(draw: Draw) -> Made:
    """Peepholes P and initial states given as initializers."""
    text = f"({X}) => ({Y}) {{ Y = LSTM<hidden_size=6>(X, W, R, B, , h0, c0, P) }}"
    tensors = draw.weights() | {
        "P": draw.normal(1, 3 * H, scale=0.5),
        "h0": draw.normal(1, N, H, scale=0.5),
        "c0": draw.normal(1, N, H, scale=0.5),
    }
    return build(text, tensors), {"X": draw.x()}


def layout_batchwise(draw: Draw) -> Made:
    """`layout=1`: batch first."""
    text = """(float[N,T,5] X, float[N,2,6] h0) => (float[N,T,2,6] Y, float[N,2,6] Y_h) {
        Y, Y_h = LSTM<hidden_size=6, layout=1, direction="bidirectional">(X, W, R, B, , h0)
    }"""
    feeds = {"X": draw.x(N, T, IN), "h0": draw.normal(N, 2, H)}
    return build(text, draw.weights(dirs=2)), feeds, {"onnxruntime": False}


def no_hidden_size(draw: Draw) -> Made:
    """`hidden_size` is left out, which the specification allows."""
    text = f"({X}) => ({Y}) {{ Y = LSTM(X, W, R, B) }}"
    return build(text, draw.weights()), {"X": draw.x()}, {"onnxruntime": False}


def activations_lstm(draw: Draw) -> Made:
    """Other activations with alpha and beta, and clip."""
    text = f"""({X}) => ({Y}) {{
        Y = LSTM<hidden_size=6, clip=1.5, activations=["HardSigmoid", "Softsign", "ScaledTanh"],
            activation_alpha=[0.25, 1.2], activation_beta=[0.45, 0.7]>(X, W, R, B)
    }}"""
    return build(text, draw.weights()), {"X": draw.x()}


def activations_per_direction(draw: Draw) -> Made:
    """A bidirectional GRU with other activations in each direction."""
    text = f"""({X}) => (float[T,2,N,6] Y) {{
        Y = GRU<hidden_size=6, direction="bidirectional",
            activations=["Sigmoid", "Relu", "Sigmoid", "Tanh"]>(X, W, R, B)
    }}"""
    return build(text, draw.weights("GRU", dirs=2)), {"X": draw.x()}


def input_forget(draw: Draw) -> Made:
    """Coupled gates: `input_forget=1`, so the forget rows of W and R do nothing."""
    text = f"({X}) => ({Y}) {{ Y = LSTM<hidden_size=6, input_forget=1>(X, W, R, B) }}"
    return build(text, draw.weights()), {"X": draw.x()}


def no_optionals(draw: Draw) -> Made:
    """No B; only Y_c is taken, the outputs before it have empty names."""
    text = f"({X}) => (float[1,N,6] c) {{ , , c = LSTM<hidden_size=6>(X, W, R) }}"
    return build(text, draw.weights(names="WR")), {"X": draw.x()}


def sequence_lengths(draw: Draw) -> Made:
    """No B and no states, but `sequence_lens`, in a bidirectional LSTM with all outputs."""
    outs = "float[T,2,N,6] Y, float[2,N,6] Y_h, float[2,N,6] Y_c"
    text = f"""({X}, int32[N] lens) => ({outs}) {{
        Y, Y_h, Y_c = LSTM<hidden_size=6, direction="bidirectional">(X, W, R, , lens)
    }}"""
    feeds = {"X": draw.x(), "lens": np.array([7, 4, 2], np.int32)}
    return build(text, draw.weights(dirs=2, names="WR")), feeds


def gru_reset_before(draw: Draw) -> Made:
    """GRU with `linear_before_reset=0`."""
    return gru_reset(draw, 0)


def gru_reset_after(draw: Draw) -> Made:
    """GRU with `linear_before_reset=1`: the recurrent bias of the hidden gate stays apart."""
    return gru_reset(draw, 1)


def gru_reset(draw: Draw, after: int) -> Made:
    """Both forms of GRU."""
    text = f"""({X}) => ({Y}, {LAST}) {{
        Y, Y_h = GRU<hidden_size=6, linear_before_reset={after}>(X, W, R, B)
    }}"""
    return build(text, draw.weights("GRU")), {"X": draw.x()}


def rnn_relu_bidirectional(draw: Draw) -> Made:
    """RNN with Relu in one direction and Tanh in the other, states as inputs."""
    text = f"""({X}, float[2,N,6] h0) => (float[T,2,N,6] Y, float[2,N,6] Y_h) {{
        Y, Y_h = RNN<hidden_size=6, direction="bidirectional",
            activations=["Relu", "Tanh"]>(X, W, R, B, , h0)
    }}"""
    feeds = {"X": draw.x(), "h0": draw.normal(2, N, H)}
    return build(text, draw.weights("RNN", dirs=2)), feeds


def one_unit(draw: Draw) -> Made:
    """H = 1 with one input feature: no unit can go."""
    text = "(float[T,N,1] X) => (float[T,1,N,1] Y) { Y = LSTM<hidden_size=1>(X, W, R, B) }"
    return build(text, draw.weights(inputs=1, hidden=1)), {"X": draw.x(T, N, 1)}


# What surrounds the node


def encoder_decoder(draw: Draw) -> Made:
    """Y_h and Y_c of one LSTM start another: their units are tied."""
    text = f"""({X}, float[U,N,4] Z) => (float[U,N,3] out) {{
        , h, c = LSTM<hidden_size=6>(X, W1, R1, B1)
        y = LSTM<hidden_size=6>(Z, W2, R2, B2, , h, c)
        flat = Squeeze(y, axis)
        out = MatMul(flat, head)
    }}"""
    tensors = draw.weights(suffix="1") | draw.weights(inputs=4, suffix="2")
    tensors |= {"axis": np.array([1]), "head": draw.normal(H, 3)}
    equal = build(text.replace(", h, c =", "unused, h, c ="), tensors)
    return build(text, tensors), {"X": draw.x(), "Z": draw.x(4, N, 4)}, {"equal": equal}


def residual_stack(draw: Draw) -> Made:
    """Two LSTM layers with residual adds, so units are tied to input features and each other."""
    text = """(float[T,N,6] X) => (float[T,N,2] out) {
        y1 = LSTM<hidden_size=6>(X, W1, R1, B1)
        z1 = Squeeze(y1, axis)
        s1 = Add(X, z1)
        y2 = LSTM<hidden_size=6>(s1, W2, R2, B2)
        z2 = Squeeze(y2, axis)
        s2 = Add(s1, z2)
        out = MatMul(s2, head)
    }"""
    tensors = draw.weights(inputs=H, suffix="1") | draw.weights(inputs=H, suffix="2")
    tensors |= {"axis": np.array([1]), "head": draw.normal(H, 2)}
    return build(text, tensors), {"X": draw.x(T, N, H)}


def projection_between(draw: Draw) -> Made:
    """A dense layer, a Relu and a dense layer lie between two LSTMs: all units are free."""
    text = f"""({X}) => (float[T,N,2] out) {{
        y1 = LSTM<hidden_size=8>(X, W1, R1, B1)
        z1 = Squeeze(y1, axis)
        d1 = MatMul(z1, V1)
        d2 = Add(d1, v1)
        x2 = Relu(d2)
        y2 = GRU<hidden_size=6, linear_before_reset=1>(x2, W2, R2, B2)
        z2 = Squeeze(y2, axis)
        d3 = MatMul(z2, V2)
        out = Add(d3, v2)
    }}"""
    tensors = draw.weights(hidden=8, suffix="1")
    tensors |= draw.weights("GRU", inputs=4, suffix="2")
    tensors |= {
        "axis": np.array([1]),
        "V1": draw.normal(8, 4),
        "v1": draw.normal(4),
        "V2": draw.normal(H, 2),
        "v2": draw.normal(2),
    }
    return build(text, tensors), {"X": draw.x()}


def bidirectional_heads(draw: Draw) -> Made:
    """Directions joined by Transpose and Reshape to 2H, and split again for two heads."""
    text = f"""({X}) => (float[T,N,2] both, float[T,N,2] back) {{
        y = LSTM<hidden_size=6, direction="bidirectional">(X, W, R, B)
        yt = Transpose<perm=[0, 2, 1, 3]>(y)
        flat = Reshape(yt, shape)
        both = MatMul(flat, head)
        fw, bw = Split<axis=2>(flat, halves)
        back = MatMul(bw, head_back)
    }}"""
    tensors = draw.weights(dirs=2) | {
        "shape": np.array([0, 0, 2 * H]),
        "halves": np.array([H, H]),
        "head": draw.normal(2 * H, 2, scale=0.5),
        "head_back": draw.normal(H, 2),
    }
    return build(text, tensors), {"X": draw.x()}


def gated_output(draw: Draw) -> Made:
    """The output is split in halves along H and one gates the other: units tied in pairs."""
    text = f"""({X}) => (float[T,N,2] out) {{
        y = LSTM<hidden_size=6>(X, W, R, B)
        z = Squeeze(y, axis)
        a, b = Split<axis=2>(z, halves)
        gate = Sigmoid(b)
        mixed = Mul(a, gate)
        out = MatMul(mixed, head)
    }}"""
    tensors = draw.weights() | {
        "axis": np.array([1]),
        "halves": np.array([3, 3]),
        "head": draw.normal(3, 2),
    }
    return build(text, tensors), {"X": draw.x()}


def computed_zero_state(draw: Draw) -> Made:
    """Zero states whose shape, holding H, is computed from the batch of the input."""
    text = f"""({X}) => ({Y}) {{
        size = Shape(X)
        batch = Slice(size, one, two)
        shape = Concat<axis=0>(one, batch, six)
        zeros = ConstantOfShape(shape)
        Y = LSTM<hidden_size=6>(X, W, R, B, , zeros, zeros)
    }}"""
    tensors = draw.weights() | {f: np.array([i]) for f, i in (("one", 1), ("two", 2), ("six", 6))}
    return build(text, tensors), {"X": draw.x()}


def dead_node(draw: Draw) -> Made:
    """One of two LSTMs leads to no output."""
    text = f"""({X}) => ({Y}) {{
        [used] Y = LSTM<hidden_size=6>(X, W, R, B)
        [unused] Y2 = LSTM<hidden_size=6>(X, W2, R2, B2)
    }}"""
    return build(text, draw.weights() | draw.weights(suffix="2")), {"X": draw.x()}


# Names and versions


def unnamed_nodes(draw: Draw) -> Made:
    """Two LSTM nodes without a name."""
    text = f"""({X}) => ({LAST}) {{
        y = LSTM<hidden_size=8>(X, W1, R1)
        x2 = Squeeze(y, axis)
        , Y_h = LSTM<hidden_size=6>(x2, W2, R2)
    }}"""
    tensors = draw.weights(hidden=8, names="WR", suffix="1")
    tensors |= draw.weights(inputs=8, names="WR", suffix="2")
    return build(text, tensors | {"axis": np.array([1])}), {"X": draw.x()}


def duplicate_names(draw: Draw) -> Made:
    """The node in the outer graph and one in a branch have the same name."""
    text = f"""({X}, bool more) => ({Y}) {{
        [rnn] y1 = LSTM<hidden_size=6>(X, W1, R1)
        Y = If(more) <
            then_branch = then () => (float[T,1,N,6] a) {{
                x2 = Squeeze(y1, axis)
                [rnn] a = LSTM<hidden_size=6>(x2, W2, R2)
            }},
            else_branch = other () => (float[T,1,N,6] b) {{
                [rnn] b = Identity(y1)
            }}>
    }}"""
    tensors = draw.weights(names="WR", suffix="1")
    tensors |= draw.weights(inputs=H, names="WR", suffix="2")
    feeds = {"X": draw.x(), "more": np.array(True)}
    return build(text, tensors | {"axis": np.array([1])}), feeds


def odd_names(draw: Draw) -> Made:
    """Tensor and node names with slashes, colons, blanks, dots and letters beyond ASCII."""
    names = {
        "X": "in put:0",
        "Y": "выход/слой:0",
        "W": "model/lstm 1/W:0",
        "R": "../R",
        "B": 'b"quoted"',
    }
    model = build(PLAIN, draw.weights())
    (node,) = model.graph.node
    node.name = "слой/lstm;1"
    node.input[:] = [names[i] for i in node.input]
    node.output[:] = [names[o] for o in node.output]
    named = [*model.graph.input, *model.graph.output, *model.graph.initializer]
    for thing in named:
        thing.name = names[thing.name]
    return model, {names["X"]: draw.x()}


def ir3_inputs(draw: Draw) -> Made:
    """IR version 3: every initializer is also an input of the graph; opset 8."""
    text = f"""({X}, float[1,24,5] W, float[1,24,6] R, float[1,48] B) => ({Y}) {{
        Y = LSTM<hidden_size=6>(X, W, R, B)
    }}"""
    return build(text, draw.weights(), opset=8, ir=3), {"X": draw.x()}


def ir8_overridable(draw: Draw) -> Made:
    """IR version 8, but W is also an input with a default value and so may be overridden."""
    text = f"""({X}, float[1,24,5] W) => ({Y}) {{
        Y = LSTM<hidden_size=6>(X, W, R, B)
    }}"""
    return build(text, draw.weights(), opset=17, ir=8), {"X": draw.x()}


def opset7(draw: Draw) -> Made:
    """Opset 7: axes are attributes of Squeeze and Slice."""
    weights = "float[1,18,5] W, float[1,18,6] R, float[1,36] B"
    text = f"""({X}, {weights}) => (float[T,N,6] Z, float[N,3] part) {{
        Y, Y_h = GRU<hidden_size=6, linear_before_reset=1>(X, W, R, B)
        Z = Squeeze<axes=[1]>(Y)
        h = Squeeze<axes=[0]>(Y_h)
        part = Slice<axes=[1], starts=[0], ends=[3]>(h)
    }}"""
    return build(text, draw.weights("GRU"), opset=7, ir=3), {"X": draw.x()}


def opset22(draw: Draw) -> Made:
    """Opset 22, the newest version of the recurrent operators."""
    text = f"""({X}) => ({Y}, {LAST}) {{
        y1 = RNN<hidden_size=8>(X, W1, R1, B1)
        x2 = Squeeze(y1, axis)
        y2 = GRU<hidden_size=8, linear_before_reset=1>(x2, W2, R2, B2)
        x3 = Squeeze(y2, axis)
        Y, Y_h = LSTM<hidden_size=6>(x3, W3, R3, B3)
    }}"""
    tensors = draw.weights("RNN", hidden=8, suffix="1")
    tensors |= draw.weights("GRU", inputs=8, hidden=8, suffix="2")
    tensors |= draw.weights(inputs=8, suffix="3") | {"axis": np.array([1])}
    return build(text, tensors, opset=22), {"X": draw.x()}


MAKERS: tuple[Maker, ...] = (
    w_constant_nodes,
    w_torch_chain,
    w_keras_kernel,
    w_cast_identity,
    w_dequantize,
    w_stacked_layers,
    w_directions_concat,
    w_masked,
    w_low_rank,
    w_weight_norm,
    w_sparse_initializer,
    w_sparse_constant,
    w_external,
    w_typed_field,
    w_graph_inputs,
    w_chosen_at_run_time,
    w_from_input,
    w_is_output,
    w_shared,
    w_partly_shared,
    w_double,
    if_outer_weights,
    if_equal_copies,
    if_same_names,
    if_one_branch,
    loop_step,
    loop_body_weights,
    scan_step,
    if_in_loop,
    function_weight_inputs,
    function_constants,
    function_attribute,
    function_nested,
    peephole,
    layout_batchwise,
    no_hidden_size,
    activations_lstm,
    activations_per_direction,
    input_forget,
    no_optionals,
    sequence_lengths,
    gru_reset_before,
    gru_reset_after,
    rnn_relu_bidirectional,
    one_unit,
    encoder_decoder,
    residual_stack,
    projection_between,
    bidirectional_heads,
    gated_output,
    computed_zero_state,
    dead_node,
    unnamed_nodes,
    duplicate_names,
    odd_names,
    ir3_inputs,
    ir8_overridable,
    opset7,
    opset22,
)


def make(maker: Maker) -> Case:
    """Make one graph and evaluate it."""
    model, feeds, *rest = maker(Draw(zlib.crc32(maker.__name__.encode())))
    options = dict(rest[0]) if rest else {}
    evaluator = ReferenceEvaluator(options.pop("equal", model), new_ops=[LSTM, GRU, RNN])
    values = evaluator.run(None, dict(feeds))
    outputs = {o.name: np.asarray(v) for o, v in zip(model.graph.output, values, strict=True)}
    return Case(
        name=f"hand_{maker.__name__}",
        model=model,
        feeds=feeds,
        outputs=outputs,
        exporter=f"onnx {onnx.__version__}, by hand",
        idiom=maker.__doc__ or "",
        **options,
    )


if __name__ == "__main__":
    write_cases(map(make, MAKERS), "make_handmade.py")
