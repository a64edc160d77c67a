"""The README's commands run: the quick ones as written, the sweeps as far as their plan; `make test` runs this."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.partition("#")[0].strip() for line in re.findall(r"^    (\S.*)$", README, re.M)]
QUICK = [c for c in COMMANDS if c.startswith("python -m budgets.cost") or c.startswith("python -m evaluations.tasks")]


def test_the_two_commands_are_targets():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert {"demo", "test"} <= targets
    assert {"make demo", "make test"} <= set(COMMANDS)


@pytest.mark.parametrize("command", QUICK)
def test_quick_commands_run(command, tmp_path):
    words = [sys.executable, *shlex.split(command)[1:]]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python -m evaluations.run --suite")])
def test_runs_can_be_planned(command, tmp_path):
    words = [sys.executable, *shlex.split(command)[1:], "--out", str(tmp_path / "run")]
    if "--dry-run" not in words:
        words.append("--dry-run")
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
