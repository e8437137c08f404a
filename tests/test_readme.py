"""The README's commands are what CI and users run, so they must not rot."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from conftest import SAMPLES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"```sh\n(.*?)\n```", README, re.DOTALL)


def test_the_first_two_commands_install_and_run():
    assert "rnnprune prune sample_models/" in COMMANDS[0]
    assert "tests/check.sh" in COMMANDS[1]


def test_ci_runs_the_test_command_of_the_readme():
    assert COMMANDS[1] in (ROOT / ".ci" / "run").read_text()


def test_the_main_command_runs(tmp_path):
    """Runs the first command's last part, in a folder like the repository."""
    words = shlex.split(COMMANDS[0].split("&&")[-1])
    (tmp_path / "sample_models").mkdir()
    for path in SAMPLES.glob("language*"):
        (tmp_path / "sample_models" / path.name).symlink_to(path)
    command = [sys.executable, "-m", "rnnprune_cli.cli", *words[1:]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "sample_models" / "language.pruned.onnx").exists()
    # What does not depend on the machine is as the README shows it.
    shown = README.split("## What comes out")[1].split("```")[1]
    printed = [line.rstrip() for line in done.stdout.splitlines()]
    varying = ("latency", "→", "✓", "logits", "gzipped", "bits-per-char")
    for line in shown.splitlines():
        if not any(word in line for word in varying):
            assert line.rstrip() in printed


def test_every_option_of_prune_is_in_the_readme_and_the_reverse():
    done = subprocess.run(
        [sys.executable, "-m", "rnnprune_cli.cli", "prune", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        env={"COLUMNS": "200", "PATH": ""},
    )
    offered = set(re.findall(r"(--[a-z][a-z-]*)", done.stdout)) - {"--help"}
    table = README.split("| option | values | default |")[1].split("\n\n")[0]
    assert set(re.findall(r"(--[a-z][a-z-]*)", table)) | {"--output", "--granularity"} == offered
