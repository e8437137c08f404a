"""The action and the snippets of the README, run as CI runs them, in a repository with a model.

Only the installation is left out: ``rnnprune`` and ``python`` are those that run the tests.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import yaml
from conftest import Graph

ROOT = Path(__file__).parent.parent
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
INSTALL, RUN = ACTION["runs"]["steps"]
SECTION = (ROOT / "README.md").read_text().split("\n## CI\n")[1].split("\n## ")[0]
BLOCKS = {
    found[1]: found[0]
    for found in re.findall(r"```(?:toml|yaml|make)\n(# (\S+)\n.*?)```", SECTION, re.DOTALL)
    if found[1] != ".github/workflows/model.yml"
}
WITH_ACTION, PLAIN = (
    yaml.safe_load(text)
    for text in re.findall(r"```yaml\n(# \.github\S+\n.*?)```", SECTION, re.DOTALL)
)
GITLAB = yaml.safe_load(BLOCKS[".gitlab-ci.yml"])
ACTIONS_BASH = ["bash", "--noprofile", "--norc", "-eo", "pipefail"]


def classifier(path, hidden=64, used=32):
    """Writes an LSTM of which half of the units change nothing, and data on which it is right."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((1, 4 * hidden, 6))
    r = 0.3 * rng.standard_normal((1, 4 * hidden, hidden))
    out = rng.standard_normal((hidden, 4))
    idle = rng.permutation(hidden)[used:]
    r[:, :, idle], out[idle] = 0, 0
    g = Graph(["batch", "time", 6])
    y = g.op(
        "LSTM", g.op("Transpose", "x", perm=[1, 0, 2]), w.astype(np.float32),
        r.astype(np.float32), hidden_size=hidden, outs=2,
    )  # fmt: skip
    g.nodes[-1].output[0] = ""
    last = g.op("Squeeze", y.replace("_0", "_1"), np.array([0]))
    g.output(g.op("MatMul", last, out.astype(np.float32)))
    model = g.model().SerializeToString()
    (path / "model.onnx").write_bytes(model)
    x = rng.standard_normal((128, 12, 6)).astype(np.float32)
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    np.savez(path / "test.npz", x=x, labels=session.run(None, {"x": x})[0].argmax(-1))


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    """What an installation has in its bin."""
    folder = tmp_path_factory.mktemp("bin")
    for name, command in (("rnnprune", "-m rnnprune_cli.cli"), ("python", "")):
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {command} "$@"\n')
        (folder / name).chmod(0o755)
    return folder


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory, tools):
    """A repository after its first build, whose report is the baseline."""
    folder = tmp_path_factory.mktemp("repository")
    git(folder, "init", "-q")
    classifier(folder)
    for name, text in BLOCKS.items():
        (folder / name).write_text(text)
    (folder / ".gitignore").write_text("small.onnx\nreport.*\n")
    done = shell("make baseline", folder, tools)
    assert done.returncode == 0, done.stdout + done.stderr
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "model, recipe, baseline")
    return folder


@pytest.fixture
def repository(built, tmp_path):
    return Path(shutil.copytree(built, tmp_path / "repository"))


def shell(script, folder, tools, command=("bash", "-e"), **environment):
    """Runs a script as a CI runner does: from a file, with nothing but what it is given."""
    path = folder.parent / "script.sh"
    path.write_text(script)
    keep = {k: v for k, v in os.environ.items() if k in ("HOME", "LANG", "TMPDIR")}
    return subprocess.run(
        [*command, path],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env={**keep, "PATH": f"{tools}:{os.environ['PATH']}", **environment},
    )


class Build:
    """What a run of the action leaves behind."""

    def __init__(self, done, folder):
        self.code, self.log = done.returncode, done.stdout + done.stderr
        self.summary = (folder / "summary").read_text()
        self.outputs = {}
        lines = iter((folder / "output").read_text().splitlines())
        for line in lines:
            name, multiline, end = line.partition("<<")
            if multiline:
                values = []
                while (value := next(lines)) != end:
                    values.append(value)
                self.outputs[name] = "\n".join(values)
            else:
                name, _, self.outputs[line.partition("=")[0]] = line.partition("=")


def act(repository, tools, **inputs):
    """Runs the action's main step, as GitHub does."""
    known = {name: given.get("default", "") for name, given in ACTION["inputs"].items()}
    assert inputs.keys() <= known.keys()
    values = {f"inputs.{k}": v for k, v in {**known, **inputs}.items()}
    values["steps.install.outputs.bin"] = str(tools)
    environment = {
        name: values[re.fullmatch(r"\$\{\{ (\S+) \}\}", text)[1]]
        for name, text in RUN["env"].items()
    }
    runner = repository.parent / "runner"
    shutil.rmtree(runner, ignore_errors=True)
    runner.mkdir()
    for name in ("summary", "output"):
        (runner / name).touch()
    done = shell(
        RUN["run"], repository, tools, ACTIONS_BASH,
        RUNNER_TEMP=str(runner), GITHUB_OUTPUT=str(runner / "output"),
        GITHUB_STEP_SUMMARY=str(runner / "summary"), **environment,
    )  # fmt: skip
    return Build(done, runner)


def scaled(repository, factor):
    """Makes the saved report one of a model that takes longer."""
    path = repository / "report.json"
    report = json.loads(path.read_text())
    latency = report["after"]["latency_ms"]
    latency["samples"] = [factor * sample for sample in latency["samples"]]
    path.write_text(json.dumps(report))


USUAL = {"recipe": "small.toml", "report": "report.json"}


# The scenario


def test_a_change_that_does_nothing_is_skipped_and_passes(repository, tools):
    (repository / "README").write_text("words")
    before = (repository / "small.onnx").stat().st_mtime_ns
    build = act(repository, tools, **USUAL, baseline="baseline.json", strict="true")
    assert build.code == 0, build.log
    assert "rnnprune: unchanged: small.onnx" in build.log
    assert (repository / "small.onnx").stat().st_mtime_ns == before
    expected = {"report": "report.json", "output": "small.onnx", "passed": "true"}
    assert {**build.outputs, "output": Path(build.outputs["output"]).name} == expected
    assert "metric-drop&lt;=0.02" in build.summary or "metric-drop<=0.02" in build.summary
    assert "latency ÷ baseline" in build.summary and "small.onnx" in build.summary


def test_a_change_that_hurts_accuracy_fails_and_says_what_to_do(repository, tools):
    recipe = repository / "small.toml"
    recipe.write_text(recipe.read_text().replace("sparsity = 0.4", "sparsity = 0.8"))
    git(repository, "commit", "-qam", "smaller")
    build = act(repository, tools, **USUAL, baseline="baseline.json")
    assert build.code == 1, build.log
    assert build.outputs["passed"] == "false"
    assert "unchanged" not in build.log
    assert "::error title=rnnprune::" in build.log
    # What failed, by how much, what to do; from the requirement and from the baseline.
    report = json.loads((repository / "report.json").read_text())
    (failed,) = [c for c in report["checks"] if not c["passed"]]
    assert failed["expression"] == "metric-drop<=0.02" and failed["actual"] > 0.1
    row = next(
        line for line in build.summary.splitlines() if "❌" in line and "metric-drop" in line
    )
    assert f"{failed['actual']:.4g}" in row and "0.02" in row
    assert "lower --sparsity" in build.summary and "--finetune" in build.summary
    assert "drop from baseline" in build.summary
    assert build.summary.index("❌") < build.summary.index("parameters")
    # Undoing it makes the build pass again, with the same bytes as before.
    git(repository, "revert", "--no-edit", "HEAD")
    build = act(repository, tools, **USUAL)
    assert build.code == 0, build.log
    baseline = json.loads((repository / "baseline.json").read_text())
    again = json.loads((repository / "report.json").read_text())
    assert again["output"]["sha256"] == baseline["output"]["sha256"]
    assert again["key"] == baseline["key"] != report["key"]


def test_a_latency_that_became_worse_fails_against_the_baseline(repository, tools):
    scaled(repository, 1.1)
    build = act(repository, tools, **USUAL, baseline="baseline.json")
    assert build.code == 1 and build.outputs["passed"] == "false", build.log
    row = next(line for line in build.summary.splitlines() if "❌" in line and "latency" in line)
    assert "1.1" in row and "1.03" in row
    assert "it became slower" in build.summary


# The action


def test_no_input_is_pasted_into_a_script():
    for step in ACTION["runs"]["steps"]:
        assert step["shell"] == "bash"
        assert "${{" not in step["run"]
    used = {v for s in ACTION["runs"]["steps"] for v in [*s["env"].values()]}
    used.add(RUN["working-directory"])
    read = {name for text in used for name in re.findall(r"inputs\.([\w-]+)", text)}
    assert read == ACTION["inputs"].keys()
    assert {v["value"] for v in ACTION["outputs"].values()} == {
        f"${{{{ steps.rnnprune.outputs.{name} }}}}" for name in ACTION["outputs"]
    }


EVIL = "x$(touch pwned)`touch pwned`'; touch pwned; \"\n touch pwned #.toml"


def test_inputs_do_not_run_as_code(repository, tools):
    for name in ("recipe", "model", "require", "baseline", "report", "strict"):
        build = act(repository, tools, **{**USUAL, name: EVIL})
        assert not list(repository.rglob("pwned")), name
        assert (build.code == 0) == (name == "strict"), build.log
    build = act(repository, tools, **USUAL, args="--data 'a b.npz' $(touch${IFS}pwned) `x` * ; x")
    assert not list(repository.rglob("pwned"))
    assert build.code == 2, build.log


def test_names_are_no_options(repository, tools):
    build = act(repository, tools, **{**USUAL, "recipe": "--help"})
    assert build.code == 2 and "neither a recipe" in build.log


def test_a_model_without_a_recipe(repository, tools):
    build = act(
        repository, tools, model="model.onnx", report="own.json",
        args="--sparsity 0.5\n--data test.npz -o 'my model.onnx'", require="bytes<=2\n\nsize<=1B\n",
    )  # fmt: skip
    assert build.code == 1, build.log
    assert build.outputs["output"] == "my model.onnx"
    report = json.loads((repository / "own.json").read_text())
    assert [c["passed"] for c in report["checks"]] == [True, False]
    assert "size" in build.summary


def test_what_cannot_be_done_is_in_the_summary(repository, tools):
    for inputs, code, said in (
        ({"recipe": "none.toml"}, 3, "none.toml does not exist"),
        ({"baseline": "none.json"}, 3, "none.json does not exist"),
        ({"args": "--no-such-option"}, 2, "No such option"),
        ({"require": "bites<=1"}, 2, "no figure 'bites'"),
    ):
        build = act(repository, tools, **{**USUAL, **inputs})
        assert build.code == code, build.log
        assert build.outputs["passed"] == "false"
        assert said in build.summary and "rnnprune failed" in build.summary
        assert said in build.log


def test_a_family_names_all_its_outputs(repository, tools):
    build = act(
        repository, tools, model="model.onnx", args="--family 0.6,0.8", report="family.json"
    )
    assert build.code == 0, build.log
    outputs = build.outputs["output"].splitlines()
    assert outputs == ["model.pruned-0.6.onnx", "model.pruned-0.8.onnx"]


def test_the_action_installs_itself_beside_everything_else():
    """The step's text; it is run for real when the action is used."""
    assert INSTALL["env"] == {
        "ACTION_PATH": "${{ github.action_path }}",
        "TENSORFLOW": "${{ inputs.tensorflow }}",
        "VERSION": "${{ inputs.version }}",
    }
    script = INSTALL["run"]
    assert 'python3 -m venv "$RUNNER_TEMP/rnnprune"' in script
    assert re.search(r'-m pip install .*"\$package"\n', script)
    assert 'package="$ACTION_PATH$extra"' in script
    assert 'package="rnnprune$extra==$VERSION"' in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


# The snippets of the README


def test_the_workflow_with_the_action_gives_it_what_it_knows(repository, tools):
    *_, cache, own = WITH_ACTION["jobs"]["prune"]["steps"]
    assert own["uses"].startswith("OWNER/rnnprune@")
    assert set(cache["with"]["path"].split()) == {own["with"]["report"], "small.onnx"}
    build = act(repository, tools, **own["with"])
    assert build.code == 0, build.log


def plain_steps(repository, tools, leave_out=()):
    """Runs the steps of the plain workflow; returns name → exit code of those that ran."""
    codes = {}
    for step in PLAIN["jobs"]["prune"]["steps"]:
        if "run" not in step or step["name"] in leave_out:
            continue
        assert "${{" not in step["run"]
        if step["name"] == "Install":
            assert step["run"] == "pip install rnnprune"
            continue
        if any(codes.values()) and step.get("if") != "always()":
            continue
        done = shell(
            step["run"], repository, tools, GITHUB_STEP_SUMMARY=str(repository / "summary")
        )
        codes[step["name"]] = done.returncode
    return codes


def test_the_plain_workflow_fails_with_a_summary(repository, tools):
    (repository / "small.toml").write_text(
        (repository / "small.toml").read_text().replace("sparsity = 0.4", "sparsity = 0.8")
    )
    assert plain_steps(repository, tools) == {"Prune": 1, "Summary": 0}
    assert "lower --sparsity" in (repository / "summary").read_text()


def test_the_plain_workflow_compares(repository, tools):
    """With the report of the first build: another would be timed anew."""
    assert plain_steps(repository, tools, ["Prune"]) == {"Compare": 0, "Summary": 0}
    assert "latency ÷ baseline" in (repository / "summary").read_text()
    scaled(repository, 1.2)
    assert plain_steps(repository, tools, ["Prune"]) == {"Compare": 1, "Summary": 0}
    assert "it became slower" in (repository / "summary").read_text()


def gitlab(repository, tools):
    job = GITLAB["prune"]
    assert job["before_script"] == ["pip install rnnprune"]
    return shell("\n".join(job["script"]), repository, tools, ("bash", "-eo", "pipefail"))


def test_gitlab_passes_and_fails(repository, tools):
    done = gitlab(repository, tools)
    assert done.returncode == 0, done.stdout + done.stderr
    for path in GITLAB["prune"]["artifacts"]["paths"]:
        assert (repository / path).exists()
    scaled(repository, 1.2)
    assert gitlab(repository, tools).returncode == 1


def test_make_passes_and_fails(repository, tools):
    done = shell("make check", repository, tools)
    assert done.returncode == 0, done.stdout + done.stderr
    scaled(repository, 1.2)
    done = shell("make check", repository, tools)
    assert done.returncode == 2 and "it became slower" in done.stdout


def test_the_table_of_requirements_is_complete():
    from rnnprune_cli.checks import FIGURES, parse_requirements

    table = SECTION.split("| `--require` | what it limits |")[1].split("\n\n")[0]
    shown = re.findall(
        r"`([^`]+)`", " ".join(line.split("|")[1] for line in table.splitlines()[2:])
    )
    assert {re.split("[<>]", text)[0] for text in shown} == FIGURES.keys()
    parse_requirements([text for text in shown if re.search("[<>]", text)])
