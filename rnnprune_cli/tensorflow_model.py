"""TensorFlow models: SavedModel directories, and ``.keras`` and ``.h5`` files.

Weights are pruned in place: the values of the variables are replaced in a copy of the files and
nothing else changes. A Keras file is exported to a temporary SavedModel, which is what gets
searched and run, so that all formats share one way through the code.
"""

from __future__ import annotations

import functools
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from rnnprune_cli.errors import RnnpruneError
from rnnprune_cli.gate_order import keras_to_onnx, onnx_to_keras
from rnnprune_cli.model import (
    GATES,
    UNCHANGED,
    Array,
    Claim,
    ExportOptions,
    LoadedModel,
    Op,
    ParameterCount,
    Pruned,
    RecurrentLayer,
    Runner,
    Saved,
    Skipped,
    Weight,
)
from rnnprune_cli.tensorflow.recurrence import Findings, Recurrence, layer_path
from rnnprune_cli.tensorflow.runtime import Program, TensorFlowRunner, is_float, set_threads
from rnnprune_cli.tensorflow.savedmodel import SavedModelStore
from rnnprune_cli.tensorflow.store import Change, Store, check_dense

_KERAS_SUFFIXES = (".keras", ".h5", ".hdf5")


def load(path: Path, signature: str | None = None, threads: int = 1) -> TensorFlowModel:
    """Reads a TensorFlow model and finds its recurrent layers.

    Args:
        path: A SavedModel directory, or a ``.keras`` or ``.h5`` file.
        signature: Which signature to work on; None for ``serving_default`` or the only one.
        threads: Threads that TensorFlow uses, for the rest of the process.

    Returns:
        The model; nothing of it has been executed.

    Raises:
        UsageError: If the signature does not exist, or one must be chosen.
        RnnpruneError: If the model cannot be read, holds NaN or infinite recurrent weights, or
            TensorFlow is not installed.
    """
    warning = set_threads(threads)
    store = _open_store(path)
    program = Program.load(store.savedmodel, signature, store.path)
    if isinstance(store, SavedModelStore):
        store.select(program.signature)
    return TensorFlowModel(store, program, program.analyse(), (warning,) if warning else ())


def to_onnx(model: TensorFlowModel, opset: int = 18) -> onnx.ModelProto:
    """Converts the signature of a model, as it was loaded, to ONNX.

    Args:
        model: What :func:`load` returned.
        opset: Version of the default operator set.

    Returns:
        A model whose inputs and outputs have the names of the signature; sizes that the signature
        leaves open stay open.

    Raises:
        RnnpruneError: If it cannot be converted (a stateful model, an operator without
            equivalent), or tf2onnx is not installed.
    """
    from rnnprune_cli.tensorflow.convert import convert

    return convert(model.path, model.program, model.stateful, opset)


def _open_store(path: Path) -> Store:
    if path.is_dir():
        return SavedModelStore(path)
    if not path.exists():
        raise RnnpruneError(f"{path}: no such file or directory")
    if path.suffix.lower() in _KERAS_SUFFIXES:
        from rnnprune_cli.tensorflow.keras_file import KerasStore

        return KerasStore(path)
    raise RnnpruneError(
        f"{path}: not a TensorFlow model",
        "name a SavedModel directory, or a .keras or .h5 file",
    )


@dataclass(frozen=True, eq=False)
class _Kernel:
    """Where a weight comes from.

    Attributes:
        op: Decides the order of its gates.
        captures: The variables that hold it; several where equal copies are shared.
        addresses: Where the files hold it.
    """

    op: Op
    captures: tuple[int, ...]
    addresses: tuple[str, ...]


class TensorFlowModel(LoadedModel):
    """A SavedModel or Keras file, opened by :func:`load`."""

    def __init__(
        self, store: Store, program: Program, findings: Findings, warnings: tuple[str, ...]
    ) -> None:
        self.path = store.path
        self.format = store.format
        self.producer = store.producer
        self.opset = None
        self.files = store.files()
        self.warnings = warnings
        self.program = program
        self._store = store
        self._findings = findings
        self._kernels: dict[str, _Kernel] = {}
        self._by_variable: dict[int, Weight] = {}
        self._by_content: dict[tuple[str, bytes], Weight] = {}
        self.skipped = findings.skipped
        captures = dict.fromkeys(c for layer in findings.layers for c in (layer.w, layer.r))
        self._addresses = self._distinct(store.locate({c: program.values(c) for c in captures}))
        layers = []
        for recurrence, name in zip(findings.layers, self._layer_names(), strict=True):
            layer = self._layer(recurrence, name)
            if layer is not None:
                layers.append(layer)
        self.layers = tuple(layers)

    def _distinct(self, located: dict[int, tuple[str, ...]]) -> dict[int, tuple[str, ...]]:
        """Drops addresses that could be those of a W as well as of an R, which are never copies."""
        roles: dict[int, str] = {}
        for layer in self._findings.layers:
            for capture, role in ((layer.w, "W"), (layer.r, "R")):
                roles.setdefault(capture, role)
        claims: dict[str, set[str]] = defaultdict(set)
        for capture, addresses in located.items():
            for address in addresses:
                claims[address].add(roles[capture])
        return {
            capture: addresses if all(len(claims[a]) == 1 for a in addresses) else ()
            for capture, addresses in located.items()
        }

    # -- layers -----------------------------------------------------------------------------------

    def _layer_names(self) -> list[str]:
        """The Keras path of each layer, as its recurrent kernel's variable spells it."""
        names: list[str] = []
        for recurrence in self._findings.layers:
            base = layer_path(self.program.name(recurrence.r))
            name, number = base, 1
            while name in names:
                number += 1
                name = f"{base}#{number}"
            names.append(name)
        return names

    def _layer(self, recurrence: Recurrence, name: str) -> RecurrentLayer | None:
        """Describes a layer, or notes why it cannot be pruned."""
        captures = (recurrence.w, recurrence.r)
        located = [self._addresses[capture] for capture in captures]
        if not all(located):
            reason = "it cannot be told which of the stored variables are its weights"
            hint = "save the model again with the current TensorFlow"
            self.skipped = (*self.skipped, Skipped(name, reason, hint))
            return None
        w, r = (
            self._weight(recurrence.op, capture, addresses, name, role)
            for capture, addresses, role in zip(captures, located, "WR", strict=True)
        )
        hidden = r.shape[2]
        direction = "reverse" if recurrence.reverse else "forward"
        return RecurrentLayer(name, recurrence.op, direction, w.shape[2], hidden, w, r)

    def _weight(
        self, op: Op, capture: int, addresses: tuple[str, ...], layer: str, role: str
    ) -> Weight:
        """The weight of a variable; variables of equal content and role share one."""
        if capture in self._by_variable:
            return self._by_variable[capture]
        name = f"{layer}.{role}"
        values = self.program.values(capture)
        if not np.isfinite(values).all():
            raise RnnpruneError(
                f"{self.path}: the weights '{name}' hold NaN or infinite values",
                "the model was damaged in training; restore an earlier checkpoint",
            )
        shape = "x".join(map(str, values.shape))
        digest = hashlib.sha256(np.ascontiguousarray(values).tobytes()).digest()
        key = (f"{op} {role} {values.dtype} {shape}", digest)
        weight = self._by_content.get(key)
        if weight is None:
            columns, rows = values.shape
            read = self._reader(op, capture)
            weight = Weight(name, (1, rows, columns), values.dtype, read, GATES[op])
            self._by_content[key] = weight
            self._kernels[name] = _Kernel(op, (capture,), addresses)
        else:
            known = self._kernels[weight.name]
            merged = tuple(dict.fromkeys(known.addresses + addresses))
            self._kernels[weight.name] = _Kernel(op, (*known.captures, capture), merged)
        self._by_variable[capture] = weight
        return weight

    def _reader(self, op: Op, capture: int) -> Callable[[], Array]:
        # Kept, since the rows of a weight are asked for one block after another.
        @functools.cache
        def read() -> Array:
            values = keras_to_onnx(op, self.program.values(capture))
            values.setflags(write=False)
            return values

        return read

    @property
    def stateful(self) -> bool:
        """Whether a call changes variables, so that the next call returns something else."""
        return bool(self._findings.assigned)

    # -- running ----------------------------------------------------------------------------------

    def open(self, threads: int = 1) -> Runner:
        """Returns the original model, ready to run.

        Args:
            threads: As given to :func:`load`; TensorFlow fixes the number once per process, and a
                different one here only adds to :attr:`warnings`.
        """
        return self._run(self._load(self._store), threads)

    def open_masked(self, stored: Mapping[str, Callable[[], Array]], threads: int = 1) -> Runner:
        """Returns the original, loaded afresh, whose variables are given other values in memory.

        Args:
            stored: Weight name → its values, in the layout of :class:`Weight`.
            threads: As for :meth:`open`.
        """
        program = self._load(self._store)
        for name, values in stored.items():
            kernel = self._kernels[name]
            for capture in kernel.captures:
                program.assign(capture, onnx_to_keras(kernel.op, values()))
        return self._run(program, threads)

    def reopen(self, saved: Saved, threads: int = 1) -> Runner:
        """Returns what :meth:`save` wrote, loaded from its files, ready to run."""
        return self._run(self._load(self._store.reopen(saved.path)), threads)

    def _load(self, store: Store) -> Program:
        return Program.load(store.savedmodel, self.program.signature, store.path)

    def _run(self, program: Program, threads: int) -> Runner:
        warning = set_threads(threads)
        if warning and warning not in self.warnings:
            self.warnings = (*self.warnings, warning)
        return TensorFlowRunner(program, self._findings.assigned, self._findings.ranges)

    # -- saving -----------------------------------------------------------------------------------

    def save(
        self, pruned: Pruned, directory: Path, name: str, options: ExportOptions, note: str
    ) -> Saved:
        """Writes a copy whose variables hold zeros where the masks remove weights.

        Args:
            pruned: What becomes of weights; those that are not named stay as they are.
            directory: Existing empty directory.
            name: File or directory name of the model in there.
            options: ``auto`` or ``dense``; a variable has no other form.
            note: Provenance; goes to ``assets.extra/rnnprune.json`` of a SavedModel, beside the
                graph, which stays byte-identical.

        Raises:
            UsageError: If the options ask for what only ONNX can hold.
            RnnpruneError: If the files have changed since, or cannot be written.
        """
        check_dense(options)
        changes = {}
        for key, values in pruned.items():
            kernel = self._kernels[key]
            change = Change(
                self.program.values(kernel.captures[0]), onnx_to_keras(kernel.op, values())
            )
            changes.update(dict.fromkeys(kernel.addresses, change))
        target = directory / name
        self._store.write(changes, target, note)
        return Saved(
            path=target,
            files=self._store.files(target),
            format=self.format,
            exports=dict.fromkeys(pruned, "dense"),
            stored=dict(pruned),
        )

    def read_back(self, saved: Saved) -> Iterable[tuple[str, Array]]:
        """Yields (weight name, values) as the written files hold them, in the layout of Weight.

        A weight that is stored in several places comes several times.

        Raises:
            RnnpruneError: If the files cannot be read.
        """
        for name in saved.stored:
            kernel = self._kernels[name]
            for address in kernel.addresses:
                yield name, keras_to_onnx(kernel.op, self._store.read(saved.path, address))

    def verify_untouched(self, saved: Saved) -> list[Claim]:
        """Checks that nothing but the pruned weights differs from the original.

        Returns:
            One claim. If it does not hold, it names the first differences and ``max_abs`` counts
            them.
        """
        changed = frozenset(
            address for name in saved.stored for address in self._kernels[name].addresses
        )
        differences = self._store.differences(saved.path, changed)
        claim = UNCHANGED
        if differences:
            claim += f" (differs: {', '.join(differences[:3])})"
        return [Claim(claim, not differences, float(len(differences)), 0.0)]

    def count(self) -> ParameterCount:
        """Counts the floating-point variables of the signature, each once.

        Equal copies of recurrent weights count once. Variables that a call changes hold state, not
        parameters, and are left out.
        """
        parameters = nonzero = 0
        for weight in {id(weight): weight for weight in self._by_variable.values()}.values():
            parameters += weight.size
            nonzero += weight.nonzero
        for capture, matrix in enumerate(self.program.matrices()):
            # A constant has no capture, and a variable captured again has the first one's.
            if matrix is None or matrix.capture != capture or capture in self._findings.assigned:
                continue
            if capture in self._by_variable:
                continue
            values = self.program.values(capture)
            if is_float(values.dtype):
                parameters += values.size
                nonzero += int(np.count_nonzero(values))
        return ParameterCount(parameters, nonzero)
