"""Graphs of this folder rewritten by other tools: simplified, quantised, halved, converted.

Run it after `make_torch.py`. Simplified and converted graphs must give the outputs of their source;
for those of another precision the expected outputs are onnxruntime's for the rewritten graph.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import onnxscript.optimizer
import onnxsim
import onnxslim
from common import HERE, Arrays, Case, strip_notes, write_cases
from onnx import version_converter
from onnxconverter_common import float16
from onnxruntime.quantization import QuantType, quantize_dynamic

Model = onnx.ModelProto
Rewrite = Callable[[Model], Model]


@dataclass(frozen=True)
class Plan:
    """A tool, what it does, and to which graphs; tolerance is None where outputs stay equal."""

    prefix: str
    package: str
    idiom: str
    rewrite: Rewrite
    sources: tuple[str, ...]
    tolerance: float | None = None


def through_files(act: Callable[[Path, Path], object]) -> Rewrite:
    """Make a rewrite of a tool that reads one file and writes another."""

    def rewrite(model: Model) -> Model:
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder) / "source.onnx", Path(folder) / "target.onnx"
            onnx.save(model, source)
            act(source, target)
            return onnx.load(target)

    return rewrite


def optimize(source: Path, target: Path) -> None:
    """Save what onnxruntime's extended optimisation makes of a graph."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(target)
    onnxruntime.InferenceSession(source, options, ["CPUExecutionProvider"])


def quantize(source: Path, target: Path) -> None:
    """Quantise weights to int8."""
    quantize_dynamic(source, target, weight_type=QuantType.QInt8)


def quantize_channels(source: Path, target: Path) -> None:
    """Quantise weights to int8 with a scale for each channel."""
    quantize_dynamic(source, target, per_channel=True, weight_type=QuantType.QInt8)


PLANS = (
    Plan(
        "sim",
        "onnxsim",
        "Simplified: the chains before the weights are folded.",
        lambda model: onnxsim.simplify(model)[0],
        ("ts_unfolded_opset18", "dyn_gru_unoptimized", "ts_functions"),
    ),
    Plan(
        "slim",
        "onnxslim",
        "Slimmed.",
        onnxslim.slim,
        ("ts_unfolded_gru", "dyn_lstm_streaming"),
    ),
    Plan(
        "optimizer",
        "onnxscript",
        "Optimised by onnxscript.",
        onnxscript.optimizer.optimize,
        ("ts_unfolded_gru", "dyn_lstm_unoptimized"),
    ),
    Plan(
        "ort",
        "onnxruntime",
        "Optimised graph saved by onnxruntime (extended level).",
        through_files(optimize),
        ("ts_unfolded_gru", "ts_script_if_rates", "ts_mixed_stack"),
    ),
    Plan(
        "to22",
        "onnx",
        "Converted from an older opset to 22 by onnx.version_converter.",
        lambda model: version_converter.convert_version(model, 22),
        ("ts_opset9",),
    ),
    Plan(
        "int8",
        "onnxruntime",
        "`quantize_dynamic`: LSTM becomes DynamicQuantizeLSTM, GRU stays.",
        through_files(quantize),
        ("ts_lstm_streaming", "ts_lstm_packed", "ts_mixed_stack"),
        0.05,
    ),
    Plan(
        "int8_channels",
        "onnxruntime",
        "`quantize_dynamic(per_channel=True)`.",
        through_files(quantize_channels),
        ("ts_lstm_directions",),
        0.05,
    ),
    Plan(
        "half",
        "onnxconverter-common",
        "float16 inside, float32 inputs and outputs.",
        lambda model: float16.convert_float_to_float16(model, keep_io_types=True),
        ("ts_lstm_streaming", "ts_gru_norm"),
        4e-3,
    ),
    Plan(
        "half_dense",
        "onnxconverter-common",
        "float16 but for the recurrent nodes: Cast on both sides of them.",
        lambda model: float16.convert_float_to_float16(
            model, keep_io_types=True, op_block_list=["LSTM", "GRU"]
        ),
        ("dyn_encoder_decoder",),
        4e-3,
    ),
)


def load(name: str) -> tuple[Model, Arrays, Arrays]:
    """Load a graph of this folder with its feed and outputs."""
    with np.load(HERE / f"{name}.npz", allow_pickle=False) as data:
        arrays = dict(data)
    kinds = ("input:", "output:")
    feeds, outputs = (
        {key.removeprefix(kind): value for key, value in arrays.items() if key.startswith(kind)}
        for kind in kinds
    )
    return onnx.load(HERE / f"{name}.onnx"), feeds, outputs


def make_all() -> Iterator[Case]:
    """Carry out all plans."""
    for plan in PLANS:
        for source in plan.sources:
            model, feeds, outputs = load(source)
            rewritten = plan.rewrite(model)
            strip_notes(rewritten)
            if plan.tolerance is not None:
                session = onnxruntime.InferenceSession(
                    rewritten.SerializeToString(), providers=["CPUExecutionProvider"]
                )
                outputs = dict(zip(outputs, session.run(list(outputs), feeds), strict=True))
            yield Case(
                name=f"{plan.prefix}_{source}",
                model=rewritten,
                feeds=feeds,
                outputs=outputs,
                exporter=f"{plan.package} {version(plan.package)}",
                idiom=f"`{source}`: {plan.idiom}",
                atol=plan.tolerance or 1e-5,
            )


if __name__ == "__main__":
    write_cases(make_all(), "make_rewritten.py")
