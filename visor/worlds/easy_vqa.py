"""easy-VQA (PyPI `easy-vqa`, MIT): one coloured shape an image, its own questions, its own train and test images.

The last 200 of its 4,000 training images are this project's validation split.
"""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache

import numpy as np
from PIL import Image

from visor.worlds.canvas import COLORS
from visor.worlds.coverage import covered_cells
from visor.worlds.world import IMAGE_SIZE, Label, Question, Scene, pick_some

SHAPES = ("circle", "rectangle", "triangle")
VALIDATION_FROM = 3800


@lru_cache(maxsize=2)
def _package(test: bool) -> tuple[dict, dict]:
    import easy_vqa

    texts, answers, ids = easy_vqa.get_test_questions() if test else easy_vqa.get_train_questions()
    questions = defaultdict(list)
    for text, answer, image_id in zip(texts, answers, ids, strict=True):
        questions[image_id].append((text, answer))
    return (easy_vqa.get_test_image_paths() if test else easy_vqa.get_train_image_paths()), questions


@lru_cache(maxsize=4)
def images_of_split(split: str) -> tuple[int, ...]:
    """Image ids of a split, in the package's numbering, that have at least one question."""
    paths, questions = _package(split == "test")
    ids = sorted(i for i in paths if questions[i])
    if split == "test":
        return tuple(ids)
    return tuple(i for i in ids if (i >= VALIDATION_FROM) == (split == "validation"))


def _kind(answer: str) -> str:
    return "easy_vqa/" + ("yes_no" if answer in ("yes", "no") else "color" if answer in COLORS else "shape")


def load(split: str, image_id: int) -> tuple[Image.Image, tuple[Question, ...]]:
    """One image at the models' native size with all its questions."""
    paths, questions = _package(split == "test")
    with Image.open(paths[image_id]) as file:
        image = file.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return image, tuple(Question(text, answer, _kind(answer)) for text, answer in questions[image_id])


def words_shown(questions: tuple[Question, ...]) -> tuple[str, ...]:
    """The colour and the shape of an image, as far as its questions and answers tell."""
    shown: set[str] = set()
    for question in questions:
        words = question.text.rstrip("?").split()
        # "is there a red shape?" yes, and "is there not a red shape?" no, both say that red is there.
        negated = "not" in words or "no" in words
        if question.answer not in ("yes", "no") or (question.answer == "yes") != negated:
            shown.update(word for word in (*words, question.answer) if word in COLORS or word in SHAPES)
    return tuple(sorted(shown))


def _labels(image: Image.Image, questions: tuple[Question, ...]) -> tuple[Label, ...]:
    """What stands where: at the centre of what is not background, and in every cell that it covers."""
    pixels = np.asarray(image).astype(int)
    foreground = np.abs(pixels - pixels[0, 0]).sum(-1) > 60
    if not foreground.any():
        return ()
    ys, xs = np.nonzero(foreground)
    words = words_shown(questions)
    cells = [Label(words, x, y) for x, y, _ in covered_cells(foreground)]
    return (Label(words, float(xs.mean()), float(ys.mean())), *cells)


def draw(rng: np.random.Generator, split: str, size: float) -> Scene:
    """One image of the split with up to six of its questions."""
    ids = images_of_split(split)
    image, questions = load(split, ids[int(rng.integers(len(ids)))])
    return Scene(image, tuple(pick_some(rng, questions, 6)), _labels(image, questions), 1)
