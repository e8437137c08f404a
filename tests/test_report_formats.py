"""Every format shows the same figures: those of the JSON document."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import recurrent_model
from pages import Page, as_page, printed, says
from reports import bench, check, family, report, results, sensitivity
from test_report import CLASSES, LEVELS, classifier, data  # noqa: F401

from rnnprune_cli.errors import UsageError
from rnnprune_cli.model import MetricValue
from rnnprune_cli.report import figures
from rnnprune_cli.report.files import as_table, as_text, check_report_paths, write_reports
from rnnprune_cli.report.json import (
    bench_document,
    check_document,
    family_document,
    render,
    report_document,
    sensitivity_document,
)
from rnnprune_cli.report.read import read_report


class Formats:
    """One result in all formats."""

    def __init__(self, result) -> None:
        self.markdown = as_page(as_text(result, {}, "markdown"))
        self.html = Page(as_text(result, {}, "html"))
        self.lines = printed(as_table(result))

    def row(self, *start: str) -> list[str]:
        """The rest of a row, which is the same in every format."""
        html, markdown = self.html.row(*start), self.markdown.row(*start)
        assert html == markdown
        words = " ".join(" ".join(html).split())
        assert words in self.lines, (words, self.lines)
        return html[len(start) :]


def held(cells: list[str], *values: float) -> None:
    assert len(cells) >= len(values)
    for text, value in zip(cells, values, strict=False):
        assert says(text, value), (text, value)


def as_json(result) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(result), default=str))


def before_after(shown: Formats, document: dict) -> None:
    """Holds the rows of the main table against the document."""
    before, after, ratios = document["before"], document["after"], document["ratios"]
    for label, key in {
        "parameters": "parameters",
        "not zero": "nonzero",
        "recurrent weights not zero": "recurrent_nonzero",
        "size": "bytes",
        "gzipped": "gzip_bytes",
        "MACs per step": "macs_per_step",
    }.items():
        held(shown.row(label), before[key], after[key], ratios.get(key, after[key] / before[key]))
    cells = shown.row("latency (median)")
    ratio = ratios["latency"]
    held(cells, before["latency_ms"]["median"], after["latency_ms"]["median"], ratio["median"])
    low, high = cells[2].split("[")[1].rstrip("]").split(", ")
    assert says(low, ratio["low"]) and says(high, ratio["high"])
    for one, two in zip(before["metrics"], after["metrics"], strict=True):
        whose = f" of {one['output']}" if len(before["metrics"]) > 1 else ""
        arrow = "↑" if one["higher_is_better"] else "↓"
        cells = shown.row(f"{one['name']}{whose} {arrow}")
        held(cells, one["value"], two["value"], two["value"] - one["value"])


@pytest.mark.parametrize("granularity", ["weight", "unit"])
def test_a_pruned_model_has_the_figures_of_its_json(prune_model, data, granularity):  # noqa: F811
    result = prune_model(
        classifier(),
        0.5,
        granularity=granularity,
        scope="layer",
        data=data(**{"target:level": LEVELS, "target:logits": CLASSES}),
    )
    document = json.loads(render(report_document(result)))
    shown = Formats(result)
    before_after(shown, document)
    (layer,) = document["layers"]
    cells = shown.row(layer["name"])
    held(cells[2:], layer["weights_after"], layer["nonzero_after"], layer["sparsity"])
    for row in document["fidelity"]["outputs"]:
        held(shown.row(row["name"]), row["max_abs"], row["mean_abs"], row["cosine"])
    for claim in document["verification"]:
        for page in (shown.html, shown.markdown):
            assert claim["claim"] in page.text
    for warning in document["warnings"]:
        assert warning in shown.html.text and warning in shown.markdown.text
        assert f"! {warning}" in shown.lines


def test_training_quantization_and_checks_have_the_figures_of_their_json():
    result = report()
    document, shown = as_json(result), Formats(result)
    before_after(shown, document)
    epochs = document["finetune"]["epochs"]
    for number, epoch in enumerate(epochs, 1):
        name = f"epoch {number}" + (", kept" if number == document["finetune"]["best"] else "")
        figures_ = (epoch["loss"], epoch["validation_loss"], epoch["metrics"][0]["value"])
        held(shown.row(name), *figures_, epoch["drop"], epoch["sparsity"])
    quantized = document["quantized"]
    for page in (shown.html, shown.markdown):
        rows = next(t for t in page.tables if t[0][1:3] == ["pruned", "int8"])
        size = next(row for row in rows if row[0].strip() == "size")
        held(size[1:], quantized["before"]["bytes"], document["after"]["bytes"])
        held(size[3:], quantized["ratios"]["bytes"])
        assert page.row("gru_1")[1:] == [result.quantized.left[0].reason, "leave it as it is"]
    assert any("int8 ÷ pruned" in line for line in shown.lines)
    for one in document["checks"]:
        words = f"{one['actual']:.4g}"
        for page in (shown.html, shown.markdown):
            row = next(r for t in page.tables for r in t if one["expression"] in "".join(r[:2]))
            assert any(words in cell for cell in row)
            assert ("✓" in row[0] or "✅" in row[0]) == one["passed"]
            assert one["hint"] in page.text
        assert any(one["expression"] in line and words in line for line in shown.lines)


def test_trials_and_repairs_have_the_figures_of_their_json():
    result = report()
    pages = [Page(as_text(result, {}, "html")), as_page(as_text(result, {}, "markdown"))]
    for number, trial in enumerate(as_json(result)["trials"], 1):
        for page in pages:
            table = next(t for t in page.tables if t[0][0] == "tried")
            held(table[number][2:], trial["figures"]["metric-drop"], trial["figures"]["bytes"])
    for page in pages:
        held(page.row("MatMul 'dense'", "3,336 samples")[2:], 0.026)


def test_a_family_has_the_figures_of_its_json():
    reports = family()
    shown = Formats(reports)
    for one in map(as_json, reports):
        cells = shown.row(one["output"]["path"])
        ratios = one["ratios"]
        held(cells, ratios["bytes"], ratios["nonzero"], ratios["latency"]["median"])
        before, after = one["before"]["metric"], one["after"]["metric"]
        assert cells[3] == f"accuracy {before['value']:.4f} → {after['value']:.4f}"


def test_sensitivity_has_the_figures_of_its_json():
    result = sensitivity()
    pages = [Page(as_text(result, {}, "html")), as_page(as_text(result, {}, "markdown"))]
    lines = printed(as_table(result))
    for curve in as_json(result)["curves"]:
        gate = curve["gate"] or "all"
        rows = [page.row(curve["layer"], gate) for page in pages]
        assert rows[0] == rows[1]
        held(rows[0][2:], curve["size"], *(point["drop"] for point in curve["points"]))
        start = " ".join(rows[0][0 if gate == "all" else 1 :])
        assert any(line.startswith(start) for line in lines)
    for text in (pages[0].text, pages[1].text, " ".join(lines)):
        assert result.advice in text


def test_a_benchmark_has_the_figures_of_its_json():
    result = bench()
    document, shown = as_json(result), Formats(result)
    main, cost = (t for t in shown.html.tables if t[0][0] == "model" and "format" not in t[0])
    reference = document["models"][0]
    for model in document["models"]:
        cells = dict(zip(main[0][1:], shown.row(model["name"]), strict=True))
        (costs,) = (row for row in cost[1:] if row[0] == model["name"])
        assert any(" ".join(costs) in line for line in shown.lines)
        assert costs in next(t for t in shown.markdown.tables if t[0] == cost[0])
        cells |= dict(zip(cost[0][1:], costs[1:], strict=True))
        latency = model["latency_ms"]
        held([cells["size"], cells["size ÷"]], model["bytes"], model["bytes"] / reference["bytes"])
        quantiles = [cells[c] for c in ("latency p50", "p95", "p99")]
        held(quantiles, latency["median"], latency["p95"], latency["p99"])
        first = next(t for t in document["timings"] if t["model"] == model["name"])
        held([cells["samples/s"], cells["steps/s"]], first["samples_per_second"])
        held([cells["load"], cells["memory"]], model["load_ms"], model["peak_bytes"])
        held([cells["MACs/step"], cells["bytes/step"]], model["macs_per_step"])
        assert says(cells["real time"], first["real_time_factor"])
        assert cells["metric"] == f"accuracy ↑ {model['metric']['value']:.4f}"
        if model is reference:
            assert cells["latency ÷"] == "reference"
        else:
            ratio = next(r for r in document["ratios"] if r["model"] == model["name"])["latency"]
            said = f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
            assert cells["latency ÷"] == said
    for timing in document["timings"]:
        threads = "1 thread" if timing["threads"] == 1 else f"{timing['threads']} threads"
        where = f"batch {timing['batch']}, {timing['steps']} steps, {threads}"
        held(shown.row(where, timing["model"]), timing["latency_ms"]["median"])
    for control in document["controls"]:
        assert says(shown.row(control["reference"], where)[0], control["latency"]["median"])


@pytest.mark.parametrize("passed", [True, False])
def test_checks_have_the_figures_of_their_json_and_say_what_to_do(passed):
    result = check(passed)
    shown = Formats(result)
    text = [shown.html.text, shown.markdown.text, " ".join(shown.lines)]
    for one in result.checks:
        for words in text:
            assert one.expression in words
            assert f"{one.actual:.4g}" in words
            if one.low is not None:
                assert f"[{one.low:.4g}, {one.high:.4g}]" in words
            assert one.hint in words
    verdict = "all 2 checks hold" if passed else "1 of 3 checks fail"
    assert all(verdict in words for words in text)


@pytest.mark.parametrize("kind", ["report", "family", "bench", "check"])
def test_checks_come_first_and_failed_ones_before_others(kind):
    result = results()[kind]
    for page in (Page(as_text(result, {}, "html")), as_page(as_text(result, {}, "markdown"))):
        names = ["".join(row[:2]) for row in page.tables[0]]
        assert page.text.index("1 of 3 checks fail") < 40
        places = [next(k for k, n in enumerate(names) if c.expression in n) for c in check().checks]
        failed, *others = (places[k] for k in (1, 0, 2))
        assert failed == 1 and sorted(others) == others == [2, 3]


@pytest.mark.parametrize(
    ("bytes_", "latency", "after", "said"),
    [
        (0.38, (0.5, 0.49, 0.51), 0.9, "2.6× smaller, 2.0× faster, accuracy −5.0 points"),  # noqa: RUF001
        (1.5, (1.3, 1.2, 1.4), 0.96, "1.5× larger, 1.3× slower, accuracy +1.0 points"),  # noqa: RUF001
        (0.9, (1.0, 0.99, 1.01), 0.95, "10 % smaller, as fast, accuracy +0.0 points"),
        (
            1.001,
            (0.9, 0.5, 1.5),
            0.95,
            "as large, not clearly faster or slower, accuracy +0.0 points",
        ),
        (0.5, (0.98, 0.97, 0.99), 0.95, "2.0× smaller, 2 % faster, accuracy +0.0 points"),  # noqa: RUF001
    ],
)
def test_the_headline_claims_no_more_than_the_intervals_tell(bytes_, latency, after, said):
    from rnnprune_cli.model import Ratio

    one = report()
    ratios = dataclasses.replace(one.ratios, bytes=bytes_, latency=Ratio(*latency))
    before, now = (MetricValue("accuracy", v, True) for v in (0.95, after))
    one = dataclasses.replace(
        one,
        ratios=ratios,
        before=dataclasses.replace(one.before, metric=before),
        after=dataclasses.replace(one.after, metric=now),
    )
    assert figures.headline(one) == said


def test_reports_are_written_by_their_suffix_and_not_over_others(tmp_path):
    result = report()
    paths = [tmp_path / f"r.{suffix}" for suffix in ("json", "md", "html")]
    document = report_document(result)
    write_reports(paths, result, document, force=False)
    assert json.loads(paths[0].read_text())["schema_version"] == 1
    assert paths[1].read_text() == as_text(result, document, "markdown")
    assert paths[2].read_text() == as_text(result, document, "html")
    with pytest.raises(UsageError, match="exists already"):
        write_reports(paths[1:2], result, document, force=False)
    write_reports(paths[1:2], result, document, force=True)


@pytest.mark.parametrize("name", ["r.txt", "r", "r.HTML"])
def test_a_report_of_another_kind_is_refused(tmp_path, name):
    with pytest.raises(UsageError) as caught:
        check_report_paths([tmp_path / name], force=True)
    assert ".json, .md or .html" in caught.value.hint


def test_a_report_is_not_written_twice_to_one_place(tmp_path):
    with pytest.raises(UsageError, match="twice"):
        check_report_paths([tmp_path / "r.md", tmp_path / "r.md"], force=True)


def test_infinite_and_missing_figures_are_shown_in_every_format(prune_model):
    """No data, no labels: no metric, and a fidelity that may not be a number."""
    one = prune_model(recurrent_model(), 0.5)
    row = dataclasses.replace(one.fidelity[0], cosine=float("nan"), agreement=None)
    shown = Formats(dataclasses.replace(one, fidelity=(row,)))
    assert "nan" in shown.row(row.name)
    assert np.isnan(row.cosine)


@pytest.mark.parametrize("kind", sorted(results()))
def test_what_json_holds_is_enough_for_every_other_format(tmp_path, kind):
    result = results()[kind]
    document = {
        "report": lambda: report_document(result),
        "family": lambda: family_document(result, {}),
        "sensitivity": lambda: sensitivity_document(result),
        "bench": lambda: bench_document(result),
        "check": lambda: check_document(result),
    }[kind]()
    write_reports([tmp_path / "r.json"], result, document, force=False)
    read = read_report(tmp_path / "r.json")
    for form in ("markdown", "html"):
        assert as_text(read, {}, form) == as_text(result, {}, form)
    assert printed(as_table(read)) == printed(as_table(result))


def test_the_command_writes_and_prints_every_format(tmp_path):
    (tmp_path / "model.onnx").write_bytes(recurrent_model().SerializeToString())
    names = ["r.json", "r.md", "r.html"]
    words = ["prune", "model.onnx", "-s", "0.5", "--format", "markdown"]
    done = subprocess.run(
        [sys.executable, "-m", "rnnprune_cli.cli", *words, *(f"--report={n}" for n in names)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (tmp_path / "r.md").read_text()
    document = json.loads((tmp_path / "r.json").read_text())
    for page in (as_page(done.stdout), Page((tmp_path / "r.html").read_text())):
        held(page.row("size")[1:], document["before"]["bytes"], document["after"]["bytes"])
    assert len(document["layers"][0]["pictures"]) == 2


@pytest.mark.parametrize("command", [["inspect", "model.onnx"], ["methods"]])
def test_what_is_no_report_has_no_markdown(command):
    done = subprocess.run(
        [sys.executable, "-m", "rnnprune_cli.cli", *command, "--format", "markdown"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and "'table'" in done.stderr
