"""Shared by the scripts of this folder: write a graph, its feed and outputs, and its index entry.

For every graph the scripts leave `NAME.onnx`, `NAME.npz` (arrays `input:<name>` and
`output:<name>`) and an entry of `index.json`, from which `check.py` writes the table of
`README.md`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

HERE = Path(__file__).resolve().parent
RECURRENT = ("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM")
LOOPS = ("Loop", "Scan")

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """One graph with the feed and the outputs that its maker computed for it."""

    name: str
    model: onnx.ModelProto
    feeds: Arrays
    outputs: Arrays
    exporter: str
    idiom: str
    atol: float = 1e-5
    onnxruntime: bool = True
    full_check: bool = True
    external: Arrays = field(default_factory=dict)
    """Initializers, by name, to be stored in `NAME.bin` instead of in the model."""


@dataclass(frozen=True)
class Scope:
    """A graph or function body with the scopes around it, innermost first."""

    path: str
    nodes: Sequence[onnx.NodeProto]
    initializers: frozenset[str]
    inputs: frozenset[str]
    outer: tuple[Scope, ...]

    def chain(self) -> tuple[Scope, ...]:
        """Give this scope and then the enclosing ones."""
        return (self, *self.outer)


def graph_scopes(graph: onnx.GraphProto, path: str, outer: tuple[Scope, ...]) -> Iterator[Scope]:
    """Yield the scope of a graph and those of all graphs nested in its nodes."""
    names = {i.name for i in graph.initializer}
    names |= {i.values.name for i in graph.sparse_initializer}
    inputs = frozenset(i.name for i in graph.input) - names
    scope = Scope(path, graph.node, frozenset(names), inputs, outer)
    yield scope
    yield from nested_scopes(graph.node, scope)


def nested_scopes(nodes: Iterable[onnx.NodeProto], scope: Scope) -> Iterator[Scope]:
    """Yield the scopes of the graphs held by the attributes of nodes."""
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                path = f"{scope.path}/{node.op_type}.{attribute.name}"
                yield from graph_scopes(attribute.g, path, scope.chain())


def model_scopes(model: onnx.ModelProto) -> Iterator[Scope]:
    """Yield every graph and function body of a model."""
    yield from graph_scopes(model.graph, "main", ())
    for function in model.functions:
        path = f"function {function.name}"
        scope = Scope(path, function.node, frozenset(), frozenset(function.input), ())
        yield scope
        yield from nested_scopes(function.node, scope)


def origin(name: str, scope: Scope) -> tuple[set[str], set[str]]:
    """Where a tensor comes from: kinds of sources, and the operators on the way."""
    for level in scope.chain():
        if name in level.initializers:
            return {"initializer"}, set()
        if name in level.inputs:
            return {"function input" if level.path.startswith("function") else "input"}, set()
        for node in level.nodes:
            if name not in node.output:
                continue
            if node.op_type == "Constant":
                return {"Constant"}, set()
            sources: set[str] = set()
            operators = {node.op_type}
            for used in filter(None, node.input):
                more, way = origin(used, level)
                sources |= more
                operators |= way
            return sources, operators
    raise ValueError(f"{name!r} has no producer in {scope.path}")


def recurrent_nodes(model: onnx.ModelProto) -> list[dict[str, Any]]:
    """Describe every recurrent node: operator, place, hidden size, direction, weight sources."""
    found = []
    for scope in model_scopes(model):
        for node in scope.nodes:
            if node.op_type not in RECURRENT or node.domain not in ("", "com.microsoft"):
                continue
            attributes = {a.name: a for a in node.attribute}
            entry: dict[str, Any] = {"op": node.op_type, "where": scope.path, "name": node.name}
            if "hidden_size" in attributes and not attributes["hidden_size"].ref_attr_name:
                entry["hidden_size"] = attributes["hidden_size"].i
            direction = attributes.get("direction")
            entry["direction"] = "forward"
            if direction:
                entry["direction"] = direction.s.decode() or f"@{direction.ref_attr_name}"
            for label, position in (("W", 1), ("R", 2)):
                sources, operators = origin(node.input[position], scope)
                entry[label] = " + ".join(sorted(sources))
                if operators:
                    entry[label] += " via " + ", ".join(sorted(operators))
            found.append(entry)
    return found


def loop_places(model: onnx.ModelProto) -> list[str]:
    """Name the place of every Loop and Scan node."""
    return [
        f"{scope.path}/{node.op_type}"
        for scope in model_scopes(model)
        for node in scope.nodes
        if node.op_type in LOOPS
    ]


def describe(case: Case, script: str) -> dict[str, Any]:
    """Build the index entry of a graph."""
    return {
        "script": script,
        "exporter": case.exporter,
        "opset": {i.domain or "ai.onnx": i.version for i in case.model.opset_import},
        "ir_version": case.model.ir_version,
        "idiom": " ".join(case.idiom.split()),
        "atol": case.atol,
        "onnxruntime": case.onnxruntime,
        "full_check": case.full_check,
        "external": bool(case.external),
        "recurrent": recurrent_nodes(case.model),
        "loops": loop_places(case.model),
    }


def strip_notes(model: onnx.ModelProto) -> None:
    """Remove the notes of exporters, which name files of the machine and may be most of a file."""
    scopes: list[Any] = [model.graph, *model.functions]
    while scopes:
        scope = scopes.pop()
        noted_parts = [scope, *scope.node, *scope.value_info]
        if isinstance(scope, onnx.GraphProto):
            noted_parts += [*scope.input, *scope.output, *scope.initializer]
        for noted in noted_parts:
            noted.doc_string = ""
            del noted.metadata_props[:]
        for node in scope.node:
            scopes.extend(a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH)


def read_index(folder: Path = HERE) -> dict[str, dict[str, Any]]:
    """Read the `index.json` of a folder, or an empty index where there is none yet."""
    path = folder / "index.json"
    entries: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    return entries


def write_cases(made: Iterable[Case], script: str, folder: Path = HERE) -> None:
    """Write graphs with their data and put them in the index in place of the script's old ones."""
    cases = list(made)
    folder.mkdir(exist_ok=True)
    index = read_index(folder)
    for name in [name for name, entry in index.items() if entry["script"] == script]:
        for suffix in (".onnx", ".npz", ".bin"):
            (folder / f"{name}{suffix}").unlink(missing_ok=True)
        del index[name]
    for case in cases:
        if case.name in index:
            raise ValueError(f"two graphs are named {case.name}")
        index[case.name] = describe(case, script)
        write_model(case, folder)
        arrays = {f"input:{name}": array for name, array in case.feeds.items()}
        arrays |= {f"output:{name}": array for name, array in case.outputs.items()}
        np.savez_compressed(folder / f"{case.name}.npz", allow_pickle=False, **arrays)
        print(case.name)
    lines = [f"{json.dumps(name)}: {json.dumps(index[name])}" for name in sorted(index)]
    (folder / "index.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def write_model(case: Case, folder: Path) -> None:
    """Write a model, and beside it the tensors that it keeps outside."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    blob = b""
    for initializer in model.graph.initializer:
        if initializer.name not in case.external:
            continue
        data = case.external[initializer.name].tobytes()
        initializer.ClearField("raw_data")
        initializer.data_location = onnx.TensorProto.EXTERNAL
        entries = {"location": f"{case.name}.bin", "offset": len(blob), "length": len(data)}
        for key, value in entries.items():
            initializer.external_data.add(key=key, value=str(value))
        blob += data
    if blob:
        (folder / f"{case.name}.bin").write_bytes(blob)
    (folder / f"{case.name}.onnx").write_bytes(model.SerializeToString(deterministic=True))
