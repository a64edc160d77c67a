"""Two processes train every stage of the base model as one does."""

import os
import subprocess
import sys

import torch

SCRIPT = """
import sys
from pathlib import Path

import torch

from visor.embedded.architecture import TinyArchitecture
from visor.embedded.base_model import run_base_stage
from visor.embedded.recipes import BASE_STAGES, recipe_of
from visor.training.processes import Processes

torch.set_num_threads(1)
small = TinyArchitecture(tower_layers=2, tower_width=32, tower_heads=2, decoder_layers=2, decoder_width=32,
                         decoder_heads=2, decoder_kv_heads=1, decoder_intermediate=48)
changes = ["steps=3", "batch_size=4", "micro_batch=4", "warmup=1", "log_every=1", "precision=fp32"]
for stage in BASE_STAGES:
    run_base_stage(recipe_of(stage, [f"optimisation.{change}" for change in changes]), Path(sys.argv[1]), small)
print("processes", Processes().size)
"""


def test_two_processes_take_the_steps_of_one(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    one = [sys.executable]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, command in (("1", one), ("2", two)):
        done = subprocess.run(
            [*command, str(script), str(tmp_path / name)],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f"processes {name}" in done.stdout
    for stage in ("decoder", "tower", "align", "dense"):
        alone, shared = (torch.load(tmp_path / name / stage / "state.pt", weights_only=True) for name in ("1", "2"))
        assert alone["step"] == shared["step"] == 3 and alone["stage"] == shared["stage"], stage
        for key, expected in alone["parameters"].items():
            # A step of Adam is as long for a tiny gradient as for a large one: rounding moves a weight by part of it.
            torch.testing.assert_close(shared["parameters"][key], expected, atol=2e-4, rtol=1e-3, msg=f"{stage} {key}")
