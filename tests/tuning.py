"""Tiny models with something to learn, and a call that prunes and fine-tunes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from conftest import Graph, weights
from onnx import helper, numpy_helper

from rnnprune_cli.model import GATES, ExportOptions, FineTune, Report
from rnnprune_cli.options import PruneOptions, complete_stage
from rnnprune_cli.pipeline import prune

INPUTS, HIDDEN, STEPS = 4, 8, 6
STILL = 1e-12
"""A learning rate at which no weight of float32 changes."""
Arrays = Mapping[str, np.ndarray]


def network(
    op: str = "LSTM",
    direction: str = "forward",
    outputs: int = 3,
    *,
    hidden: int = HIDDEN,
    reset: int = 0,
    last: bool = False,
    end: str | None = None,
    lengths: bool = False,
    states: bool = False,
    dtype: type = np.float32,
    seed: int = 0,
) -> onnx.ModelProto:
    """x [batch, time, inputs] → recurrent layer → dense layer → one row a step, or for the last.

    Args:
        end: ``Softmax`` or ``Sigmoid``.
        lengths: Whether the model is told how long its sequences are.
        states: Whether it is handed its states, and hands them back.
    """
    directions = 2 if direction == "bidirectional" else 1
    made = {k: 1.5 * v for k, v in weights(op, hidden, INPUTS, directions, seed).items()}
    rng = np.random.default_rng([seed, 1])
    elem = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    g = Graph(["batch", "time", INPUTS])
    g.inputs[0] = helper.make_tensor_value_info("x", elem, ["batch", "time", INPUTS])
    given: list[str | np.ndarray | None] = [g.op("Transpose", "x", perm=[1, 0, 2])]
    given += [made[name].astype(dtype) for name in "WRB"]
    if lengths:
        g.inputs.append(helper.make_tensor_value_info("lengths", 6, ["batch"]))
    given.append("lengths" if lengths else None)
    letters = ("h", "c") if op == "LSTM" else ("h",)
    for letter in letters if states else ():
        shape = [directions, "batch", hidden]
        g.inputs.append(helper.make_tensor_value_info(f"state_{letter}", elem, shape))
        given.append(f"state_{letter}")
    attributes: dict[str, object] = {"hidden_size": hidden, "direction": direction}
    if op == "GRU":
        attributes["linear_before_reset"] = reset
    while given[-1] is None:
        given.pop()
    y = g.op(op, *given, outs=3 if op == "LSTM" else 2, **attributes)
    g.nodes[-1].name = "rnn"
    ends = list(g.nodes[-1].output[1:])
    if last:
        v = g.op("Transpose", ends[0], perm=[1, 0, 2])
        v = g.op("Reshape", v, np.array([0, -1]))
    else:
        v = g.op("Transpose", y, perm=[2, 0, 1, 3])
        v = g.op("Reshape", v, np.array([0, 0, -1]))
    head = rng.standard_normal((directions * hidden, outputs)).astype(dtype)
    v = g.op("Add", g.op("MatMul", v, head), rng.standard_normal(outputs).astype(dtype))
    g.output(v if end is None else g.op(end, v, **({"axis": -1} if end == "Softmax" else {})))
    for value in ends if states else ():
        g.output(value)
    return g.model()


def inputs(count: int = 48, steps: int = STEPS, seed: int = 5) -> np.ndarray:
    """x [samples, steps, inputs]."""
    return np.random.default_rng(seed).standard_normal((count, steps, INPUTS)).astype(np.float32)


def tune(
    folder: Path,
    model: onnx.ModelProto | Path,
    train: Arrays | Path | None,
    sparsity: float | None = 0.5,
    *,
    name: str = "out",
    granularity: str = "weight",
    scope: str | None = None,
    method: str = "magnitude",
    include: Sequence[str] = (),
    compensate: bool = True,
    resize_state: bool = False,
    validation: Arrays | None = None,
    data: Arrays | None = None,
    calibration: Arrays | None = None,
    export: str = "dense",
    seed: int = 0,
    threads: int = 1,
    force: bool = False,
    told: Callable[[str], None] = lambda step: None,
    **finetune: Any,
) -> Report:
    """Prunes and fine-tunes a model, and writes it as ``name``.onnx."""
    if isinstance(model, onnx.ModelProto):
        path = folder / "model.onnx"
        path.write_bytes(model.SerializeToString())
    else:
        path = model
    places: dict[str, Path | None] = {"train": train if isinstance(train, Path) else None}
    given = {"train": train, "validation": validation, "data": data, "calibration": calibration}
    for key, arrays in given.items():
        if isinstance(arrays, Mapping):
            places[key] = folder / f"{name}.{key}.npz"
            np.savez(places[key], **arrays)
    more = {"include": tuple(include), "compensate": compensate, "resize_state": resize_state}
    stage = complete_stage(method, granularity, scope, sparsity, **more)
    cuts = granularity in ("unit", "layer")
    options = PruneOptions(
        model=path,
        output=folder / f"{name}.onnx",
        stages=(stage,),
        seed=seed,
        data=places.get("data"),
        calibration=places.get("calibration"),
        export=ExportOptions("auto" if cuts else export),
        threads=threads,
        force=force,
        latency_seconds=0.0,
        finetune=FineTune(train=places["train"], validation=places.get("validation"), **finetune),
    )
    return prune(options, {}, told)


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """All nodes of a graph and of its branches and bodies."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from nodes(attribute.g)


def stored(model: onnx.ModelProto | Path) -> dict[str, np.ndarray]:
    """Initializers and Constants of a model, of its branches and bodies, too."""
    proto = onnx.load(str(model)) if isinstance(model, Path) else model
    found: dict[str, np.ndarray] = {}

    def look(graph: onnx.GraphProto) -> None:
        found.update({t.name: numpy_helper.to_array(t) for t in graph.initializer})
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    look(attribute.g)
                elif node.op_type == "Constant" and attribute.name == "value":
                    found[node.output[0]] = numpy_helper.to_array(attribute.t)

    look(proto.graph)
    return found


def recurrent(model: onnx.ModelProto | Path) -> list[dict[str, np.ndarray]]:
    """W, R and B of each recurrent operator, wherever it is."""
    proto = onnx.load(str(model)) if isinstance(model, Path) else model
    known = stored(proto)
    return [
        {letter: known[name] for letter, name in zip("WRB", node.input[1:4], strict=False) if name}
        for node in nodes(proto.graph)
        if node.op_type in GATES
    ]
