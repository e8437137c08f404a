"""Reports as Markdown for a job summary, or a comment on a pull request, on GitHub or GitLab.

Names come from models that nobody vouches for: whatever could be markup, a link, or call somebody
is written as an entity. Long lists are cut, so that a report fits into a comment.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from rnnprune_cli import __version__
from rnnprune_cli.errors import printable
from rnnprune_cli.model import BenchReport, Check, CheckReport, Report, SensitivityReport
from rnnprune_cli.report import figures
from rnnprune_cli.report.figures import Rows, Section

LIMIT = 60_000
"""Bytes; a comment may have 65,536 characters, and some of them are the user's."""
_TRIES = ((60, 300), (25, 200), (10, 120), (4, 80), (1, 40))
"""Rows of a table, and characters of a cell, at most: the first that fits is taken."""
_SPECIAL = re.compile(
    r"[\\`*|~$@]|<(?=[a-z/!?])|&(?=[#a-z])|#(?=\d)|(?<=www)\.|:(?=//|\w+:)"
    r"|\[(?!-?[\d.]+, -?[\d.]+\](?![\[(:]))|(?<![a-z0-9_])_+|_+(?![a-z0-9_])",
    re.IGNORECASE | re.ASCII,
)
"""What could be markup, a link, a picture, mathematics, or call a person or an issue."""


def report_markdown(report: Report) -> str:
    """Returns checks, a line that says it all, before/after figures, and the details."""

    def made(page: _Page) -> None:
        page.checks(report.checks)
        page.headline(
            f"{page.code(_name(report.model.path))} → {page.text(figures.headline(report))}"
        )
        page.table(figures.figure_rows(report.before, report.after, report.ratios))
        page.line(
            f"{page.code(report.output.path)}: {page.text(figures.plan(report))}."
            " In brackets: 95 % intervals."
        )
        short = dataclasses.replace(report, layers=figures.foremost(report.layers, page.most))
        sections = figures.report_sections(short)
        page.section(sections[0], len(report.layers))
        for section in sections[1:]:
            page.section(section)
        page.verification(report)
        page.ending(report.warnings, report.environment)

    return _fitting(made)


def family_markdown(reports: Sequence[Report]) -> str:
    """Returns the checks and a line for each model of a family."""

    def made(page: _Page) -> None:
        page.checks(figures.family_checks(reports))
        title = f"{page.code(_name(reports[0].model.path))} → {len(reports)} models"
        page.headline(title)
        rows = figures.family_rows(reports)
        page.table(rows)
        page.line(
            "Size, weights that are not zero and latency: after ÷ before, in brackets 95 %"
            " intervals."
        )
        page.ending(figures.family_warnings(reports), reports[0].environment)

    return _fitting(made)


def curves_markdown(report: SensitivityReport) -> str:
    """Returns what each layer and gate can bear, and what to do about it."""

    def made(page: _Page) -> None:
        page.headline(f"Sensitivity of {page.code(_name(report.model.path))}")
        page.line(f"**{page.text(report.advice)}**")
        page.line(f"{page.text(figures.curves_title(report))}.")
        page.table(figures.curve_rows(report))
        page.ending(report.warnings, report.environment)

    return _fitting(made)


def bench_markdown(report: BenchReport) -> str:
    """Returns the checks, a line for each model, and the details."""

    def made(page: _Page) -> None:
        page.checks(report.checks)
        page.headline(page.text(figures.bench_headline(report)) or "Benchmark")
        page.table(figures.bench_rows(report))
        settings = dict.fromkeys(map(figures.setting_text, figures.first_settings(report).values()))
        page.line(f"{page.text('; '.join(settings))}. In brackets: 95 % intervals.")
        for section in figures.bench_sections(report):
            page.section(section)
        page.ending(report.warnings, report.environment)

    return _fitting(made)


def check_markdown(report: CheckReport) -> str:
    """Returns whether what was asked for holds, and what to do where it does not."""

    def made(page: _Page) -> None:
        page.checks(report.checks)
        if not report.checks:
            page.headline(figures.verdict(report.checks))
        against = "" if report.baseline is None else f" against {page.code(report.baseline)}"
        page.line(f"{page.code(report.report)}{against}")
        page.ending(report.warnings, {})

    return _fitting(made)


def _fitting(made: Callable[[_Page], None]) -> str:
    """Makes a page with shorter and shorter lists until it fits."""
    for most, longest in _TRIES:
        page = _Page(most, longest)
        made(page)
        text = page.finished()
        if len(text.encode()) <= LIMIT:
            break
    return text


def _name(path: str) -> str:
    return PurePath(path).name or path


class _Page:
    """A page in the making.

    Args:
        most: Rows of a table at most.
        longest: Characters of a text at most.
    """

    def __init__(self, most: int, longest: int) -> None:
        self.most = most
        self._longest = longest
        self._parts: list[str] = []
        self._cut = False

    def text(self, value: str) -> str:
        """Returns a text in which nothing is markup, a link or a mention."""
        clean = printable(value)
        if len(clean) > self._longest:
            clean, self._cut = clean[: self._longest - 1] + "…", True
        return _SPECIAL.sub(_entity, clean)

    def code(self, value: str) -> str:
        """Returns a name."""
        return f"<code>{self.text(value)}</code>"

    def headline(self, line: str) -> None:
        """Adds a headline."""
        self._parts.append(f"### {line}")

    def line(self, line: str) -> None:
        """Adds a paragraph."""
        self._parts.append(line)

    def checks(self, checks: Sequence[Check]) -> None:
        """Adds the checks, those that fail first, and what to do; nothing if there are none."""
        if not checks:
            return
        failed = [check for check in checks if not check.passed]
        self._parts.append(f"### {'❌' if failed else '✅'} {figures.verdict(checks)}")
        order = [*failed, *(check for check in checks if check.passed)]
        found = figures.check_rows(order)
        rows = tuple(
            ("✅" if check.passed else "❌", *row[:-1])
            for check, row in zip(order, found.rows, strict=True)
        )
        self.table(Rows(("", *found.columns[:-1]), rows, tuple(k + 1 for k in found.right)))
        hints = [
            f"- {self.code(check.expression)}: {self.text(check.hint)}"
            for check in failed[: self.most]
            if check.hint
        ]
        if hints:
            self._parts.append("\n".join(["**What to do**", "", *hints]))

    def table(self, rows: Rows, total: int | None = None) -> None:
        """Adds a table; its first column holds names."""
        if rows.rows:
            self._parts.append(self._table(rows, total))

    def _table(self, rows: Rows, total: int | None = None) -> str:
        shown, more = rows.cut(self.most)
        more = more if total is None else total - len(shown.rows)
        marks = ("---:" if k in rows.right else ":---" for k in range(len(rows.columns)))
        lines = [_line(map(self._cell, rows.columns)), _line(marks)]
        for row in shown.rows:
            cells = map(self._cell, row)
            lines.append(_line(_whole(c) if k in rows.right else c for k, c in enumerate(cells)))
        if more:
            self._cut = True
            lines.append(_line([f"… and {more:,} more", *[""] * (len(rows.columns) - 1)]))
        return "\n".join(lines)

    def _cell(self, value: str) -> str:
        indented = value.startswith("  ")
        return ("&emsp;" if indented else "") + self.text(value.strip())

    def section(self, section: Section, total: int | None = None) -> None:
        """Adds a part that is closed at first."""
        inside = [] if section.rows is None else [self._table(section.rows, total)]
        inside += [self.text(note) for note in section.notes]
        self._details(section.title, inside)

    def _details(self, title: str, inside: Iterable[str]) -> None:
        whole = "\n\n".join(inside)
        self._parts.append(
            f"<details><summary>{self.text(title)}</summary>\n\n{whole}\n\n</details>"
        )

    def verification(self, report: Report) -> None:
        """Adds what was verified."""
        claims = report.verification
        held = sum(row.passed for row in claims)
        lines = [
            f"- {'✅' if row.passed else '❌'} {self.text(figures.claim(row))}"
            for row in claims[: self.most]
        ]
        self._details(
            f"Verification: {held} of {len(claims)} statements hold",
            ["\n".join(self._more(lines, len(claims)))],
        )

    def ending(self, warnings: Sequence[str], environment: Mapping[str, Any]) -> None:
        """Adds warnings and the machine."""
        if warnings:
            lines = [f"- ⚠️ {self.text(warning)}" for warning in warnings[: self.most]]
            self._details(
                f"Warnings ({len(warnings)})", ["\n".join(self._more(lines, len(warnings)))]
            )
        if environment:
            self.section(Section("Environment", figures.environment_rows(environment)))

    def _more(self, lines: list[str], total: int) -> list[str]:
        if len(lines) < total:
            self._cut = True
            lines = [*lines, f"- … and {total - len(lines):,} more"]
        return lines

    def finished(self) -> str:
        """Returns the whole page."""
        cut = (
            " Some of it was cut to fit into a comment; the JSON report has all."
            if self._cut
            else ""
        )
        return "\n\n".join([*self._parts, f"<sub>rnnprune {__version__}.{cut}</sub>"]) + "\n"


def _entity(found: re.Match[str]) -> str:
    """Writes characters so that they are only themselves; nobody is called by an @."""
    apart = "&#8203;" if found.group() in "@#" else ""
    return "".join(f"&#{ord(character)};" for character in found.group()) + apart


def _whole(figure: str) -> str:
    """Returns a figure that is broken before its interval only."""
    return "  ".join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in figure.split("  "))


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
