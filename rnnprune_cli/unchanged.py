"""``--skip-if-unchanged``: whether an earlier run has already done what is asked for.

A report carries a key: the digest of everything that its output depends on. Nothing heavy is
imported here, so that a build in which nothing has changed takes no time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rnnprune_cli import __version__
from rnnprune_cli.checks import judged_anew
from rnnprune_cli.errors import RnnpruneError, UsageError
from rnnprune_cli.load import TENSORFLOW_SUFFIXES, model_files
from rnnprune_cli.measure import sha256
from rnnprune_cli.model import Report
from rnnprune_cli.options import PruneOptions, check_options, member_path, output_path
from rnnprune_cli.report.read import read_report

NO_PART = ("output", "force", "reports", "require", "strict", "resume", "logdir")
"""Fields of the options that do not change the result; all others are part of the key."""
_PACKAGES = ("numpy", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "optuna")
_TENSORFLOW = ("tensorflow", "tensorflow-cpu", "tf2onnx", "keras", "tf-keras")


def key_of(options: PruneOptions) -> str:
    """Returns the digest of what a run depends on: files, options, and versions.

    Of paths, the contents count, and not where they lie.
    """
    _, output_format = output_path(options.model, options.output, rebuilds=options.rebuilds)
    tensorflow = (
        output_format != "onnx"
        or options.model.is_dir()
        or options.model.suffix.lower() in TENSORFLOW_SUFFIXES
        or options.finetune.epochs > 0
    )
    parts = {
        "tool": __version__,
        "format": output_format,
        "options": _plain(options),
        "versions": _versions((*_PACKAGES, *(_TENSORFLOW if tensorflow else ()))),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def unchanged(options: PruneOptions, arguments: Mapping[str, Any]) -> tuple[Report, ...] | None:
    """Returns the reports of an earlier run that has done the same, judged anew.

    Args:
        options: What is to be done; its reports name where the earlier one was saved.
        arguments: The options as the user gave them now.

    Returns:
        One report, or several of a family; None if something is to be done.

    Raises:
        UsageError: If no report is named that can be read again, or the options make no sense.
    """
    check_options(options)
    saved = next((path for path in options.reports if path.suffix == ".json"), None)
    if saved is None:
        raise UsageError(
            "--skip-if-unchanged looks at the report of an earlier run", "give --report report.json"
        )
    reports = _earlier(saved)
    output, _ = output_path(options.model, options.output, rebuilds=options.rebuilds)
    places = [member_path(output, value) for value in options.family] or [output]
    if len(reports) != len(places) or not all(place.exists() for place in places):
        return None
    if any(report.finetune is not None and report.finetune.interrupted for report in reports):
        return None
    if {report.key for report in reports} != {key_of(options)}:
        return None
    found = []
    for number, (report, place) in enumerate(zip(reports, places, strict=True)):
        if sha256(_files(place)) != report.output.sha256:
            return None
        judged = judged_anew(report, options.require, options.strict)
        own = {"family": options.family[number]} if options.family else {}
        found.append(
            dataclasses.replace(
                judged,
                arguments={**arguments, **own},
                model=dataclasses.replace(report.model, path=str(options.model)),
                output=dataclasses.replace(report.output, path=str(place)),
            )
        )
    return tuple(found)


def _earlier(path: Path) -> Sequence[Report]:
    """Reads what an earlier run has saved; nothing if that is no such report."""
    if not path.is_file():
        return ()
    try:
        found = read_report(path)
    except RnnpruneError:  # of a run that failed, or of another version: it is made again
        return ()
    if isinstance(found, Report):
        return (found,)
    return found if isinstance(found, tuple) else ()


def _plain(value: Any) -> Any:  # noqa: ANN401  any option
    """Returns an option as JSON, with the contents of files instead of their paths."""
    if isinstance(value, Path):
        return _contents(value)
    if dataclasses.is_dataclass(value):
        names = (field.name for field in dataclasses.fields(value))
        return {name: _plain(getattr(value, name)) for name in names if name not in NO_PART}
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple):
        return [_plain(inner) for inner in value]
    return value


def _contents(path: Path) -> Any:  # noqa: ANN401  any JSON value
    """Returns the digests of a model's or data set's files; None if there are none."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return {str(file.relative_to(path)): sha256([file]) for file in files}
    return sha256(_files(path)) if path.is_file() else None


def _files(path: Path) -> tuple[Path, ...]:
    """Returns all files of a model or data set.

    Whether an ONNX model has more than one is in its tensors, as ``location``; those that have not
    that word anywhere need not be parsed.
    """
    if path.suffix.lower() == ".onnx" and path.stat().st_size:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            if text.find(b"location") < 0:
                return (path,)
        return model_files(path)
    return model_files(path) if path.is_dir() else (path,)


def _versions(names: Sequence[str]) -> dict[str, str]:
    """Returns name → version of the packages that are installed, without importing them."""
    found = (
        (name, next(iter(importlib.metadata.distributions(name=name)), None)) for name in names
    )
    return {name: package.version for name, package in found if package is not None}
