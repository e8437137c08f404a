"""``.keras`` and ``.h5`` files: loading them safely, and replacing weights in place.

1. The container is checked before Keras sees it: a plausible size, no links to other files, and a
   configuration that names no Python code (Lambda layers, classes outside Keras).
2. Keras 3 or Keras 2 (``tf_keras``) loads it, whichever wrote it first, and exports a temporary
   SavedModel, which is searched and run.
3. Values are replaced in the HDF5 data sets themselves, so that the optimizer's state, the training
   configuration and all else stay as they are. A data set is recognised by its content.
"""

from __future__ import annotations

import builtins
import contextlib
import hashlib
import importlib
import json
import os
import re
import shutil
import tempfile
import warnings
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rnnprune_cli.errors import RnnpruneError
from rnnprune_cli.model import Array
from rnnprune_cli.tensorflow.runtime import DAMAGED, first_line, import_tensorflow, quiet
from rnnprune_cli.tensorflow.safety import is_harmful
from rnnprune_cli.tensorflow.store import Change, Store, same_bits

_CONFIG = "config.json"
_METADATA = "metadata.json"
_WEIGHTS = "model.weights.h5"
_NOTE = "rnnprune.json"
_NOTE_ATTRIBUTE = "rnnprune"
_MAX_CONFIG = 64 << 20
_MAX_INFLATION = 20
_ALWAYS_FINE = 256 << 20
_SAFE_MODULES = ("keras", "tf_keras")
# What a TFOpLambda layer may call: it names any symbol of TensorFlow's API, some of which read or
# write files, load libraries or run Python.
_SAFE_NAMESPACES = (
    "math",
    "nn",
    "linalg",
    "signal",
    "image",
    "strings",
    "bitwise",
    "__operators__",
)
_PLAIN = """
abs acos acosh add add_n argmax argmin argsort asin asinh atan atan2 atanh batch_to_space bitcast
boolean_mask broadcast_dynamic_shape broadcast_static_shape broadcast_to cast clip_by_global_norm
clip_by_norm clip_by_value complex concat constant cos cosh cumsum divide dynamic_partition
dynamic_stitch edit_distance eig eigvals einsum ensure_shape equal exp expand_dims eye fill
fingerprint floor gather gather_nd greater greater_equal histogram_fixed_width identity identity_n
less less_equal linspace logical_and logical_not logical_or matmul matrix_square_root maximum
meshgrid minimum multiply negative no_op norm not_equal one_hot ones ones_like pad parallel_stack
pow range rank realdiv reduce_all reduce_any reduce_logsumexp reduce_max reduce_mean reduce_min
reduce_prod reduce_sum repeat reshape reverse reverse_sequence roll round saturate_cast scalar_mul
searchsorted sequence_mask shape shape_n sigmoid sign sin sinh size slice sort space_to_batch
space_to_batch_nd split sqrt square squeeze stack stop_gradient strided_slice subtract tan tanh
tensor_scatter_nd_add tensor_scatter_nd_max tensor_scatter_nd_min tensor_scatter_nd_sub
tensor_scatter_nd_update tensordot tile transpose truediv truncatediv truncatemod unique
unique_with_counts unstack unravel_index where zeros zeros_like
"""
_SAFE_FUNCTIONS = frozenset(_PLAIN.split())
_SAFE_CLASSES = ("RaggedTensor", "SparseTensor")
_FUNCTION_LAYERS = ("TFOpLambda", "SlicingOpLambda")
_METHOD_LAYERS = ("ClassMethod", "InstanceMethod", "InstanceProperty")
_UNREADABLE = (*DAMAGED, zipfile.BadZipFile, zlib.error)
_DAMAGED_HINT = "check that the copy is complete, or download it again"
_CODE_HINT = "export the model as a SavedModel where its code is at hand, and prune that"


class KerasStore(Store):
    """A ``.keras`` or ``.h5`` file.

    Args:
        path: The file.

    Raises:
        RnnpruneError: If it is damaged, holds no model, needs code of its own, or Keras cannot
            load it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.format = "keras" if zipfile.is_zipfile(path) else "h5"
            config, version = self._inspect()
        except _UNREADABLE as error:
            raise RnnpruneError(
                f"{path}: cannot be read: {first_line(error)}", _DAMAGED_HINT
            ) from error
        _refuse_code(path, config)
        self.producer = f"Keras {version}" if version else "Keras"
        self._temporary = tempfile.TemporaryDirectory(prefix="rnnprune-")
        self.savedmodel = Path(self._temporary.name) / "model"
        # Keras goes by the suffix, which need not say what the file is.
        named = self.savedmodel.with_suffix(f".{self.format}")
        shutil.copyfile(path, named)
        _export(path, named, self.savedmodel, old=not version.startswith("3"))
        named.unlink()

    def files(self, path: Path | None = None) -> tuple[Path, ...]:
        """The one file."""
        return (path or self.path,)

    def locate(self, kernels: Mapping[int, Array]) -> dict[int, tuple[str, ...]]:
        """Data sets that hold the kernels, recognised by their content.

        Kernels of equal content share their data sets. If there are more of these than kernels,
        one belongs to something else and none is returned.
        """
        wanted: dict[str, list[int]] = defaultdict(list)
        for capture, values in kernels.items():
            wanted[_digest(values)].append(capture)
        addresses: dict[str, list[str]] = defaultdict(list)
        shapes = {values.shape for values in kernels.values()}
        with self._weights(self.path) as file:
            for name, dataset in _datasets(file).items():
                if dataset.shape in shapes and not name.startswith("optimizer"):
                    addresses[_digest(dataset[()])].append(name)
        return {
            capture: tuple(addresses[digest]) if len(addresses[digest]) == len(captures) else ()
            for digest, captures in wanted.items()
            for capture in captures
        }

    def write(self, changes: Mapping[str, Change], target: Path, note: str) -> None:
        """Copies the file to ``target`` with other values in some data sets."""
        try:
            if self.format == "h5":
                shutil.copyfile(self.path, target)
                self._edit(target, changes, note)
                return
            with tempfile.TemporaryDirectory(prefix="rnnprune-") as scratch:
                weights = Path(scratch) / _WEIGHTS
                with zipfile.ZipFile(self.path) as archive:
                    with archive.open(_WEIGHTS) as source, weights.open("wb") as copy:
                        shutil.copyfileobj(source, copy)
                    self._edit(weights, changes, "")
                    self._pack(archive, weights, target, note)
        except _UNREADABLE as error:
            raise RnnpruneError(
                f"{target}: cannot write the model: {first_line(error)}",
                "check the free space and the permissions",
            ) from error

    def _edit(self, path: Path, changes: Mapping[str, Change], note: str) -> None:
        import h5py  # type: ignore[import-untyped]

        with h5py.File(path, "r+") as file:
            for name, change in changes.items():
                if not same_bits(file[name][()], change.before):
                    raise RnnpruneError(
                        f"{self.path}: '{name}' has changed since the model was loaded",
                        "start again",
                    )
                file[name][...] = change.after
            if note:
                file.attrs[_NOTE_ATTRIBUTE] = note

    def _pack(self, archive: zipfile.ZipFile, weights: Path, target: Path, note: str) -> None:
        """Writes the archive anew; with the original dates, so that it depends on nothing else."""
        with zipfile.ZipFile(target, "w") as packed:
            for info in archive.infolist():
                if info.filename == _NOTE:
                    continue
                entry = zipfile.ZipInfo(info.filename, info.date_time)
                entry.compress_type = info.compress_type
                entry.external_attr = info.external_attr
                with (
                    packed.open(entry, "w", force_zip64=True) as sink,
                    weights.open("rb")
                    if info.filename == _WEIGHTS
                    else archive.open(info) as source,
                ):
                    shutil.copyfileobj(source, sink)
            text = json.dumps({"note": note}, indent=2, sort_keys=True) + "\n"
            packed.writestr(zipfile.ZipInfo(_NOTE), text)

    def read(self, path: Path, address: str) -> Array:
        """Reads one data set of a written file."""
        with self._weights(path) as file:
            return np.asarray(file[address][()])

    def differences(self, path: Path, changed: frozenset[str]) -> list[str]:
        """Compares the other parts of the archive, all data sets, and all attributes."""
        found = []
        if self.format == "keras":
            with zipfile.ZipFile(self.path) as original, zipfile.ZipFile(path) as copy:
                names = [set(z.namelist()) - {_NOTE, _WEIGHTS} for z in (original, copy)]
                found += sorted(names[0] ^ names[1])
                common = sorted(names[0] & names[1])
                found += [name for name in common if original.read(name) != copy.read(name)]
        with self._weights(self.path) as ours, self._weights(path) as theirs:
            left, right = _objects(ours), _objects(theirs)
            found += sorted(set(left) ^ set(right))
            for name in sorted(set(left) & set(right)):
                same = _attributes(left[name]) == _attributes(right[name])
                if hasattr(left[name], "shape") and name not in changed:
                    same = same and same_bits(left[name][()], right[name][()])
                if not same:
                    found.append(name)
        return found

    def reopen(self, path: Path) -> KerasStore:
        """Opens a written file."""
        return KerasStore(path)

    def _inspect(self) -> tuple[Any, str]:
        """Checks the container; returns the model's configuration and the version of Keras."""
        import_tensorflow()
        if self.format == "keras":
            with zipfile.ZipFile(self.path) as archive:
                _check_size(
                    self.path,
                    sum(info.file_size for info in archive.infolist()),
                    self.path.stat().st_size,
                )
                if _WEIGHTS not in archive.namelist():
                    raise RnnpruneError(
                        f"{self.path}: holds no {_WEIGHTS}",
                        "save the model again with Keras as one .keras file",
                    )
                if archive.getinfo(_CONFIG).file_size > _MAX_CONFIG:
                    raise ValueError(f"{_CONFIG} is larger than {_MAX_CONFIG >> 20} MiB")
                config = json.loads(archive.read(_CONFIG))
                metadata = json.loads(archive.read(_METADATA))
            version = str(metadata.get("keras_version", ""))
        with self._weights(self.path) as file:
            datasets = _datasets(file)
            _check_size(
                self.path,
                sum(dataset.nbytes for dataset in datasets.values()),
                self.path.stat().st_size,
            )
            if self.format == "keras":
                return config, version
            if "model_config" not in file.attrs:
                raise RnnpruneError(
                    f"{self.path}: holds weights but no model",
                    "save the whole model with model.save(…), not model.save_weights(…)",
                )
            return json.loads(file.attrs["model_config"]), _text(file.attrs.get("keras_version"))

    @contextlib.contextmanager
    def _weights(self, path: Path) -> Iterator[Any]:
        """Opens the HDF5 file, or the one inside the archive, for reading.

        HDF5 finds damage only where it reads, so that any access can fail.
        """
        import h5py

        with contextlib.ExitStack() as stack:
            try:
                source: Any = path
                if self.format == "keras":
                    # HDF5 needs random access, and a disk holds more than memory.
                    source = stack.enter_context(tempfile.TemporaryFile())
                    with zipfile.ZipFile(path) as archive, archive.open(_WEIGHTS) as stream:
                        shutil.copyfileobj(stream, source)
                    source.seek(0)
                yield stack.enter_context(h5py.File(source, "r"))
            except _UNREADABLE as error:
                raise RnnpruneError(
                    f"{path}: cannot be read: {first_line(error)}", _DAMAGED_HINT
                ) from error


def _check_size(path: Path, unpacked: int, stored: int) -> None:
    """Refuses files that would unpack to far more than they hold."""
    if unpacked > _ALWAYS_FINE and unpacked > _MAX_INFLATION * stored:
        raise RnnpruneError(
            f"{path}: {stored >> 10} KiB would unpack to {unpacked >> 20} MiB",
            "this is no ordinary model; save it again uncompressed if you trust it",
        )


def _objects(file: Any) -> dict[str, Any]:  # noqa: ANN401  h5py.File
    """All groups and data sets by path, the root as an empty one."""
    import h5py

    found = {"": file}
    pending = [("", file)]
    while pending:
        prefix, group = pending.pop()
        for name in group:
            link = group.get(name, getlink=True)
            if not isinstance(link, h5py.HardLink):
                raise ValueError(f"'{prefix}{name}' is a link to another place")
            item = group[name]
            found[f"{prefix}{name}"] = item
            if isinstance(item, h5py.Group):
                pending.append((f"{prefix}{name}/", item))
            elif item.is_virtual or item.external:
                raise ValueError(f"'{prefix}{name}' is stored in another file")
    return found


def _datasets(file: Any) -> dict[str, Any]:  # noqa: ANN401  h5py.File
    """The data sets by path."""
    return {name: item for name, item in _objects(file).items() if hasattr(item, "shape")}


def _attributes(item: Any) -> dict[str, str]:  # noqa: ANN401
    """The attributes of an HDF5 object in a form that can be compared."""
    return {
        name: repr(np.asarray(value).tolist())
        for name, value in item.attrs.items()
        if name != _NOTE_ATTRIBUTE
    }


def _text(value: Any) -> str:  # noqa: ANN401
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value or "")


def _digest(values: Array) -> str:
    data = np.ascontiguousarray(values)
    return f"{data.dtype} {data.shape} {hashlib.sha256(data.tobytes()).hexdigest()}"


def _refuse_code(path: Path, config: Any) -> None:  # noqa: ANN401  parsed JSON
    """Refuses a configuration that would have Keras run code which the file brings or names."""
    pending = [config]
    while pending:
        item = pending.pop()
        if isinstance(item, list):
            pending.extend(item)
        if not isinstance(item, dict):
            continue
        # Losses and metrics are not loaded.
        pending.extend(value for key, value in item.items() if key != "compile_config")
        kind, module = str(item.get("class_name", "")), item.get("module")
        if kind in ("Lambda", "__lambda__"):
            raise RnnpruneError(f"{path}: a Lambda layer holds Python code", _CODE_HINT)
        if isinstance(module, str) and not _is_keras(module, kind, item.get("config")):
            raise RnnpruneError(f"{path}: {kind!a} is code of {module!a}, not of Keras", _CODE_HINT)
        settings = item.get("config")
        name = _unsafe_call(kind, settings if isinstance(settings, dict) else {})
        if name is not None:
            raise RnnpruneError(f"{path}: a layer calls {name!a}", _CODE_HINT)


def _unsafe_call(kind: str, settings: dict[str, Any]) -> str | None:
    """What a layer calls by its name, unless it is a plain computation."""
    if kind in _FUNCTION_LAYERS:
        function = str(settings.get("function"))
        return None if _is_safe_function(function) else f"tf.{function}"
    if kind in _METHOD_LAYERS:
        owner = str(settings.get("cls_symbol", _SAFE_CLASSES[0]))
        method = str(settings.get("method_name", settings.get("attr_name")))
        safe = owner in _SAFE_CLASSES and not method.startswith("_")
        return None if safe else f"tf.{owner}.{method}"
    if kind == "TensorFlowOpLayer":  # Keras of TensorFlow 2.0 to 2.3
        words = re.findall(r"\w+", str(settings.get("node_def")))
        return next((word for word in words if is_harmful(word, savers=True)), None)
    return None


def _is_keras(module: str, kind: str, config: Any) -> bool:  # noqa: ANN401
    """Whether an object is Keras's own; its functions claim to be of ``builtins``, by name."""
    if module == "builtins":
        return kind == "function" and isinstance(config, str) and not hasattr(builtins, config)
    return module.split(".")[0] in _SAFE_MODULES


_SAFE_COMPAT = frozenset(
    f"compat.v1.{name}"
    for name in ("transpose", "squeeze", "shape", "size", "gather", "gather_nd", "pad")
)
"""What tf_keras itself saves under the old names."""


def _is_safe_function(name: str) -> bool:
    """Whether a symbol of TensorFlow's API is a plain computation."""
    if name in _SAFE_COMPAT:
        return True
    namespace = name.split(".")[:-1]
    return namespace[0] in _SAFE_NAMESPACES if namespace else name in _SAFE_FUNCTIONS


def _export(path: Path, named: Path, target: Path, old: bool) -> None:
    """Loads a file with the Keras that wrote it, else with the other, and exports it.

    Args:
        path: What the user named, for messages.
        named: The same file under a name that Keras takes.
        target: Where the SavedModel goes.
        old: Whether Keras 2 wrote it.
    """
    tf = import_tensorflow()
    packages = ("tf_keras", "keras") if old else ("keras", "tf_keras")
    reasons = [_failure(tf, packages[0], named, target)]
    if reasons[0] is not None:
        shutil.rmtree(target, ignore_errors=True)
        reasons.append(_failure(tf, packages[1], named, target))
    if reasons[-1] is not None:
        # The first is the version that the file claims to be of.
        raise RnnpruneError(f"{path}: Keras cannot load it: {reasons[0]}", _CODE_HINT)


def _failure(tf: Any, package: str, named: Path, target: Path) -> str | None:  # noqa: ANN401
    """Loads a file and exports it; returns why that failed."""
    try:
        with (
            quiet(),
            warnings.catch_warnings(),
            Path(os.devnull).open("w") as sink,
            contextlib.redirect_stdout(sink),
        ):
            warnings.simplefilter("ignore")
            keras = importlib.import_module(package)
            model = keras.models.load_model(str(named), compile=False, safe_mode=True)
            _write_savedmodel(tf, keras, model, target)
    except (*_UNREADABLE, ImportError, tf.errors.OpError) as error:
        return first_line(error)
    return None


def _write_savedmodel(tf: Any, keras: Any, model: Any, target: Path) -> None:  # noqa: ANN401
    """Exports a model whose signature has the names of its inputs and output layers."""
    if not model.inputs:
        raise ValueError("the model does not know the shape of its input")
    specs = [tf.TensorSpec(i.shape, i.dtype, i.name.split(":")[0]) for i in model.inputs]
    # A Sequential has one output, and in Keras 3 no name for it.
    names = list(getattr(model, "output_names", None) or ["output"])
    if len(set(names)) < len(names):
        names = [f"output_{position}" for position in range(len(names))]

    def call(*inputs: Any) -> dict[str, Any]:  # noqa: ANN401
        outputs = model(inputs[0] if len(inputs) == 1 else list(inputs), training=False)
        return dict(zip(names, tf.nest.flatten(outputs), strict=True))

    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("serve", call, input_signature=specs)
    archive.write_out(str(target))
