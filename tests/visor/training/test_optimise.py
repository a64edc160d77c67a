"""The loop: exact resume, any number of processes, accumulation, the average, and rows that cannot be used."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tiny_checkpoint import make_llava, make_processor

from visor.training.data import LlavaSource, Stream
from visor.training.encoding import Encoder
from visor.training.forward import PackedModel
from visor.training.objectives import NestedPooling, VisorObjective
from visor.training.optimisation import Optimisation
from visor.training.optimise import Training
from visor.training.packed_stage import PackedStage
from visor.training.parts import freeze_all_but
from visor.training.processes import Processes

QUICK = {
    "steps": 4,
    "batch_size": 4,
    "micro_batch": 4,
    "peak_rate": 1e-2,
    "warmup": 1,
    "precision": "fp32",
    "log_every": 2,
}


def training(
    data,
    folder,
    file="good.json",
    train=("decoder", "projector"),
    processor=None,
    sgd=False,
    tensorboard=False,
    **changes,
):
    """A training of a fresh tiny base on LLaVA rows, at M3's scales.

    Args:
        sgd: weights then show gradients as they are. AdamW's first steps show their signs, and some gradients (of key
            biases) are zero but for rounding.
    """
    packed = PackedModel(make_llava())
    encoder = Encoder(processor or make_processor(), packed.adapter.image_token_ids)
    stream = Stream([LlavaSource(data[1] / file, data[1])], [1.0], seed=0)
    options = Optimisation(**{**QUICK, **changes})
    processes = Processes(options.precision)
    stage = PackedStage(packed, train, NestedPooling((6, 3)), stream, encoder, options, processes)
    one = Training(stage, options, folder, processes, tensorboard)
    if sgd:
        one.optimizer = torch.optim.SGD(one.parameters.values(), lr=options.peak_rate)
    return one


def weights(one):
    return {name: value.detach().clone() for name, value in one.stage.packed.model.state_dict().items()}


def same(first, second, tolerance=0.0):
    return all((first[name] - second[name]).abs().max() <= tolerance for name in first)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_interrupted_run_ends_with_the_same_weights(llava_data, tmp_path, precision):
    options = {"precision": precision, "ema": 0.5}
    whole = training(llava_data, tmp_path / "whole", **options)
    start = weights(whole)
    whole.run()
    first = training(llava_data, tmp_path / "broken", **options)
    first.run(stop_after=3)
    with (tmp_path / "broken" / "log.jsonl").open("a") as log:
        log.write('{"step": 4}\n')  # written, but not saved before the kill
    second = training(llava_data, tmp_path / "broken", **options)
    assert second.step == 3
    second.run()
    assert not same(start, weights(whole))
    assert same(weights(whole), weights(second)) and all(
        torch.equal(whole.average[name], second.average[name]) for name in whole.average
    )
    rows = [json.loads(line) for line in (tmp_path / "broken" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 3, 4] and set(rows[-1]["accuracy"]) == {"even", "odd"}
    assert set(rows[-1]["passes"]) == {"side 6", "side 3"} and rows[-1]["scenes_per_second"] > 0


def test_accumulation_and_reading_ahead_change_nothing(llava_data, tmp_path):
    whole = training(llava_data, tmp_path / "whole", steps=2, sgd=True)
    start = weights(whole)
    whole.run()
    assert not same(start, weights(whole), 1e-3)
    parts = training(llava_data, tmp_path / "parts", steps=2, micro_batch=1, workers=1, sgd=True)
    parts.run()
    assert same(weights(whole), weights(parts), 1e-6)


SCRIPT = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from test_optimise import same, training, weights
data, out = (None, Path(sys.argv[2])), Path(sys.argv[3])
"""
DOUBLED = """
one = training(data, out, steps=2, file="mixed.json", sgd=True)
assert one.processes.size == 2 and one.processes.device.type == "cpu"
one.run()
if one.processes.is_main:
    torch.save(weights(one), out / "weights.pt")
"""
RESUMED = """
whole = training(data, out / "whole", steps=2)
whole.run()
training(data, out / "broken", steps=2).run(stop_after=1)
resumed = training(data, out / "broken", steps=2)
assert resumed.processes.size == 2 and resumed.step == 1
resumed.run()
assert same(weights(whole), weights(resumed))
"""


def run_in_two_processes(script, data, out, folder):
    """Run Python source after `SCRIPT` under torchrun."""
    path = folder / "script.py"
    path.write_text(SCRIPT + script)
    here = os.path.dirname(__file__)
    paths = [here, os.path.dirname(here), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(path)]
    done = subprocess.run(
        [*command, here, str(data[1]), str(out)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_resume(llava_data, tmp_path):
    run_in_two_processes(RESUMED, llava_data, tmp_path, tmp_path)


def test_two_processes_take_the_step_of_one_with_the_doubled_batch(llava_data, tmp_path):
    """Of unusable rows too: the processes have different numbers of answers, and each answer token counts the same."""
    one = training(llava_data, tmp_path / "one", steps=2, file="mixed.json", sgd=True)
    one.run()
    run_in_two_processes(DOUBLED, llava_data, tmp_path / "two", tmp_path)
    both = torch.load(tmp_path / "two" / "weights.pt", weights_only=True)
    assert same(weights(one), both, 1e-6)
    rows = [json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[-1]) for name in ("one", "two")]
    for key in ("loss", "accuracy", "passes", "skipped"):
        assert rows[0][key] == pytest.approx(rows[1][key], abs=2e-4)


def test_the_average_follows_the_weights(llava_data, tmp_path):
    one = training(llava_data, tmp_path, steps=1, ema=0.9)
    start = {name: parameter.detach().clone() for name, parameter in one.parameters.items()}
    one.run()
    for name, value in one.average.items():
        torch.testing.assert_close(value, 0.9 * start[name] + 0.1 * one.parameters[name])
    one.adopt_average()
    assert all(torch.equal(one.parameters[name], value) for name, value in one.average.items())


def test_only_the_named_parts_move(llava_data, tmp_path):
    one = training(llava_data, tmp_path, steps=1, train=("projector",))
    before = weights(one)
    one.run()
    moved = {name for name, value in weights(one).items() if not torch.equal(value, before[name])}
    assert moved and all("multi_modal_projector" in name for name in moved)
    with pytest.raises(ValueError, match=r"parts of tower, projector, decoder; got \['cross'\]"):
        freeze_all_but(one.stage.packed, ["cross"])


def test_the_tower_learns_through_several_passes(llava_data, tmp_path):
    """Gradients of all passes reach it, in one backward."""
    one = training(llava_data, tmp_path, steps=1, train=("tower",))
    before = weights(one)
    one.run()
    moved = [name for name, value in weights(one).items() if not torch.equal(value, before[name])]
    assert len(moved) > 10 and all("vision_tower" in name for name in moved)


def test_bad_rows_are_skipped_counted_and_listed(llava_data, tmp_path):
    one = training(llava_data, tmp_path, file="mixed.json", steps=9, log_every=9)  # one pass over 34 rows, and two more
    one.run()
    listed = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert sorted(row["row"] for row in listed) == [f"mixed.json[{i}]" for i in range(24, 34)]
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["skipped"] == 10


def test_image_tokens_that_do_not_match_the_features_are_listed(llava_data, tmp_path):
    processor = make_processor()
    processor.patch_size = 8  # nine image tokens, but the tower sees 36 patches
    one = training(llava_data, tmp_path, processor=processor, steps=5, log_every=5)
    before = weights(one)
    with pytest.raises(ValueError, match="20 x 9 image tokens in the prompt, but 36 visual features"):
        one.run()
    assert same(before, weights(one)), "nothing was trained on"


def test_a_checkpoint_of_other_parts_is_refused(llava_data, tmp_path):
    training(llava_data, tmp_path, steps=1).run()
    with pytest.raises(ValueError, match="trained other parts"):
        training(llava_data, tmp_path, steps=1, train=("projector",))


def test_tensorboard_log(llava_data, tmp_path):
    pytest.importorskip("tensorboard")
    one = training(llava_data, tmp_path, steps=1, tensorboard=True)
    one.run()
    one.log.writer.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"scenes_per_second" in content and b"accuracy/odd" in content and b"passes/side 3" in content


def test_tensorboard_is_optional(llava_data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        training(llava_data, tmp_path / "none", steps=1, tensorboard=True)


def test_draws_depend_on_the_step_alone():
    objective = VisorObjective(((), (1,), (1, 3)), factors=(4, 2), pooled_share=0.5, seed=4)
    draws = [objective.draw(step) for step in range(60)]
    assert draws == [objective.draw(step) for step in range(60)]
    assert {subset for subset, _ in draws} == {(), (1,), (1, 3)} and {factor for _, factor in draws} == {None, 4, 2}
    scales = NestedPooling((6, 3, 2), at_once=2)
    assert all(len(set(scales.draw(step))) == 2 for step in range(10)) and scales.num_passes(0) == 2
    with pytest.raises(ValueError, match="at_once must be 1 to 3"):
        NestedPooling((6, 3, 2), at_once=4)


@pytest.mark.parametrize(("weights", "shares"), [((1, 3), (1 / 7, 3 / 7, 3 / 7)), ((1, 2, 1, 9), (0.25, 0.5, 0.25))])
def test_configurations_are_drawn_by_weight_and_the_last_weight_holds_on(weights, shares):
    configurations = ((), (1,), (1, 3))
    objective = VisorObjective(configurations, weights, seed=4)
    drawn = [objective.draw(step)[0] for step in range(2000)]
    assert [drawn.count(one) / 2000 for one in configurations] == pytest.approx(shares, abs=0.04)


def test_factors_of_pooling_are_drawn_by_weight():
    objective = VisorObjective(((),), factors=(2, 4), pooled_share=0.5, factor_weights=(3, 1), seed=4)
    drawn = [objective.draw(step)[1] for step in range(2000)]
    assert [drawn.count(one) / 2000 for one in (None, 2, 4)] == pytest.approx((0.5, 0.375, 0.125), abs=0.04)
    with pytest.raises(ValueError, match="pooling.weights must not be negative, nor all zero.*for 2 factors"):
        VisorObjective(((),), factors=(2, 4), factor_weights=(0, 0))


@pytest.mark.parametrize("weights", [(0, 0, 0, 1), (1, -1)])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError, match="configuration_weights must not be negative, nor all zero.*3 configurations"):
        VisorObjective(((), (1,), (1, 3)), weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"steps": 0}, "steps"), ({"precision": "fp8"}, "one of bf16, fp32"), ({"ema": 2}, "ema"), ({"clip": 0}, "clip")],
)
def test_optimisation_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        Optimisation(**{**QUICK, **change})
