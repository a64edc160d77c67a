"""The worlds: reproducible, disjoint between splits, and true to their labels."""

import numpy as np
import pytest

from visor.embedded.symbolic import PatchWords
from visor.embedded.vocabulary import build_tokenizer
from visor.worlds import digits, easy_vqa
from visor.worlds.coverage import CELL, SHARE
from visor.worlds.world import IMAGE_SIZE, SLOTS, SPLITS, generator
from visor.worlds.worlds import WORLDS, scene


@pytest.mark.parametrize("world", WORLDS)
def test_a_scene_is_a_function_of_its_seed(world):
    first, again, other = scene(world, "test", 5), scene(world, "test", 5), scene(world, "test", 6)
    assert first.image.tobytes() == again.image.tobytes() and first.questions == again.questions
    assert first.image.tobytes() != other.image.tobytes()
    assert first.image.size == (IMAGE_SIZE, IMAGE_SIZE)
    assert all(question.answer and question.text for question in first.questions)


@pytest.mark.parametrize("world", WORLDS)
def test_no_test_image_is_a_training_image(world):
    images = {split: {scene(world, split, index).image.tobytes() for index in range(30)} for split in ("train", "test")}
    assert not images["train"] & images["test"]


def test_streams_of_splits_and_worlds_differ():
    draws = {generator(world, split, 0).integers(2**60) for world in WORLDS for split in SPLITS}
    assert len(draws) == len(WORLDS) * len(SPLITS)


@pytest.mark.parametrize("parts", [digits.scans_of_split, easy_vqa.images_of_split])
def test_source_images_are_split(parts):
    train, validation = (set(map(int, parts(split))) for split in ("train", "validation"))
    assert not train & validation and len(train) > len(validation) > 0
    if parts is digits.scans_of_split:  # easy-VQA's test images come from another folder of the package
        assert not (train | validation) & set(map(int, parts("test")))


@pytest.mark.parametrize("world", WORLDS)
def test_labels_are_vocabulary_words_inside_the_image_one_glyph_a_patch(world):
    tokenizer = build_tokenizer()
    vocabulary, patches = tokenizer.get_vocab(), PatchWords(tokenizer, 12)
    for index in range(40):
        labels = scene(world, "train", index).labels
        assert labels
        for label in labels:
            assert all(word in vocabulary for word in label.words)
            assert 0 <= label.x < IMAGE_SIZE and 0 <= label.y < IMAGE_SIZE
        glyphs = [patches.patch_of(label) for label in labels if label.words and len(label.words[0]) == 1]
        assert len(glyphs) == len(set(glyphs)), f"{world} {index}: two characters share a patch"


@pytest.mark.parametrize("world", ["forms", "glyphs", "charts", "digits", "connections"])
def test_answers_stand_in_the_image(world):
    words = {word for index in range(20) for label in scene(world, "test", index).labels for word in label.words}
    for question in (q for index in range(20) for q in scene(world, "test", index).questions):
        parts = [question.answer] if question.answer in words else list(question.answer)
        assert all(part in words for part in parts)


def test_size_grows_the_scene():
    small, large = ([scene("glyphs", "train", i, size).difficulty for i in range(40)] for size in (0.0, 1.0))
    assert max(small) == 2 and max(large) == 16


def test_easy_vqa_labels_lie_on_the_shape():
    one = scene("easy_vqa", "train", 3)
    pixels = np.asarray(one.image).astype(int)
    center = one.labels[0]
    assert np.abs(pixels[int(center.y), int(center.x)] - pixels[0, 0]).sum() > 60
    for label in one.labels[1:]:
        x, y = int(label.x) - CELL // 2, int(label.y) - CELL // 2
        cell = np.abs(pixels[y : y + CELL, x : x + CELL] - pixels[0, 0]).sum(-1) > 60
        assert label.words == center.words and cell.mean() >= SHARE


@pytest.mark.parametrize("world", ["scenes", "charts", "easy_vqa"])
def test_large_things_are_labelled_in_every_patch_that_they_cover(world):
    patches, most = PatchWords(build_tokenizer(), 12), 0
    for index in range(20):
        shapes = {}
        for label in scene(world, "train", index).labels:
            if len(label.words) > 1:
                shapes.setdefault(label.words, set()).add(patches.patch_of(label))
        most = max([most, *map(len, shapes.values())])
        taken = [patch for covered in shapes.values() for patch in covered]
        assert len(taken) == len(set(taken)), f"{world} {index}: two shapes in one patch"
    assert most >= 8


def test_easy_vqa_labels_do_not_contradict_the_answers():
    for image_id in easy_vqa.images_of_split("train")[:300]:
        shown = easy_vqa.words_shown(easy_vqa.load("train", image_id)[1])
        assert len([word for word in shown if word in easy_vqa.SHAPES]) <= 1, shown
        assert len([word for word in shown if word not in easy_vqa.SHAPES]) <= 1, shown


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown world"):
        scene("form", "test", 0)
    with pytest.raises(ValueError, match="unknown split"):
        scene("forms", "dev", 0)


@pytest.mark.parametrize("world", ["forms", "glyphs", "charts", "digits", "connections", "scenes"])
def test_facts_are_vocabulary_words_in_known_slots(world):
    vocabulary = build_tokenizer().get_vocab()
    facts = [fact for index in range(20) for label in scene(world, "train", index).labels for fact in label.facts]
    assert facts
    assert all(slot in SLOTS and word in vocabulary for slot, word in facts)


def test_a_value_knows_its_key():
    for index in range(20):
        one = scene("forms", "train", index)
        known = {
            "".join(word for slot, word in label.facts if slot.startswith("key")) for label in one.labels if label.facts
        }
        asked = {question.text.rstrip("?.").split()[-1] for question in one.questions if "after" in question.text}
        assert asked <= known


def test_a_page_holds_several_times_the_characters_of_a_form():
    characters = {
        world: np.mean([len(scene(world, "train", index).labels) for index in range(20)])
        for world in ("pages", "forms")
    }
    assert characters["pages"] > 2 * characters["forms"]
