"""The built-in benchmark: its models are made as it says, and measured group by group."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys

import pytest
from conftest import SAMPLES
from test_cli import rnnprune

from rnnprune_cli import suite as built_in
from rnnprune_cli.bench import BenchOptions
from rnnprune_cli.errors import ExitCode, RnnpruneError, UsageError
from rnnprune_cli.load import load

OPTIONS = BenchOptions((), seconds=0.5)


def quiet(step: str) -> None:
    pass


def test_every_variant_is_made_measured_and_said_how(monkeypatch, tmp_path):
    monkeypatch.setattr(built_in, "SAMPLES", {"timeseries": ".onnx", "speech": ".onnx"})
    kept = ("int8", "magnitude 90 %", "units 75 %")
    monkeypatch.setattr(built_in, "VARIANTS", {k: built_in.VARIANTS[k] for k in kept})
    found = built_in.suite(OPTIONS, {}, quiet)
    models = {model.name: model for model in found.models}
    assert [*models] == [
        f"{sample}, {variant}"
        for sample in ("timeseries", "speech")
        for variant in ("original", *kept)
    ]
    assert {r.reference for r in found.ratios} == {"timeseries, original", "speech, original"}
    assert len(found.controls) == 2
    assert all(m.metric is not None and m.group == m.name.split(",")[0] for m in found.models)
    assert models["speech, int8"].bytes < 0.5 * models["speech, original"].bytes
    small = models["timeseries, units 75 %"]
    assert small.parameters < 0.2 * models["timeseries, original"].parameters
    # The command that it shows makes the same model.
    words = shlex.split(small.how)
    assert words[:3] == ["rnnprune", "prune", "timeseries.onnx"]
    data = [f"--data={SAMPLES}/timeseries.test.npz"]
    data += [f"--calibration={SAMPLES}/timeseries.calibration.npz"]
    output = tmp_path / "small.onnx"
    done = rnnprune("prune", SAMPLES / "timeseries.onnx", *words[3:], *data, "-o", output)
    assert done.returncode == 0, done.stderr
    assert output.stat().st_size == small.bytes
    assert load(output).count().parameters == small.parameters


def test_what_cannot_be_made_is_left_out_with_the_reason(tmp_path):
    (tmp_path / "speech.onnx").write_bytes(b"no model")
    variants = ("int8", "units 50 %")
    tasks = [
        built_in._Task("speech", v, tmp_path, tmp_path / f"{k}.onnx", 0)
        for k, v in enumerate(variants)
    ]
    (problem,) = built_in._made(tasks, tmp_path, quiet)
    assert problem.startswith("left out: speech, int8; speech, units 50 %: ")
    assert "speech.onnx" in problem


def test_what_is_interrupted_leaves_no_files(tmp_path):
    command = [sys.executable, "-m", "rnnprune_cli.cli", "bench", "--verbose", "--format", "json"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stderr is not None
        while line := process.stderr.readline():
            if "made 1 of" in line:  # both workers are at it
                process.send_signal(signal.SIGTERM)
        process.communicate()
    assert process.returncode == ExitCode.INTERRUPTED
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("rnnprune")] == []


def test_the_suite_has_its_own_data():
    with pytest.raises(UsageError, match="its own data"):
        built_in.suite(BenchOptions((), data=SAMPLES / "speech.test.npz"), {}, quiet)


def test_without_sample_models_it_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(built_in, "__file__", str(tmp_path / "package" / "suite.py"))
    with pytest.raises(RnnpruneError, match="not installed") as caught:
        built_in.suite(OPTIONS, {}, quiet)
    assert "rnnprune bench" in caught.value.hint
