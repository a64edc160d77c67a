"""The stages as they are run: the whole chain on a tiny base, resume after a kill, recipes and their errors."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny_checkpoint import make_image

from visor.embedded.pipeline import run_stages
from visor.embedded.publish import card
from visor.embedded.recipes import RECIPES as EMBEDDED
from visor.embedded.recipes import STAGES, recipe_of, scaled
from visor.training.explore import macro_mean
from visor.training.fit_router import fit, split
from visor.training.labels import Labels
from visor.training.models import load_model
from visor.training.recipe import RECIPES, RouterFit, load
from visor.training.recipe import STAGES as TRAINING_STAGES
from visor.training.run import main
from visor.training.runner import run_stage

QUICK = ["optimisation.steps=2", "optimisation.batch_size=2", "optimisation.log_every=1", "optimisation.warmup=1"]
WORLDS = "data=[{worlds: [forms, scenes], split: train, questions: 2}]"
SLOTS = ["conversion.self_layers=null", "conversion.cross_layers=null"]  # the base has six layers
PLAIN = ("optimisation.fact_supervision_weight=0", "optimisation.attention_supervision_weight=0")  # no words
WITHOUT_TARGETS = [x for change in PLAIN for x in ("--set", change)]
EXPLORE = [WORLDS.replace("train", "validation"), "exploration.num_examples=6", "exploration.batch_size=3"]
CHANGES = {
    "blocks": [*QUICK, WORLDS, *SLOTS],
    "everything": [*QUICK, WORLDS, *PLAIN],
    "search": EXPLORE,
    "universal": [*QUICK, WORLDS, *PLAIN, "pooling={factors: [4], share: 0.5}"],
    "labels": EXPLORE,
    "router": ["router_fit.epochs=3", "router.hidden_size=8"],
}


@pytest.fixture(scope="module")
def visor_run(base_folder, tmp_path_factory):
    """(folder of the run, what the last stage said)."""
    out = tmp_path_factory.mktemp("visor")
    return out, run_stages("router", out, base_folder, changes=CHANGES)


def test_the_chain_ends_with_a_model_that_answers(visor_run):
    out, document = visor_run
    model, processor = load_model(document["model"])
    configurations = model.config.configurations
    assert configurations[0] == [] and configurations[-1] == model.config.self_layers == [1, 4]
    assert model.config.router == {"hidden_size": 8, "inputs": ["last", "text", "visual"]}
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}],
        add_generation_prompt=True,
    )
    inputs = processor(text=[text], images=[make_image(0)], return_tensors="pt")
    answers = model.generate(**inputs, max_new_tokens=2, policy="router", do_sample=False)
    assert answers.shape[1] <= inputs["input_ids"].shape[1] + 2
    assert 0 <= document["label_accuracy"] <= 1 and len(document["fixed"]) == len(configurations)


def test_each_stage_trains_what_it_says(visor_run, base_folder):
    out, _ = visor_run
    weights = {
        stage: load_model(out / stage / "model")[0].state_dict() for stage in ("blocks", "everything", "universal")
    }
    base = load_model(base_folder)[0].state_dict()
    for name, value in base.items():
        own = "base." + name
        assert torch.equal(weights["blocks"][own], value), f"stage 1 left {name} alone"
        if "vision_tower" in name:
            assert torch.equal(weights["everything"][own], value), "stage 2 of the tiny recipes left the tower alone"
    bases = {stage: load_model(out / stage / "model")[0].config.trained_from for stage in weights}
    assert bases == {"blocks": None, "everything": base_folder.name, "universal": base_folder.name}
    blocks = [name for name in weights["blocks"] if "cross_blocks" in name and name.endswith("o_proj.weight")]
    assert len(blocks) == 2 and all(weights["blocks"][name].abs().max() > 0 for name in blocks)
    for earlier, later in (("blocks", "everything"), ("everything", "universal")):
        moved = [n for n in weights[later] if not torch.equal(weights[earlier][n], weights[later][n])]
        assert any("layers.0.mlp" in n for n in moved) and any("cross_blocks" in n for n in moved)
        assert any("vision_tower" in n for n in moved) == (later == "universal")


def test_search_and_labels_say_what_they_found(visor_run):
    out, _ = visor_run
    search = json.loads((out / "search" / "search.json").read_text())
    assert [c["layers"] for c in search["candidates"] if c["viable"]] == search["configurations"]
    costs = [c["cost"] for c in search["candidates"]]
    assert costs == sorted(costs) and 0 < costs[0] < costs[-1] < 1 and search["num_visual"] == 36
    assert {"forms/value"} < set(search["candidates"][0]["by_kind"])
    labels = Labels.load(out / "labels")
    assert labels.scores_NC.shape == (len(labels.kinds), len(search["configurations"]))
    assert labels.vectors_NR.shape == (len(labels.kinds), 3 * 48) and len(labels.images_N.unique()) <= 6
    document = json.loads((out / "labels" / "labels.json").read_text())
    assert sum(document["label_share"]) == pytest.approx(1) and document["num_questions"] == len(labels.kinds)
    log = [json.loads(line) for line in (out / "universal" / "log.jsonl").read_text().splitlines()]
    assert all(row["accuracy"] and row["eta_seconds"] >= 0 and row["passes"] for row in log)


def test_what_is_done_is_not_repeated(visor_run, base_folder):
    out, document = visor_run
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert run_stages("router", out, base_folder, changes=CHANGES) == document
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    with pytest.raises(ValueError, match="begun with another recipe .different: seed"):
        run_stages("router", out, base_folder, changes={**CHANGES, "blocks": [*CHANGES["blocks"], "seed=5"]})


def test_what_a_stage_does_not_read_may_change(visor_run, base_folder):
    out, document = visor_run
    path = out / "universal" / "recipe.json"
    recipe = json.loads(path.read_text())
    recipe["router_fit"] |= {"epochs": 99, "no_longer_an_option": 1}
    del recipe["configuration_weights"]  # came later, and with its default means what the run did
    path.write_text(json.dumps(recipe))
    plain = {**CHANGES, "universal": [*CHANGES["universal"], "configuration_weights=[]"]}
    assert run_stages("router", out, base_folder, changes=plain) == document
    with pytest.raises(ValueError, match="begun with another recipe .different: configuration_weights"):
        run_stages("router", out, base_folder, changes=CHANGES)
    path.unlink()  # as it was
    assert run_stages("router", out, base_folder, changes=CHANGES) == document


def test_published_models_have_a_card_and_load(visor_run, tmp_path, base_folder):
    from visor.embedded.publish import main as publish

    out, document = visor_run
    results = tmp_path / "results.json"
    cell = {"task": "forms", "method": "visor", "setting_id": "visor:router", "score": 0.5, "num_samples": 10,
            "flops_relative_to_dense": 0.33}  # fmt: skip
    results.write_text(json.dumps({"cells": [cell]}))
    assert publish(["--run", str(out), "--out", str(tmp_path / "shipped")]) == 0
    assert "Not measured yet" in card(tmp_path / "shipped", None)
    assert publish(["--out", str(tmp_path / "shipped"), "--results", str(results)]) == 0
    text = (tmp_path / "shipped" / "README.md").read_text()
    assert (
        "trained: true" in text
        and "## Data" in text
        and "| universal | cross, decoder, projector, tower | 2 | 4 |" in text
    )
    assert "| visor:router | 50.0% | 33.0% |" in text and "router, on" in text
    model, _ = load_model(tmp_path / "shipped")
    assert model.config.configurations == load_model(document["model"])[0].config.configurations
    assert publish(["--run", str(tmp_path), "--out", str(tmp_path / "none")]) == 2


def test_m3_is_the_base_trained_over_scales(base_folder, tmp_path):
    changes = {"m3": [*QUICK, WORLDS, *PLAIN, "pooling={sides: [6, 3, 1]}"]}
    document = run_stages("m3", tmp_path, base_folder, changes=changes)
    model, _ = load_model(document["model"])
    assert model.config.model_type == "llava" and model.config.m3_sides == [6, 3, 1]
    last = json.loads((tmp_path / "m3" / "log.jsonl").read_text().splitlines()[-1])
    assert set(last["passes"]) == {"side 6", "side 3", "side 1"}


def test_a_killed_training_ends_with_the_weights_of_an_unbroken_one(base_folder, llava_data, tmp_path):
    data = f"data=[{{llava: {llava_data[0]}, images: {llava_data[1]}}}]"
    changes = [*QUICK, *SLOTS, data, "optimisation.steps=40", "optimisation.save_every=0.001"]
    recipe = recipe_of("blocks", changes)
    whole = run_stage(recipe, base_folder, tmp_path / "whole")
    command = [
        sys.executable,
        "-m",
        "visor.training.run",
        "--recipe",
        str(EMBEDDED / "blocks.yaml"),
        "--model",
        str(base_folder),
    ]
    command += [
        "--out",
        str(tmp_path / "killed"),
        "--threads",
        "1",
        *(x for change in changes for x in ("--set", change)),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    log, deadline = tmp_path / "killed" / "log.jsonl", time.monotonic() + 200
    while not (log.exists() and len(log.read_text().splitlines()) >= 5):
        assert process.poll() is None and time.monotonic() < deadline, "it ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed" / "model").exists()
    resumed = run_stage(recipe, base_folder, tmp_path / "killed")
    first, second = (load_model(document["model"])[0].state_dict() for document in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert resumed["steps"] == 40


def test_a_router_learns_what_can_be_learned(tmp_path):
    """The first input says whether the cheap configuration suffices."""
    from visor.model.router import Router

    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(1000, 12, generator=generator)
    easy = (vectors[:, 0] > 0).float()
    labels = Labels(vectors, torch.stack([easy, torch.ones(1000)], 1), torch.arange(1000), ["all"] * 1000, [0.1, 0.4])
    options = RouterFit(epochs=20, batch_size=32, rate=1e-2)
    torch.manual_seed(0)
    router = Router(4, ("last", "text", "visual"), 16, 2)
    document = fit(router, labels, options, tmp_path / "whole")
    assert (
        document["label_accuracy"] > 0.75
        and document["router"]["score"] > document["random at its cost"]["score"] + 0.05
    )
    assert document["fixed"][0]["score"] < document["router"]["score"] and document["router"]["cost"] < 0.4
    aware = document["cost_aware"]
    assert aware["0.25"]["cost"] > aware["4"]["cost"] and aware["0.25"]["score"] >= aware["4"]["score"]
    assert sum(map(sum, document["confusion"])) == document["num_questions"] == 150
    again = fit(Router(4, ("last", "text", "visual"), 16, 2), labels, options, tmp_path / "whole")
    assert again == document, "a finished fit is taken from its state"


def test_a_split_never_parts_an_image():
    images = torch.arange(50).repeat_interleave(4)
    train, test = split(images, 0.2, seed=1)
    assert not set(images[train].tolist()) & set(images[test].tolist()) and len(train) + len(test) == 200
    assert len(test) == 40


def test_tasks_count_the_same_whatever_they_ask():
    assert macro_mean({"a/one": [1.0], "a/two": [0.0, 0.0, 0.0], "b": [1.0]}) == pytest.approx((0.25 + 1.0) / 2)


def test_labels_take_the_cheapest_that_suffices():
    scores = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.5, 0.985, 0.99], [1.0, 1.0, 0.0]])
    labels = Labels(torch.zeros(5, 1), scores, torch.arange(5), ["all"] * 5, [0.1, 0.2, 0.3])
    assert labels.labels_N(0.99).tolist() == [1, 0, 0, 1, 0]
    assert labels.labels_N(1.0).tolist() == [1, 0, 0, 2, 0]


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_load(path):
    changes = [] if path.stem == "router" else ["data=[{worlds: [forms]}]"]
    assert load(path, changes).stage == path.stem
    assert sorted(each.stem for each in RECIPES.glob("*.yaml")) == sorted(TRAINING_STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_of_the_small_models_has_its_recipe(stage):
    assert recipe_of(stage).stage == stage
    assert {each.stem for each in EMBEDDED.glob("*.yaml")} == set(STAGES)


def test_m3_gets_as_many_steps_as_visor():
    steps = {name: recipe_of(name).optimisation.steps for name in ("blocks", "everything", "universal", "m3")}
    assert steps.pop("m3") == sum(steps.values())


def test_a_trial_takes_a_share():
    universal = recipe_of("universal")
    assert scaled(universal, 0.01).optimisation.steps == universal.optimisation.steps // 100
    assert scaled(recipe_of("labels"), 0.01).exploration.num_examples == 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["optimisation.step=3"], "unknown option optimisation.step; nearest first: optimisation.steps"),
        (["steps=3"], "unknown option steps; nearest first: optimisation.steps"),
        (["optimisation.steps=-3"], "steps must be a positive integer, got -3"),
        (["stage=unversal"], "unknown stage 'unversal'; nearest first: universal"),
        (["train=[]"], "needs train"),
        (["steps"], "--set takes key=value"),
        (["data=[]"], "needs data"),
        (["conversion.blocks=zero"], "copy, fan_in or config"),
        (["pooling.sides=[8, 8]"], "different sides"),
        (["pooling.factors=[3]"], r"different ones of \[2, 4\], got \[3\]"),
        (["pooling.factors=[]"], "pooling.share needs pooling.factors"),
        (["optimisation.peak_rate=fast"], "peak_rate: input should be a valid number.*got 'fast'"),
    ],
)
def test_recipe_errors_say_what_to_do(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe_of("universal", changes)


def test_numbers_that_yaml_takes_for_text_are_numbers():
    assert recipe_of("universal", ["optimisation.peak_rate=1e-3"]).optimisation.peak_rate == 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "univrsal", "--model", "x"], "those that ship: universal"),
        (
            ["--recipe", "universal", "--model", "dense-tiny", "--set", WORLDS],
            "needs a VISOR model; run the stage 'blocks'",
        ),
        (["--recipe", str(EMBEDDED / "blocks.yaml"), "--model", "no-such-model"], "unknown model 'no-such-model'"),
    ],
)
def test_command_errors(arguments, message, capsys, tmp_path):
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert re.search(message, capsys.readouterr().err)
