"""``--require`` and ``rnnprune check`` as CI runs them: exit codes, files, what is said."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import recurrent_model

OLD = Path(__file__).parent / "reports_v1"


def rnnprune(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "rnnprune_cli.cli", *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model.onnx").write_bytes(recurrent_model().SerializeToString())
    x = np.random.default_rng(0).standard_normal((3, 8, 7)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x[np.newaxis])
    shutil.copy(OLD / "prune.json", tmp_path / "old.json")
    return tmp_path


# --require


def test_a_failed_requirement_is_exit_code_1_and_the_files_are_written(folder):
    done = rnnprune(
        folder, "prune", "model.onnx", "-s", 0.5, "--require", "sparsity>=0.4", "--require",
        "sparsity>=0.6", "--report", "r.json", "--report", "r.md",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "")
    assert (folder / "model.pruned.onnx").exists()
    assert "sparsity>=0.6" in done.stdout and "raise --sparsity" in done.stdout
    document = json.loads((folder / "r.json").read_text())
    assert document["status"] == "ok" and document["passed"] is False
    assert [c["passed"] for c in document["checks"]] == [True, False]
    assert "raise --sparsity" in (folder / "r.md").read_text()
    # The same, of the saved report: what its own run required.
    again = rnnprune(folder, "check", "r.json")
    assert again.returncode == 1 and "sparsity>=0.6" in again.stdout


def test_requirements_that_hold_are_exit_code_0(folder):
    done = rnnprune(folder, "prune", "model.onnx", "-s", 0.5, "--require", "sparsity>=0.4")
    assert done.returncode == 0 and "sparsity>=0.4" in done.stdout


def test_a_missed_target_is_a_warning_and_no_failure(folder):
    """Targets are searched for; only what is required fails a build."""
    report = json.loads((folder / "old.json").read_text())
    missed = {"expression": "latency<=0.1", "limit": 0.1, "actual": 0.9, "passed": False}
    report["checks"] = [missed]
    report["arguments"]["require"] = ["bytes <= 0.9"]
    (folder / "r.json").write_text(json.dumps(report))
    assert rnnprune(folder, "check", "r.json").returncode == 0


WRONG = {
    "unknown": (["--require", "latencyy<=1"], "'latency'"),
    "no data": (["--require", "metric-drop<=0.1"], "--data"),
    "no labels": (["--require", "metric>=0.9", "--data", "data.npz"], "labels"),
    "wrong way": (
        ["--require", "metric>=0.9", "--data", "data.npz", "--metric", "mse"],
        "better when lower",
    ),
}


@pytest.mark.parametrize(("arguments", "said"), WRONG.values(), ids=WRONG)
def test_requirements_that_make_no_sense_are_refused_before_the_work(folder, arguments, said):
    done = rnnprune(folder, "prune", "model.onnx", "-s", 0.5, *arguments)
    assert done.returncode == 2 and said in done.stderr
    assert not (folder / "model.pruned.onnx").exists()


def test_a_recipe_requires_and_the_command_line_replaces_it(folder):
    (folder / "recipe.toml").write_text(
        'model = "model.onnx"\nrequire = ["sparsity>=0.9"]\n[[stage]]\nsparsity = 0.5\n'
    )
    done = rnnprune(folder, "run", "recipe.toml", "--save-recipe", "x.toml")
    assert done.returncode == 2  # an option of prune
    done = rnnprune(folder, "run", "recipe.toml", "--report", "r.json")
    assert done.returncode == 1, done.stderr
    again = rnnprune(folder, "run", "recipe.toml", "--require", "sparsity>=0.4", "--force")
    assert again.returncode == 0, again.stderr
    # A report repeats its requirements, too.
    assert rnnprune(folder, "run", "r.json", "--force").returncode == 1
    (folder / "recipe.toml").write_text(
        'model = "model.onnx"\nskip-if-unchanged = true\n[[stage]]\nsparsity = 0.5\n'
    )
    done = rnnprune(folder, "run", "recipe.toml", "--force")
    assert done.returncode == 2 and "--skip-if-unchanged" in done.stderr


def test_a_saved_recipe_holds_what_is_required(folder):
    done = rnnprune(
        folder, "prune", "model.onnx", "-s", 0.5, "--require", "sparsity>=0.9", "--strict",
        "--save-recipe", "s.toml",
    )  # fmt: skip
    assert done.returncode == 1
    text = (folder / "s.toml").read_text()
    assert '"sparsity>=0.9"' in text and "strict = true" in text
    assert rnnprune(folder, "run", "s.toml", "--force").returncode == 1


# check


def regressed(folder, **figures):
    """Writes the old report with other figures after pruning; latency by a factor."""
    report = json.loads((folder / "old.json").read_text())
    factor = figures.pop("latency", 1)
    after = report["after"]
    after["latency_ms"]["samples"] = [factor * s for s in after["latency_ms"]["samples"]]
    after.update(figures)
    (folder / "new.json").write_text(json.dumps(report))


def test_the_same_report_is_no_regression(folder):
    done = rnnprune(folder, "check", "old.json", "--baseline", "old.json", "--strict")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("figures", [{"latency": 1.1}, {"bytes": 4000}, {"nonzero": 600}])
def test_a_regression_is_exit_code_1_in_every_format(folder, figures):
    regressed(folder, **figures)
    name = next(iter(figures))
    outputs = {}
    for form in ("table", "json", "markdown"):
        done = rnnprune(folder, "check", "new.json", "--baseline", "old.json", "--format", form)
        assert (done.returncode, done.stderr) == (1, "")
        outputs[form] = done.stdout
    document = json.loads(outputs["json"])
    assert document["passed"] is False
    (failed,) = [c for c in document["checks"] if not c["passed"]]
    assert failed["expression"].startswith(name)
    assert all(failed["hint"] in " ".join(text.split()) for text in outputs.values())
    assert (failed["p"] is not None) == (name == "latency")


def test_margin_and_tolerance_forgive(folder):
    regressed(folder, latency=1.1, bytes=3000)
    line = ("check", "new.json", "--baseline", "old.json")
    assert rnnprune(folder, *line).returncode == 1
    assert rnnprune(folder, *line, "--margin", 0.2).returncode == 1
    assert rnnprune(folder, *line, "--margin", 0.2, "--tolerance", 0.1).returncode == 0


def test_reports_of_the_check_are_written(folder):
    names = ("c.md", "c.html", "c.json")
    done = rnnprune(
        folder, "check", "old.json", "--require", "bytes<=0.1",
        *(part for name in names for part in ("--report", name)),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    for name in names:
        assert "bytes" in (folder / name).read_text()
    again = rnnprune(folder, "check", "old.json", "--require", "bytes<=0.1", "--report", "c.md")
    assert again.returncode == 2 and "--force" in again.stderr


def test_the_whole_report_is_shown_with_the_new_checks(folder):
    regressed(folder, bytes=4000)
    line = ("check", "new.json", "--baseline", "old.json", "--require", "sparsity>=0.9", "--full")
    done = rnnprune(folder, *line, "--format", "json", "--report", "p.html", "--report", "p.md")
    assert done.returncode == 1, done.stderr
    document = json.loads(done.stdout)
    assert document["passed"] is False and document["after"]["bytes"] == 4000
    failed = [c["expression"] for c in document["checks"] if not c["passed"]]
    assert failed == ["sparsity>=0.9", "bytes ÷ baseline<=1.005"]
    for name in ("p.html", "p.md"):
        text = (folder / name).read_text()
        assert "recurrent weights not zero" in text and "baseline" in text


@pytest.mark.parametrize("name", ["prune", "family", "sensitivity"])
def test_a_saved_report_can_be_written_again_in_any_format(folder, name):
    shutil.copy(OLD / f"{name}.json", folder / "r.json")
    reports = [part for suffix in ("md", "html", "json") for part in ("--report", f"a.{suffix}")]
    done = rnnprune(folder, "check", "r.json", "--full", *reports)
    assert done.returncode == 0, done.stderr
    again, document = (json.loads((folder / f"{n}.json").read_text()) for n in ("a", "r"))
    figures = {
        "prune": lambda d: [d["after"]["bytes"], d["before"]["latency_ms"]["samples"]],
        "family": lambda d: [m["after"]["bytes"] for m in d["models"]],
        "sensitivity": lambda d: [p["drop"] for c in d["curves"] for p in c["points"]],
    }[name]
    assert figures(again) == figures(document)
    assert "model.onnx" in (folder / "a.md").read_text()
    assert "<html" in (folder / "a.html").read_text()


def test_a_saved_check_keeps_its_verdict(folder):
    line = ("check", "old.json", "--require", "bytes<=0.1", "--report", "c.json")
    assert rnnprune(folder, *line).returncode == 1
    assert rnnprune(folder, "check", "c.json").returncode == 1


def test_another_machine_is_a_warning_and_strictly_a_failure(folder):
    report = json.loads((folder / "old.json").read_text())
    report["environment"]["cpu"] = "another"
    (folder / "other.json").write_text(json.dumps(report))
    done = rnnprune(folder, "check", "old.json", "--baseline", "other.json")
    assert done.returncode == 0 and "processor" in done.stdout
    done = rnnprune(folder, "check", "old.json", "--baseline", "other.json", "--strict")
    assert done.returncode == 1 and "processor" in done.stdout


@pytest.mark.parametrize("which", ["report", "baseline"])
def test_what_cannot_be_read_is_exit_code_3(folder, which):
    (folder / "bad.json").write_text("{")
    shutil.copy(OLD / "sensitivity.json", folder / "curves.json")
    for bad in ("bad.json", "none.json", "curves.json"):
        files = (bad, "old.json") if which == "report" else ("old.json", bad)
        done = rnnprune(folder, "check", files[0], "--baseline", files[1], "--format", "json")
        assert done.returncode == 3 and bad in done.stderr
        assert json.loads(done.stdout)["status"] == "error"


def test_wrong_usage_is_exit_code_2(folder):
    for line in (["--require", "bites<=1"], ["--baseline", "old.json", "--margin", "-1"]):
        done = rnnprune(folder, "check", "old.json", *line)
        assert done.returncode == 2, done.stdout


def test_what_is_judged_is_not_replaced(tmp_path):
    saved = tmp_path / "report.json"
    saved.write_bytes((OLD / "prune.json").read_bytes())
    for words in ([saved], [OLD / "prune.json", "--baseline", saved]):
        done = rnnprune(tmp_path, "check", *words, "--report", saved, "--force")
        assert done.returncode == 2 and "would replace what is judged" in done.stderr
    assert saved.read_bytes() == (OLD / "prune.json").read_bytes()


def test_a_baseline_of_another_original_is_said(tmp_path):
    other = json.loads((OLD / "prune.json").read_text())
    other["model"]["sha256"] = "0" * 64
    (tmp_path / "other.json").write_text(json.dumps(other))
    done = rnnprune(tmp_path, "check", OLD / "prune.json", "--baseline", tmp_path / "other.json")
    assert "about different originals" in done.stdout
    same = rnnprune(tmp_path, "check", OLD / "prune.json", "--baseline", OLD / "prune.json")
    assert "different originals" not in same.stdout
