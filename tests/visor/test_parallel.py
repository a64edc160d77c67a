"""Two processes train as one."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys, torch
from visor.training import stages
from visor.training.parallel import Group
from visor.training.tiny_model import TinyArchitecture
from visor.training.trainer import Recipe, batch_of, train
from pathlib import Path

small = TinyArchitecture(tower_layers=2, tower_width=32, tower_heads=2, decoder_layers=2, decoder_width=32,
                         decoder_heads=2, decoder_kv_heads=1, decoder_intermediate=48)
torch.set_num_threads(1)
stage = stages.AlignStage(stages.TinyModel(small))
start = {k: v.clone() for k, v in stage.module.state_dict().items()}
train(stage, Recipe(steps=3, batch_size=4, warmup=1), Path(sys.argv[1]))
group = Group()
assert group.gather(group.share(list(range(7)))) == list(range(7))
if group.rank == 0:
    moved = {k: v - start[k] for k, v in stage.module.state_dict().items()}
    torch.save(moved, Path(sys.argv[1], "moved.pt"))
"""


def _run(folder, num_processes: int):
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(SCRIPT)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(num_processes), "--master-port", "0"]
    launch += ["--standalone"]
    command = [sys.executable, *(launch if num_processes > 1 else []), str(script), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "align.jsonl").read_text().splitlines()[-1])["step"], folder / "moved.pt"


def test_two_processes_take_the_step_of_one(tmp_path):
    import torch

    (steps, one), (again, two) = _run(tmp_path / "one", 1), _run(tmp_path / "two", 2)
    assert steps == again == 3
    one, two = (torch.load(path, weights_only=True) for path in (one, two))
    for name in one:
        # Adam turns the rounding of a tiny bfloat16 gradient into a whole step, so single weights may differ.
        assert (one[name] - two[name]).norm() < 0.1 * one[name].norm(), name


@pytest.mark.parametrize("num", [0, 1, 5])
def test_a_group_of_one_changes_nothing(num):
    from visor.training.parallel import Group

    group = Group()
    assert group.gather(group.share(list(range(num)))) == list(range(num))
