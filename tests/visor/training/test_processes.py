"""Two processes train as one."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys
from pathlib import Path

import torch
from torch.nn.functional import mse_loss

from visor.embedded import stages
from visor.embedded.parallel import Group
from visor.embedded.architecture import TinyArchitecture
from visor.embedded.trainer import Recipe, train

torch.set_num_threads(1)
group = Group()
assert group.size == 2
assert group.gather(group.share(list(range(7)))) == list(range(7))

torch.manual_seed(0)
layer, unused, inputs, targets = torch.nn.Linear(5, 3), torch.nn.Linear(2, 2), torch.randn(8, 5), torch.randn(8, 3)
mse_loss(layer(inputs), targets).backward()
whole = [p.grad.clone() for p in layer.parameters()]
layer.zero_grad()
rows = group.share(list(range(8)))
mse_loss(layer(inputs[rows]), targets[rows]).backward()
group.average_gradients([*layer.parameters(), *unused.parameters()])
for expected, parameter in zip(whole, layer.parameters()):
    torch.testing.assert_close(parameter.grad, expected, atol=1e-6, rtol=1e-5)

small = TinyArchitecture(tower_layers=2, tower_width=32, tower_heads=2, decoder_layers=2, decoder_width=32,
                         decoder_heads=2, decoder_kv_heads=1, decoder_intermediate=48)
stage = stages.TowerStage(stages.TinyModel(small))
train(stage, Recipe(steps=2, batch_size=4, warmup=1), Path(sys.argv[1]))
weights = torch.cat([p.detach().flatten() for p in stage.module.parameters()])
both = [torch.empty_like(weights) for _ in range(2)]
torch.distributed.all_gather(both, weights)
assert torch.equal(*both), "the processes have drifted apart"
"""


def test_two_processes_take_the_step_of_one(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    (row,) = (json.loads(line) for line in (tmp_path / "tower.jsonl").read_text().splitlines())
    assert row["step"] == 2 and (tmp_path / "tower.pt").exists()


@pytest.mark.parametrize("num", [0, 1, 5])
def test_a_group_of_one_changes_nothing(num):
    from visor.embedded.parallel import Group

    group = Group()
    assert group.gather(group.share(list(range(num)))) == list(range(num))
