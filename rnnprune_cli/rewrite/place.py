"""Putting new weights where layers read them, in an onnx-ir model.

Where a weight is an initializer or a Constant of its own, its value is replaced and keeps its name.
Where it was computed, is shared with something that is not pruned, or needs unpacking, the new one
is made once at the start of the main graph (or function body) and the readers are pointed to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from rnnprune_cli.find import Layout, Site, exclusive, laid_out
from rnnprune_cli.graph import Walker, stored_tensor
from rnnprune_cli.model import Array, StoredWeight, Weight
from rnnprune_cli.rewrite import packed
from rnnprune_cli.rewrite.build import (
    MIN_IR_INITIALIZERS,
    Builder,
    remove_unread,
    value_names,
)

_CHUNK_ELEMENTS = 1 << 20


def lazy_tensor(
    weight: Weight, read: Callable[[], Array], layout: Layout = "stack"
) -> ir.LazyTensor:
    """Returns a tensor that is computed when it is written, so that few are in memory at once.

    Args:
        weight: The weight.
        read: Returns its values, in its own shape.
        layout: How they lie in the tensor.
    """
    if isinstance(read, StoredWeight) and layout == "stack":
        return _MaskedTensor(read)
    _, rows, columns = weight.shape
    shapes = {"stack": weight.shape, "rows": (rows, columns), "columns": (columns, rows)}
    return ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(laid_out(read(), layout))),
        dtype=ir.DataType.from_numpy(weight.dtype),
        shape=ir.Shape(shapes[layout]),
    )


class _MaskedTensor(ir.LazyTensor):
    """A masked weight that goes into a file some rows at a time."""

    def __init__(self, stored: StoredWeight) -> None:
        super().__init__(
            lambda: ir.tensor(stored()),
            dtype=ir.DataType.from_numpy(stored.weight.dtype),
            shape=ir.Shape(stored.weight.shape),
        )
        self._stored = stored

    def tofile(self, file: BinaryIO) -> None:
        """Writes the bytes of the tensor, as :meth:`tobytes` returns them."""
        directions, rows, columns = self._stored.weight.shape
        step = max(1, _CHUNK_ELEMENTS // columns)
        for start in range(0, directions * rows, step):
            file.write(np.ascontiguousarray(self._stored.rows(start, start + step)).data)


class Placer:
    """Replaces weights in one model.

    Args:
        walker: The model, which is changed.
        readers: (id of node, input index) of every input whose weight may be replaced.
        values: Precision of packed values.
    """

    def __init__(self, walker: Walker, readers: frozenset[tuple[int, int]], values: str) -> None:
        self._walker = walker
        self._readers = readers
        self._values = values
        self._taken = value_names(walker.model)
        self._builders: dict[int, Builder] = {}
        self._made: dict[tuple[str, int], ir.Value] = {}
        self._placed: set[int] = set()
        self._replaced: list[ir.Value] = []
        self._renames: list[tuple[ir.Value, str]] = []

    def place(self, site: Site, weight: Weight, read: Callable[[], Array], form: str) -> str:
        """Gives one reader its new weight.

        Args:
            site: Where the weight is read and stored.
            weight: The weight.
            read: Returns the new values.
            form: ``dense``, ``sparse`` or ``packed``.

        Returns:
            The name of the value that holds the weight.
        """
        old = site.value
        if id(old) in self._placed:
            return old.name or ""
        alone = exclusive(self._walker, old, self._readers)
        own = alone and stored_tensor(old) is not None
        if own and form != "packed":
            self._placed.add(id(old))
            self._set(old, lazy_tensor(weight, read, site.layout))
            return old.name or ""
        # Where all readers see it: beside the old one, which a caller may pass to a function.
        root = self._walker.root(old.graph if alone else site.node.graph)
        key = (weight.name, id(root))
        if key not in self._made:
            self._made[key] = self._make(root, weight, read, form, site.layout)
        new = self._made[key]
        if alone:
            old.replace_all_uses_with(new)
        else:
            site.node.replace_input_with(site.index, new)
        self._replaced.append(old)
        if own and old.graph is root and old.name:
            self._renames.append((new, old.name))
        return new.name or ""

    def _make(
        self,
        root: ir.Graph,
        weight: Weight,
        read: Callable[[], Array],
        form: str,
        layout: Layout,
    ) -> ir.Value:
        if id(root) not in self._builders:
            old = self._walker.model.ir_version < MIN_IR_INITIALIZERS
            self._builders[id(root)] = Builder(
                root,
                self._walker.opset(root),
                not self._walker.is_function(root) and not old,
                self._taken,
            )
        build = self._builders[id(root)]
        if form == "packed":
            name = build.unique(weight.name)
            values = read() if layout == "stack" else read()[0]
            made = packed.emit(packed.pack(values, self._values, build.opset), build, name)
            # Packed row by row, as rounding and reading back go: each has a scale of its own.
            return build.node("Transpose", [made], perm=[1, 0]) if layout == "columns" else made
        return build.constant(weight.name, lazy_tensor(weight, read, layout))

    def _set(self, value: ir.Value, tensor: ir.LazyTensor) -> None:
        if value.is_initializer():
            tensor.name = value.name
            value.const_value = tensor
            return
        node = value.producer()
        assert node is not None  # stored_tensor found it at a Constant
        for name in list(node.attributes):
            del node.attributes[name]
        node.attributes["value"] = ir.AttrTensor("value", tensor)
        value.const_value = None

    def clean(self) -> None:
        """Removes replaced weights and what only fed them; the new ones take over free names."""
        remove_unread(self._replaced)
        names = value_names(self._walker.model)
        for value, name in self._renames:
            if name not in names:
                value.name = name
                names.add(name)
