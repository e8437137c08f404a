"""An ONNX file as a :class:`LoadedModel`: reading, running, and writing pruned copies."""

from __future__ import annotations

import dataclasses
import functools
import gc
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from rnnprune_cli.errors import NotEquivalentError, RnnpruneError
from rnnprune_cli.find import (
    ROLES,
    Found,
    Layout,
    Located,
    Site,
    exclusive,
    find,
    locate,
    reader,
    readers,
    taken_in,
)
from rnnprune_cli.graph import Folder, Walker, input_of, stored_tensor
from rnnprune_cli.model import (
    UNCHANGED,
    Array,
    BoolArray,
    Claim,
    ExportOptions,
    Lift,
    LoadedModel,
    ParameterCount,
    Pruned,
    RecurrentLayer,
    Runner,
    Saved,
    Skipped,
    StoredWeight,
    Weight,
)
from rnnprune_cli.onnx_file import (
    checker_refuses,
    deserialize,
    external_files,
    graphs,
    read_proto,
)
from rnnprune_cli.onnx_inputs import describe_inputs, describe_outputs, size_hints
from rnnprune_cli.others import Others, at_input, find_others, operators
from rnnprune_cli.rewrite import packed, sparse
from rnnprune_cli.rewrite.build import MIN_IR_INITIALIZERS, Builder, value_names
from rnnprune_cli.rewrite.place import Placer, lazy_tensor
from rnnprune_cli.rewrite.runnable import make_runnable, obstacles
from rnnprune_cli.runtime import BIG_MODEL_BYTES, CPU, OnnxRunner, ResizedRunner, first_line

Values = Mapping[str, Callable[[], Array]]

MAX_INLINE_BYTES = 1_900 << 20
"""A protobuf file holds less than 2 GiB; larger models keep their weights beside it."""
MAX_UNPACKED_BYTES = 128 << 20
"""Larger weights are not packed unasked: unpacking takes about five times their size."""
MAX_COPIED_BYTES = 4096
"""External tensors up to this size are copied; onnx-ir keeps those below 256 in the model file."""
_LARGE_BYTES = 64 << 20
PROVENANCE = "rnnprune"
"""Key of ``metadata_props`` under which tool version and plan are written."""


class OnnxModel(LoadedModel):
    """An ONNX model on disk.

    Args:
        path: The file.
        shown_path: What the user named, where that is not ``path`` (a converted SavedModel).
        lifts: What lifting made of the model that the user named.
        resized: Input → which places of it stay, broadcastable to it, and the axis that becomes
            shorter: cuts states of the original's shape for a model that takes shorter ones.

    Raises:
        RnnpruneError: If the file cannot be read or contradicts itself.
    """

    format = "onnx"

    def __init__(
        self,
        path: Path,
        shown_path: Path | None = None,
        lifts: tuple[Lift, ...] = (),
        resized: Mapping[str, tuple[BoolArray, int]] | None = None,
    ) -> None:
        self.lifts = lifts
        self.resized = dict(resized or {})
        self._file = path
        self.path = shown_path or path
        proto = read_proto(path)
        self.files = (path, *external_files(proto, path))
        size = sum(f.stat().st_size for f in self.files)
        self._external = len(self.files) > 1 or size > MAX_INLINE_BYTES
        self.big = size > BIG_MODEL_BYTES
        self.large = size > _LARGE_BYTES
        self._declared = {info.name for graph in graphs(proto) for info in graph.value_info}
        model = deserialize(proto, path)
        walker = Walker(model)
        self._found: Found = find(walker, size)
        self.layers = self._found.layers
        self.skipped = self._found.skipped
        self.producer = " ".join(
            part for part in (model.producer_name, model.producer_version) if part
        )
        self.opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx"))
        self._ir_version = model.ir_version
        self._obstacles = {
            what: located.name
            for located, layer in self._executed(walker)
            for what in obstacles(walker, located.instance, layer)
        }
        self._inputs = describe_inputs(walker)
        self._hints = size_hints(walker)
        self._outputs = describe_outputs(model)
        self.warnings = tuple(self._file_warnings(proto))
        del proto, model, walker
        if self.large:
            gc.collect()  # graphs refer to themselves; a large one must not wait to be freed

    def explain(self, declined: Sequence[Skipped]) -> None:
        """Takes over why lifting left something as it is."""
        reasons = {item.name: item for item in declined}
        own = {item.name for item in self.skipped}
        self.skipped = tuple(reasons.get(item.name, item) for item in self.skipped)
        alike: dict[tuple[str, str], list[str]] = {}
        for item in declined:
            if item.name not in own:
                alike.setdefault((item.reason, item.hint), []).append(f"'{item.name}'")
        for (reason, hint), names in alike.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            verb = "are" if len(names) > 1 else "is"
            said = f"{', '.join(names[:3])}{more} {verb} not lifted: {reason}"
            self.warnings += (f"{said}; {hint}" if hint else said,)

    @property
    def by_name(self) -> Mapping[str, RecurrentLayer]:
        """Name of an executed recurrent node → its layer; a layer may run in several nodes."""
        return self._found.by_name

    @functools.cached_property
    def others(self) -> Others:
        """What else can be pruned; the file is searched for it when this is first looked at."""
        return find_others(Walker(self.fresh()))

    @property
    def _weights(self) -> dict[str, Weight]:
        return {w.name: w for layer in self.layers for w in layer.weights}

    def _file_warnings(self, proto: onnx.ModelProto) -> Iterator[str]:
        if proto.training_info:
            yield "the model's training_info is not kept: onnx-ir does not carry it"
        refusal = checker_refuses(self._file)
        self._accepted = refusal is None
        if refusal is not None:
            what = "lifted model" if self.lifts else "original"
            yield f"onnx.checker does not accept the {what}: {refusal}"
        for what, name in self._obstacles.items():
            yield (
                f"onnxruntime's CPU kernels do not support {what} ('{name}'): verified and timed on"
                " an equivalent graph; the written file is like the original"
            )

    def fresh(self) -> ir.Model:
        """Reads the file again, as an onnx-ir model that the caller may change."""
        return deserialize(read_proto(self._file), self._file)

    # Running

    def open(self, threads: int = 1, providers: Sequence[str] = CPU) -> Runner:
        """Opens the original file, with execution providers; see :meth:`LoadedModel.open`."""
        return self._open(self._file, threads, providers)

    def open_masked(self, stored: Values, threads: int = 1) -> Runner:
        """Opens the original graph with the inputs of its layers bound to other values.

        Functions are inlined and every layer's node gets initializers of its own; everything
        else stays. :meth:`save` does neither.
        """
        model = self.fresh()
        bound: list[tuple[ir.Node, int, Weight, Layout]] = list(
            self._bound_others(model, stored.keys())
        )
        executed = self._inlined(model)
        model.ir_version = max(model.ir_version, 4)
        build = Builder(model.graph, self.opset or 1, True, value_names(model))
        made: dict[tuple[str, Layout], ir.Value] = {}
        for node, layer in executed:
            for index, weight in zip(ROLES, layer.weights, strict=True):
                if weight.name in stored:
                    bound.append((node, index, weight, "stack"))
        for node, index, weight, layout in bound:
            key = (weight.name, layout)
            if key not in made:
                tensor = lazy_tensor(weight, stored[weight.name], layout)
                made[key] = build.constant(f"masked/{weight.name}", tensor)
            node.replace_input_with(index, made[key])
        return self._open_ir(model, executed, threads)

    def _bound_others(
        self, model: ir.Model, names: AbstractSet[str]
    ) -> Iterator[tuple[ir.Node, int, Weight, Layout]]:
        """Yields where other layers read some weights, and how these lie there."""
        if names <= self._weights.keys():
            return
        weights = {layer.name: layer.w for layer in self.others.layers}
        for operator in operators(Walker(model)):
            weight = weights.get(operator.name)
            if weight is not None and weight.name in names:
                index = self.others.inputs[operator.name]
                node = operator.instance.node
                yield node, index, weight, at_input(node, index)

    def reopen(self, saved: Saved, threads: int = 1) -> Runner:
        """Opens the written file; see :meth:`LoadedModel.reopen`."""
        return self._open(saved.path, threads)

    def _open(self, path: Path, threads: int, providers: Sequence[str] = CPU) -> Runner:
        runner: Runner
        if self._obstacles:
            model = deserialize(read_proto(path), path)
            runner = self._open_ir(model, self._inlined(model), threads)
        else:
            specs = self._inputs, self._outputs, self._hints
            runner = OnnxRunner(path, threads, *specs, self.big, providers)
        return ResizedRunner(runner, self.resized) if self.resized else runner

    def _executed(self, walker: Walker) -> Iterator[tuple[Located, RecurrentLayer]]:
        """Yields every executed prunable node of a copy of the model with its layer."""
        for located in locate(walker):
            if located.name in self._found.by_name:
                yield located, self._found.by_name[located.name]

    def _inlined(self, model: ir.Model) -> list[tuple[ir.Node, RecurrentLayer]]:
        """Inlines functions, so that every executed node exists once; pairs nodes and layers."""
        names = [located.name for located in locate(Walker(model))]
        if model.functions:
            try:
                common.InlinePass()(model)  # keeps the order of execution
            except Exception as error:  # onnx-ir raises many unrelated types
                raise RnnpruneError(
                    f"{self.path}: its functions cannot be inlined: {first_line(error)}",
                    "inline them when exporting (onnx.inliner.inline_local_functions)",
                ) from error
        nodes = [located.instance.node for located in locate(Walker(model))]
        known = self._found.by_name
        return [(n, known[name]) for name, n in zip(names, nodes, strict=True) if name in known]

    def _open_ir(
        self, model: ir.Model, executed: list[tuple[ir.Node, RecurrentLayer]], threads: int
    ) -> Runner:
        make_runnable(Walker(model), executed)
        if not self._external and not self.big:
            return OnnxRunner(
                ir.to_proto(model).SerializeToString(),
                threads,
                self._inputs,
                self._outputs,
                self._hints,
            )
        with tempfile.TemporaryDirectory(prefix="rnnprune-") as folder:
            path = Path(folder) / "model.onnx"
            ir.save(model, path, external_data="model.onnx.data")
            return OnnxRunner(path, threads, self._inputs, self._outputs, self._hints, self.big)

    # Writing

    def save(
        self, pruned: Pruned, directory: Path, name: str, options: ExportOptions, note: str
    ) -> Saved:
        """Writes the pruned model; see :meth:`LoadedModel.save`.

        1. Choose a form for each weight by its size.
        2. Put the new weights where the old ones were, or, where a weight was computed or needs
           unpacking, once at the start of the main graph or function.
        3. Remove what only fed the old ones.
        4. Add the provenance, serialize, turn chosen initializers sparse.
        """
        model = self.fresh()
        walker = Walker(model)
        sites = list(self._sites(walker, pruned.keys()))
        placer = Placer(walker, self._readers(walker, pruned.keys()), options.values)
        forms: dict[str, str] = {}
        overridable = {
            weight.name
            for site, weight in sites
            if site.value.is_graph_input() and self._ir_version >= MIN_IR_INITIALIZERS
        }
        called = {w.name for site, w in sites if self._in_function(walker, site)}
        stored: dict[str, StoredWeight] = {}
        warnings: list[str] = []
        for weight_name, kept in pruned.items():
            weight = kept.weight
            form, why_not = self._choose(
                weight, kept.mask, options, weight_name in overridable, weight_name in called
            )
            forms[weight_name] = form
            warnings.extend([why_not] if why_not else [])
            if options.values != "float32" and form != "packed":
                warnings.append(f"'{weight_name}' is stored {form}, its values are not rounded")
            stored[weight_name] = kept
            if form == "packed" and options.values != "float32":
                rounding = packed.rounding(options.values)
                stored[weight_name] = dataclasses.replace(kept, rounding=rounding)
        sparse_names: set[str] = set()
        for site, weight in sites:
            form = forms[weight.name]
            placed = placer.place(site, weight, pruned[weight.name], form)
            if form == "sparse":
                sparse_names.add(placed)
        placer.clean()
        model.metadata_props[PROVENANCE] = note
        path = directory / name
        files = self._write(model, path, sparse_names, self._declared)
        return Saved(path, files, "onnx", forms, stored, tuple(dict.fromkeys(warnings)))

    def _sites(self, walker: Walker, names: AbstractSet[str]) -> Iterator[tuple[Site, Weight]]:
        """Yields every place of some prunable weights in a copy of the model."""
        for located, layer in self._executed(walker):
            for site, weight in zip(located.sites, layer.weights, strict=True):
                if weight.name in names:
                    yield site, weight
        if not names <= self._weights.keys():
            yield from (s for s in self.others.sites(walker) if s[1].name in names)

    def _readers(self, walker: Walker, names: AbstractSet[str]) -> frozenset[tuple[int, int]]:
        """Returns (id of node, input index) of all that may read some weights when they change.

        Whatever reads the matrix of another layer, a Transpose say, reads nothing else.
        """
        found = readers(walker, self._found)
        if names <= self._weights.keys():
            return found
        others = [site.value for site, w in self.others.sites(walker) if w.name in names]
        uses = (use for value in others for use in walker.consumers(value))
        return found | {(id(use[0]), use[1]) for use in uses if use is not None}

    def _in_function(self, walker: Walker, site: Site) -> bool:
        """Tells whether a weight lies in a model function, or may be put there for its reader."""
        return any(
            walker.is_function(walker.root(graph)) for graph in (site.value.graph, site.node.graph)
        )

    def _choose(
        self,
        weight: Weight,
        mask: Array,
        options: ExportOptions,
        overridable: bool,
        in_function: bool,
    ) -> tuple[str, str | None]:
        """Returns the form in which a weight is stored, and why it is not the asked one."""
        if overridable:
            asked = options.export not in ("auto", "dense") or options.values != "float32"
            reason = f"'{weight.name}' stays dense: it is also an input, which callers may override"
            return "dense", reason if asked else None
        nonzero = int(np.count_nonzero(mask))
        itemsize = weight.dtype.itemsize
        if options.values == "float16":
            itemsize = min(itemsize, 2)
        elif options.values == "int8":
            itemsize = 1
        opset = self.opset or 1
        sizes = {"dense": weight.size * weight.dtype.itemsize}
        reasons = {}
        if options.export == "auto" and sizes["dense"] > MAX_UNPACKED_BYTES:
            return "dense", (
                f"weights over {MAX_UNPACKED_BYTES >> 20} MiB are stored dense: unpacking takes"
                " several times their size when the model is loaded; --export packed does it"
            )
        if opset < packed.MIN_OPSET:
            reasons["packed"] = (
                f"opset {opset} has no operators to unpack with (needs {packed.MIN_OPSET})"
            )
        elif opset < packed.MIN_OPSET_CONSTANT and self._ir_version < MIN_IR_INITIALIZERS:
            reasons["packed"] = f"IR version {self._ir_version} with opset {opset} has no constants"
        else:
            sizes["packed"] = packed.smallest(weight.size, nonzero, itemsize, opset)[1]
        if self._external:
            reasons["sparse"] = "external data cannot hold sparse tensors"
        elif self._ir_version < MIN_IR_INITIALIZERS:
            reasons["sparse"] = f"in IR version {self._ir_version} every weight is an input"
        elif opset < sparse.MIN_OPSET:
            reasons["sparse"] = f"opset {opset} has no sparse tensors (needs {sparse.MIN_OPSET})"
        elif in_function:
            reasons["sparse"] = "onnxruntime may crash on sparse constants in model functions"
        elif options.values == "float32":
            sizes["sparse"] = sparse.nbytes(nonzero, weight.dtype.itemsize)
        if options.export == "dense":
            return "dense", None
        wanted = list(sizes) if options.export == "auto" else ["dense", options.export]
        best = min((f for f in wanted if f in sizes), key=lambda f: sizes[f])
        if options.export in ("auto", best):
            return best, None
        reason = reasons.get(options.export, "it would be larger than the dense weight")
        return best, f"'{weight.name}' is not stored {options.export}: {reason}"

    def write_graph(self, model: ir.Model, path: Path) -> None:
        """Writes a changed copy of the model, with its weights in it or beside it as they were."""
        self._write(model, path, set(), set())

    def _write(
        self, model: ir.Model, path: Path, sparse_names: set[str], declared: set[str]
    ) -> tuple[Path, ...]:
        if self._external:
            data = f"{path.name}.data"
            for value in _constants(model):
                tensor = value.const_value
                if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes <= MAX_COPIED_BYTES:
                    # onnx-ir would close their memory map, which someone may still look at.
                    copy = np.array(tensor.numpy())
                    value.const_value = ir.tensor(copy, tensor.dtype, name=tensor.name)
            ir.save(model, path, external_data=data)
            return tuple(p for p in (path, path.parent / data) if p.exists())
        proto = ir.to_proto(model)
        for graph in graphs(proto):
            # onnx-ir declares every initializer a second time; what the file had stays.
            stored = {tensor.name for tensor in graph.initializer} - declared
            for info in [v for v in graph.value_info if v.name in stored]:
                graph.value_info.remove(info)
        sparse.make_sparse(proto, sparse_names)
        path.write_bytes(proto.SerializeToString(deterministic=True))
        return (path,)

    # Reading back and counting

    def read_back(self, saved: Saved) -> Iterator[tuple[str, Array]]:
        """Yields the weights of the written file; see :meth:`LoadedModel.read_back`.

        Packed weights are unpacked by onnxruntime, operator by operator.
        """
        walker = Walker(deserialize(read_proto(saved.path), saved.path))
        size = sum(file.stat().st_size for file in saved.files)
        done: set[tuple[str, int]] = set()
        for site, weight in self._sites(walker, saved.stored.keys()):
            if (weight.name, id(site.value)) in done:
                continue
            done.add((weight.name, id(site.value)))
            tensor = stored_tensor(site.value)
            if tensor is not None:
                yield weight.name, taken_in(reader(tensor)(), site.layout)
                continue
            values = Folder(walker, size).fold(site.value, site.calls)
            if isinstance(values, str):
                raise NotEquivalentError(f"weight '{weight.name}' cannot be read back: {values}")
            yield weight.name, taken_in(values, site.layout)

    def verify_untouched(self, saved: Saved) -> list[Claim]:
        """Checks that the file is as valid as the original was, and, for a big model, unchanged.

        A big model's graph and every other tensor are held against the original's. Together with
        the weights that were read back this proves what running two more copies would, if every
        weight is still stored in its old place.
        """
        claims = []
        if self._accepted:
            valid = checker_refuses(saved.path) is None
            claim = "onnx.checker accepts the written file, with full check"
            claims.append(Claim(claim, valid, 0.0 if valid else float("inf"), 0.0))
        if self.big and self._all_in_place(saved):
            models = (self.fresh(), deserialize(read_proto(saved.path), saved.path))
            same = len({self._skeleton(model, saved) for model in models}) == 1
            claims.append(Claim(UNCHANGED, same, 0.0 if same else float("inf"), 0.0))
        return claims

    def _all_in_place(self, saved: Saved) -> bool:
        """Tells whether every pruned weight is a dense initializer of its own, where it was."""
        walker = Walker(self.fresh())
        reading = self._readers(walker, saved.stored.keys())
        return set(saved.exports.values()) == {"dense"} and all(
            site.value.is_initializer() and exclusive(walker, site.value, reading)
            for site, _ in self._sites(walker, saved.stored.keys())
        )

    def _skeleton(self, model: ir.Model, saved: Saved) -> bytes:
        """A digest of everything but the pruned weights, where they lie, and the provenance."""
        model.metadata_props.pop(PROVENANCE, None)
        pruned = {id(site.value) for site, _ in self._sites(Walker(model), saved.stored.keys())}
        digest = hashlib.sha256()
        for value in _constants(model):
            if value.is_initializer() and value.const_value is not None:
                if id(value) not in pruned:
                    digest.update(value.const_value.tobytes())
                value.const_value = ir.tensor(np.zeros((), np.uint8), name=value.name)
        digest.update(ir.to_proto(model).SerializeToString(deterministic=True))
        return digest.digest()

    def count(self) -> ParameterCount:
        """Counts floating-point weights; see :meth:`LoadedModel.count`.

        Constant expressions count as what they produce, equal copies of recurrent weights once, and
        quantized matrices (int8) as the weights that they stand for; scales and zero points do not.
        """
        model = self.fresh()
        walker = Walker(model)
        recurrent = self._weights.keys()
        placer = Placer(walker, readers(walker, self._found), "float32")
        for site, weight in list(self._sites(walker, recurrent)):
            if stored_tensor(site.value) is None:
                placer.place(site, weight, weight.read, "dense")
        placer.clean()
        own = {id(site.value) for site, _ in self._sites(walker, recurrent)}
        own |= {id(value) for value in _steps(walker)}
        parameters = nonzero = 0
        for value in _constants(model):
            tensor = stored_tensor(value)
            if tensor is None or id(value) in own:
                continue
            zero = _zero_of(value)
            if zero is not None or tensor.dtype.is_floating_point():
                parameters += tensor.size
                nonzero += int(np.count_nonzero(tensor.numpy() != (zero or 0)))
        for weight in self._weights.values():
            parameters += weight.size
            nonzero += weight.nonzero
        return ParameterCount(parameters, nonzero)

    def quantized_sizes(self) -> tuple[int, ...]:
        """Returns how many weights, a byte each, the quantized LSTMs read for one step."""
        nodes = (instance.node for instance in Walker(self.fresh()).instances())
        weights = (n.inputs[1:3] for n in nodes if n.op_type == "DynamicQuantizeLSTM")
        stored = (stored_tensor(value) for pair in weights for value in pair if value is not None)
        return tuple(tensor.size for tensor in stored if tensor is not None)


_STEPS = {
    "DynamicQuantizeLSTM": range(8, 12),
    "DequantizeLinear": range(1, 3),
    "MatMulInteger": range(2, 4),
    "DynamicQuantizeMatMul": range(2, 4),
}
"""Quantized operator → inputs that are scales or zero points."""


def _zero_of(value: ir.Value) -> int | None:
    """Returns what stands for zero in a quantized matrix; None if the value is none.

    Matrices of int8 have 0. Tables of embeddings may be uint8, with a zero point of their own.
    """
    tensor = stored_tensor(value)
    if tensor is None or len(tensor.shape) < 2:
        return None
    if tensor.dtype == ir.DataType.INT8:
        return 0
    if tensor.dtype != ir.DataType.UINT8:
        return None
    for gather, _ in value.uses():
        for node, _ in gather.outputs[0].uses() if gather.op_type == "Gather" else ():
            if node.op_type == "DequantizeLinear":
                point = input_of(node, 2)
                stored = None if point is None else stored_tensor(point)
                return 0 if stored is None else int(stored.numpy().ravel()[0])
    return None


def _steps(walker: Walker) -> Iterator[ir.Value]:
    """Yields the scales and zero points of quantized weights."""
    for instance in walker.instances():
        node = instance.node
        for index in _STEPS.get(node.op_type, ()):
            if index < len(node.inputs) and (value := node.inputs[index]) is not None:
                yield value
        makers = {value.producer() for value in node.inputs if value is not None}
        if node.op_type == "Mul" and any(
            m and m.op_type == "DynamicQuantizeLinear" for m in makers
        ):
            yield from (value for value in node.inputs if value is not None)


def _constants(model: ir.Model) -> Iterator[ir.Value]:
    """Yields every initializer and output of a Constant, in all graphs and functions."""
    for top in (model.graph, *(f.graph for f in model.functions.values())):
        for graph in (top, *top.subgraphs()):
            yield from graph.initializers.values()
            for node in graph:
                if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
                    yield node.outputs[0]
