"""Graphs converted by paddle2onnx from PaddlePaddle layers.

`SimpleRNN` is left out: its converted graph lacks the recurrent node and is invalid.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import paddle
from common import Case, strip_notes, write_cases

T, N, IN, H = 7, 3, 5, 6
LAYERS = {"lstm": paddle.nn.LSTM, "gru": paddle.nn.GRU}


class Tagger(paddle.nn.Layer):  # type: ignore[misc]
    """A recurrent layer and a dense layer."""

    def __init__(self, cell: str, **settings: Any) -> None:
        """Take the cell and the settings of the layer."""
        super().__init__()
        self.rnn = LAYERS[cell](IN, H, **settings)
        directions = 2 if settings.get("direction") == "bidirect" else 1
        self.dense = paddle.nn.Linear(H * directions, 2)

    def forward(self, x):  # type: ignore[no-untyped-def]
        """Give scores for each step."""
        y, _ = self.rnn(x)
        return self.dense(y)


def make(name: str, idiom: str, cell: str, opset: int, **settings: Any) -> Case:
    """Build a model, run it and convert it."""
    rng = np.random.default_rng(7)
    layer = Tagger(cell, **settings)
    for parameter in layer.parameters():
        fan = parameter.shape[-1] if len(parameter.shape) > 1 else 9
        drawn = rng.standard_normal(parameter.shape) * 1.2 / fan**0.5
        parameter.set_value(drawn.astype(np.float32))
    layer.eval()
    x = rng.standard_normal((N, T, IN)).astype(np.float32)
    spec = [paddle.static.InputSpec([-1, -1, IN], "float32", "x")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        paddle.onnx.export(layer, str(path), input_spec=spec, opset_version=opset)
        model = onnx.load(path.with_suffix(".onnx"))
    strip_notes(model)
    return Case(
        name=f"paddle_{name}",
        model=model,
        feeds={"x": x},
        outputs={model.graph.output[0].name: layer(paddle.to_tensor(x)).numpy()},
        exporter=f"paddle2onnx {version('paddle2onnx')}, paddlepaddle {paddle.__version__}",
        idiom=idiom,
    )


def make_all() -> Iterator[Case]:
    """Convert all models."""
    yield make("lstm", "LSTM; each value passes Identity nodes.", "lstm", 13)
    both: dict[str, Any] = {"num_layers": 2, "direction": "bidirect"}
    yield make("lstm_bi_stack", "Two bidirectional layers.", "lstm", 13, **both)
    yield make("gru", "GRU.", "gru", 11)


if __name__ == "__main__":
    write_cases(make_all(), "make_paddle.py")
