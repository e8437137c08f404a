"""The report as JSON, ``schema_version: 1``."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rnnprune_cli import __version__
from rnnprune_cli.checks import passed
from rnnprune_cli.errors import RnnpruneError
from rnnprune_cli.methods import Method
from rnnprune_cli.model import (
    BenchReport,
    CheckReport,
    LoadedModel,
    OtherLayer,
    RemovableUnits,
    Report,
    SensitivityReport,
)

SCHEMA_VERSION = 1


def header() -> dict[str, Any]:
    """Returns what every document begins with."""
    return {"schema_version": SCHEMA_VERSION, "tool": {"name": "rnnprune", "version": __version__}}


def report_document(report: Report, status: str = "ok") -> dict[str, Any]:
    """Returns the document of a run that came to its end.

    Args:
        report: What it has to say.
        status: ``ok``, or ``unchanged`` if an earlier run had done it all.
    """
    fields = dataclasses.asdict(report)
    fields["fidelity"] = {"outputs": fields["fidelity"]}
    arguments = fields.pop("arguments")
    start = {**header(), "arguments": arguments, "status": status, "passed": passed(report)}
    return {**start, **fields}


def family_document(
    reports: Sequence[Report], arguments: Mapping[str, Any], status: str = "ok"
) -> dict[str, Any]:
    """Returns the document of a family of models."""
    models = [report_document(report, status) for report in reports]
    start = {**header(), "arguments": dict(arguments), "status": status}
    return {**start, "passed": all(map(passed, reports)), "models": models}


def sensitivity_document(report: SensitivityReport) -> dict[str, Any]:
    """Returns the document of sensitivity curves."""
    fields = dataclasses.asdict(report)
    arguments = fields.pop("arguments")
    return {**header(), "arguments": arguments, "status": "ok", **fields}


def bench_document(report: BenchReport) -> dict[str, Any]:
    """Returns the document of a benchmark."""
    fields = dataclasses.asdict(report)
    arguments = fields.pop("arguments")
    held = all(check.passed for check in report.checks)
    return {**header(), "arguments": arguments, "status": "ok", "passed": held, **fields}


def check_document(report: CheckReport) -> dict[str, Any]:
    """Returns the document of what was judged."""
    fields = dataclasses.asdict(report)
    arguments = fields.pop("arguments")
    return {**header(), "arguments": arguments, "status": "ok", "passed": report.passed, **fields}


def document_of(
    result: Report | Sequence[Report] | SensitivityReport | BenchReport | CheckReport,
) -> dict[str, Any]:
    """Returns the document of a result that was read from one."""
    match result:
        case Report():
            return report_document(result)
        case SensitivityReport():
            return sensitivity_document(result)
        case BenchReport():
            return bench_document(result)
        case CheckReport():
            return check_document(result)
        case _:
            arguments = {k: v for k, v in result[0].arguments.items() if k != "family"}
            limits = [member.arguments.get("family") for member in result]
            return family_document(result, {**arguments, "family": limits})


def error_document(error: RnnpruneError, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the document of a run that failed."""
    return {
        **header(),
        "arguments": dict(arguments),
        "status": "error",
        "error": {"message": error.message, "hint": error.hint, "exit_code": int(error.code)},
    }


def inspect_document(
    model: LoadedModel,
    units: Iterable[RemovableUnits],
    others: Iterable[OtherLayer],
    arguments: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns what ``inspect`` found."""
    return {
        **header(),
        "arguments": dict(arguments),
        "status": "ok",
        "model": {
            "path": str(model.path),
            "format": model.format,
            "producer": model.producer,
            "opset": model.opset,
        },
        "layers": [
            {
                "name": layer.name,
                "op": layer.op,
                "direction": layer.direction,
                "input": layer.input_size,
                "hidden": layer.hidden_size,
                "weights": layer.macs_per_step,
                "shared": [w.name for w in layer.weights if not w.name.startswith(layer.name)],
            }
            for layer in model.layers
        ],
        "units": [dataclasses.asdict(layer) for layer in units],
        "others": [
            {
                "name": layer.name,
                "op": layer.op,
                "kind": layer.kind,
                "rows": layer.hidden_size,
                "columns": layer.input_size,
                "weights": layer.w.size,
            }
            for layer in others
        ],
        "lifts": [dataclasses.asdict(lift) for lift in model.lifts],
        "skipped": [dataclasses.asdict(s) for s in model.skipped],
        "warnings": list(model.warnings),
    }


def methods_document(
    methods: Iterable[Method],
    granularities: Mapping[str, str],
    scopes: Mapping[str, Mapping[str, str]],
    exports: Mapping[str, str],
) -> dict[str, Any]:
    """Returns every method, granularity, scope (by granularity) and export form."""
    return {
        **header(),
        "methods": [
            {
                "name": m.name,
                "summary": m.summary,
                "paper": m.paper,
                "granularities": list(m.scores),
                "needs_data": m.needs_data,
            }
            for m in methods
        ],
        "granularities": dict(granularities),
        "scopes": {granularity: dict(known) for granularity, known in scopes.items()},
        "exports": dict(exports),
    }


def render(document: Mapping[str, Any]) -> str:
    """Returns a document as text; figures that JSON cannot hold become null."""
    text = json.dumps(_plain(document), indent=2, ensure_ascii=False)
    return _NUMBERS.sub(lambda numbers: f"[{' '.join(numbers[1].split())}]", text)


_NUMBERS = re.compile(r"\[\n\s+([-+.\deE,\s]+?)\n\s+\]")
"""A list of numbers; inside a string there is no line break."""


def _plain(value: Any) -> Any:  # noqa: ANN401  any JSON value
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    return str(value)
