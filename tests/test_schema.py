"""The committed schema, real documents of every command against it, and reading them back."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import schema as generator
from conftest import Graph, weights

from rnnprune_cli.checks import _EXAMPLES, OF_BENCH, check_saved
from rnnprune_cli.errors import RnnpruneError
from rnnprune_cli.report.json import document_of, render, report_document
from rnnprune_cli.report.read import MAX_REPORT_BYTES, read_report, report_of

OLD = Path(__file__).parent / "reports_v1"
SCHEMA = json.loads(generator.PLACE.read_text())


def valid(document, kind, closed=False):
    """Validates a document as one of a kind; closed: nothing in it may be unknown."""
    whole = generator.schema(closed)
    jsonschema.validate(document, {"$ref": f"#/$defs/{kind}", "$defs": whole["$defs"]})


def test_the_committed_schema_is_what_the_dataclasses_say():
    assert generator.PLACE.read_text() == generator.text(), "run: python tests/schema.py"
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


# Every command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A classifier with data on which it is right, and what every command writes about it."""
    folder = tmp_path_factory.mktemp("documents")
    g = Graph(["batch", "time", 7])
    own = weights("LSTM", 12, 7, 1, 0)
    y = g.op(
        "LSTM", g.op("Transpose", "x", perm=[1, 0, 2]), own["W"], own["R"], own["B"],
        hidden_size=12, outs=3,
    )  # fmt: skip
    steps = g.op("Transpose", g.op("Squeeze", y, np.array([1])), perm=[1, 0, 2])
    rng = np.random.default_rng(0)
    g.output(g.op("MatMul", steps, rng.standard_normal((12, 3)).astype(np.float32)))
    (folder / "model.onnx").write_bytes(g.model().SerializeToString())
    x = rng.standard_normal((16, 10, 7)).astype(np.float32)
    np.savez(folder / "test.npz", x=x, labels=rng.integers(0, 3, (16, 10)))
    return folder


COMMANDS = {
    "prune": ("report", "prune model.onnx -s 0.5 --data test.npz --require bytes<=2"),
    "lift nothing": ("error", "lift model.onnx"),
    "search": (
        "report",
        "prune model.onnx --granularity unit --target parameters=0.6 --data test.npz -o s.onnx",
    ),
    "recipe": ("report", "run recipe.toml"),
    "family": ("family", "prune model.onnx --family 0.3,0.6 --data test.npz"),
    "sensitivity": ("sensitivity", "sensitivity model.onnx --data test.npz --sparsities 0.5"),
    "bench": ("bench", "bench model.onnx model.pruned.onnx --time 0.05 --require bytes<=0.1"),
    "check": ("check", "check report.json --require bytes<=0.1 --baseline report.json"),
    "inspect": ("inspect", "inspect model.onnx"),
    "methods": ("methods", "methods"),
    "error": ("error", "prune model.onnx -s 2"),
}


@pytest.fixture(scope="module")
def documents(folder):
    """Command → what it prints; in order, since some take what others wrote."""
    (folder / "recipe.toml").write_text(
        'model = "model.onnx"\noutput = "r.onnx"\nrequire = ["latency<=9"]\n[[stage]]\nsparsity=0.5'
    )
    found = {}
    for name, (_, line) in COMMANDS.items():
        report = ["--report", "report.json"] if name == "prune" else []
        command = [sys.executable, "-m", "rnnprune_cli.cli", *line.split(), *report]
        done = subprocess.run(
            [*command, "--format", "json"], cwd=folder, capture_output=True, text=True, timeout=120
        )
        found[name] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_command_prints_is_valid_and_nothing_in_it_is_unknown(documents, name):
    kind, _ = COMMANDS[name]
    jsonschema.validate(documents[name], SCHEMA)
    valid(documents[name], kind)
    valid(documents[name], kind, closed=True)


@pytest.mark.parametrize(
    "name", ["prune", "search", "recipe", "family", "sensitivity", "bench", "check"]
)
def test_what_is_read_back_writes_the_same_document(documents, name):
    result = report_of(documents[name], "r.json")
    again = json.loads(render(document_of(result)))
    if name == "family":
        again["arguments"] = documents[name]["arguments"]
    assert again == documents[name]


def test_a_schema_refuses_what_is_no_report(documents):
    """Without this the tests above could not fail."""
    for change in ({"before": None}, {"schema_version": 2}, {"plan": {"stages": "none"}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**documents["prune"], **change}, SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        valid({**documents["prune"], "surprise": 1}, "report", closed=True)


# Older and newer reports


@pytest.mark.parametrize("path", sorted(OLD.glob("*.json")), ids=lambda path: path.stem)
def test_reports_of_earlier_versions_are_valid(path):
    jsonschema.validate(json.loads(path.read_text()), SCHEMA)


@pytest.mark.parametrize("name", ["prune", "family", "sensitivity", "bench", "check"])
def test_reports_of_earlier_versions_are_read_with_all_their_figures(name):
    document = json.loads((OLD / f"{name}.json").read_text())
    again = json.loads(render(document_of(read_report(OLD / f"{name}.json"))))

    def held(old, new, where):
        if isinstance(old, dict):
            assert old.keys() <= new.keys(), where
            for key, value in old.items():
                held(value, new[key], f"{where}: {key}")
        elif isinstance(old, list):
            assert len(old) == len(new), where
            for place, (one, two) in enumerate(zip(old, new, strict=True)):
                held(one, two, f"{where}[{place}]")
        else:
            assert old == new, where

    document["arguments"] = again["arguments"] if name == "family" else document["arguments"]
    held(document, again, name)


def test_what_later_versions_add_is_left_out():
    document = json.loads((OLD / "prune.json").read_text())
    document["later"] = {"x": 1}
    document["after"]["later"] = 2
    assert report_of(document, "r") == read_report(OLD / "prune.json")


def test_null_is_a_figure_that_json_cannot_hold():
    report = read_report(OLD / "prune.json")
    odd = dataclasses.replace(
        report,
        ratios=dataclasses.replace(report.ratios, bytes=math.inf),
        after=dataclasses.replace(report.after, metric=None),
    )
    document = json.loads(render(report_document(odd)))
    jsonschema.validate(document, SCHEMA)
    read = report_of(document, "r")
    assert math.isnan(read.ratios.bytes) and read.after.metric is None


# What is no report


def changed(*path, value):
    document = json.loads((OLD / "prune.json").read_text())
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return json.dumps(document)


BAD = {
    "not JSON": ("{", "is not JSON"),
    "empty": ("", "is not JSON"),
    "not UTF-8": (b"\xff\xfe{", "not UTF-8"),
    "a list": ("[]", "is no report of rnnprune"),
    "another tool's": ('{"version": 1}', "is no report of rnnprune"),
    "another version": ('{"schema_version": 2}', "schema_version 2"),
    "methods": ('{"schema_version": 1, "methods": []}', "holds no result"),
    "an empty family": ('{"schema_version": 1, "models": []}', "holds no result"),
    "a member that is none": ('{"schema_version": 1, "models": [1]}', "models[0] must be an obj"),
    "a run that failed": ((OLD / "error.json").read_text(), "run that failed: nothing.onnx"),
    "deep": ("[" * 100_000, "nests too deeply"),
    "missing": (changed("after", value=None), "'after' is missing"),
    "missing inside": (changed("before", "bytes", value=None), "before is damaged: 'bytes'"),
    "text for a number": (changed("after", "bytes", value="x"), "must be a whole number"),
    "true for a number": (changed("ratios", "bytes", value=True), "must be a number"),
    "half a byte": (changed("after", "bytes", value=0.5), "must be a whole number"),
    "number for text": (changed("model", "path", value=1), "must be text"),
    "text for a list": (changed("warnings", value="abc"), "must be a list"),
    "object for a list": (changed("layers", value={}), "must be a list"),
    "list for an object": (changed("model", value=[]), "must be an object"),
    "pair of three": (
        changed("finetune", value={
            "loss": "", "schedule": "", "samples": [1, 2, 3], "parameters": [1, 1], "steps": 1,
            "start": [], "drop": 0, "epochs": [], "best": 0, "clipped": 0, "rollbacks": 0,
            "stopped": None, "seconds": 0,
        }),
        "a list of 2",
    ),
    "unknown operator": (
        changed("lifts", value=[{"name": "", "pattern": "", "op": "X", "source": ""}]),
        "'LSTM' or 'GRU' or 'RNN'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_what_is_no_report_is_refused_with_the_place(tmp_path, text, message):
    path = tmp_path / "r.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RnnpruneError) as caught:
        read_report(path)
    assert message in caught.value.message
    assert caught.value.code == 3 and caught.value.hint


def test_files_that_cannot_be_reports_are_refused(tmp_path):
    for path, message in ((tmp_path / "none.json", "does not exist"), (tmp_path, "is no file")):
        with pytest.raises(RnnpruneError, match=message):
            read_report(path)
    huge = tmp_path / "huge.json"
    with huge.open("wb") as file:
        file.truncate(MAX_REPORT_BYTES + 1)
    with pytest.raises(RnnpruneError, match="larger than 32 MiB"):
        read_report(huge)


def test_whole_numbers_that_no_float_holds_are_infinite():
    document = json.loads((OLD / "prune.json").read_text())
    document["ratios"]["bytes"] = 10**400
    assert report_of(document, "r").ratios.bytes == math.inf


VALUES = [None, True, 0, -1, 10**400, 1e308, 0.5, "", "x", "<b>\x1b", [], {}, [1], {"a": 1}, [None]]


def places(value, path=()):
    """Yields the path of everything in a document; of long lists, of the first few."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value[:4])
    for key, item in inner:
        if isinstance(item, dict | list):
            yield from places(item, (*path, key))
        else:
            yield (*path, key)


@pytest.mark.parametrize("name", ["prune", "family", "bench", "check", "sensitivity"])
def test_whatever_is_damaged_is_judged_or_refused_with_an_error_of_ours(name):
    """Nothing that a file can hold raises anything but RnnpruneError."""
    text = (OLD / f"{name}.json").read_text()
    sound, rng = report_of(json.loads(text), "r"), random.Random(0)
    known = list(places(json.loads(text)))
    expressions = [e for n, e in _EXAMPLES.items() if name != "bench" or n in OF_BENCH]
    read = 0
    for _ in range(400):
        document = json.loads(text)
        *path, last = rng.choice(known)
        inner = functools.reduce(lambda value, key: value[key], path, document)
        inner[last] = rng.choice(VALUES)
        with contextlib.suppress(RnnpruneError):
            report = report_of(document, "r")
            read += 1
            render(document_of(report))
            for one, two, wanted in (
                (report, None, expressions), (report, None, ()), (report, sound, ()),
                (sound, report, ()),
            ):  # fmt: skip
                with contextlib.suppress(RnnpruneError):
                    check_saved(one, two, wanted, ("r", "b"), {}, strict=True)
    assert 20 < read < 380
