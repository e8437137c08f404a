"""Refuses graphs that would touch files, the network or code of the machine that runs them.

A SavedModel is a program. Its graph can hold operators that write files or call Python, and loading
a model already runs its initialisers. Everything that the file holds is searched before
TensorFlow loads it, the chosen signature again before it is first run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rnnprune_cli.errors import RnnpruneError

# Tables read their vocabulary from an asset (InitializeTableFromTextFileV2); that is left alone.
_HARMFUL = re.compile(
    # Files.
    r"WriteFile|ReadFile|MatchingFiles"
    r"|(Delete|Copy|Move|Rename|Create|Append)(File|Dir|Recursively).*"
    r"|(WholeFile|TextLine|FixedLengthRecord|TFRecord|LMDB)Reader(V\d+)?|RecordInput"
    r"|(Experimental)?(TextLine|FixedLengthRecord|TFRecord|LMDB|Sql|MatchingFiles)Dataset(V\d+)?"
    r"|(Save|Load|Cache)Dataset(V\d+)?|.*Snapshot\w*Dataset.*|DistributedSave"
    r"|(Experimental)?DatasetToTFRecord|Snapshot\w+Reader|CalibrationStatisticsSaver"
    r"|LoadAndRemapMatrix|GenerateVocabRemapping|FileSystemSetConfiguration"
    r"|CreateSummary(File|Db)Writer|Write\w*Summary|ImportEvent|DumpTensor|Debug\w+"
    # Code, which the file brings or names.
    r"|(Eager)?PyFunc(Stateless)?|\w*Load\w*Library|DatasetFromGraph|_?XlaCustomCall(V\d+)?"
    # Other machines.
    r"|RemoteCall|Rpc\w+|DeleteRpcFutureResource|\w*DataService\w*"
)
_SAVER = re.compile(r"Save|SaveV2|SaveSlices|(DTensor)?Restore(V2|Slice)?|MergeV2Checkpoints")
_PRINTS = ("PrintV2",)
# Functions that loading calls, by their place in the object graph.
_LOADING = ("_initialize", "_create_resource", "_destroy_resource")
_INITIALIZERS = ("saved_model_main_op", "legacy_init_op")
_INITIALIZER_SIGNATURE = "__saved_model_init_op"
_HINT = "save the model without this operator, and prune that"


def is_harmful(op: str, savers: bool = False) -> bool:
    """Whether no plain computation needs an operator, as it touches more than its operands.

    Args:
        op: Name of the operator.
        savers: Whether that holds for those, too, that save and restore checkpoints.
    """
    return bool(_HARMFUL.fullmatch(op) or (savers and _SAVER.fullmatch(op)))


def check_signature(label: Path, name: str, graph: Any) -> None:  # noqa: ANN401  GraphDef
    """Searches what a call of a signature would run.

    Args:
        label: What the user named.
        name: The signature.
        graph: Its graph.

    Raises:
        RnnpruneError: If it holds an operator that does more than compute.
    """
    functions = {function.signature.name: function for function in graph.library.function}
    _check(label, f"the signature '{name}'", graph.node, functions, True)


def check_stored(path: Path, label: Path) -> None:
    """Searches the graph and all functions of a SavedModel; nothing of it is loaded.

    The operators that save and restore checkpoints are refused only where loading would run them.

    Args:
        path: The SavedModel directory.
        label: What the user named.

    Raises:
        RnnpruneError: If it holds an operator that does more than compute.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from tensorflow.core.protobuf import saved_model_pb2

    model = saved_model_pb2.SavedModel()
    try:
        model.ParseFromString((path / "saved_model.pb").read_bytes())
    except DecodeError:
        return  # TensorFlow cannot load it either, and says why.
    except OSError as error:
        raise RnnpruneError(
            f"{label}: its saved_model.pb cannot be read", "check that the copy is complete"
        ) from error
    for meta_graph in model.meta_graphs:
        graph = meta_graph.graph_def
        functions = {function.signature.name: function for function in graph.library.function}
        _check_nodes(label, "the model", graph.node, False)
        for function in graph.library.function:
            _check_nodes(label, f"its function '{function.signature.name}'", function.node_def)
        for name in _loading_functions(meta_graph):
            if name in functions:
                place = f"its function '{name}', which loading runs,"
                _check(label, place, functions[name].node_def, functions, True)
        # Without objects, the file is of TensorFlow 1, whose graph is initialised as a whole.
        if not meta_graph.object_graph_def.nodes:
            nodes = _ancestors(graph.node, _initializers(meta_graph))
            _check(label, "its initialiser", nodes, functions, True, _restoring)


def _loading_functions(meta_graph: Any) -> set[str]:  # noqa: ANN401  MetaGraphDef
    nodes = meta_graph.object_graph_def.nodes
    wanted = set()
    for node in nodes:
        wanted |= {c.node_id for c in node.children if c.local_name.startswith(_LOADING)}
        wanted |= {s.restore_function for s in node.saveable_objects.values()}
    names = set()
    for position in wanted:
        if 0 <= position < len(nodes):
            names.update(nodes[position].function.concrete_functions)
            names.add(nodes[position].bare_concrete_function.concrete_function_name)
    return names


def _initializers(meta_graph: Any) -> set[str]:  # noqa: ANN401  MetaGraphDef
    """Nodes of a graph of TensorFlow 1 that loading runs."""
    names = {meta_graph.saver_def.restore_op_name}
    for key in _INITIALIZERS:
        if key in meta_graph.collection_def:
            names.update(meta_graph.collection_def[key].node_list.value)
    if _INITIALIZER_SIGNATURE in meta_graph.signature_def:
        outputs = meta_graph.signature_def[_INITIALIZER_SIGNATURE].outputs
        names.update(output.name for output in outputs.values())
    return names


def _ancestors(nodes: Iterable[Any], names: Iterable[str]) -> list[Any]:
    by_name = {node.name: node for node in nodes}
    pending = [_node_name(name) for name in names]
    seen: dict[str, Any] = {}
    while pending:
        name = pending.pop()
        if name in by_name and name not in seen:
            seen[name] = by_name[name]
            pending.extend(_node_name(text) for text in by_name[name].input)
    return list(seen.values())


def _node_name(text: str) -> str:
    return text.removeprefix("^").split(":")[0]


def _restoring(op: str) -> bool:
    """Whether an operator only reads a checkpoint; an initialiser of TensorFlow 1 does."""
    return "Restore" in op


def _no_exception(_: str) -> bool:
    return False


def _check(
    label: Path,
    place: str,
    nodes: Iterable[Any],
    functions: Mapping[str, Any],
    savers: bool,
    allowed: Callable[[str], bool] = _no_exception,
) -> None:
    """Searches nodes and all functions that they call."""
    pending = [list(nodes)]
    seen: set[str] = set()
    while pending:
        block = pending.pop()
        _check_nodes(label, place, block, savers, allowed)
        for node in block:
            for name in _called(node):
                if name in functions and name not in seen:
                    seen.add(name)
                    pending.append(list(functions[name].node_def))


def _called(node: Any) -> list[str]:  # noqa: ANN401  NodeDef
    names = [node.op]
    for value in node.attr.values():
        names.append(value.func.name)
        names.extend(function.name for function in value.list.func)
    return names


def _check_nodes(
    label: Path,
    place: str,
    nodes: Iterable[Any],
    savers: bool = False,
    allowed: Callable[[str], bool] = _no_exception,
) -> None:
    for node in nodes:
        harmful = is_harmful(node.op, savers) and not allowed(node.op)
        if node.op in _PRINTS:
            harmful = node.attr["output_stream"].s.startswith(b"file:")
        if harmful:
            raise RnnpruneError(
                f"{label}: {place} holds the operator {node.op}, which can reach files or run code",
                _HINT,
            )
