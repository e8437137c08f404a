"""The command as a user runs it: exit codes, streams, files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import GRAPHS, recurrent_model

RNNPRUNE = [sys.executable, "-m", "rnnprune_cli.cli"]


def rnnprune(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*RNNPRUNE, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=120
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(recurrent_model().SerializeToString())
    return path


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_prune_writes_beside_the_input_and_prints_a_table(model):
    done = rnnprune("prune", model, "--method", "magnitude", "--sparsity", 0.7)
    assert done.returncode == 0, done.stderr
    assert model.with_name("model.pruned.onnx").exists()
    assert "before" in done.stdout and "after" in done.stdout and "LSTM" in done.stdout
    assert done.stderr == ""


def test_json_is_one_document_on_stdout_and_in_the_report(model, tmp_path):
    report = tmp_path / "report.json"
    done = rnnprune("prune", model, "-s", 0.5, "--format", "json", "--report", report)
    document = json.loads(done.stdout)
    assert document == json.loads(report.read_text())
    assert document["schema_version"] == 1
    assert document["status"] == "ok"
    assert document["tool"]["name"] == "rnnprune"
    assert {
        "arguments", "model", "output", "plan", "layers", "skipped", "before", "after", "ratios",
        "fidelity", "verification", "checks", "warnings", "environment",
    } <= document.keys()  # fmt: skip
    assert set(document["before"]) == {
        "parameters", "nonzero", "recurrent_parameters", "recurrent_nonzero", "bytes", "gzip_bytes",
        "macs_per_step", "latency_ms", "metric", "metrics",
    }  # fmt: skip
    assert set(document["ratios"]["latency"]) == {"median", "low", "high"}
    assert document["after"]["bytes"] == (tmp_path / "model.pruned.onnx").stat().st_size
    assert document["fidelity"]["outputs"][0]["name"] == "y"
    assert document["plan"]["stages"][0]["sparsity"] == 0.5


def test_json_is_printed_on_failure_too(tmp_path):
    done = rnnprune("prune", tmp_path / "nothing.onnx", "-s", 0.5, "--format", "json")
    document = json.loads(done.stdout)
    assert (done.returncode, document["status"], document["error"]["exit_code"]) == (3, "error", 3)


USAGE = {
    "sparsity of one": (["--sparsity", 1.0], "between 0 and 1"),
    "sparsity above one": (["--sparsity", 1.5], "between 0 and 1"),
    "negative sparsity": (["--sparsity", -0.1], "between 0 and 1"),
    "sparsity not a number": (["--sparsity", "nan"], "between 0 and 1"),
    "sparsity in words": (["--sparsity", "much"], "valid number"),
    "method": (["-s", 0.5, "--method", "magnitud"], "'magnitude'"),
    "scope": (["-s", 0.5, "--scope", "globl"], "'global'"),
    "granularity": (["-s", 0.5, "--granularity", "weigth"], "'weight'"),
    "export": (["-s", 0.5, "--export", "pakced"], "'packed'"),
    "values": (["-s", 0.5, "--values", "float61"], "'float16'"),
    "values that need packing": (["-s", 0.5, "--values", "int8", "--export", "dense"], "packed"),
    "metric": (["-s", 0.5, "--metric", "acc"], "accuracy"),
    "layer": (["-s", 0.5, "--layers", "rn"], "'rnn'"),
    "option": (["-s", 0.5, "--methd", "magnitude"], "--method"),
    "no sparsity": ([], "sparsity"),
    "signature of an onnx file": (["-s", 0.5, "--signature", "x"], "SavedModels"),
    "no threads": (["-s", 0.5, "--threads", 0], "threads"),
    "too many threads": (["-s", 0.5, "--threads", 100000], "threads"),
    "output is no model": (["-s", 0.5, "-o", "out.txt"], ".onnx"),
    "output folder missing": (["-s", 0.5, "-o", "no/where/out.onnx"], "mkdir"),
    "report format": (["-s", 0.5, "--report", "report.txt"], ".json"),
}


@pytest.mark.parametrize("name", sorted(USAGE))
def test_wrong_usage_ends_with_2_and_touches_nothing(model, tmp_path, name):
    arguments, words = USAGE[name]
    before = snapshot(tmp_path)
    done = rnnprune("prune", model, *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert 1 <= len(done.stderr.splitlines()) <= 2
    assert snapshot(tmp_path) == before


def test_nothing_is_overwritten_unasked(model, tmp_path):
    output = tmp_path / "out.onnx"
    output.write_text("mine")
    done = rnnprune("prune", model, "-s", 0.5, "-o", output)
    assert (done.returncode, output.read_text()) == (2, "mine")
    assert "--force" in done.stderr
    assert rnnprune("prune", model, "-s", 0.5, "-o", output, "--force").returncode == 0
    assert output.stat().st_size > 100


def test_the_output_cannot_be_the_input(model):
    before = model.read_bytes()
    done = rnnprune("prune", model, "-s", 0.5, "-o", model, "--force")
    assert (done.returncode, model.read_bytes()) == (2, before)
    link = model.with_name("link.onnx")
    link.symlink_to(model)
    done = rnnprune("prune", model, "-s", 0.5, "-o", link, "--force")
    assert (done.returncode, model.read_bytes()) == (2, before)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission(model, tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    assert rnnprune("prune", model, "-s", 0.5, "-o", folder / "out.onnx").returncode == 2


def test_a_device_is_no_place_for_a_model(model):
    done = rnnprune("prune", model, "-s", 0.5, "-o", "/proc/out.onnx")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) <= 2


def test_a_model_that_cannot_be_pruned_ends_with_3(tmp_path):
    model = GRAPHS / "cells" / "loop_lstm_norm.onnx"
    done = rnnprune("prune", model, "-s", 0.5, "-o", tmp_path / "o.onnx")
    assert done.returncode == 3
    assert "its cell is no LSTM" in done.stderr
    assert not (tmp_path / "o.onnx").exists()


def test_data_of_the_wrong_kind_end_with_3(model, tmp_path):
    data = tmp_path / "data.npz"
    np.savez(data, wrong=np.zeros(3))
    done = rnnprune("prune", model, "-s", 0.5, "--data", data)
    assert (done.returncode, done.stdout) == (3, "")
    assert "'x'" in done.stderr
    assert not model.with_name("model.pruned.onnx").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_no_half_written_file(tmp_path, number):
    path = tmp_path / "big.onnx"
    path.write_bytes(recurrent_model(hidden=512, inputs=512).SerializeToString())
    process = subprocess.Popen(
        [*RNNPRUNE, "prune", str(path), "-s", "0.5", "--verbose", "--format", "json"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if "verifying" in line:
            break
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted; no model was written" in stderr
    assert json.loads(stdout)["error"]["exit_code"] == 130
    assert [p.name for p in tmp_path.iterdir()] == ["big.onnx"]


def test_inspect_shows_layers_and_what_blocks_others():
    done = rnnprune("inspect", GRAPHS / "hand_w_shared.onnx")
    assert done.returncode == 0
    assert "left" in done.stdout and "right" in done.stdout and "weights of left" in done.stdout
    model = GRAPHS / "cells" / "loop_lstm_norm.onnx"
    done = rnnprune("inspect", model, "--format", "json")
    document = json.loads(done.stdout)
    assert (done.returncode, document["layers"]) == (0, [])
    assert document["skipped"][0]["hint"]


def test_inspect_shows_what_became_of_a_loop():
    done = rnnprune("inspect", GRAPHS / "keras3_gru.onnx", "--format", "json")
    document = json.loads(done.stdout)
    assert [lift["pattern"] for lift in document["lifts"]] == ["cell", "loop"]
    assert [layer["op"] for layer in document["layers"]] == ["GRU"]


def test_lift_writes_an_operator_in_the_place_of_a_loop(tmp_path):
    path = tmp_path / "lifted.onnx"
    done = rnnprune("lift", GRAPHS / "keras3_gru.onnx", "-o", path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "was a loop" in done.stdout
    ops = [node.op_type for node in onnx.load(path).graph.node]
    assert "GRU" in ops and "Loop" not in ops


def test_a_masked_loop_is_lifted_on_a_promise_only(tmp_path):
    path, model = tmp_path / "lifted.onnx", GRAPHS / "keras3_masked_lstm.onnx"
    done = rnnprune("lift", model, "-o", path)
    assert (done.returncode, path.exists()) == (3, False)
    assert "--assume-right-padding" in done.stderr
    done = rnnprune("lift", model, "-o", path, "--assume-right-padding")
    assert done.returncode == 0
    assert "Loop" not in [node.op_type for node in onnx.load(path).graph.node]


def test_the_cell_of_a_loop_that_stays_is_pruned(tmp_path):
    path, model = tmp_path / "pruned.onnx", GRAPHS / "keras3_masked_lstm.onnx"
    done = rnnprune("prune", model, "-s", 0.5, "-o", path, "--export", "dense")
    assert done.returncode == 0
    assert "--assume-right-padding" in done.stdout
    assert "Loop" in [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize(
    ("model", "words"),
    [("cells/loop_lstm_norm", "can be lifted"), ("keras3_lstm", "has to be lifted")],
)
def test_lift_fails_where_there_is_nothing_to_lift(tmp_path, model, words):
    done = rnnprune("lift", GRAPHS / f"{model}.onnx", "-o", tmp_path / "o.onnx")
    assert done.returncode == 3
    assert words in done.stderr
    assert not list(tmp_path.iterdir())


def test_methods_lists_every_criterion_with_its_paper():
    done = rnnprune("methods")
    assert done.returncode == 0
    for word in ("magnitude", "random", "Han et al. 2015", "row", "global", "packed"):
        assert word in done.stdout
    names = [
        m["name"] for m in json.loads(rnnprune("methods", "--format", "json").stdout)["methods"]
    ]
    assert names == sorted(names) and "magnitude" in names


@pytest.mark.parametrize(
    "arguments",
    [["prune"], ["prune", "m.onnx", "-s", "abc"], ["nothing"], ["prune", "/proc/1/mem"]],
)
def test_json_is_printed_for_every_failure(arguments):
    for extra in ([], ["--verbose"]):
        done = rnnprune(*arguments, "--format", "json", *extra)
        assert done.returncode in (2, 3)
        assert json.loads(done.stdout)["error"]["exit_code"] == done.returncode


def test_names_in_a_model_are_neither_markup_nor_control_characters(tmp_path):
    model = recurrent_model()
    model.graph.node[0].name = "[/x] enc[bold]der \x1b[31m"
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    done = rnnprune("prune", path, "-s", 0.5)
    assert done.returncode == 0, done.stderr
    assert "[/x] enc[bold]der" in done.stdout and "\x1b" not in done.stdout


def test_arrows_do_not_stop_an_ascii_terminal(model):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    command = [*RNNPRUNE, "prune", str(model), "-s", "0.5"]
    done = subprocess.run(command, capture_output=True, env=environment, timeout=60)
    assert done.returncode == 0


def test_no_arguments_show_the_help():
    assert "Usage" in rnnprune().stdout


def test_a_report_cannot_be_the_output(model, tmp_path):
    path = tmp_path / "same.json"
    done = rnnprune("prune", model, "-s", 0.5, "-o", path, "--report", path)
    assert done.returncode == 2 and not path.exists()


def test_a_model_that_is_sparse_already_is_not_copied_silently(model, tmp_path):
    assert rnnprune("prune", model, "-s", 0.7).returncode == 0
    done = rnnprune("prune", tmp_path / "model.pruned.onnx", "-s", 0.5)
    assert done.returncode == 3 and "zero already" in done.stderr


def test_version_and_help():
    assert rnnprune("--version").stdout.startswith("rnnprune 0.")
    for command in ([], ["prune"], ["inspect"], ["methods"]):
        done = rnnprune(*command, "--help")
        assert done.returncode == 0 and "Usage" in done.stdout


def imported(*arguments: object) -> set[str]:
    code = (
        "import sys, rnnprune_cli.cli as c\n"
        f"sys.argv = ['rnnprune', *{list(map(str, arguments))!r}]\n"
        "try: c.main()\n"
        "except SystemExit as e: print(sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    return set(eval(done.stderr.splitlines()[-1]))


def test_help_imports_nothing_heavy():
    assert not {"numpy", "onnx", "onnxruntime", "tensorflow"} & imported("--help")


def test_an_onnx_model_is_pruned_without_tensorflow(model):
    modules = imported("prune", model, "-s", 0.5)
    assert "onnxruntime" in modules
    assert not {"tensorflow", "tf_keras", "keras", "tf2onnx"} & modules


def test_a_defect_is_one_line_and_70(model, tmp_path):
    code = (
        "import sys, rnnprune_cli.cli as c, rnnprune_cli.pipeline as p\n"
        "def bad(*a): raise KeyError('oops')\n"
        "p.prune = bad\n"
        f"sys.argv = ['rnnprune', 'prune', {str(model)!r}, '-s', '0.5']\n"
        "c.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 70
    assert "Traceback" not in done.stderr and "--verbose" in done.stderr


@pytest.mark.parametrize("form", ["table", "json"])
def test_a_reader_that_goes_away_changes_no_exit_code(tmp_path, form):
    report = Path(__file__).parent / "reports_v1" / "prune.json"
    for limit, code in (("bytes<=9", 0), ("bytes<=0.0001", 1)):
        words = ["check", report, "--require", limit, "--format", form]
        with subprocess.Popen([*RNNPRUNE, *map(str, words)], stdout=subprocess.PIPE) as process:
            process.stdout.close()
            assert process.wait(timeout=60) == code
