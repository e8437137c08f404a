"""The built-in benchmark: every sample model as it is, and compressed in several ways."""

from __future__ import annotations

import dataclasses
import multiprocessing
import signal
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rnnprune_cli.bench import BenchOptions, Entry, Group, Progress, check, report
from rnnprune_cli.errors import RnnpruneError, UsageError
from rnnprune_cli.load import load
from rnnprune_cli.model import BenchReport, ExportOptions
from rnnprune_cli.options import PruneOptions, complete_stage

SAMPLES = {"language": ".onnx", "speech": ".onnx", "timeseries": ".onnx", "medicine": ""}
"""Sample model → what its file ends with; the slowest first."""
CONVERTED = "other format"
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    CONVERTED: {"sparsity": 0.0},
    "int8": {"sparsity": 0.0, "quantize": "int8"},
    "magnitude 70 %": {"sparsity": 0.7, "export": "packed"},
    "magnitude 90 %": {"sparsity": 0.9, "export": "packed"},
    "units 50 %": {"granularity": "unit", "method": "obs", "sparsity": 0.5},
    "units 75 %": {"granularity": "unit", "method": "obs", "sparsity": 0.75},
    "units, metric-drop ≤ 1 %": {
        "granularity": "unit",
        "method": "obs",
        "target": "metric-drop=0.01",
    },
}
"""What is made of each model: options of ``prune``."""
WORKERS = 2


@dataclass(frozen=True)
class _Task:
    sample: str
    variant: str
    folder: Path
    output: Path
    seed: int


@dataclass(frozen=True)
class _Done:
    task: _Task
    problem: str | None


def suite(options: BenchOptions, arguments: Mapping[str, Any], progress: Progress) -> BenchReport:
    """Makes the models of the suite in a temporary folder, and measures them.

    Args:
        options: Settings; the suite has its own models and data.
        arguments: The options as the user gave them, for the report.
        progress: Called with a short text at the beginning of each step.

    Raises:
        RnnpruneError: If the sample models are not there.
    """
    check(options)
    if options.data is not None:
        raise UsageError("the built-in suite has its own data", "give models, or leave out --data")
    samples = samples_folder()
    with tempfile.TemporaryDirectory(prefix="rnnprune-") as name:
        tasks = [
            _Task(sample, variant, samples, Path(name) / _file(sample, variant), options.seed)
            for sample in SAMPLES
            for variant in VARIANTS
        ]
        problems = _made(tasks, Path(name), progress)
        groups = []
        for sample, suffix in SAMPLES.items():
            original = samples / f"{sample}{suffix}"
            try:
                entries = [Entry(f"{sample}, original", load(original), "as it is")]
            except RnnpruneError:  # a SavedModel without TensorFlow: its variants have said so
                continue
            for task in tasks:
                if task.sample == sample and task.output.exists():
                    said = _name(task.sample, task.variant), load(task.output)
                    entries.append(Entry(*said, _how(original.name, task)))
            data = samples / f"{sample}.test.npz"
            groups.append(Group(entries, options, data, progress, sample))
        found = report(groups, options, arguments)
    return dataclasses.replace(found, warnings=(*problems, *found.warnings))


def samples_folder() -> Path:
    """Returns where the sample models lie: in the package, or beside it in a clone.

    Raises:
        RnnpruneError: If they are nowhere.
    """
    here = Path(__file__).parent
    for folder in (here / "sample_models", here.parent / "sample_models"):
        if folder.is_dir():
            return folder
    raise RnnpruneError(
        "the sample models of the built-in suite are not installed",
        "give models to measure: rnnprune bench model.onnx other.onnx",
    )


def _name(sample: str, variant: str) -> str:
    if variant == CONVERTED:
        variant = "ONNX" if not SAMPLES[sample] else "SavedModel"
    return f"{sample}, {variant}"


def _file(sample: str, variant: str) -> str:
    """Returns the name of a model's file, which begins with the sample's."""
    words = "".join(c if c.isalnum() else "-" for c in variant)
    folder = variant == CONVERTED and SAMPLES[sample] == ".onnx"
    return f"{sample}-{words}{'' if folder else '.onnx'}"


def _how(model: str, task: _Task) -> str:
    """Returns the command that makes a model."""
    words = [
        f"--{key} {value:g}" if isinstance(value, float) else f"--{key} {value}"
        for key, value in VARIANTS[task.variant].items()
    ]
    return f"rnnprune prune {model} {' '.join(words)}"


def _made(tasks: list[_Task], folder: Path, progress: Progress) -> tuple[str, ...]:
    """Makes all models, two at a time; returns what could not be made, and why.

    Args:
        tasks: What to make.
        folder: For temporary files: the processes that write them are killed if this one ends.
        progress: Told how far it is.
    """
    problems: dict[str, list[str]] = {}
    begin = time.perf_counter()
    progress(f"making {len(tasks)} models")
    context = multiprocessing.get_context("spawn")
    with context.Pool(WORKERS, _begin, (str(folder),)) as pool:
        for number, done in enumerate(pool.imap_unordered(_make, tasks), 1):
            left = (time.perf_counter() - begin) / number * (len(tasks) - number)
            progress(f"made {number} of {len(tasks)} models, about {left:.0f} s left")
            if done.problem is not None:
                name = _name(done.task.sample, done.task.variant)
                problems.setdefault(done.problem, []).append(name)
    return tuple(f"left out: {'; '.join(sorted(w))}: {problem}" for problem, w in problems.items())


def _begin(folder: str) -> None:
    """Begins a process that makes models."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tempfile.tempdir = folder


def _make(task: _Task) -> _Done:
    """Makes one model; runs in a process of its own."""
    from rnnprune_cli.pipeline import prune
    from rnnprune_cli.recipe import targets_of

    given: dict[str, Any] = {"method": "magnitude", "granularity": "weight", "sparsity": 0.0}
    given |= VARIANTS[task.variant]
    limits, _ = targets_of([given["target"]] if "target" in given else (), ())
    options = PruneOptions(
        model=task.folder / f"{task.sample}{SAMPLES[task.sample]}",
        output=task.output,
        stages=(complete_stage(given["method"], given["granularity"], None, given["sparsity"]),),
        seed=task.seed,
        data=task.folder / f"{task.sample}.test.npz",
        calibration=task.folder / f"{task.sample}.calibration.npz",
        export=ExportOptions(given.get("export", "auto")),
        targets=limits,
        quantize=given.get("quantize"),
        latency_seconds=0.0,
    )
    try:
        prune(options, {}, lambda step: None)
    except RnnpruneError as error:
        return _Done(task, f"{error.message} ({error.hint})")
    return _Done(task, None)
