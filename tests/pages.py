"""Reads tables and tags out of pages, and numbers out of texts."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser

from markdown_it import MarkdownIt
from rich.console import Console

VOID = {"meta", "img", "br", "wbr", "hr", "input", "link"}
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "µs": 1e-3, "s": 1e3, "%": 0.01}


class Page(HTMLParser):
    """What a page has: its tags with their attributes, its text, and the cells of its tables."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.feed(page)
        self.close()
        self.text = " ".join("".join(self.words).split())
        self.tables = [
            [[" ".join(cell.split()) for cell in row] for row in table] for table in self.tables
        ]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.words.append(" ")
        elif tag in ("p", "li", "h1", "h2", "h3", "div", "summary", "span"):
            self.words.append(" ")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open and self.open[-1] == tag, (tag, self.open)
            self.open.pop()

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["title"]):
            self.words.append(data)
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data

    def row(self, *start: str) -> list[str]:
        """The first row that begins with these texts."""
        rows = (row for table in self.tables for row in table)
        return next(row for row in rows if row[: len(start)] == list(start))


def as_page(markdown: str) -> Page:
    """Markdown as GitHub would show it: CommonMark with tables, HTML let through."""
    return Page(MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown))


def printed(drawing) -> list[str]:
    """What a terminal shows, a line each, without superfluous blanks."""
    console = Console(width=400, file=io.StringIO())
    console.print(drawing)
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]


def says(text: str, value: float) -> bool:
    """Whether a text holds a number as exactly as its digits tell."""
    found = re.match(r"[+−-]?[\d,.]+(?:e[-+]?\d+)?", text)  # noqa: RUF001
    assert found, text
    digits = found.group().replace(",", "").replace("−", "-")  # noqa: RUF001
    unit = UNITS.get(text[found.end() :].split(" [")[0].strip(), 1)
    mantissa, _, exponent = digits.partition("e")
    decimals = len(mantissa.partition(".")[2])
    step = 10.0 ** (int(exponent or 0) - decimals) * unit
    return abs(float(digits) * unit - value) <= 0.5001 * step
