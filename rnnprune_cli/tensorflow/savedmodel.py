"""SavedModel directories: finding a variable's place in the checkpoint, and writing other values.

Only the checkpoint is written. The graph (``saved_model.pb``), its assets and metadata are copied
byte for byte, so that every signature keeps working. See "SavedModel format" in the TensorFlow
guide: the object graph names, for each captured input of a function, a node; the checkpoint names,
for each node, a key.
"""

from __future__ import annotations

import filecmp
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rnnprune_cli.errors import RnnpruneError
from rnnprune_cli.model import Array
from rnnprune_cli.tensorflow.runtime import DAMAGED, first_line, import_tensorflow
from rnnprune_cli.tensorflow.store import Change, Store, same_bits

_OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
_NOTE = Path("assets.extra") / "rnnprune.json"
_INCOMPLETE = "check that the copy is complete, or download it again"


class SavedModelStore(Store):
    """A SavedModel directory.

    Args:
        path: The directory.

    Raises:
        RnnpruneError: If it is no SavedModel, or is damaged or incomplete.
    """

    format = "savedmodel"

    def __init__(self, path: Path) -> None:
        self.path = self.savedmodel = path
        meta_graph = _read_meta_graph(path)
        version = meta_graph.meta_info_def.tensorflow_version
        self.producer = f"TensorFlow {version}" if version else "TensorFlow"
        self._objects = meta_graph.object_graph_def
        needs_variables = any(n.WhichOneof("kind") == "variable" for n in self._objects.nodes)
        self._reader = _open_checkpoint(path, needs_variables)
        self._keys = self._checkpoint_keys()
        self._captures: tuple[int, ...] = ()

    def select(self, signature: str) -> None:
        """Chooses the signature whose captures :meth:`locate` is asked for."""
        nodes = self._objects.nodes
        node = nodes[0] if len(nodes) else None
        for name in ("signatures", signature):
            children = {child.local_name: child.node_id for child in node.children} if node else {}
            node = nodes[children[name]] if name in children else None
        if node is None:
            return
        if node.WhichOneof("kind") == "bare_concrete_function":
            function = node.bare_concrete_function.concrete_function_name
        else:
            function = next(iter(node.function.concrete_functions), "")
        self._captures = tuple(self._objects.concrete_functions[function].bound_inputs)

    def files(self, path: Path | None = None) -> tuple[Path, ...]:
        """All files below the directory, sorted."""
        return tuple(sorted(file for file in (path or self.path).rglob("*") if file.is_file()))

    def locate(self, kernels: Mapping[int, Array]) -> dict[int, tuple[str, ...]]:
        """Checkpoint keys of captured variables and of their copies.

        Keras 3 exports each weight twice; the copy has the variable's name and its value, and would
        keep the removed weights in the file if it were left.
        """
        others = {self._captures[c] for c in kernels if c < len(self._captures)}
        return {c: self._keys_of(c, values, others) for c, values in kernels.items()}

    def _keys_of(self, capture: int, values: Array, others: set[int]) -> tuple[str, ...]:
        if capture >= len(self._captures):
            return ()
        node = self._captures[capture]
        key = self._keys.get(node)
        if key is None or not same_bits(self._tensor(key), values):
            return ()
        name = self._objects.nodes[node].variable.name
        copies = [
            other
            for twin, other in self._keys.items()
            if twin not in others  # a variable of its own, if of the same default name
            and name
            and self._objects.nodes[twin].variable.name == name
            and same_bits(self._tensor(other), values)
        ]
        return (key, *copies)

    def write(self, changes: Mapping[str, Change], target: Path, note: str) -> None:
        """Copies the directory to ``target`` and writes the checkpoint anew.

        Raises:
            RnnpruneError: If a tensor is not what it was when the model was loaded, or the copy
                cannot be written.
        """
        tf = import_tensorflow()
        try:
            shutil.copytree(self.path, target, ignore=self._ignore_checkpoint)
            if self._reader is not None:
                self._write_checkpoint(tf, changes, target / "variables" / "variables")
            write_note(target, note)
        except (OSError, tf.errors.OpError) as error:
            raise RnnpruneError(
                f"{target}: cannot write the SavedModel: {first_line(error)}",
                "check the free space and the permissions",
            ) from error

    def _ignore_checkpoint(self, directory: str, names: list[str]) -> list[str]:
        if Path(directory) != self.path / "variables":
            return []
        return [name for name in names if name.startswith("variables.")]

    def _write_checkpoint(self, tf: Any, changes: Mapping[str, Change], prefix: Path) -> None:  # noqa: ANN401
        types = self._reader.get_variable_to_dtype_map()
        keys = sorted(types)
        tensors = []
        for key in keys:
            value = self._tensor(key)
            change = changes.get(key)
            if change is not None:
                if not same_bits(value, change.before):
                    raise RnnpruneError(
                        f"{self.path}: '{key}' has changed since the model was loaded",
                        "start again",
                    )
                value = change.after
            tensors.append(tf.constant(value, types[key]))
        prefix.parent.mkdir(exist_ok=True)
        tf.raw_ops.SaveV2(
            prefix=str(prefix),
            tensor_names=keys,
            shape_and_slices=[""] * len(keys),
            tensors=tensors,
        )

    def read(self, path: Path, address: str) -> Array:
        """Reads a tensor from the checkpoint of a written SavedModel."""
        reader = _open_checkpoint(path, True)
        return np.asarray(_read_tensor(path, reader, address))

    def differences(self, path: Path, changed: frozenset[str]) -> list[str]:
        """Compares all files but the checkpoint byte by byte, and its tensors bit by bit."""
        ours, theirs = (
            {
                file.relative_to(root)
                for file in self.files(root)
                if not str(file.relative_to(root)).startswith("variables/variables.")
                and file.relative_to(root) != _NOTE
            }
            for root in (self.path, path)
        )
        found = [str(file) for file in sorted(ours ^ theirs)]
        found += [
            str(file)
            for file in sorted(ours & theirs)
            if not filecmp.cmp(self.path / file, path / file, shallow=False)
        ]
        if self._reader is None:
            return found
        reader = _open_checkpoint(path, True)
        before = self._reader.get_variable_to_dtype_map()
        after = reader.get_variable_to_dtype_map()
        found += sorted(set(before) ^ set(after))
        found += [
            key
            for key in sorted(set(before) & set(after) - changed)
            if before[key] != after[key]
            or not same_bits(self._tensor(key), _read_tensor(path, reader, key))
        ]
        return found

    def reopen(self, path: Path) -> SavedModelStore:
        """Opens a written SavedModel."""
        return SavedModelStore(path)

    def _tensor(self, key: str) -> Any:  # noqa: ANN401  ndarray, or bytes for a string scalar
        return _read_tensor(self.path, self._reader, key)

    def _checkpoint_keys(self) -> dict[int, str]:
        """Node of the object graph → checkpoint key, for variables.

        The two graphs number their nodes independently, so both are walked from the root along
        children of the same name.
        """
        if self._reader is None:
            return {}
        nodes = self._objects.nodes
        stored = self._reader.get_variable_to_dtype_map()
        if not nodes or _OBJECT_GRAPH not in stored:
            return {}  # saved by TensorFlow 1
        from tensorflow.core.protobuf import trackable_object_graph_pb2

        graph = trackable_object_graph_pb2.TrackableObjectGraph()
        graph.ParseFromString(self._tensor(_OBJECT_GRAPH))
        keys: dict[int, str] = {}
        seen = {(0, 0)}
        pending = [(0, 0)]
        while pending:
            ours, theirs = pending.pop()
            if nodes[ours].WhichOneof("kind") == "variable":
                for attribute in graph.nodes[theirs].attributes:
                    if attribute.name == "VARIABLE_VALUE" and attribute.checkpoint_key in stored:
                        keys[ours] = attribute.checkpoint_key
            children = {child.local_name: child.node_id for child in graph.nodes[theirs].children}
            for child in nodes[ours].children:
                pair = (child.node_id, children.get(child.local_name, -1))
                if pair[1] >= 0 and pair not in seen:
                    seen.add(pair)
                    pending.append(pair)
        return keys


def write_note(path: Path, note: str) -> None:
    """Writes where a SavedModel comes from, beside its graph."""
    file = path / _NOTE
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"note": note}, indent=2, sort_keys=True) + "\n", "utf-8")


def _read_meta_graph(path: Path) -> Any:  # noqa: ANN401  MetaGraphDef
    """Parses ``saved_model.pb``."""
    file = path / "saved_model.pb"
    if not file.is_file():
        if (path / "saved_model.pbtxt").is_file():
            raise RnnpruneError(
                f"{path}: the SavedModel is in text form (saved_model.pbtxt)",
                "load and save it again with TensorFlow, which writes saved_model.pb",
            )
        raise RnnpruneError(
            f"{path}: not a SavedModel: it has no saved_model.pb",
            "name the directory that holds saved_model.pb and variables/",
        )
    import_tensorflow()
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from tensorflow.core.protobuf import saved_model_pb2

    model = saved_model_pb2.SavedModel()
    try:
        model.ParseFromString(file.read_bytes())
    except (DecodeError, OSError) as error:
        raise RnnpruneError(f"{file}: cannot be read: {first_line(error)}", _INCOMPLETE) from error
    if not model.meta_graphs:
        raise RnnpruneError(f"{file}: holds no graph", _INCOMPLETE)
    if len(model.meta_graphs) > 1:
        raise RnnpruneError(
            f"{path}: the SavedModel holds {len(model.meta_graphs)} graphs",
            "save it again with TensorFlow 2, which writes one",
        )
    return model.meta_graphs[0]


def _open_checkpoint(path: Path, required: bool) -> Any:  # noqa: ANN401  CheckpointReader
    """Opens the variables of a SavedModel; None if it has none and needs none."""
    tf = import_tensorflow()
    prefix = path / "variables" / "variables"
    index = prefix.with_name("variables.index")
    if not index.is_file():
        if required:
            raise RnnpruneError(f"{path}: variables/variables.index is missing", _INCOMPLETE)
        return None
    try:
        return tf.train.load_checkpoint(str(prefix))
    except (*DAMAGED, tf.errors.OpError) as error:
        raise RnnpruneError(
            f"{path}: the variables cannot be read: {first_line(error)}", _INCOMPLETE
        ) from error


def _read_tensor(path: Path, reader: Any, key: str) -> Any:  # noqa: ANN401
    tf = import_tensorflow()
    try:
        return reader.get_tensor(key)
    except (*DAMAGED, tf.errors.OpError) as error:
        raise RnnpruneError(
            f"{path}: the variable '{key}' cannot be read: {first_line(error)}", _INCOMPLETE
        ) from error
