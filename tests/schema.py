"""Makes ``rnnprune_cli/report/schema.json`` from the dataclasses: python tests/schema.py.

Written files validate against it, and older ones do, too: only what has no default is required.
Figures may be null, which stands for NaN. A test holds the committed file against this.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rnnprune_cli.model import (
    BenchReport,
    CheckReport,
    Lift,
    RemovableUnits,
    Report,
    SensitivityReport,
    Skipped,
)
from rnnprune_cli.report.json import SCHEMA_VERSION

PLACE = Path(__file__).parent.parent / "rnnprune_cli" / "report" / "schema.json"
PLAIN = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": ["number", "null"]},
    str: {"type": "string"},
    Path: {"type": "string"},
    Any: {},
}
WORDS, NUMBER = {"type": "string"}, {"type": "integer"}
HEADER = {
    "schema_version": {"const": SCHEMA_VERSION},
    "tool": {
        "type": "object",
        "properties": {"name": {"const": "rnnprune"}, "version": WORDS},
        "required": ["name", "version"],
    },
}
RESULT = {**HEADER, "arguments": {"type": "object"}, "status": {"const": "ok"}}
JUDGED = {**RESULT, "passed": {"type": "boolean"}}
DONE = {**JUDGED, "status": {"enum": ["ok", "unchanged"]}}


class Maker:
    """Collects the definitions of dataclasses.

    Args:
        closed: Whether to refuse fields that are not known, as a test wants it; documents of later
            versions may have more.
    """

    def __init__(self, closed: bool = False) -> None:
        self.definitions: dict[str, Any] = {}
        self._closed = closed

    def object(
        self, properties: Mapping[str, Any], optional: tuple[str, ...] = (), summary: str = ""
    ) -> dict[str, Any]:
        """Returns the schema of an object."""
        made: dict[str, Any] = {"description": summary} if summary else {}
        made |= {"type": "object", "properties": dict(properties)}
        made["required"] = [name for name in properties if name not in optional]
        return made | ({"additionalProperties": False} if self._closed else {})

    def of(self, kind: Any) -> dict[str, Any]:
        """Returns the schema of a type."""
        origin, inner = typing.get_origin(kind), typing.get_args(kind)
        if dataclasses.is_dataclass(kind):
            if kind.__name__ not in self.definitions:
                self.definitions[kind.__name__] = {}  # one that holds itself would not end
                self.definitions[kind.__name__] = self.dataclass(kind, {})
            return {"$ref": f"#/$defs/{kind.__name__}"}
        if origin in (typing.Union, types.UnionType):
            (own,) = (self.of(k) for k in inner if k is not types.NoneType)
            if isinstance(own.get("type"), str):
                return {**own, "type": [own["type"], "null"]}
            return own if "null" in own.get("type", ()) else {"anyOf": [own, {"type": "null"}]}
        if origin is typing.Literal:
            return {"enum": list(inner)}
        if origin is tuple and inner[-1] is ...:
            return {"type": "array", "items": self.of(inner[0])}
        if origin is tuple:
            size = {"minItems": len(inner), "maxItems": len(inner)}
            return {"type": "array", "prefixItems": [self.of(k) for k in inner], **size}
        if origin is Mapping:
            values = self.of(inner[1])
            return {"type": "object", **({"additionalProperties": values} if values else {})}
        return PLAIN[kind]

    def dataclass(self, kind: Any, more: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the schema of a dataclass, after what its document begins with."""
        hints, missing = typing.get_type_hints(kind), dataclasses.MISSING
        optional = tuple(
            f.name
            for f in dataclasses.fields(kind)
            if not (f.default is f.default_factory is missing)
        )
        fields = {field.name: self.of(hints[field.name]) for field in dataclasses.fields(kind)}
        summary = (kind.__doc__ or "").split("\n")[0]
        # Reports of the first versions did not say whether what was required holds.
        return self.object({**more, **fields}, (*optional, "passed"), summary)

    def documents(self) -> dict[str, Any]:
        """Returns document → schema."""
        report = self.dataclass(Report, DONE)
        outputs = {"outputs": report["properties"]["fidelity"]}
        report["properties"]["fidelity"] = self.object(outputs)
        skipped, lifts = (self.of(tuple[k, ...]) for k in (Skipped, Lift))  # type: ignore[valid-type]
        names = {"type": "array", "items": WORDS}
        summaries = {"type": "object", "additionalProperties": WORDS}
        layer = {
            **dict.fromkeys(("name", "op", "direction"), WORDS),
            **dict.fromkeys(("input", "hidden", "weights"), NUMBER),
            "shared": names,
        }
        other = {
            **dict.fromkeys(("name", "op", "kind"), WORDS),
            **dict.fromkeys(("rows", "columns", "weights"), NUMBER),
        }
        model = {
            **dict.fromkeys(("path", "format", "producer"), WORDS),
            "opset": {"type": ["integer", "null"]},
        }
        error = {"message": WORDS, "hint": WORDS, "exit_code": NUMBER}
        method = {
            **dict.fromkeys(("name", "summary", "paper"), WORDS),
            "granularities": names,
            "needs_data": {"type": "boolean"},
        }
        reports = {"type": "array", "items": {"$ref": "#/$defs/report"}, "minItems": 1}
        return {
            "report": report,
            "family": self.object(
                {**DONE, "models": reports}, ("passed",), "Several models of one run."
            ),
            "sensitivity": self.dataclass(SensitivityReport, RESULT),
            "bench": self.dataclass(BenchReport, JUDGED),
            "check": self.dataclass(CheckReport, JUDGED),
            "inspect": self.object(
                {
                    **RESULT,
                    "model": self.object(model),
                    "layers": {"type": "array", "items": self.object(layer)},
                    "units": self.of(tuple[RemovableUnits, ...]),
                    "others": {"type": "array", "items": self.object(other)},
                    "lifts": lifts,
                    "skipped": skipped,
                    "warnings": names,
                },
                summary="What is recurrent in a model.",
            ),
            "methods": self.object(
                {
                    **HEADER,
                    "methods": {"type": "array", "items": self.object(method)},
                    "granularities": summaries,
                    "scopes": {"type": "object", "additionalProperties": summaries},
                    "exports": summaries,
                },
                summary="What can be asked for.",
            ),
            "error": self.object(
                {
                    **HEADER,
                    "arguments": {"type": "object"},
                    "status": {"const": "error"},
                    "error": self.object(error),
                },
                summary="Why a run failed.",
            ),
        }


def schema(closed: bool = False) -> dict[str, Any]:
    """Returns the schema of all documents.

    Args:
        closed: See :class:`Maker`.
    """
    maker = Maker(closed)
    documents = maker.documents()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "What rnnprune writes as JSON",
        "description": "Fields may be added within a schema_version, and none is taken away. A"
        " figure that JSON cannot hold is null.",
        "anyOf": [{"$ref": f"#/$defs/{name}"} for name in documents],
        "$defs": {**documents, **dict(sorted(maker.definitions.items()))},
    }


def text() -> str:
    """Returns the schema as the committed file has it."""
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PLACE.write_text(text(), encoding="utf-8")
