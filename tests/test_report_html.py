"""Pages need nothing but themselves, and nothing that a model is called does anything there."""

from __future__ import annotations

import base64
import dataclasses
import re
import struct
import zlib

import numpy as np
import pytest
from pages import Page
from reports import (
    HOSTILE,
    bench,
    curves,
    family,
    hostile,
    latency,
    layer,
    picture,
    report,
    results,
)
from reports import sensitivity as sensitivity_report

from rnnprune_cli.model import Latency, Picture
from rnnprune_cli.report.charts import Dot, front, scatter
from rnnprune_cli.report.files import as_text
from rnnprune_cli.report.html import MOST_PICTURES, MOST_ROWS
from rnnprune_cli.report.pixels import gate_images

KINDS = sorted(results())
ADDRESSES = {"src", "href", "xlink:href", "action", "data", "poster", "srcset", "formaction"}


def page(result) -> str:
    return as_text(result, {}, "html")


def inert(text: str) -> Page:
    """Checks that a page loads nothing and runs nothing."""
    found = Page(text)
    assert not found.open
    for tag, attributes in found.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ADDRESSES:
                assert (value or "").startswith(("data:image/png;", "#")), value
            for address in re.findall(r"url\(([^)]*)", value or ""):
                assert address.startswith("#")
    styles = " ".join(re.findall(r"<style>(.*?)</style>", text, re.DOTALL))
    assert "url(" not in styles and "@import" not in styles
    (policy,) = [a["content"] for t, a in found.tags if "http-equiv" in a]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_refers_to_nothing_outside_and_has_no_script(kind):
    inert(page(results()[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_models_are_only_text(kind):
    found = inert(page(hostile()[kind]))
    assert HOSTILE.replace("\u202e", "\ufffd").strip() in found.text
    assert not [a for t, a in found.tags if t == "img" and a["src"] == "x"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_is_the_same_each_time(kind):
    assert page(results()[kind]) == page(results()[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_tables_and_drawings_can_be_read_aloud(kind):
    found = inert(page(results()[kind]))
    for tag, attributes in found.tags:
        if tag == "svg":
            assert attributes["role"] == "img" and attributes["aria-label"]
        if tag == "img":
            assert attributes["alt"]
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    uses = {a["xlink:href"][1:] for _, a in found.tags if "xlink:href" in a}
    assert uses <= set(ids)


def test_every_warning_is_on_the_page():
    for result in results().values():
        if hasattr(result, "warnings"):
            found = inert(page(result))
            assert all(warning in found.text for warning in result.warnings)


def test_thousands_of_layers_give_a_page_of_reasonable_size():
    layers = tuple(layer(f"layer{k}") for k in range(4000))
    one = dataclasses.replace(
        report(), layers=layers, sensitivity=curves(tuple(f"l{k}" for k in range(500)), gates=False)
    )
    text = page(one)
    found = inert(text)
    assert len(text) < 600_000
    table = next(t for t in found.tables if t[0][0] == "layer")
    assert len(table) == MOST_ROWS + 1
    assert f"… and {4000 - MOST_ROWS:,} more rows" in found.text
    assert f"… and {4000 - MOST_PICTURES:,} more layers" in found.text
    assert len(page(40 * family())) < 2_000_000
    assert len(page(sensitivity_report(tuple(f"l{k}" for k in range(500))))) < 600_000
    assert len(page(bench(tuple(f"m{k}" for k in range(300))))) < 600_000


def test_bars_are_as_long_as_the_ratios():
    one = report()
    ratios = dataclasses.replace(one.ratios, bytes=2.0, nonzero=0.5)
    bars = re.findall(
        r'<span>([\w ]+)</span><span class="track" style="--whole:([\d.]+)%"><i'
        r' style="width:([\d.]+)%"',
        page(dataclasses.replace(one, ratios=ratios)),
    )
    widths = {name: float(width) / float(whole) for name, whole, width in bars}
    assert {whole for _, whole, _ in bars} == {"50.00"}
    assert widths["size"] == 2.0 and widths["not zero"] == 0.5
    assert widths["latency"] == pytest.approx(one.ratios.latency.median, abs=1e-3)


def spread(drawing: str) -> list[float]:
    """The heights of a latency's bars."""
    (path,) = re.findall(r'<path d="M0 30(V[^"]*?)V30z"', drawing)
    return [30 - float(height) for height in re.findall(r"V([\d.-]+)h1", path)]


def test_a_latency_is_drawn_as_its_calls_are_spread():
    calls = (1.0,) * 100 + (1.5,) * 25 + (50.0,) * 4
    one = report()
    slow = Latency(1.0, 1.0, 1.5, calls)
    before = dataclasses.replace(one.before, latency_ms=slow)
    after = dataclasses.replace(one.after, latency_ms=Latency(1.0, 1.0, 1.0, (1.0,) * 9))
    text = page(dataclasses.replace(one, before=before, after=after, quantized=None))
    drawings = re.findall(r'<div class="spread">.*?</svg></div>', text)
    assert len(drawings) == 2
    heights = spread(drawings[0])
    bars = {k: height for k, height in enumerate(heights) if height > 1e-3}
    assert sorted(bars.values()) == pytest.approx([6.0, 15.0, 30.0], abs=0.01)  # square roots
    first, middle, last = sorted(bars)
    assert (first, last) == (0, len(heights) - 1)  # calls that were held up are at the end
    assert "3.1 % beyond" in drawings[0] and "beyond" not in drawings[1]
    assert 0.45 < middle / len(heights) < 0.55


def test_calls_of_one_length_can_be_drawn():
    one = report()
    same = Latency(1.0, 1.0, 1.0, (1.0,) * 9)
    text = page(
        dataclasses.replace(
            one,
            before=dataclasses.replace(one.before, latency_ms=same),
            after=dataclasses.replace(one.after, latency_ms=None),
        )
    )
    assert text.count('<div class="spread">') == 1
    assert latency(1.0).samples != same.samples


def pixels(address: str) -> np.ndarray:
    """The levels of an image, decoded by hand."""
    data = base64.b64decode(address.removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    parts, place = {}, 8
    while place < len(data):
        (size,) = struct.unpack(">I", data[place : place + 4])
        body = data[place + 4 : place + 8 + size]
        assert struct.unpack(">I", data[place + 8 + size : place + 12 + size])[0] == zlib.crc32(
            body
        )
        parts[body[:4]] = body[4:]
        place += 12 + size
    width, height = struct.unpack(">II", parts[b"IHDR"][:8])
    rows = np.frombuffer(zlib.decompress(parts[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not rows[:, 0].any()
    return rows[:, 1:]


def test_images_show_the_cells_of_each_gate():
    cells = ("01", "9x", "55", "xx")
    images = gate_images(Picture("W", 0, "zr", (4, 2), cells), None, 2)
    assert [pixels(image).tolist() for image in images] == [[[0, 1], [9, 10]], [[5, 5], [10, 10]]]


def test_units_that_are_gone_are_marked_one_by_one():
    cells = ("99", "99")  # two cells for four units, of which one of each is gone
    for weight, expected in {
        "W": [[9, 9], [10, 10], [10, 10], [9, 9]],
        "R": [[9, 10, 10, 9], [10] * 4, [10] * 4, [9, 10, 10, 9]],
    }.items():
        (image,) = gate_images(Picture(weight, 0, "i", (4, 4), cells), (0, 3), 4)
        assert pixels(image).tolist() == expected


def test_images_of_large_layers_have_a_limit():
    images = gate_images(picture("R", 32, 48), tuple(range(0, 4096, 4)), 4096)
    assert len(images) == 4
    shown = pixels(images[0])
    assert shown.shape == (128, 128)
    assert (shown == 10).all()  # of each group most units are gone


def test_the_front_is_what_no_other_beats():
    points = [(1.0, 0.9), (0.5, 0.9), (0.4, 0.8), (0.6, 0.85), (0.4, 0.7), (0.5, 0.9)]
    assert front(points, True) == (False, True, True, False, False, True)
    losses = [(x, 1 - y) for x, y in points]
    assert front(losses, False) == front(points, True)


def test_charts_take_the_colours_of_the_page_and_name_no_file():
    drawing = scatter([Dot(0.1, 0.2, "$x$", True), Dot(0.3, 0.1, "<b>", False)], "x", "y", '"a"')
    assert "$x$" in drawing and "&lt;b&gt;" in drawing
    assert 'aria-label="&quot;a&quot;"' in drawing
    assert "var(--c0)" in drawing and "var(--c1)" in drawing and "currentColor" in drawing
    assert not re.search(r"#0[01]0[0-9a-f]{3}|xmlns|http|DejaVu", drawing)
