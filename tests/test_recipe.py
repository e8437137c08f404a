"""Recipes, and reports that are repeated: what they say, what they refuse, the same bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import tomli_w
from conftest import SAMPLES, Graph, recurrent_model, run, weights
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_cli import rnnprune, snapshot

from rnnprune_cli import cli
from rnnprune_cli.errors import RnnpruneError
from rnnprune_cli.load import load, model_files
from rnnprune_cli.model import ExportOptions, Stage, Target
from rnnprune_cli.options import EXPORTS, VALUES, PruneOptions, complete_stage
from rnnprune_cli.recipe import (
    COMMAND_LINE_ONLY,
    KEYS,
    STAGE_DEFAULTS,
    STAGE_KEYS,
    arguments_of,
    read_recipe,
    recipe_text,
)

TWO_STAGES = """
version = 1
model = "model.onnx"
output = "small.onnx"
data = "test.npz"
calibration = "calibration.npz"
values = "float16"

[[stage]]
granularity = "unit"
method = "obs"
sparsity = 0.5

[[stage]]
sparsity = 0.6
layers = ["enc*"]
"""


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def ended(monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """Runs the command line in this process; returns the exit code and stderr."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["rnnprune", *map(str, arguments)])
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        with pytest.raises(SystemExit) as ending:
            cli.main()
        return ending.value.code, capsys.readouterr().err

    return call


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model of two LSTMs and a dense layer, and data for it."""
    graph = Graph(["batch", "steps", 6])
    value = graph.op("Transpose", "x", perm=[1, 0, 2])
    for name, inputs in (("encoder", 6), ("decoder", 16)):
        w = weights("LSTM", 16, inputs, 1, seed=inputs)
        value = graph.op("LSTM", value, w["W"], w["R"], w["B"], hidden_size=16)
        graph.nodes[-1].name = name
        value = graph.op("Squeeze", value, np.array([1]))
    rng = np.random.default_rng(0)
    graph.output(graph.op("MatMul", value, rng.standard_normal((16, 3)).astype(np.float32)))
    (tmp_path / "model.onnx").write_bytes(graph.model().SerializeToString())
    for name in ("test", "calibration"):
        np.savez(tmp_path / f"{name}.npz", x=rng.standard_normal((40, 9, 6)).astype(np.float32))
    return tmp_path


@pytest.fixture
def recipe(folder: Path) -> Path:
    path = folder / "recipe.toml"
    path.write_text(TWO_STAGES)
    return path


# What a recipe says


def test_a_recipe_runs_all_its_stages_from_any_folder(recipe, folder):
    done = rnnprune("run", recipe, "--format", "json", cwd=Path("/"))
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert [s["granularity"] for s in report["plan"]["stages"]] == ["unit", "weight"]
    rows = {row["name"]: row for row in report["layers"]}
    assert rows["encoder"]["hidden_after"] == rows["decoder"]["hidden_after"] == 8
    assert rows["decoder"]["nonzero_after"] == rows["decoder"]["weights_after"]
    assert rows["encoder"]["nonzero_after"] == round(0.4 * rows["encoder"]["weights_after"])
    assert (folder / "small.onnx").exists()
    assert report["arguments"]["recipe"] == str(recipe)
    assert report["arguments"]["values"] == "float16"


def test_stages_do_what_the_same_stages_do_one_after_the_other(recipe, folder):
    """What two calls of prune write holds the same weights, for they calibrate on the same data."""
    recipe.write_text(TWO_STAGES.replace('values = "float16"', 'export = "dense"'))
    assert rnnprune("run", recipe).returncode == 0
    data = ["--data", folder / "test.npz", "--calibration", folder / "calibration.npz"]
    half, both = folder / "half.onnx", folder / "both.onnx"
    unit = ["--granularity", "unit", "--method", "obs", "-s", 0.5]
    assert rnnprune("prune", folder / "model.onnx", *unit, *data, "-o", half).returncode == 0
    weight = ["-s", 0.6, "--layers", "enc*", "--export", "dense"]
    assert rnnprune("prune", half, *weight, *data, "-o", both).returncode == 0
    feed = {"x": np.load(folder / "test.npz")["x"]}
    np.testing.assert_allclose(run(both, feed)[0], run(folder / "small.onnx", feed)[0], atol=1e-5)


def test_table_and_report_are_those_of_prune(recipe, folder):
    report = folder / "report.json"
    done = rnnprune("run", recipe, "--report", report)
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())  # long paths wrap the line
    assert "obs, unit by layer, sparsity 0.5; magnitude, weight by cell" in shown
    pruned = rnnprune(
        "prune", folder / "model.onnx", "-s", 0.5, "--format", "json", "-o", folder / "other.onnx"
    )
    assert json.loads(report.read_text()).keys() == json.loads(pruned.stdout).keys()


def test_the_command_line_goes_before_the_file(recipe, folder):
    other = folder / "other"
    other.mkdir()
    for name in ("model.onnx", "test.npz"):
        (folder / name).rename(other / name)
    arguments = ["-o", other / "o.onnx", "--data", other / "test.npz", "--seed", 3, "--threads", 2]
    done = rnnprune("run", recipe, other / "model.onnx", *arguments, "--format", "json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["plan"]["seed"], report["environment"]["threads"]) == (3, 2)
    assert report["arguments"]["data"] == str(other / "test.npz")
    assert report["arguments"]["calibration"] == str(folder / "calibration.npz")
    assert (other / "o.onnx").exists() and not (folder / "small.onnx").exists()


def test_a_target_is_searched_for_in_the_last_stage(recipe, folder):
    recipe.write_text('target = ["bytes=0.6"]\ntrials = 10\n' + TWO_STAGES.replace("0.6", "0.0"))
    assert "leave out the sparsity" in rnnprune("run", recipe).stderr
    recipe.write_text(recipe.read_text().replace("sparsity = 0.0", ""))
    done = rnnprune("run", recipe, "--format", "json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ratios"]["bytes"] <= 0.6
    assert report["plan"]["stages"][0]["sparsity"] == 0.5
    assert report["plan"]["stages"][1]["sparsity"] > 0


def test_a_family_is_made(recipe, folder):
    text = TWO_STAGES.replace("sparsity = 0.6", "")
    recipe.write_text("family = [0.5, 0.9]\n" + text)
    done = rnnprune("run", recipe)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in folder.glob("small*")) == ["small-0.5.onnx", "small-0.9.onnx"]
    again = folder / "again.toml"
    arguments = ["--family", "0.5,0.9", "--save-recipe", again]
    done = rnnprune("prune", folder / "model.onnx", *arguments)
    assert (done.returncode, again.exists()) == (2, False)


def test_layers_can_have_shares_of_their_own(recipe):
    shares = "shares = {encoder = 0.2, decoder = 0.8}"
    recipe.write_text(TWO_STAGES.replace('layers = ["enc*"]', shares))
    done = rnnprune("run", recipe, "--format", "json")
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)["layers"]}
    for name, share in (("encoder", 0.2), ("decoder", 0.8)):
        left = rows[name]["nonzero_after"] / rows[name]["weights_after"]
        assert left == pytest.approx(1 - share, abs=0.01)


def test_nothing_is_overwritten_unasked(recipe, folder):
    (folder / "small.onnx").write_text("mine")
    before = snapshot(folder)
    done = rnnprune("run", recipe)
    assert (done.returncode, snapshot(folder)) == (2, before)
    assert "--force" in done.stderr
    assert rnnprune("run", recipe, "--force", "--quiet").returncode == 0


def test_defaults_are_those_of_prune(folder, recipe):
    parameters = inspect.signature(cli.prune).parameters
    for name, value in STAGE_DEFAULTS.items():
        assert parameters[name].default == value
    recipe.write_text("[[stage]]\nsparsity = 0.5")
    arguments = arguments_of(read_recipe(recipe).options(model=folder / "model.onnx"))
    arguments.pop("model")
    arguments["metric"] = [arguments["metric"]]  # repeatable on the command line
    assert arguments == {name: parameters[name].default for name in arguments}
    for field in dataclasses.fields(Stage):
        if field.name not in STAGE_DEFAULTS and field.name in parameters:
            assert (parameters[field.name].default or ()) in (field.default, field.default or ())


def test_every_option_of_prune_is_a_key_or_for_the_command_line_only():
    options = {name.replace("_", "-") for name in inspect.signature(cli.prune).parameters}
    options = options - {"output-format"} | {"format"}
    options = options - {"right-padding"} | {"assume-right-padding"}
    assert options == {*KEYS, *COMMAND_LINE_ONLY, *(STAGE_KEYS.keys() & options)}
    fields = {f.name for f in dataclasses.fields(PruneOptions)}
    done_elsewhere = {"stages", "force", "reports", "family_of"}
    assert {field.partition(".")[0] for field in KEYS.values()} | done_elsewhere == fields


# What it refuses

STAGE = "[[stage]]\nsparsity = 0.5\n"
REFUSED = {
    "no toml": ("sparsity = = 1", 3, "line 1"),
    "an unknown key": (f'modle = "model.onnx"\n{STAGE}', 2, "'model'"),
    "an unknown key of a stage": (f"{STAGE}sparsty = 1", 2, "stage 1: there is no key 'sparsty'"),
    "an underscore": (f"{STAGE}allow_inexact = true", 2, "'allow-inexact'"),
    "a misspelt stage": ("[[stages]]\nsparsity = 0.5", 2, "'stage'"),
    "single brackets": ("[stage]\nsparsity = 0.5", 2, "[[stage]]"),
    "a list of numbers": ("stage = [1]", 2, "[[stage]]"),
    "no stage": ('model = "model.onnx"', 2, "holds no stage"),
    "a key of a stage above": (f"sparsity = 0.5\n{STAGE}", 2, "below [[stage]]"),
    "a key above in a stage": (f'{STAGE}export = "dense"', 2, "above the first [[stage]]"),
    "an option of the command line": (f"force = true\n{STAGE}", 2, "command line: --force"),
    "a report": (f'report = "r.json"\n{STAGE}', 2, "command line: --report"),
    "words for a number": (f'{STAGE}[[stage]]\nsparsity = "half"', 2, "stage 2: sparsity must be"),
    "a truth for a number": ("[[stage]]\nsparsity = true", 2, "must be a number, not true"),
    "a truth for the seed": (f"seed = true\n{STAGE}", 2, "seed must be a whole number"),
    "a fraction for the seed": (f"seed = 0.5\n{STAGE}", 2, "seed must be a whole number"),
    "a negative seed": (f"seed = -1\n{STAGE}", 2, "must not be negative"),
    "a day for the seed": (f"seed = 2020-01-01\n{STAGE}", 2, "seed must be a whole number"),
    "a number for a path": (f"data = 1\n{STAGE}", 2, "data must be a path"),
    "an empty path": (f'data = ""\n{STAGE}', 2, "data must be a path"),
    "a NUL in a path": (f'data = "\\u0000"\n{STAGE}', 2, "data must be a path"),
    "words for a truth": (f'{STAGE}compensate = "no"', 2, "compensate must be true or false"),
    "a pattern without brackets": (f'{STAGE}layers = "LSTM*"', 2, "layers must be a list"),
    "a list of numbers for patterns": (f"{STAGE}layers = [1]", 2, "must be a string, not 1"),
    "no sparsity": ("[[stage]]", 2, "stage 1: no sparsity is given"),
    "too much sparsity": ("[[stage]]\nsparsity = 1", 2, "stage 1: sparsity 1 is not between"),
    "no number": ("[[stage]]\nsparsity = nan", 2, "between 0 and 1"),
    "a huge number": (f"[[stage]]\nsparsity = 1{'0' * 400}", 2, "between 0 and 1"),
    "a huger number": (f"[[stage]]\nsparsity = 1{'0' * 9000}", 3, "not TOML"),
    "an unknown method": (f'{STAGE}method = "magnitud"', 2, "'magnitude'"),
    "an unknown layer": (f'{STAGE}layers = ["encodr"]', 2, "'encoder'"),
    "an unknown metric": (f'metric = "acuracy"\n{STAGE}', 2, "'accuracy'"),
    "units after weights": (f'{STAGE}{STAGE}granularity = "unit"', 2, "put that stage first"),
    "a state of weights": (f"{STAGE}resize-state = true", 2, "stage 1: resize-state is for units"),
    "shares without names": (f"{STAGE}shares = [0.5]", 2, "shares must be a table"),
    "a share in words": (f'{STAGE}shares = {{encoder = "x"}}', 2, "encoder must be a number"),
    "a share above one": (f"{STAGE}shares = {{encoder = 2}}", 2, "'encoder' is not between"),
    "a share of no layer": (f"{STAGE}shares = {{encodr = 0.5}}", 2, "'encoder'"),
    "an unknown target": ('target = ["byte=0.5"]\n[[stage]]', 2, "'bytes'"),
    "a target without limit": ('target = ["bytes"]\n[[stage]]', 2, "has no limit"),
    "a target and a sparsity": (f'target = ["bytes=0.5"]\n{STAGE}', 2, "leave out the sparsity"),
    "one trial": ('target = ["bytes=0.5"]\ntrials = 1\n[[stage]]', 2, "trials 1 is less"),
    "a family in words": ('family = "0.5,0.7"\n[[stage]]', 2, "family must be a list"),
    "an unknown version": (f"version = 2\n{STAGE}", 3, "version 2"),
    "no version": (f'version = "1"\n{STAGE}', 2, "version must be a whole number"),
    "deep nesting": (f"a = {'[' * 9000}", 3, "nests too deeply"),
    "a key of many parts": (f"a{'.a' * 500000} = 1", 3, "nests too deeply"),
    "too much": ("#" * (1 << 20) + "\n", 3, "larger than 1 MiB"),
    "no text": (b"\xff\xfe\x00", 3, "not UTF-8"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_makes_no_sense_is_refused_and_nothing_is_written(folder, ended, name):
    text, code, words = REFUSED[name]
    path = folder / "recipe.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = snapshot(folder)
    found, error = ended("run", path, folder / "model.onnx")
    assert found == code, error
    assert words in error
    assert 1 <= len(error.splitlines()) <= 2
    assert snapshot(folder) == before


def test_what_is_no_readable_file_is_refused(tmp_path, ended):
    (tmp_path / "folder.toml").mkdir()
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "zero.toml").symlink_to("/dev/zero")
    (tmp_path / "model.onnx").write_bytes(recurrent_model().SerializeToString())
    for name in ("folder.toml", "pipe.toml", "zero.toml", "nothing.toml"):
        assert ended("run", tmp_path / name)[0] == 3
    code, error = ended("run", tmp_path / "model.onnx")
    assert code == 2 and "rnnprune prune" in error


def test_a_recipe_without_model_asks_for_one(folder, recipe):
    recipe.write_text(STAGE)
    done = rnnprune("run", recipe)
    assert done.returncode == 2 and "names no model" in done.stderr
    assert rnnprune("run", recipe, folder / "model.onnx").returncode == 0
    assert (folder / "model.pruned.onnx").exists()


def test_a_byte_order_mark_does_no_harm(recipe):
    recipe.write_bytes(b"\xef\xbb\xbf" + recipe.read_bytes())
    assert len(read_recipe(recipe).stages) == 2


def test_failures_are_json_too(tmp_path):
    (tmp_path / "r.toml").write_text("[[stage]]\nsparsity = 3")
    done = rnnprune("run", tmp_path / "r.toml", "--format", "json")
    document = json.loads(done.stdout)
    assert (document["status"], document["error"]["exit_code"]) == ("error", 2)
    assert document["arguments"]["recipe"] == str(tmp_path / "r.toml")


VALUE = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=5),
        st.sampled_from(["unit", "weight", "obs", "random", "row", "nm:2:4", "\ud800", "int8"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)
STAGE_TABLE = st.dictionaries(
    st.one_of(st.sampled_from([*STAGE_KEYS, *STAGE_KEYS.values()]), st.text(max_size=4)), VALUE
)
TABLE = st.dictionaries(
    st.one_of(st.sampled_from(["version", *KEYS]), st.text(max_size=4)), VALUE
).flatmap(
    lambda top: st.one_of(VALUE, st.lists(STAGE_TABLE, max_size=3)).map(
        lambda stages: {**top, "stage": stages}
    )
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.one_of(st.binary(), TABLE))
def test_any_content_is_a_recipe_or_refused_kindly(tmp_path, content):
    path = tmp_path / "any.toml"
    try:
        whole = content if isinstance(content, bytes) else tomli_w.dumps(content).encode()
    except (TypeError, UnicodeEncodeError):
        return
    path.write_bytes(whole)
    try:
        read_recipe(path).options(model=path)
    except RnnpruneError as error:
        assert error.message


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(VALUE, VALUE, st.one_of(VALUE, st.lists(STAGE_TABLE, max_size=3)), VALUE)
@example({}, "0" * 64, [dataclasses.asdict(Stage("magnitude", "weight", "row", 0.5))], 0)
def test_any_report_is_repeated_or_refused_kindly(tmp_path, arguments, digest, stages, seed):
    path = tmp_path / "any.json"
    document = {
        "schema_version": 1,
        "status": "ok",
        "arguments": arguments,
        "plan": {"stages": stages, "seed": seed},
        "model": {"sha256": digest},
        "output": {"format": "onnx", "sha256": digest},
    }
    path.write_text(json.dumps(document))
    try:
        read_recipe(path).options(model=path)
    except RnnpruneError as error:
        assert error.message


# Options to a recipe, and back

NAME = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), min_size=1, max_size=8
).filter(lambda name: name not in (".", ".."))
PATH = st.builds(
    lambda below, parts: Path("/recipes/here" if below else "/else").joinpath(*parts),
    st.booleans(),
    st.lists(NAME, min_size=1, max_size=3),
)
GLOBS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8)).map(tuple)
SPARSITY = st.floats(0, 1, exclude_max=True)
WEIGHTS = st.builds(
    complete_stage,
    st.sampled_from(["magnitude", "random", "obs"]),
    st.sampled_from(["weight", "block:4x1", "bank:16"]),
    st.sampled_from([None, "row"]),
    SPARSITY,
    layers=GLOBS,
    exclude=GLOBS,
    compensate=st.booleans(),
    shares=st.dictionaries(NAME, SPARSITY, max_size=3),
)
UNITS = st.builds(
    complete_stage,
    st.sampled_from(["magnitude", "obs"]),
    st.just("unit"),
    st.sampled_from(["layer", "global"]),
    SPARSITY,
    layers=GLOBS,
    resize_state=st.booleans(),
    allow_inexact=st.booleans(),
)
LIMIT = st.floats(1e-12, 0.999)
TARGETS = st.lists(
    st.builds(Target, st.sampled_from(["metric-drop", "latency", "bytes"]), LIMIT), min_size=1
).map(tuple)


@st.composite
def prune_options(draw: st.DrawFn) -> PruneOptions:
    options = draw(
        st.builds(
            PruneOptions,
            model=PATH,
            output=st.none() | PATH,
            stages=st.lists(st.one_of(UNITS, WEIGHTS), min_size=1, max_size=4).map(tuple),
            seed=st.integers(0, 2**70),
            data=st.none() | PATH,
            calibration=st.none() | PATH,
            metric=st.text(st.characters(exclude_categories=["Cs"])),
            export=st.builds(ExportOptions, st.sampled_from([*EXPORTS]), st.sampled_from(VALUES)),
            signature=st.none() | NAME,
            threads=st.integers(1, 256),
            right_padding=st.booleans(),
        )
    )
    targets = draw(st.just(()) | TARGETS)
    family = draw(st.just(()) | st.lists(LIMIT, min_size=1).map(tuple))
    if not targets and not family:
        return options
    return dataclasses.replace(
        options,
        targets=targets,
        family=family,
        family_of=draw(st.sampled_from([None, "latency"])) if family else None,
        trials=draw(st.integers(2, 100)),
        stages=(*options.stages[:-1], dataclasses.replace(options.stages[-1], sparsity=0.0)),
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(prune_options())
def test_options_come_back_from_a_recipe(tmp_path_factory, options):
    here = tmp_path_factory.getbasetemp()

    def moved(path: Path | None) -> Path | None:
        return path and here / path.relative_to("/recipes/here") if "here" in str(path) else path

    options = dataclasses.replace(
        options,
        model=moved(options.model),
        output=moved(options.output),
        data=moved(options.data),
        calibration=moved(options.calibration),
    )
    path = here / "round trip.toml"
    text = recipe_text(options, here)
    assert str(here) not in text
    path.write_text(text, encoding="utf-8")
    assert read_recipe(path).options() == options


# The same bytes again

UNIT = ("--granularity", "unit", "--method", "random", "--seed", 5, "--scope", "global")


def test_a_saved_recipe_gives_the_same_bytes(folder):
    saved = folder / "saved.toml"
    done = rnnprune(
        *("prune", "model.onnx", *UNIT, "-s", 0.4, "--data", "test.npz", "-o", "a.onnx"),
        *("--save-recipe", saved),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert str(folder) not in saved.read_text()
    again = rnnprune("run", saved, "-o", folder / "b.onnx", cwd=Path("/"))
    assert again.returncode == 0, again.stderr
    assert sha256(folder / "a.onnx") == sha256(folder / "b.onnx")


def test_what_was_searched_for_is_found_in_recipe_and_report(folder):
    saved, report = folder / "saved.toml", folder / "report.json"
    done = rnnprune(
        *("prune", "model.onnx", "--target", "metric-drop=0.2", "--target", "bytes=0.9"),
        *("--data", "test.npz", "--trials", 12, "-o", "a.onnx", "--report", report),
        *("--save-recipe", saved, "--scope", "sensitivity"),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert "target" not in saved.read_text()
    for number, source in enumerate((saved, report)):
        done = rnnprune("run", source, "-o", f"{number}.onnx", "--format", "json", cwd=folder)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["trials"] == []
        assert sha256(folder / "a.onnx") == sha256(folder / f"{number}.onnx")


def test_a_report_gives_the_same_bytes_again_and_again(recipe, folder):
    """Units, then weights, with data; the report of a repetition can be repeated, too."""
    first, second = folder / "first.json", folder / "second.json"
    assert rnnprune("run", recipe, "--report", first).returncode == 0
    done = rnnprune("run", first, "-o", "b.onnx", "--report", second, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "byte for byte" not in done.stdout
    assert rnnprune("run", second, "-o", "c.onnx", cwd=folder).returncode == 0
    digests = {sha256(folder / f"{name}.onnx") for name in ("small", "b", "c")}
    assert len(digests) == 1
    one, two = (json.loads(path.read_text()) for path in (first, second))
    assert one["plan"] == two["plan"]
    assert one["output"]["sha256"] == two["output"]["sha256"] == digests.pop()


def test_a_sample_model_gives_the_same_bytes(tmp_path):
    path, name = tmp_path / "recipe.toml", "timeseries"
    path.write_text(
        f'model = "{SAMPLES / name}.onnx"\ndata = "{SAMPLES / name}.test.npz"\noutput = "a.onnx"\n'
        f'calibration = "{SAMPLES / name}.calibration.npz"\n'
        '[[stage]]\ngranularity = "unit"\nmethod = "obs"\nsparsity = 0.5\n'
        '[[stage]]\nmethod = "obs"\ngranularity = "block:4x1"\nsparsity = 0.5\n'
    )
    report = tmp_path / "report.json"
    assert rnnprune("run", path, "--report", report).returncode == 0
    assert rnnprune("run", report, "-o", tmp_path / "b.onnx").returncode == 0
    assert sha256(tmp_path / "a.onnx") == sha256(tmp_path / "b.onnx")


def test_a_converted_model_gives_the_same_bytes(tmp_path):
    pytest.importorskip("tf2onnx")
    path, report = tmp_path / "recipe.toml", tmp_path / "report.json"
    path.write_text(
        f'model = "{SAMPLES}/medicine"\noutput = "a.onnx"\n'
        '[[stage]]\ngranularity = "unit"\nsparsity = 0.5\n[[stage]]\nsparsity = 0.5\n'
    )
    assert rnnprune("run", path, "--report", report).returncode == 0
    assert rnnprune("run", report, "-o", tmp_path / "b.onnx").returncode == 0
    assert sha256(tmp_path / "a.onnx") == sha256(tmp_path / "b.onnx")


@pytest.mark.parametrize("kind", ["external data", "SavedModel", "ONNX"])
def test_the_files_of_a_model_are_known_without_loading_it(tmp_path, kind):
    path = tmp_path / "model.onnx"
    onnx.save_model(
        recurrent_model(),
        path,
        save_as_external_data=kind == "external data",
        all_tensors_to_one_file=False,
        size_threshold=0,
    )
    if kind == "SavedModel":
        pytest.importorskip("tensorflow")
        path = SAMPLES / "medicine"
    assert model_files(path) == load(path).files
    assert len(model_files(path)) == {"external data": 4, "SavedModel": 4, "ONNX": 1}[kind]


def test_a_report_is_not_repeated_on_another_model(recipe, folder):
    report = folder / "report.json"
    assert rnnprune("run", recipe, "--report", report).returncode == 0
    model = folder / "model.onnx"
    model.rename(folder / "moved.onnx")
    done = rnnprune("run", report, "-o", folder / "b.onnx")
    assert done.returncode == 3 and "give MODEL" in done.stderr
    model.write_bytes(recurrent_model().SerializeToString())
    before = snapshot(folder)
    done = rnnprune("run", report, "-o", folder / "b.onnx")
    assert (done.returncode, snapshot(folder)) == (3, before)
    assert "sha256" in done.stderr and len(done.stderr.splitlines()) == 2
    assert rnnprune("run", report, folder / "moved.onnx", "-o", folder / "b.onnx").returncode == 0


def test_other_bytes_than_those_of_the_report_are_said(recipe, folder):
    report = folder / "report.json"
    assert rnnprune("run", recipe, "--report", report).returncode == 0
    np.savez(folder / "calibration.npz", x=np.ones((40, 9, 6), np.float32))
    done = rnnprune("run", report, "-o", folder / "b.onnx")
    assert done.returncode == 0 and "byte for byte" in done.stdout
    done = rnnprune("run", report, "-o", folder / "c.onnx", "--seed", 4)
    assert done.returncode == 0 and "byte for byte" not in done.stdout


def test_the_report_of_prune_is_repeated_without_its_force_and_reports(folder):
    report = folder / "report.json"
    arguments = ["-s", 0.5, "--report", report, "--force", "--layers", "encoder"]
    assert rnnprune("prune", "model.onnx", *arguments, cwd=folder).returncode == 0
    before = snapshot(folder)
    done = rnnprune("run", report, cwd=folder)
    assert (done.returncode, snapshot(folder)) == (2, before)
    assert rnnprune("run", report, "--force", cwd=folder).returncode == 0
    assert snapshot(folder) == before


def test_a_saved_recipe_runs_on_another_model(folder, tmp_path):
    saved = folder / "saved.toml"
    arguments = ["-s", 0.5, "--save-recipe", saved]
    assert rnnprune("prune", folder / "model.onnx", *arguments).returncode == 0
    other = folder / "other.onnx"
    other.write_bytes(recurrent_model().SerializeToString())
    assert rnnprune("run", saved, other).returncode == 0
    assert (folder / "other.pruned.onnx").exists()


REPORTS = {
    "another schema": ({"schema_version": 2}, "schema_version 2"),
    "a failed run": ({"status": "error"}, "failed"),
    "no plan": ({"plan": None}, "not about pruning"),
    "no stage": ({"plan": {"stages": [], "seed": 0}}, "not about pruning"),
    "no arguments": ({"arguments": 1}, "'arguments'"),
    "no model": ({"model": {}}, "'sha256'"),
    "a field of another version": (
        {"plan": {"stages": [{"method": "magnitude", "rank": 3}], "seed": 0}},
        "does not know 'rank'",
    ),
    "no seed": ({"plan": {"stages": [{"sparsity": 0.5}]}}, "seed"),
}


@pytest.mark.parametrize("name", sorted(REPORTS))
def test_a_report_that_cannot_be_repeated_is_refused(folder, ended, name):
    changes, words = REPORTS[name]
    report = folder / "report.json"
    model = folder / "model.onnx"
    assert ended("prune", model, "-s", 0.5, "--report", report)[0] == 0
    report.write_text(json.dumps({**json.loads(report.read_text()), **changes}))
    code, error = ended("run", report, "-o", folder / "b.onnx")
    assert code in (2, 3)
    assert words in error
    assert not (folder / "b.onnx").exists()


# Where --save-recipe writes


@pytest.mark.parametrize(
    ("name", "words"),
    [("r.txt", ".toml"), ("no/r.toml", "mkdir"), ("mine.toml", "--force")],
)
def test_a_recipe_that_cannot_be_written_stops_before_the_work(folder, ended, name, words):
    (folder / "mine.toml").write_text("mine")
    before = snapshot(folder)
    saved = folder / name
    code, error = ended("prune", folder / "model.onnx", "-s", 0.5, "--save-recipe", saved)
    assert (code, snapshot(folder)) == (2, before)
    assert words in error


def test_paths_that_no_recipe_can_hold_stop_before_the_work(folder):
    odd = Path(os.fsdecode(bytes(folder) + b"/\xff.onnx"))
    try:
        (folder / "model.onnx").rename(odd)
    except OSError:
        pytest.skip("the file system takes Unicode names only")
    before = snapshot(folder)
    done = rnnprune("prune", odd, "-s", 0.5, "--save-recipe", folder / "r.toml")
    assert (done.returncode, snapshot(folder)) == (2, before)
    assert "Unicode" in done.stderr


def test_run_is_in_the_help():
    done = rnnprune("run", "--help")
    assert done.returncode == 0 and "recipe" in done.stdout
