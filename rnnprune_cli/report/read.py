"""Reports that were saved as JSON, back as the dataclasses that they were made from.

A report of an older version lacks fields that came later, which then have their defaults; one of a
newer version has fields that are not known here, which are left out. ``null`` stands for a figure
that JSON cannot hold: NaN.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from rnnprune_cli.errors import RnnpruneError
from rnnprune_cli.model import BenchReport, CheckReport, Report, SensitivityReport
from rnnprune_cli.report.json import SCHEMA_VERSION

MAX_REPORT_BYTES = 32 << 20
_MAX_INT = 1 << 63
_T = TypeVar("_T")

AnyReport = Report | tuple[Report, ...] | SensitivityReport | BenchReport | CheckReport
"""What a saved report can be; several reports are those of a family."""


def read_report(path: Path) -> AnyReport:
    """Reads what ``--report X.json`` or ``--format json`` wrote.

    Raises:
        RnnpruneError: If it cannot be read, or holds no result.
    """
    return report_of(parsed(path, "JSON", MAX_REPORT_BYTES, json.loads), str(path))


def report_of(document: Any, name: str) -> AnyReport:  # noqa: ANN401  any JSON value
    """Returns what a JSON document says.

    Args:
        document: As parsed.
        name: Of the file, for errors.

    Raises:
        RnnpruneError: If it is no report, one of another ``schema_version``, or damaged.
    """
    check_version(document, name)
    if document.get("status") == "error":
        error = document.get("error")
        said = error.get("message") if isinstance(error, dict) else None
        raise RnnpruneError(
            f"{name} is the report of a run that failed" + (f": {said}" if said else ""),
            "run it again, and give the report of a run that came to its end",
        )
    if "plan" in document:
        return _report(document, name)
    kinds = {"timings": BenchReport, "curves": SensitivityReport, "checks": CheckReport}
    for key, kind in kinds.items():
        if key in document:
            return _consistent(typing.cast(AnyReport, _dataclass(document, kind, name)), name)
    models = document.get("models")
    if isinstance(models, list) and models:
        return tuple(_report(m, f"{name}: models[{k}]") for k, m in enumerate(models))
    raise RnnpruneError(
        f"{name} holds no result of rnnprune prune, run, sensitivity, bench or check",
        "give what one of them wrote with --report X.json",
    )


def with_checks(report: AnyReport, checked: CheckReport) -> AnyReport:
    """Returns a report with the checks and warnings of another judgement instead of its own."""
    if isinstance(report, Report | BenchReport):
        warnings = tuple(dict.fromkeys((*report.warnings, *checked.warnings)))
        return dataclasses.replace(report, checks=checked.checks, warnings=warnings)
    if not isinstance(report, tuple):
        return report
    return tuple(
        dataclasses.replace(
            member,
            checks=tuple(c for c in checked.checks if c.subject == Path(member.output.path).name),
            warnings=tuple(dict.fromkeys((*member.warnings, *checked.warnings))),
        )
        for member in report
    )


def check_version(document: Any, name: str) -> None:  # noqa: ANN401  any JSON value
    """Raises RnnpruneError if a document is none of rnnprune, or of another schema version."""
    if not isinstance(document, dict) or "schema_version" not in document:
        raise RnnpruneError(f"{name} is no report of rnnprune", "give what --report X.json wrote")
    if document["schema_version"] != SCHEMA_VERSION:
        raise RnnpruneError(
            f"{name} is a report of schema_version {_shown(document['schema_version'])};"
            f" this rnnprune reads {SCHEMA_VERSION}",
            "take the version of rnnprune that wrote it",
        )


def parsed(path: Path, language: str, limit: int, parse: Callable[[str], _T]) -> _T:
    """Reads a file of limited size.

    Args:
        path: The file.
        language: In which it is written, for errors.
        limit: Bytes that it may have.
        parse: Reads its text; raises ValueError or RecursionError if it cannot.

    Raises:
        RnnpruneError: If it cannot be read.
    """
    if not path.exists():
        raise RnnpruneError(f"{path} does not exist", "check the path of the recipe or report")
    if not path.is_file():
        raise RnnpruneError(f"{path} is no file", "give the path of a recipe or report")
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise RnnpruneError(
            f"{path} cannot be read: {error.strerror}", "check its rights"
        ) from error
    if len(content) > limit:
        raise RnnpruneError(
            f"{path} is larger than {limit >> 20} MiB", "it is no recipe or report of rnnprune"
        )
    try:
        return parse(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RnnpruneError(f"{path} is not UTF-8 text", "save it as UTF-8") from error
    except ValueError as error:
        raise RnnpruneError(
            f"{path} is not {language}: {error}", "correct it where the message says"
        ) from error
    except RecursionError as error:
        raise RnnpruneError(
            f"{path} nests too deeply", "it is no recipe or report of rnnprune"
        ) from error


def _report(document: Any, name: str) -> Report:  # noqa: ANN401  any JSON value
    """Reads the report of one model; see :func:`rnnprune_cli.report.json.report_document`."""
    if isinstance(document, dict) and isinstance(document.get("fidelity"), dict):
        document = {**document, "fidelity": document["fidelity"].get("outputs")}
    found = typing.cast(Report, _dataclass(document, Report, name))
    if len(found.before.metrics) != len(found.after.metrics):
        raise _damaged(name, "there are not as many metrics after as before")
    return found


def _consistent(report: AnyReport, name: str) -> AnyReport:
    """Returns a report whose parts fit each other.

    Raises:
        RnnpruneError: If they do not; rnnprune does not write such a report.
    """
    if isinstance(report, SensitivityReport):
        points = [point for curve in report.curves for point in curve.points]
        if not report.dense or not all(p.metrics and math.isfinite(p.drop) for p in points):
            raise _damaged(name, "a point of a curve has no figures")
    if isinstance(report, BenchReport):
        known = {model.name for model in report.models}
        named = {timing.model for timing in report.timings}
        named |= {name for r in report.ratios for name in (r.model, r.reference)}
        if not known or named != known:
            raise _damaged(name, "its models are not those that were timed")
    return report


def _damaged(name: str, problem: str) -> RnnpruneError:
    return RnnpruneError(f"{name} is damaged: {problem}", "give the report as --report wrote it")


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """Returns field → type of a dataclass."""
    return typing.get_type_hints(kind)


def _built(value: Any, kind: Any, where: str) -> Any:  # noqa: ANN401  any type of the model
    """Returns a JSON value as a type says.

    Args:
        value: As parsed.
        kind: A type that the dataclasses of a report are made of.
        where: The file and the place in it, for errors.

    Raises:
        RnnpruneError: If it is of another type.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and types.NoneType in inner:
            return None
        (kind,) = (k for k in inner if k is not types.NoneType)
        return _built(value, kind, where)
    if origin is typing.Literal:
        return value if value in inner else _refuse(value, " or ".join(map(repr, inner)), where)
    if origin is tuple:
        return _tuple(value, inner, where)
    if dataclasses.is_dataclass(kind):
        return _dataclass(value, kind, where)
    if origin is Mapping:
        if not isinstance(value, dict):
            _refuse(value, "an object", where)
        return {key: _built(v, inner[1], f"{where}: {key}") for key, v in value.items()}
    return _plain(value, kind, where)


def _tuple(value: Any, inner: tuple[Any, ...], where: str) -> tuple[Any, ...]:  # noqa: ANN401
    if not isinstance(value, list):
        _refuse(value, "a list", where)
    kinds = [inner[0]] * len(value) if inner[-1] is ... else list(inner)
    if len(kinds) != len(value):
        _refuse(value, f"a list of {len(kinds)}", where)
    return tuple(
        _built(v, k, f"{where}[{place}]")
        for place, (v, k) in enumerate(zip(value, kinds, strict=True))
    )


def _dataclass(value: Any, kind: Any, where: str) -> Any:  # noqa: ANN401
    if not isinstance(value, dict):
        _refuse(value, "an object", where)
    hints, fields = _hints(kind), dict[str, Any]()
    for field in dataclasses.fields(kind):
        if field.name in value:
            place = f"{where}: {field.name}"
            fields[field.name] = _built(value[field.name], hints[field.name], place)
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise _damaged(where, f"'{field.name}' is missing")
    return kind(**fields)


def _plain(value: Any, kind: Any, where: str) -> Any:  # noqa: ANN401
    if kind is float:
        if value is None:
            return float("nan")
        if isinstance(value, int | float) and not isinstance(value, bool):
            return _float(value)
        _refuse(value, "a number", where)
    expected = str if kind is Path else kind
    huge = kind is int and isinstance(value, int) and abs(value) > _MAX_INT
    if not isinstance(value, expected) or (isinstance(value, bool) and kind is not bool) or huge:
        _refuse(value, {int: "a whole number", bool: "true or false"}.get(kind, "text"), where)
    return kind(value)


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return float("inf")


def _refuse(value: object, expected: str, where: str) -> NoReturn:
    raise RnnpruneError(
        f"{where} must be {expected}, not {_shown(value)}", "give the report as --report wrote it"
    )


def _shown(value: object) -> str:
    """Returns the beginning of a value that was read."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:39]}…"
