"""Running ONNX models with onnxruntime."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from rnnprune_cli.errors import RnnpruneError
from rnnprune_cli.model import Array, BoolArray, Feed, Runner, TensorSpec, compress

CPU = ("CPUExecutionProvider",)
"""Execution provider that every onnxruntime has."""
BIG_MODEL_BYTES = 512 << 20
"""From here on weights are used where they lie in the file, not re-packed in memory."""


class OnnxRunner(Runner):
    """An onnxruntime session.

    Args:
        model: Path of the model, or its serialized bytes.
        threads: Intra-operator threads.
        inputs: Input specifications with ranges, from the graph.
        outputs: Output specifications.
        hints: Sizes that the graph insists on; see :attr:`Runner.size_hints`.
        big: Skip weight pre-packing, which holds a second copy of every weight.
        providers: Execution providers, the preferred one first.

    Raises:
        RnnpruneError: If onnxruntime refuses the model.
    """

    def __init__(
        self,
        model: Path | bytes,
        threads: int,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        hints: tuple[int, ...] = (),
        big: bool = False,
        providers: Sequence[str] = CPU,
    ) -> None:
        self.inputs = inputs
        self.size_hints = hints
        self.outputs = outputs
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        if big:
            options.add_session_config_entry("session.disable_prepacking", "1")
        try:
            self._session: Any = ort.InferenceSession(
                str(model) if isinstance(model, Path) else model,
                options,
                providers=[*providers],
            )
        except Exception as error:  # onnxruntime raises many unrelated types
            raise RnnpruneError(
                f"onnxruntime cannot load the model: {first_line(error)}",
                "it must run on stock onnxruntime to be verified; check its operators and opset",
            ) from error
        running = self._session.get_providers()
        if providers[0] not in running:  # it falls back to others without a word
            raise RnnpruneError(
                f"execution provider '{providers[0]}' does not start: onnxruntime took"
                f" {', '.join(running)}",
                "check that its libraries and the device are there",
            )
        self._names = [o.name for o in outputs]

    def run(self, feed: Feed) -> list[Array]:
        """Runs the session once; see :meth:`Runner.run`."""
        try:
            results: list[Array] = self._session.run(self._names, dict(feed))
        except Exception as error:  # onnxruntime raises many unrelated types
            raise RnnpruneError(
                f"onnxruntime cannot run the model: {first_line(error)}",
                "give inputs that it accepts with --data inputs.npz",
            ) from error
        return [np.asarray(r) for r in results]

    def call(self, feed: Feed) -> Callable[[], object]:
        """Returns a call of the session itself; see :meth:`Runner.call`."""
        return functools.partial(self._session.run, self._names, dict(feed))


class ResizedRunner(Runner):
    """A model that takes shorter states than the one it was made from, fed with the old ones.

    Args:
        runner: The model.
        resized: Input → which places of it stay, broadcastable to it, and the axis that is cut.
    """

    def __init__(self, runner: Runner, resized: Mapping[str, tuple[BoolArray, int]]) -> None:
        self._runner = runner
        self._resized = resized
        self.inputs, self.outputs = runner.inputs, runner.outputs
        self.size_hints = runner.size_hints

    def prepared(self, feed: Feed) -> Feed:
        """Returns the feed with states cut; those that are short already stay."""
        cut = dict(feed)
        for name, (keep, axis) in self._resized.items():
            if cut[name].shape[axis] == keep.shape[axis]:
                cut[name] = compress(cut[name], keep, axis)
        return cut

    def run(self, feed: Feed) -> list[Array]:
        """Runs the model; see :meth:`Runner.run`."""
        return self._runner.run(self.prepared(feed))

    def call(self, feed: Feed) -> Callable[[], object]:
        """Returns a call of the model; see :meth:`Runner.call`."""
        return self._runner.call(self.prepared(feed))


_SOURCE_PLACE = re.compile(r"/onnxruntime_src/\S+:\d+ ")


def first_line(error: BaseException, limit: int = 240) -> str:
    """Returns the first line of an exception's text, shortened."""
    text = str(error).strip() or type(error).__name__
    line = _SOURCE_PLACE.sub("", text.splitlines()[0])
    return line if len(line) <= limit else line[: limit - 1] + "…"
