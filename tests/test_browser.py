"""The pages in a real browser: silent, self-contained, readable at any width and in both modes."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil

import pytest
from reports import bench, layer, report, results

from rnnprune_cli.report.files import as_text

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
try:
    from playwright.sync_api import sync_playwright
except ImportError:
    sync_playwright = None  # type: ignore[assignment]

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason=f"no browser: none of {', '.join(NAMES)} is there"),
    pytest.mark.skipif(sync_playwright is None, reason="no playwright: pip install -e .[dev]"),
]
WIDTHS = (360, 800, 1600)
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
LOOK = """
() => {
  const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const channel = v => linear(v / 255);
  const light = c => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
  const parse = text => {
    const n = (text.match(/[\\d.]+/g) || []).map(Number);
    return text.startsWith('rgb') ? [n[0], n[1], n[2], n.length > 3 ? n[3] : 1] : null;
  };
  const over = (a, b) => [0, 1, 2].map(k => a[3] * a[k] + (1 - a[3]) * b[k]);
  const behind = element => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour && colour[3] > 0) layers.push(colour);
    }
    return layers.reverse().reduce((below, colour) => over(colour, below), [255, 255, 255]);
  };
  const texts = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; node = walker.nextNode();) {
    const element = node.parentElement, words = node.textContent.trim();
    const box = element.getBoundingClientRect();
    if (!words || !box.width || !box.height) continue;
    const style = getComputedStyle(element);
    const drawn = element instanceof SVGElement;
    const matrix = drawn ? element.getScreenCTM() : {a: 1, b: 0};
    const scale = Math.hypot(matrix.a, matrix.b);
    const ground = behind(element);
    const colour = over(parse(drawn ? style.fill : style.color), ground);
    const [a, b] = [light(colour), light(ground)].sort((x, y) => y - x);
    texts.push({words: words.slice(0, 40), drawn, size: parseFloat(style.fontSize) * scale,
      contrast: (a + 0.05) / (b + 0.05)});
  }
  const root = document.documentElement;
  const wide = [...document.querySelectorAll('body *')].filter(e =>
    !e.closest('.wide') && e.getBoundingClientRect().right > root.clientWidth + 1);
  return {texts, wide: wide.map(e => e.outerHTML.slice(0, 200)),
    widths: [root.scrollWidth, root.clientWidth]};
}
"""


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser, path, width, scheme):
    """Opens a file; what the browser says and asks for is noted."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    try:
        page.goto(path.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        yield page, said, asked
    finally:
        page.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A page of each kind."""
    folder = tmp_path_factory.mktemp("pages")
    long = "a_name_without_any_blank" * 6
    kinds = results() | {
        "report with long names": dataclasses.replace(
            report(f"{long}/1"), layers=tuple(layer(f"{long}/{k}") for k in range(3))
        ),
        "bench with long names": bench(tuple(f"{long}-{k}" for k in range(4))),
    }
    for kind, result in kinds.items():
        (folder / f"{kind}.html").write_text(as_text(result, {}, "html"), encoding="utf-8")
    return {kind: folder / f"{kind}.html" for kind in kinds}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    "kind", [*sorted(results()), "report with long names", "bench with long names"]
)
def test_a_page_is_silent_fits_and_can_be_read(browser, pages, kind, width, scheme):
    with opened(browser, pages[kind], width, scheme) as (page, said, asked):
        seen = page.evaluate(LOOK)
        outside = [url for url in asked if not url.startswith("data:image/png;")]
        assert said == []
        assert outside == [pages[kind].as_uri()]
        scrolled, client = seen["widths"]
        assert scrolled <= client == width
        assert seen["wide"] == []
        assert len(seen["texts"]) > 10
        assert [text for text in seen["texts"] if text["size"] < 11] == []
        assert [text for text in seen["texts"] if text["contrast"] < 4.5] == []


def test_the_look_sees_what_is_too_small_too_pale_and_too_wide(browser, tmp_path):
    """The test above can fail."""
    path = tmp_path / "bad.html"
    path.write_text(
        '<!doctype html><body style="background:#fff;width:500px">'
        '<p style="font-size:9px">small</p>'
        '<p style="color:#aaa">pale</p><svg viewBox="0 0 2000 100" width="360"><text y="50"'
        ' font-size="20">tiny</text></svg><script>console.warn("said")</script>'
        '<img src="https://example.invalid/x.png">'
    )
    with opened(browser, path, 360, "light") as (page, said, asked):
        seen = page.evaluate(LOOK)
        assert seen["widths"][0] > seen["widths"][1]
        assert {t["words"] for t in seen["texts"] if t["size"] < 11} == {"small", "tiny"}
        assert {t["words"] for t in seen["texts"] if t["contrast"] < 4.5} == {"pale"}
        assert any("said" in words for words in said)
        assert len(asked) == 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_pages_follow_the_readers_mode(browser, pages, scheme):
    with opened(browser, pages["report"], 800, scheme) as (page, _, _):
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        lines = page.evaluate(
            "[...document.querySelectorAll('.charts path')].map(p => getComputedStyle(p).stroke)"
        )
    assert ground == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(13, 17, 23)")
    assert ("rgb(0, 114, 178)" if scheme == "light" else "rgb(88, 180, 240)") in lines


def test_images_of_weights_are_decoded(browser, pages):
    with opened(browser, pages["report"], 800, "light") as (page, _, _):
        sizes = page.evaluate(
            "[...document.querySelectorAll('.weights img')].map(i => [i.naturalWidth,"
            " i.naturalHeight])"
        )
    assert len(sizes) == 8  # two weights of four gates
    assert all(width > 0 and height > 0 for width, height in sizes)


def test_wide_tables_scroll_in_their_own_box(browser, pages):
    with opened(browser, pages["bench"], 360, "light") as (page, _, _):
        widths = page.evaluate(
            "[...document.querySelectorAll('.wide')].map(b => [b.scrollWidth, b.clientWidth])"
        )
        page.keyboard.press("Tab")
        reached = page.evaluate("document.activeElement.className")
    assert any(inside > box for inside, box in widths)
    assert reached == "wide"  # without a mouse, too
