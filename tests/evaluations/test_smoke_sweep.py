"""A real sweep, from the command line to the report: a few samples, shipped weights, every cell answers."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.compat


def test_a_sweep_of_the_shipped_models_ends_without_a_failure(tmp_path):
    words = [sys.executable, "-W", "error::FutureWarning", "-m", "evaluations.run", "--suite", "smoke", "--limit", "2",
             "--methods", "dense,visor,fastv", "--no-timing", "--out", str(tmp_path / "run")]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["failed"] == last["failed_samples"] == 0 and last["cells"] >= 9
    assert "deprecated" not in done.stderr and "Loading weights" not in done.stderr
