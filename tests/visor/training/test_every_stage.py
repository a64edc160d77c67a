"""Every trained stage of VISOR and M3, on the one loop: a resumed run is the unbroken one, two processes are one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from visor.embedded.pipeline import run_stages
from visor.embedded.recipes import recipe_of
from visor.embedded.scene_tokens import SceneTokens
from visor.training.models import load_model
from visor.training.recipe import TRAINED
from visor.training.runner import run_stage

WORLDS = "data=[{worlds: [forms, scenes], split: train, questions: 2}]"
QUICK = ["steps=4", "batch_size=4", "micro_batch=4", "warmup=1", "log_every=1", "precision=fp32", "peak_rate=1.0e-3",
         "fact_supervision_weight=0", "attention_supervision_weight=0"]  # fmt: skip
OWN = {
    "blocks": ["conversion.self_layers=null", "conversion.cross_layers=null"],  # the base has six layers
    "universal": ["pooling={factors: [4], share: 0.5}"],
    "m3": ["pooling={sides: [6, 3, 1]}"],
}
AFTER = {"everything": "blocks", "universal": "blocks"}


def quick(stage):
    return recipe_of(stage, [*(f"optimisation.{change}" for change in QUICK), WORLDS, *OWN.get(stage, ())])


@pytest.fixture(scope="module")
def model_before(base_folder, tmp_path_factory):
    """By stage, the model that it goes on from."""
    out = tmp_path_factory.mktemp("before")
    changes = {"blocks": [*(f"optimisation.{change}" for change in QUICK), WORLDS, *OWN["blocks"]]}
    blocks = run_stages("blocks", out, base_folder, changes=changes)["model"]
    return lambda stage: Path(blocks) if stage in AFTER else base_folder


def weights(folder):
    return load_model(folder)[0].state_dict()


@pytest.mark.parametrize("stage", TRAINED)
def test_a_resumed_run_is_the_unbroken_one(stage, model_before, tmp_path):
    before = model_before(stage)
    run_stage(quick(stage), before, tmp_path / "whole", targets_for=SceneTokens)
    stopped = run_stage(quick(stage), before, tmp_path / "broken", stop_after=2, targets_for=SceneTokens)
    assert stopped["stopped"] == 2 and not (tmp_path / "broken" / "model").exists()
    run_stage(quick(stage), before, tmp_path / "broken", targets_for=SceneTokens)
    whole, resumed = weights(tmp_path / "whole" / "model"), weights(tmp_path / "broken" / "model")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    start = weights(before)
    assert any(name not in start or not torch.equal(value, start[name]) for name, value in whole.items())


SCRIPT = """
import sys
from pathlib import Path
import torch
sys.path[:0] = sys.argv[1:3]
torch.set_num_threads(1)
from test_every_stage import SceneTokens, quick, run_stage
run_stage(quick(sys.argv[3]), sys.argv[4], Path(sys.argv[5]), targets_for=SceneTokens)
from visor.training.processes import Processes
print("processes", Processes().size)
"""


@pytest.mark.parametrize("stage", TRAINED)
def test_two_processes_are_one(stage, model_before, tmp_path):
    before = model_before(stage)
    run_stage(quick(stage), before, tmp_path / "one", targets_for=SceneTokens)
    script, here = tmp_path / "script.py", Path(__file__).parent
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script),
         str(here), str(here.parent), stage, str(before), str(tmp_path / "two")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "processes 2" in done.stdout
    one, two = weights(tmp_path / "one" / "model"), weights(tmp_path / "two" / "model")
    for name, expected in one.items():
        # A key's bias moves no softmax: its gradient is rounding, and a step of Adam is as long for that as for any.
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(two[name], expected, atol=2e-4, rtol=1e-3, msg=f"{stage} {name}")
