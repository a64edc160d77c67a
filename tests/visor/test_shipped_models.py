"""The checkpoints that ship: they load as any Hugging Face model does, and are what their cards say."""

import json

import pytest
import torch

from budgets.registry import METHODS
from budgets.schedule import dense
from visor.inference import LoadedModel
from visor.inference.checkpoint import CHECKPOINTS, embedded_names, read_card, weight_files
from visor.worlds.worlds import scene

NAMES = embedded_names()


def test_the_base_model_and_both_trained_ones_ship_and_all_are_small():
    assert NAMES == ["dense-tiny", "m3-tiny", "visor-tiny"]
    assert sum(file.stat().st_size for file in CHECKPOINTS.rglob("*.safetensors")) < 60e6


@pytest.mark.parametrize("name", NAMES)
def test_card_says_what_it_is(name):
    card = read_card(CHECKPOINTS / name)
    assert "trained: true" in card and "## Data" in card and "## Recipe" in card and "## Accuracy" in card
    assert "Not measured" not in card


@pytest.mark.parametrize("name", NAMES)
def test_loads_through_the_auto_classes_and_answers_in_a_pipeline(name):
    from transformers import AutoModelForImageTextToText, pipeline

    folder = CHECKPOINTS / name
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(path.suffix == ".safetensors" for path in weight_files(folder))
    config = json.loads((folder / "config.json").read_text())
    config = config.get("base_config", config)  # of a VISOR model
    assert config["text_config"]["num_hidden_layers"] >= 12 and config["image_seq_length"] >= 144
    ask = pipeline("image-text-to-text", model=str(folder))
    one = scene("scenes", "test", 0)
    content = [{"type": "image", "image": one.image}, {"type": "text", "text": one.questions[0].text}]
    answer = ask(text=[{"role": "user", "content": content}], max_new_tokens=4, return_full_text=False)
    assert answer[0]["generated_text"].strip()


def test_dense_tiny_has_learned_to_look():
    """Not its accuracy (the card has that), but that answers follow the image and not the question alone."""
    loaded = LoadedModel.load("dense-tiny")
    right = wrong_image = total = 0
    for index in range(24):
        one, other = scene("easy_vqa", "test", index), scene("easy_vqa", "test", index + 100)
        for question in one.questions:
            if question.answer in ("yes", "no"):
                continue
            for image, own in ((one.image, True), (other.image, False)):
                prepared = [loaded.prepare(image, question.text)]
                (answer,) = loaded.generate(
                    prepared, loaded.encode(prepared), [dense(loaded.geometry.num_layers, prepared[0].num_visual)], 4
                )
                right += own and answer.text == question.answer
                wrong_image += not own and answer.text == question.answer
            total += 1
    assert right > wrong_image + 0.2 * total, (right, wrong_image, total)


def share_right(name, method, world):
    """Of the questions behind eight images, how many a shipped model answers rightly under a method."""
    loaded, right = LoadedModel.load(name), []
    for index in range(8):
        one = scene(world, "test", index)
        for question in one.questions:
            prepared = [loaded.prepare(one.image, question.text)]
            schedule = method.schedule(loaded.geometry, prepared[0].num_visual)
            (answer,) = loaded.generate(prepared, loaded.encode(prepared), [schedule], 4)
            right.append(answer.text == question.answer)
    return sum(right) / len(right)


def test_m3_tiny_reads_averaged_grids_that_its_base_cannot():
    """36 of 144 tokens, a quarter of the FLOPs: the same grids, on weights with and without training for them."""
    trained = share_right("m3-tiny", METHODS.get("m3")(side=6), "charts")
    assert trained > share_right("dense-tiny", METHODS.get("pooling")(side=6), "charts") + 0.2


def test_visor_tiny_reads_small_text_off_half_the_tokens():
    """VISOR-TR at 2x: one token for two characters, on weights that were trained for it, and those that were not."""
    full, half = (
        share_right("visor-tiny", METHODS.get(name)(self_layers=2), "glyphs") for name in ("visor", "visor_tr2")
    )
    assert half > 0.8 and half > full - 0.15, (full, half)
    assert half > share_right("dense-tiny", METHODS.get("pooling_by")(factor=2), "glyphs") + 0.4


def test_the_dense_model_of_visor_tiny_is_its_base():
    """All layers on all tokens is nothing that its weights were trained for: it answered "column" where 69 is right."""
    loaded = LoadedModel.load("visor-tiny")
    assert loaded.model.config.trained_from == "dense-tiny"
    prepared = [loaded.prepare(scene("forms", "test", 0).image, "read the field ZIP.")]
    num_layers, num_visual = loaded.geometry.num_layers, prepared[0].num_visual
    for schedule in (dense(num_layers, num_visual), METHODS.get("fastv")().schedule(loaded.geometry, num_visual)):
        with pytest.raises(ValueError, match="never ran on visual tokens in training.*its base .dense-tiny."):
            loaded.generate(prepared, loaded.encode(prepared), [schedule], 4)
    with pytest.raises(ValueError, match="Load 'dense-tiny'"):
        ids = torch.tensor([prepared[0].input_ids])
        loaded.model.generate(input_ids=ids, **prepared[0].pixel_inputs, configuration="dense", max_new_tokens=2)
