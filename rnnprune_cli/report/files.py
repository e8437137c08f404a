"""Every kind of result in every format: what stdout carries, and what ``--report`` writes.

Commands call three functions: :func:`check_report_paths` before they begin,
:func:`write_reports` when they have a result, and :func:`as_text` or :func:`as_table` for stdout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnnprune_cli.errors import UsageError
from rnnprune_cli.model import BenchReport, CheckReport, Report, SensitivityReport
from rnnprune_cli.save import check_writable, write_text

if TYPE_CHECKING:
    from rich.console import RenderableType

Result = Report | Sequence[Report] | SensitivityReport | BenchReport | CheckReport
"""What a command has to say; several reports are those of a family."""

FORMATS = {".json": "json", ".md": "markdown", ".html": "html"}
"""Suffix of a report → its format."""


def check_report_paths(paths: Iterable[Path], force: bool) -> None:
    """Raises UsageError if a report cannot be written to one of these paths.

    Args:
        paths: What ``--report`` names.
        force: Whether existing files may be overwritten.
    """
    seen = set[Path]()
    for path in paths:
        if path.suffix not in FORMATS:
            *most, last = FORMATS
            raise UsageError(
                f"a report cannot be written as '{path}'",
                f"it must end in {', '.join(most)} or {last}",
            )
        if path in seen:
            raise UsageError(f"'{path}' is given twice", "leave out one --report")
        seen.add(path)
        check_writable(path, force)


def write_reports(
    paths: Iterable[Path], result: Result, document: Mapping[str, Any], force: bool
) -> None:
    """Writes a result to files, each in the format that its suffix names.

    Args:
        paths: Where to.
        result: What is written.
        document: The same as JSON.
        force: Whether existing files may be overwritten.

    Raises:
        UsageError: If one cannot be written.
    """
    paths = tuple(paths)
    check_report_paths(paths, force)
    for path in paths:
        write_text(path, as_text(result, document, FORMATS[path.suffix]))


def as_text(result: Result, document: Mapping[str, Any], form: str) -> str:
    """Returns a result as the text of a file, which ends with a line break.

    Args:
        result: What is rendered.
        document: The same as JSON.
        form: ``json``, ``markdown`` or ``html``.
    """
    if form == "json":
        from rnnprune_cli.report.json import render

        return render(document) + "\n"
    if form == "markdown":
        from rnnprune_cli.report import markdown

        match result:
            case Report():
                return markdown.report_markdown(result)
            case SensitivityReport():
                return markdown.curves_markdown(result)
            case BenchReport():
                return markdown.bench_markdown(result)
            case CheckReport():
                return markdown.check_markdown(result)
            case _:
                return markdown.family_markdown(result)
    assert form == "html", form
    from rnnprune_cli.report import html

    match result:
        case Report():
            return html.report_page(result)
        case SensitivityReport():
            return html.curves_page(result)
        case BenchReport():
            return html.bench_page(result)
        case CheckReport():
            return html.check_page(result)
        case _:
            return html.family_page(result)


def as_table(result: Result) -> RenderableType:
    """Returns a result as tables for a terminal."""
    from rnnprune_cli.report import table

    match result:
        case Report():
            return table.report_table(result)
        case SensitivityReport():
            from rnnprune_cli.report.curves import curves_table

            return curves_table(result)
        case BenchReport():
            return table.bench_table(result)
        case CheckReport():
            return table.check_table(result)
        case _:
            return table.family_table(result)
