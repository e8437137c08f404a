"""The files behind a TensorFlow model: where a variable is stored, and how values are replaced."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rnnprune_cli.errors import UsageError
from rnnprune_cli.model import Array, ExportOptions


@dataclass(frozen=True, eq=False)
class Change:
    """New values for a stored tensor, and those that must be there before.

    Attributes:
        before: What the file is expected to hold.
        after: What is to be written; same shape and type.
    """

    before: Array
    after: Array


class Store(ABC):
    """A model on disk whose tensors can be replaced while everything else stays as it is.

    Attributes:
        path: The model that the user named.
        format: ``savedmodel``, ``keras`` or ``h5``.
        producer: What wrote it.
        savedmodel: A SavedModel of it, to be loaded and run.
    """

    path: Path
    format: str
    producer: str
    savedmodel: Path

    @abstractmethod
    def files(self, path: Path | None = None) -> tuple[Path, ...]:
        """All files of this model, or of one that :meth:`write` made."""

    @abstractmethod
    def locate(self, kernels: Mapping[int, Array]) -> dict[int, tuple[str, ...]]:
        """Finds where variables are stored.

        Args:
            kernels: Position among the captured inputs of the signature → value of the variable.

        Returns:
            For each, every address that holds it; empty if it cannot be told.
        """

    @abstractmethod
    def write(self, changes: Mapping[str, Change], target: Path, note: str) -> None:
        """Writes a copy with other values under some addresses.

        Raises:
            RnnpruneError: If an address does not hold what it should, or writing fails.
        """

    @abstractmethod
    def read(self, path: Path, address: str) -> Array:
        """Reads one tensor of a model that :meth:`write` made."""

    @abstractmethod
    def differences(self, path: Path, changed: frozenset[str]) -> list[str]:
        """Names what differs between this model and a copy, beside the changed addresses."""

    @abstractmethod
    def reopen(self, path: Path) -> Store:
        """Opens a model that :meth:`write` made."""


def check_dense(options: ExportOptions) -> None:
    """Raises UsageError if weights are to be stored as only ONNX can hold them."""
    if options.export not in ("auto", "dense", "shrunk"):
        raise UsageError(
            f"a TensorFlow model cannot hold {options.export} weights",
            "write ONNX instead, with -o NAME.onnx, or use --export dense",
        )
    if options.values != "float32":
        raise UsageError(
            f"a TensorFlow model cannot hold {options.values} values for its variables",
            "write ONNX instead, with -o NAME.onnx",
        )


def same_bits(a: Any, b: Any) -> bool:  # noqa: ANN401  ndarray, or bytes for a string scalar
    """Whether two tensors are equal bit by bit: -0.0 differs from 0.0, and NaN equals itself."""
    left, right = np.asarray(a), np.asarray(b)
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    if left.dtype.hasobject:
        return bool(np.array_equal(left, right))
    return left.tobytes() == right.tobytes()
