"""Reading ONNX files that nobody vouches for: every size and path is checked before it is used."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto

from rnnprune_cli.errors import RnnpruneError

MAX_DENSIFIED_BYTES = 1 << 32

_DAMAGED = "the file is damaged or is not an ONNX model; export or copy it again"


def read_proto(path: Path) -> onnx.ModelProto:
    """Reads and checks a model without loading its external data.

    Sparse initializers and sparse Constants are made dense, because onnx-ir drops them.

    Raises:
        RnnpruneError: If the file is not a usable ONNX model, or external data lies outside the
            model's folder, is missing or is too short.
    """
    if path.stat().st_size == 0:
        raise RnnpruneError(f"{path} is empty", _DAMAGED)
    proto = onnx.ModelProto()
    try:
        with (
            path.open("rb") as file,
            mmap(file.fileno(), 0, access=ACCESS_READ) as data,
            memoryview(data) as view,  # not a second copy in memory
        ):
            proto.ParseFromString(view)
    except DecodeError as error:
        raise RnnpruneError(
            f"{path} is not an ONNX model: it cannot be decoded", _DAMAGED
        ) from error
    # protobuf accepts much that was never a model: text can parse as unknown fields.
    if not proto.graph.node or not proto.opset_import:
        raise RnnpruneError(f"{path} is not an ONNX model: it holds no graph", _DAMAGED)
    for tensor in tensors(proto):
        _check_tensor(tensor, path)
    _check_sparse(proto, path)
    for graph in graphs(proto):
        _densify(graph, path)
    _check_structure(proto, path)
    return proto


def deserialize(proto: onnx.ModelProto, path: Path) -> ir.Model:
    """Turns a checked proto into onnx-ir, with external data bound to the model's folder."""
    logging.getLogger("onnx_ir").setLevel(logging.CRITICAL)  # its warnings name no remedy
    try:
        model = ir.from_proto(proto)
    except Exception as error:  # onnx-ir raises many unrelated types on invalid models
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = " ".join(str(cause).split())[:200]
        raise RnnpruneError(f"{path} is not a valid ONNX model: {reason}", _DAMAGED) from error
    for graph in (model.graph, *(f.graph for f in model.functions.values())):
        ir.external_data.set_base_dir(graph, path.parent.resolve())
    return model


def external_files(proto: onnx.ModelProto, path: Path) -> tuple[Path, ...]:
    """Returns the external data files of a model, each once, in order of first use."""
    names = [_location(t) for t in tensors(proto) if _is_external(t)]
    return tuple(path.parent / name for name in dict.fromkeys(names))


def checker_refuses(path: Path) -> str | None:
    """Returns what ``onnx.checker`` with full check has against a file; None if it accepts it."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # the checker and shape inference raise unrelated types
        return " ".join(str(error).split())[:200]
    return None


def tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yields every tensor stored in a model: initializers and attributes, in all graphs."""
    for graph in graphs(proto):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for node in _nodes(proto):
        for attr in node.attribute:
            if attr.HasField("t"):
                yield attr.t
            yield from attr.tensors
            if attr.HasField("sparse_tensor"):
                yield from (attr.sparse_tensor.values, attr.sparse_tensor.indices)


def _nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for graph in graphs(proto):
        yield from graph.node
    for function in proto.functions:
        yield from function.node


def graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """Yields every graph of a model: main graph, branches and bodies, in functions too."""
    return _graphs([proto.graph, *proto.functions])


def _graphs(top: Sequence[Any]) -> Iterator[onnx.GraphProto]:
    pending = list(top)
    while pending:
        holder = pending.pop()
        if isinstance(holder, onnx.GraphProto):
            yield holder
        for node in holder.node:
            for attr in node.attribute:
                if attr.HasField("g"):
                    pending.append(attr.g)
                pending.extend(attr.graphs)


def _is_external(tensor: onnx.TensorProto) -> bool:
    return tensor.data_location == onnx.TensorProto.EXTERNAL


def _entries(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _location(tensor: onnx.TensorProto) -> str:
    return _entries(tensor).get("location", "")


_FIELDS: dict[int, str] = {
    TensorProto.FLOAT: "float_data",
    TensorProto.DOUBLE: "double_data",
    TensorProto.INT64: "int64_data",
    TensorProto.UINT32: "uint64_data",
    TensorProto.UINT64: "uint64_data",
    **dict.fromkeys(
        (
            TensorProto.INT32,
            TensorProto.INT16,
            TensorProto.INT8,
            TensorProto.UINT16,
            TensorProto.UINT8,
            TensorProto.BOOL,
            TensorProto.FLOAT16,
            TensorProto.BFLOAT16,
        ),
        "int32_data",
    ),
}
"""Type → field of TensorProto that holds one entry for each element, where data are not raw."""


def _stored_elements(tensor: onnx.TensorProto) -> int | None:
    """Elements in the typed field of a tensor; None for raw data and for packed types."""
    if tensor.HasField("raw_data") or tensor.data_type not in _FIELDS:
        return None
    return len(getattr(tensor, _FIELDS[tensor.data_type]))


def _elements(tensor: onnx.TensorProto) -> int:
    return int(np.prod([int(d) for d in tensor.dims], dtype=object))


def _bytes_needed(tensor: onnx.TensorProto, path: Path) -> int | None:
    """Bytes of a tensor's data in raw form; None for strings and unknown types."""
    if any(d < 0 for d in tensor.dims):
        raise RnnpruneError(f"{path}: tensor '{tensor.name}' has a negative dimension", _DAMAGED)
    try:
        dtype = ir.DataType(tensor.data_type)
        bits = dtype.bitwidth
    except (ValueError, TypeError):
        return None
    return -(-_elements(tensor) * bits // 8)


def _check_tensor(tensor: onnx.TensorProto, path: Path) -> None:
    needed = _bytes_needed(tensor, path)
    if not _is_external(tensor):
        if needed is not None and tensor.HasField("raw_data") and len(tensor.raw_data) != needed:
            raise RnnpruneError(
                f"{path}: tensor '{tensor.name}' of shape {list(tensor.dims)} needs {needed} bytes,"
                f" the file holds {len(tensor.raw_data)}",
                _DAMAGED,
            )
        stored = _stored_elements(tensor)
        if needed is not None and stored is not None and stored != _elements(tensor):
            raise RnnpruneError(
                f"{path}: tensor '{tensor.name}' of shape {list(tensor.dims)} holds {stored}"
                " elements",
                _DAMAGED,
            )
        return
    location = _location(tensor)
    folder = path.parent.resolve()
    target = (folder / location).resolve()
    if not location or Path(location).is_absolute() or not target.is_relative_to(folder):
        raise RnnpruneError(
            f"{path}: tensor '{tensor.name}' keeps its data in '{location}', outside the model's"
            " folder",
            "data files must lie beside the model; save it again with a relative location",
        )
    if not (path.parent / location).is_file():
        raise RnnpruneError(
            f"{path}: the data file '{location}' of tensor '{tensor.name}' is missing",
            "copy it next to the model",
        )
    entries = _entries(tensor)
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries.get("length", needed or 0))
    except ValueError:
        offset = length = -1
    if needed is None or length != needed or offset < 0 or offset + length > target.stat().st_size:
        raise RnnpruneError(
            f"{path}: the data file '{location}' is too short for tensor '{tensor.name}' or its"
            " offset and length are wrong",
            _DAMAGED,
        )


def _check_structure(proto: onnx.ModelProto, path: Path) -> None:
    """Refuses what the checker calls invalid in the graph itself.

    The checker also refuses models that run (an unknown custom operator, say), so only the
    errors that would mislead the rest of the program are taken from it: order and names.
    """
    _check_order(proto.graph, {i.name for i in proto.graph.input}, path)
    for function in proto.functions:
        _check_order(function, set(function.input), path)


def _check_order(
    graph: onnx.GraphProto | onnx.FunctionProto, visible: set[str], path: Path
) -> None:
    known = set(visible)
    if isinstance(graph, onnx.GraphProto):
        known |= {i.name for i in graph.input} | {t.name for t in graph.initializer}
    for node in graph.node:
        for name in node.input:
            if name and name not in known:
                raise RnnpruneError(
                    f"{path}: node '{node.name or node.op_type}' reads '{name}' before any node"
                    " makes it: the graph has a cycle or is out of order",
                    "the model is not valid ONNX; export it again",
                )
        for attr in node.attribute:
            for sub in ([attr.g] if attr.HasField("g") else []) + list(attr.graphs):
                _check_order(sub, known, path)
        known.update(node.output)


def _sparse_tensors(holders: Iterable[Any]) -> Iterator[onnx.SparseTensorProto]:
    """Yields the sparse tensors that graphs and functions hold themselves."""
    for holder in holders:
        if isinstance(holder, onnx.GraphProto):
            yield from holder.sparse_initializer
        for node in holder.node:
            yield from (a.sparse_tensor for a in node.attribute if a.HasField("sparse_tensor"))


def _check_sparse(proto: onnx.ModelProto, path: Path) -> None:
    """Refuses sparse tensors that would take too much memory, or that crash onnxruntime."""
    if any(_sparse_tensors([*proto.functions, *_graphs(proto.functions)])):
        raise RnnpruneError(
            f"{path}: a model function holds a sparse constant, which makes onnxruntime read freed"
            " memory and crash when it inlines the function",
            "inline the functions first: onnx.inliner.inline_local_functions",
        )
    total = 0
    for tensor in _sparse_tensors(_graphs([proto.graph])):
        if any(d < 0 for d in tensor.dims):
            raise RnnpruneError(f"{path}: a sparse tensor has a negative dimension", _DAMAGED)
        total += 8 * int(np.prod([int(d) for d in tensor.dims], dtype=object))
    if total > MAX_DENSIFIED_BYTES:
        raise RnnpruneError(
            f"{path}: its sparse tensors would take {total / 2**30:.1f} GiB when made dense, more"
            f" than {MAX_DENSIFIED_BYTES >> 30} GiB",
            _DAMAGED,
        )


def _densify(graph: onnx.GraphProto, path: Path) -> None:
    for sparse in graph.sparse_initializer:
        graph.initializer.append(_dense(sparse, sparse.values.name, path))
    del graph.sparse_initializer[:]
    for node in graph.node:
        for attr in node.attribute:
            if node.op_type == "Constant" and attr.name == "sparse_value":
                tensor = _dense(attr.sparse_tensor, "", path)
                attr.CopyFrom(onnx.helper.make_attribute("value", tensor))


def _dense(sparse: onnx.SparseTensorProto, name: str, path: Path) -> onnx.TensorProto:
    """Makes a sparse tensor dense, refusing sizes and positions that cannot be right."""
    size = int(np.prod([int(d) for d in sparse.dims], dtype=object))
    try:
        values = onnx.numpy_helper.to_array(sparse.values, base_dir=str(path.parent))
        indices = onnx.numpy_helper.to_array(sparse.indices, base_dir=str(path.parent))
    except (ValueError, TypeError, OSError) as error:
        raise RnnpruneError(f"{path}: sparse tensor '{name}' cannot be read", _DAMAGED) from error
    if indices.ndim == 2 and indices.shape[1] == len(sparse.dims):
        inside = bool((indices >= 0).all() and (indices < np.array(sparse.dims)).all())
        flat = np.ravel_multi_index(tuple(indices.T), tuple(sparse.dims)) if inside else None
    else:
        inside = indices.ndim == 1 and bool((indices >= 0).all() and (indices < size).all())
        flat = indices if inside else None
    if flat is None or len(flat) != len(values):
        raise RnnpruneError(f"{path}: sparse tensor '{name}' has positions outside it", _DAMAGED)
    dense = np.zeros(size, values.dtype)
    dense[flat] = values
    return onnx.numpy_helper.from_array(dense.reshape(tuple(sparse.dims)), name)
