"""Runs of before the renaming go on: their recipes, their `recipe.json`, and the weights in their `state.pt`."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from tiny_checkpoint import make_llava, make_processor

from visor.embedded.recipes import RECIPES, recipe_of
from visor.training.auxiliary.scene_targets import NamedThing, SceneTargets
from visor.training.data import Stream, WorldSource
from visor.training.encoding import Encoder
from visor.training.forward import PackedModel
from visor.training.objectives import NestedPooling
from visor.training.old_names import HEADS, OPTIONS
from visor.training.optimisation import Optimisation
from visor.training.optimise import Training
from visor.training.packed_stage import PackedStage
from visor.training.processes import Processes
from visor.training.recipe import Recipe, load
from visor.training.run_folder import remember


def with_old_names(values):
    """A recipe's options as an earlier version called them."""
    values = json.loads(json.dumps(values))
    for earlier, name in OPTIONS.items():
        (part, old), (_, new) = earlier.split("."), name.split(".")
        if new in values.get(part, {}):
            values[part][old] = values[part].pop(new)
    return values


@pytest.mark.parametrize("stage", ["everything", "universal", "m3"])
def test_recipes_with_earlier_names_say_the_same(stage, tmp_path):
    values = yaml.safe_load((RECIPES / f"{stage}.yaml").read_text())
    path = tmp_path / "old.yaml"
    path.write_text(yaml.safe_dump(with_old_names(values)))
    assert with_old_names(values) != values and load(path) == recipe_of(stage)
    document = recipe_of(stage).to_dict()
    assert Recipe.from_dict(with_old_names(document)) == Recipe.from_dict(document) == recipe_of(stage)


@pytest.mark.parametrize(
    ("change", "now"),
    [
        ("optimisation.looks_weight=0.1", "optimisation.attention_supervision_weight=0.1"),
        ("optimisation.facts_weight=0", "optimisation.fact_supervision_weight=0"),
        ("pooling={sides: [12], written_share: 0.3}", "pooling={sides: [12], window_words_share: 0.3}"),
    ],
)
def test_changes_may_use_earlier_names(change, now):
    assert recipe_of("m3", [change]) == recipe_of("m3", [now]) != recipe_of("m3")


def test_an_option_under_both_names_is_refused():
    with pytest.raises(ValueError, match="written_share is an earlier name of pooling.window_words_share; give one"):
        recipe_of("m3", ["pooling={sides: [12], written_share: 0.3, window_words_share: 0.2}"])


def test_a_run_of_before_the_renaming_is_continued_with_its_recipe_only(tmp_path):
    recipe = recipe_of("m3")
    (tmp_path / "recipe.json").write_text(json.dumps(with_old_names(recipe.to_dict())))
    remember(recipe, tmp_path, is_main=False)
    with pytest.raises(ValueError, match="begun with another recipe .different: optimisation"):
        remember(recipe_of("m3", ["optimisation.fact_supervision_weight=0.25"]), tmp_path, is_main=False)


def targets(scene, side):
    """Some word in every fourth patch, and a fact about it."""
    patches = range(0, side * side, 4)
    return SceneTargets(
        words=tuple((patch, 5 + patch % 7) for patch in patches),
        facts=tuple((patch, patch % 3, 6 + patch % 5) for patch in patches),
        named={9: NamedThing((), ())},
        answers=((),),
    )


def training(folder):
    """M3 on drawn forms, with the heads of facts and of window words."""
    options = Optimisation(steps=4, batch_size=2, warmup=1, peak_rate=1e-2, precision="fp32", log_every=2)
    processes, processor = Processes("fp32"), make_processor()
    packed = PackedModel(make_llava())
    torch.manual_seed(0)
    packed.add_fact_heads(len(processor.tokenizer))
    packed.add_window_word_head(len(processor.tokenizer))
    encoder = Encoder(processor, packed.adapter.image_token_ids, targets_of=targets)
    stream = Stream([WorldSource("forms", questions=1)], [1.0], seed=0)
    objective = NestedPooling((3,), fact_supervision_weight=1.0)
    stage = PackedStage(packed, ["projector"], objective, stream, encoder, options, processes)
    return Training(stage, options, folder, processes)


def test_heads_under_their_earlier_names_end_with_the_weights_of_an_unbroken_run(tmp_path):
    whole = training(tmp_path / "whole")
    start = {name: parameter.detach().clone() for name, parameter in whole.parameters.items()}
    whole.run()
    training(tmp_path / "old").run(stop_after=2)
    path = tmp_path / "old" / "state.pt"
    state = torch.load(path, weights_only=True)
    del state["stage"]  # came with the one loop
    for earlier, name in HEADS.items():
        state["parameters"] = {
            earlier + key.removeprefix(name) if key.startswith(name) else key: value
            for key, value in state["parameters"].items()
        }
    assert {"facts.norm.weight", "written.norm.weight"} < state["parameters"].keys()
    torch.save(state, path)
    resumed = training(tmp_path / "old")
    assert resumed.step == 2
    resumed.run()
    assert all(torch.equal(whole.parameters[name], value) for name, value in resumed.parameters.items())
    moved = {name.partition(".")[0] for name, value in start.items() if not torch.equal(whole.parameters[name], value)}
    assert {"visual_facts", "window_words"} < moved


def test_auxiliary_losses_need_who_knows_the_scenes(tmp_path):
    from visor.training.runner import run_stage

    recipe = recipe_of("m3")
    with pytest.raises(ValueError, match="need scenes with ground truth.*python -m visor.embedded.train"):
        run_stage(recipe, "dense-tiny", tmp_path)
    without = replace(recipe, optimisation=replace(recipe.optimisation, fact_supervision_weight=0.0))
    assert recipe.needs_targets and not without.needs_targets


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seed=first", "seed: input should be a valid integer.*got 'first'"),
        ("train=decoder", "train: input should be a valid tuple, got 'decoder'"),
        ("tensorboard=often", "tensorboard: input should be a valid boolean"),
        ("pooling.sides=[big]", "pooling.sides.0: input should be a valid integer"),
        ("pooling=12", "pooling must be a mapping, got 12"),
    ],
)
def test_a_value_of_another_type_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        recipe_of("m3", [change])
