"""Reports with every kind of content: made by hand, where a real one would take minutes."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from rnnprune_cli.model import (
    BenchModel,
    BenchRatio,
    BenchReport,
    Check,
    CheckReport,
    Claim,
    Control,
    Curve,
    Epoch,
    FineTuned,
    KeptUnits,
    Latency,
    LayerRow,
    Measurement,
    MetricValue,
    ModelInfo,
    OutputFidelity,
    OutputInfo,
    Picture,
    Plan,
    Point,
    Quantized,
    Ratio,
    Ratios,
    Repair,
    Report,
    SensitivityReport,
    Skipped,
    Stage,
    Timing,
    Trial,
)

HOSTILE = (
    "|<img src=x onerror=alert(1)>`**x**`@someone #1 [a](https://evil.example) $a$ &amp; \u202e"
)
"""What a model may call a layer."""
ENVIRONMENT = {
    "cpu": "A CPU @ 2 GHz",
    "cores": 2,
    "threads": 1,
    "os": "an operating system",
    "python": "3.12.1",
    "versions": {"numpy": "2.1.0", "onnxruntime": "1.20.0"},
}
WARNINGS = (
    "inputs were made up: give --data for outputs and a metric that mean something",
    "runtimes multiply zeros too: removing single weights does not change latency, --granularity"
    " unit does",
)
CHECKS = (
    Check("bytes<=0.4", 0.4, 0.346, True),
    Check(
        "latency<=0.5",
        0.5,
        0.637,
        False,
        0.615,
        0.651,
        subject="speech",
        hint="remove more units, such as --sparsity 0.75, or allow latency<=0.66",
    ),
    Check("latency against the baseline", 1.0, 1.013, True, 0.99, 1.04, 0.21),
)


def latency(median: float, seed: int = 0, count: int = 300) -> Latency:
    """Calls with a tail, as they are."""
    rng = np.random.default_rng(seed)
    samples = median * (1 + 0.05 * rng.gamma(2.0, 1.0, count) - 0.08)
    samples[:: count // 7 or 1] *= 1.8
    p5, middle, p95, p99 = (float(np.percentile(samples, q)) for q in (5, 50, 95, 99))
    half = count // 2
    return Latency(middle, p5, p95, tuple(map(float, samples)), p99, (half, count - half))


def metric(value: float, name: str = "accuracy", higher: bool = True) -> MetricValue:
    return MetricValue(name, value, higher, "logits")


def measurement(scale: float, seed: int = 0) -> Measurement:
    """The figures of a model that is so much of another one."""
    values = (metric(0.9838 - 0.02 * (1 - scale)), metric(0.31 + 0.1 * (1 - scale), "mse", False))
    return Measurement(
        int(41_122 * scale),
        int(40_609 * scale),
        int(38_912 * scale),
        int(38_000 * scale),
        int(172_544 * scale),
        int(153_088 * scale),
        int(38_912 * scale),
        latency(0.0518 * (0.3 + 0.7 * scale), seed),
        values[0],
        values,
    )


def ratios(before: Measurement, after: Measurement) -> Ratios:
    assert before.latency_ms and after.latency_ms
    times = after.latency_ms.median / before.latency_ms.median
    return Ratios(
        after.parameters / before.parameters,
        after.nonzero / before.nonzero,
        after.bytes / before.bytes,
        after.gzip_bytes / before.gzip_bytes,
        Ratio(times, times * 0.98, times * 1.03),
    )


@functools.cache
def picture(weight: str, rows: int = 32, columns: int = 20, gates: str = "iofc") -> Picture:
    """Levels of all kinds."""
    rng = np.random.default_rng(rows + columns)
    cells = rng.integers(0, 10, (rows * len(gates), columns)).astype(str)
    cells[3::rows] = "x"
    return Picture(weight, 0, gates, (64 * len(gates), columns), tuple(map("".join, cells)))


def layer(name: str, hidden: int = 32, pictures: bool = True) -> LayerRow:
    return LayerRow(
        name,
        "LSTM",
        "forward",
        64,
        hidden,
        26_000,
        12_000,
        11_000,
        1 - 11_000 / 26_000,
        ("packed", "dense"),
        "2 of 64 units: a state is handed out; --resize-state lets it become shorter",
        {"i": 0.5, "o": 0.6, "f": 0.7, "c": 0.5},
        (picture("W"), picture("R", columns=32)) if pictures else (),
    )


def curves(
    layers: tuple[str, ...] = ("encoder", "decoder"), gates: bool = True
) -> tuple[Curve, ...]:
    def points(slope: float) -> tuple[Point, ...]:
        return tuple(
            Point(s, slope * s**3, (metric(0.9838 - slope * s**3),)) for s in (0.3, 0.5, 0.7, 0.9)
        )

    found = []
    for k, name in enumerate(layers):
        found.append(Curve(name, None, 38_912, points(0.3 / (k + 1))))
        if gates:
            found += (
                Curve(name, g, 9_728, points(0.1 * j / (k + 1))) for j, g in enumerate("iofc")
            )
    return tuple(found)


def training() -> FineTuned:
    epochs = tuple(
        Epoch(
            1 / k,
            1.1 / k + 0.01 * k,
            (metric(0.9 + 0.01 * k),),
            0.08 - 0.01 * k,
            min(0.1 * k, 0.5),
            1e-3 / k,
            1.5,
        )
        for k in range(1, 9)
    )
    return FineTuned(
        "cross-entropy with labels, and distillation",
        "polynomial",
        (2_000, 200),
        (40_000, 41_000),
        504,
        (metric(0.88),),
        0.104,
        epochs,
        6,
        3,
        1,
        "no better model for 2 epochs",
        12.0,
    )


def report(name: str = "encoder/LSTM", sparsity: float = 0.5, checks: bool = True) -> Report:
    """A pruned, quantized and trained model, of which everything that can be said is said."""
    before, after, quantized = (measurement(s, k) for k, s in enumerate((1.0, 1 - sparsity, 0.2)))
    fidelity = (OutputFidelity("logits", 3.82, 0.224, 0.9955, 0.9973),)
    rows = (layer(name), layer("decoder", pictures=False))
    return Report(
        {"model": "models/speech.onnx"},
        ModelInfo("models/speech.onnx", "onnx", "0" * 64, "pytorch 2.4", 17),
        OutputInfo(f"models/speech-{sparsity:g}.onnx", "onnx", "1" * 64),
        Plan((Stage("obs", "unit", "layer", sparsity), Stage("magnitude", "weight", "cell", 0.3))),
        rows,
        (Skipped("loop_3", "its cell is no LSTM, GRU or RNN", "export it as one operator"),),
        before,
        quantized,
        ratios(before, quantized),
        fidelity,
        (
            Claim("the written file holds exactly the masked weights", True, 0.0, 0.0),
            Claim("the written model computes what the masked model computes", True, 1e-7, 1e-5),
        ),
        WARNINGS,
        ENVIRONMENT,
        units=(KeptUnits(name, (tuple(range(0, 64, 2)),)),),
        repairs=(
            Repair("MatMul 'dense'", 3_336, 0.026),
            Repair("Gemm", 0, None, "too few samples"),
        ),
        sensitivity=curves(gates=False),
        trials=tuple(
            Trial({"a": s, "b": s / 2}, {"metric-drop": 0.1 * s**2, "bytes": 1 - 0.9 * s}, s < 0.5)
            for s in (0.2, 0.4, 0.6, 0.8)
        ),
        checks=CHECKS if checks else (),
        finetune=training(),
        quantized=Quantized(
            "int8",
            after,
            ratios(after, quantized),
            fidelity,
            {"LSTM": 2, "MatMul": 1},
            (Skipped("gru_1", "onnxruntime has no quantized GRU", "leave it as it is"),),
        ),
        key="2" * 64,
    )


def family() -> tuple[Report, ...]:
    return tuple(report(sparsity=s, checks=s == 0.75) for s in (0.25, 0.5, 0.75, 0.9))


def sensitivity(layers: tuple[str, ...] = ("encoder", "decoder")) -> SensitivityReport:
    return SensitivityReport(
        {},
        ModelInfo("models/speech.onnx", "onnx", "0" * 64, "pytorch 2.4", 17),
        Stage("magnitude", "weight", "cell", 0.5),
        (metric(0.9838),),
        curves(layers),
        (layers[0],),
        f"'{layers[0]}' loses most: leave it alone with --exclude '{layers[0]}'",
        WARNINGS,
        ENVIRONMENT,
    )


def bench(names: tuple[str, ...] = ("speech.onnx", "pruned.onnx", "int8.onnx")) -> BenchReport:
    """Several models in two settings; the first is the reference."""
    scales = [1.0, *(0.9 / k for k in range(2, len(names) + 1))]
    models = tuple(
        BenchModel(
            name,
            f"models/{name}",
            "onnx",
            f"{k:064d}",
            int(41_122 * scale),
            int(40_609 * scale),
            int(172_544 * scale),
            int(153_088 * scale),
            int(38_912 * scale),
            int(155_648 * scale),
            2.5 * scale,
            int(8_000_000 * scale),
            metric(0.9838 - 0.02 * k),
            (metric(0.9838 - 0.02 * k),),
            latency(0.8 * scale, k),
            how="" if k == 0 else "half of the units, repaired",
        )
        for k, (name, scale) in enumerate(zip(names, scales, strict=True))
    )
    settings = [(1, 30, 1), (8, 30, 2)]
    timings = tuple(
        Timing(
            model.name,
            batch,
            steps,
            threads,
            dataclasses.replace(model.latency_ms, median=model.latency_ms.median * batch / threads),
            1000 * threads / model.latency_ms.median,
            30_000 * threads / model.latency_ms.median,
            model.latency_ms.median / 300,
        )
        for model in models
        for batch, steps, threads in settings
    )
    found = tuple(
        BenchRatio(
            model.name,
            names[0],
            *setting,
            Ratio(scale, 0.97 * scale, 1.02 * scale),
        )
        for model, scale in zip(models[1:], scales[1:], strict=True)
        for setting in settings
    )
    controls = tuple(
        Control(names[0], *setting, Ratio(1.001, 0.994, 1.009), 12, 4.2) for setting in settings
    )
    return BenchReport(
        {}, models, timings, found, controls[0], controls, CHECKS, WARNINGS, ENVIRONMENT
    )


def check(passed: bool = False) -> CheckReport:
    checks = tuple(c for c in CHECKS if c.passed) if passed else CHECKS
    return CheckReport({}, "report.json", "main.json", checks, WARNINGS[:1])


def hostile() -> dict[str, object]:
    """A result of each kind whose names are an attack."""
    one = report(HOSTILE)
    renamed = dataclasses.replace(
        one,
        model=dataclasses.replace(one.model, path=HOSTILE, producer=HOSTILE),
        output=dataclasses.replace(one.output, path=HOSTILE),
        skipped=(Skipped(HOSTILE, HOSTILE, HOSTILE),),
        warnings=(HOSTILE,),
        repairs=(Repair(HOSTILE, 3, 0.1, HOSTILE),),
        fidelity=(OutputFidelity(HOSTILE, 1.0, 1.0, 1.0, 1.0),),
        sensitivity=curves((HOSTILE, f"_{HOSTILE}")),
        checks=(Check(HOSTILE, 1.0, 2.0, False, subject=HOSTILE, hint=HOSTILE),),
        trials=(Trial({HOSTILE: 0.5}, {HOSTILE: 0.5, "metric-drop": 0.1}, True),),
        verification=(Claim(HOSTILE, True, 0.0, 0.0),),
        environment={HOSTILE: HOSTILE},
    )
    return {
        "report": renamed,
        "family": (renamed, renamed),
        "sensitivity": dataclasses.replace(
            sensitivity((HOSTILE, f"_{HOSTILE}")), warnings=(HOSTILE,)
        ),
        "bench": dataclasses.replace(bench((HOSTILE, f"_{HOSTILE}")), warnings=(HOSTILE,)),
        "check": CheckReport({}, HOSTILE, HOSTILE, renamed.checks, (HOSTILE,)),
    }


def results() -> dict[str, object]:
    """A result of each kind."""
    return {
        "report": report(),
        "family": family(),
        "sensitivity": sensitivity(),
        "bench": bench(),
        "check": check(),
    }
