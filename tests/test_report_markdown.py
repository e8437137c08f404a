"""Markdown fits into a comment, and nothing that a model is called does anything there."""

from __future__ import annotations

import dataclasses
import re

import pytest
from pages import as_page
from reports import HOSTILE, bench, check, curves, family, hostile, layer, report, results
from reports import sensitivity as sensitivity_report

from rnnprune_cli.model import Skipped
from rnnprune_cli.report.files import as_text

KINDS = sorted(results())
TAGS = {
    "h3", "table", "thead", "tbody", "tr", "th", "td", "code", "p", "strong", "ul", "li", "details",
    "summary", "sub",
}  # fmt: skip


def markdown(result) -> str:
    return as_text(result, {}, "markdown")


@pytest.mark.parametrize("kind", KINDS)
def test_every_report_is_tables_and_details_only(kind):
    page = as_page(markdown(results()[kind]))
    assert {tag for tag, _ in page.tags} <= TAGS
    assert not page.open
    assert all(set(attributes) <= {"style"} for _, attributes in page.tags)  # of columns
    for table in page.tables:
        assert len({len(row) for row in table}) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_models_are_only_text(kind):
    text = markdown(hostile()[kind])
    page = as_page(text)
    assert {tag for tag, _ in page.tags} <= TAGS
    for table in page.tables:
        assert len({len(row) for row in table}) == 1
    shown = HOSTILE.replace("\u202e", "\ufffd").replace("@", "@\u200b").replace("#1", "#\u200b1")
    assert shown in page.text
    assert not re.search(r"@\w|(?<!&)#\d|https?://|\$a\$|\u202e", text)  # calls, links, formulas


def test_lines_of_a_name_do_not_become_lines_of_the_report():
    one = dataclasses.replace(report(), skipped=(Skipped("a\n\n# b\n- c", "d\r\ne", "f"),))
    page = as_page(markdown(one))
    assert page.row("a # b - c")[1:] == ["d\ufffd e", "f"]
    assert "h1" not in {tag for tag, _ in page.tags}


@pytest.mark.parametrize(
    "name", ["LSTM__95", "a_b_c", "_a_", "__init__", "x*y*z", "a~~b~~", "1. a", "C:\\x\\|y", ":+1:"]
)
def test_a_name_is_shown_as_it_is(name):
    page = as_page(markdown(dataclasses.replace(report(), skipped=(Skipped(name, "b", "c"),))))
    assert page.row(name)[1:] == ["b", "c"]


def test_ordinary_text_stays_readable():
    text = markdown(check())
    assert "latency<=0.5" in text
    assert "0.637  [0.615,\N{NO-BREAK SPACE}0.651]" in text
    assert "&#" not in text


LONG = "model/" + 400 * "very_long_"


def large() -> dict[str, object]:
    """Results that are too long for a comment."""
    layers = tuple(layer(f"{LONG}{k}", pictures=False) for k in range(3000))
    one = report()
    big = dataclasses.replace(
        one,
        layers=layers,
        warnings=tuple(LONG + str(k) for k in range(500)),
        checks=500 * one.checks,
    )
    return {
        "report": big,
        "family": 400 * family(),
        "sensitivity": dataclasses.replace(
            sensitivity_report(), curves=curves(tuple(f"{LONG}{k}" for k in range(300)))
        ),
        "bench": bench(tuple(f"{LONG}{k}" for k in range(200))),
        "check": dataclasses.replace(check(), checks=900 * check().checks),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_report_fits_into_a_comment_and_says_what_is_left_out(kind):
    text = markdown(large()[kind])
    assert len(text.encode()) < 65_536
    page = as_page(text)
    assert {tag for tag, _ in page.tags} <= TAGS
    left = [int(n.replace(",", "")) for n in re.findall(r"… and ([\d,]+) more", page.text)]
    assert max(left) > 100
    assert "was cut" in page.text


def test_layers_that_lost_most_are_kept_in_the_models_order():
    lost = [5, 900, 3, 800, 4, *(1 for _ in range(2000))]
    layers = tuple(
        dataclasses.replace(
            layer(f"layer{k}", pictures=False), weights_before=1000, sparsity=share / 1000
        )
        for k, share in enumerate(lost)
    )
    page = as_page(markdown(dataclasses.replace(report(), layers=layers)))
    table = next(table for table in page.tables if table[0][0] == "layer")
    shown = [row[0] for row in table[1:6]]
    assert shown == [f"layer{k}" for k in range(5)]
    assert table[-1][0] == f"… and {len(lost) - (len(table) - 2):,} more"
