"""``--skip-if-unchanged``: what a run depends on, and that nothing is done when it is the same."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import recurrent_model

import rnnprune_cli.unchanged
from rnnprune_cli.model import ExportOptions, FineTune, Stage, Target
from rnnprune_cli.options import PruneOptions, complete_stage
from rnnprune_cli.unchanged import NO_PART, key_of


def fill(tmp_path):
    (tmp_path / "model.onnx").write_bytes(recurrent_model().SerializeToString())
    (tmp_path / "other.onnx").write_bytes(recurrent_model(seed=1).SerializeToString())
    rng = np.random.default_rng(0)
    for name in ("data", "other"):
        np.savez(tmp_path / f"{name}.npz", x=rng.standard_normal((8, 3, 7)).astype(np.float32))


@pytest.fixture
def folder(tmp_path):
    fill(tmp_path)
    return tmp_path


@pytest.fixture
def options(folder):
    stage = complete_stage("magnitude", "weight", None, 0.5)
    return PruneOptions(folder / "model.onnx", None, (stage,), data=folder / "data.npz")


def another(value, kind, folder):
    """A value of a type that is not the given one."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
    if typing.get_origin(kind) is tuple:
        return (*value, another(None, typing.get_args(kind)[0], folder))
    if typing.get_origin(kind) is Mapping:
        return {**value, "layer": 0.125}
    if kind is Path:
        return folder / "other.onnx"
    if kind is Stage:
        return Stage("random", "weight", "row", 0.25)
    if kind is Target:
        return Target("bytes", 0.5)
    if kind is bool:
        return not value
    return f"{value}x" if kind is str else (value or 0) + kind(1)


def changes(kind, value, folder):
    """Yields field → the value with that field changed."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        old = getattr(value, field.name)
        if dataclasses.is_dataclass(hints[field.name]):
            for name, new in changes(hints[field.name], old, folder):
                yield f"{field.name}.{name}", dataclasses.replace(value, **{field.name: new})
        else:
            new = another(old, hints[field.name], folder)
            yield field.name, dataclasses.replace(value, **{field.name: new})


def test_every_option_is_part_of_the_key_but_places_and_judgements(options, folder):
    """A new option is part of it, until somebody says in NO_PART that it changes nothing."""
    key, seen = key_of(options), set()
    for name, other in changes(PruneOptions, options, folder):
        last = name.rpartition(".")[2]
        assert (key_of(other) == key) == (last in NO_PART), name
        seen.add(last)
    assert set(NO_PART) <= seen
    assert {f.name for kind in (FineTune, ExportOptions) for f in dataclasses.fields(kind)} <= seen


def test_every_field_of_a_stage_is_part_of_the_key(options, folder):
    (stage,) = options.stages
    keys = {
        key_of(dataclasses.replace(options, stages=(other,)))
        for _, other in changes(Stage, stage, folder)
    }
    assert len(keys | {key_of(options)}) == len(dataclasses.fields(Stage)) + 1


def test_contents_count_and_not_where_they_lie(options, folder):
    (folder / "moved").mkdir()
    for name in ("model.onnx", "data.npz"):
        shutil.copy(folder / name, folder / "moved" / name)
    moved = dataclasses.replace(
        options, model=folder / "moved" / "model.onnx", data=folder / "moved" / "data.npz"
    )
    assert key_of(moved) == key_of(options)
    with (folder / "moved" / "data.npz").open("ab") as file:
        file.write(b"\0")
    assert key_of(moved) != key_of(options)


def test_files_of_a_folder_count_with_their_names(options, folder):
    data = folder / "saved"
    data.mkdir()
    (data / "a").write_text("1")
    options = dataclasses.replace(options, data=data)
    keys = [key_of(options)]
    (data / "a").rename(data / "b")
    keys.append(key_of(options))
    (data / "a").write_text("")
    keys.append(key_of(options))
    assert len(set(keys)) == 3


def test_external_data_of_a_model_count(options, folder):
    model = onnx.load(folder / "model.onnx")
    onnx.save(
        model, folder / "model.onnx", save_as_external_data=True, location="w", size_threshold=64
    )
    key = key_of(options)
    content = bytearray((folder / "w").read_bytes())
    content[8] ^= 1
    (folder / "w").write_bytes(content)
    assert key_of(options) != key


def test_versions_count(options, monkeypatch):
    key = key_of(options)
    monkeypatch.setattr(rnnprune_cli.unchanged, "__version__", "9")
    assert key_of(options) != key
    names = rnnprune_cli.unchanged._versions(("numpy", "no-such-package"))
    assert names == {"numpy": np.__version__}


# The command


def prune(folder, *more, sparsity=0.5, environment=None):
    command = [
        sys.executable, "-m", "rnnprune_cli.cli", "prune", "model.onnx", "-s", str(sparsity),
        "--data", "data.npz", "--report", "r.json", "--skip-if-unchanged", *map(str, more),
    ]  # fmt: skip
    return subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **(environment or {})},
    )


def state(folder):
    """Every file, with when it was written."""
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A folder in which the work was done."""
    folder = tmp_path_factory.mktemp("done")
    fill(folder)
    first = prune(folder)
    assert first.returncode == 0, first.stderr
    assert "unchanged" not in first.stderr
    return folder


@pytest.fixture
def done(first, tmp_path):
    return Path(shutil.copytree(first, tmp_path / "copy"))


def test_the_same_again_does_nothing_and_shows_the_same(done):
    before = state(done)
    again = prune(done, "--format", "json")
    assert again.returncode == 0, again.stderr
    assert again.stderr == "rnnprune: unchanged: model.pruned.onnx\n"
    assert state(done) == before
    printed, saved = json.loads(again.stdout), json.loads((done / "r.json").read_text())
    assert (printed.pop("status"), saved.pop("status")) == ("unchanged", "ok")
    printed.pop("arguments"), saved.pop("arguments")
    assert printed == saved


def test_nothing_heavy_is_imported_for_it(done):
    """What makes it fast, which a clock on a busy machine cannot tell."""
    again = prune(done, environment={"PYTHONPROFILEIMPORTTIME": "1"})
    assert "rnnprune: unchanged" in again.stderr
    imported = {line.rpartition("|")[2].strip() for line in again.stderr.splitlines()}
    assert "numpy" in imported
    heavy = {"onnx", "onnx_ir", "onnxruntime", "tensorflow", "matplotlib", "optuna"}
    assert not heavy & imported


def test_requirements_are_judged_anew(done):
    before = state(done)
    for limit, code in ((0.1, 1), (9, 0), (0.2, 1)):
        again = prune(done, "--require", f"bytes<={limit}", "--format", "json")
        assert (again.returncode, "unchanged" in again.stderr) == (code, True)
        document = json.loads(again.stdout)
        assert [c["expression"] for c in document["checks"]] == [f"bytes<={limit}"]
        assert document["passed"] is (code == 0)
    assert state(done) == before
    assert prune(done, "--require", "bites<=1").returncode == 2


def test_a_report_that_lacks_is_written(done):
    again = prune(done, "--report", "r.md")
    assert again.returncode == 0 and "unchanged" in again.stderr
    assert "model.pruned.onnx" in (done / "r.md").read_text()


CHANGES = {
    "option": lambda folder: 0.6,
    "data": lambda folder: shutil.copy(folder / "other.npz", folder / "data.npz"),
    "model": lambda folder: (folder / "model.onnx").write_bytes(
        recurrent_model(seed=1).SerializeToString()
    ),
    "output": lambda folder: (folder / "model.pruned.onnx").write_bytes(b"x"),
    "report of another key": lambda folder: (folder / "r.json").write_text(
        (folder / "r.json").read_text().replace('"key": "', '"key": "0')
    ),
    "damaged report": lambda folder: (folder / "r.json").write_text("{"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_done_again_and_overwrites_only_with_force(done, change):
    changed = CHANGES[change](done)
    sparsity = changed if isinstance(changed, float) else 0.5
    before = state(done)
    refused = prune(done, sparsity=sparsity)
    assert (refused.returncode, "exists already" in refused.stderr) == (2, True)
    assert state(done) == before
    again = prune(done, "--force", sparsity=sparsity)
    assert again.returncode == 0 and "unchanged" not in again.stderr
    assert state(done)["model.pruned.onnx"] != before["model.pruned.onnx"]


def test_a_missing_output_is_made_again(done):
    (done / "model.pruned.onnx").unlink()
    (done / "r.json").unlink()
    again = prune(done)
    assert again.returncode == 0 and "unchanged" not in again.stderr


def test_a_family_is_skipped_only_whole(folder):
    def family():
        return subprocess.run(
            [
                sys.executable, "-m", "rnnprune_cli.cli", "prune", "model.onnx", "--family",
                "0.3,0.6", "--report", "f.json", "--skip-if-unchanged", "--force", "--format",
                "json",
            ],
            cwd=folder, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    assert "unchanged" not in family().stderr
    again = family()
    assert "unchanged: model.pruned-0.3.onnx, model.pruned-0.6.onnx" in again.stderr
    document = json.loads(again.stdout)
    assert document["status"] == "unchanged"
    assert [m["arguments"]["family"] for m in document["models"]] == [0.3, 0.6]
    (folder / "model.pruned-0.6.onnx").unlink()
    assert "unchanged" not in family().stderr


def test_it_needs_a_report_that_can_be_read_again(folder):
    command = [
        sys.executable, "-m", "rnnprune_cli.cli", "prune", "model.onnx", "-s", "0.5",
        "--skip-if-unchanged", "--report", "r.md",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "--report report.json" in done.stderr


def test_same_input_and_options_give_the_same_bytes_and_key(folder):
    keys, outputs = set(), set()
    for k in range(2):
        (folder / f"r{k}").mkdir()
        command = [
            sys.executable, "-m", "rnnprune_cli.cli", "prune", "model.onnx", "-s", "0.5",
            "--method", "obs", "--data", "data.npz", "-o", f"r{k}/out.onnx",
            "--report", f"r{k}/r.json",
        ]  # fmt: skip
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)
        outputs.add((folder / f"r{k}" / "out.onnx").read_bytes())
        keys.add(json.loads((folder / f"r{k}" / "r.json").read_text())["key"])
    assert len(outputs) == len(keys) == 1
