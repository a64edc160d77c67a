"""What every world yields: a scene, reproducible from (world, split, index)."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

SPLITS = ("train", "validation", "test")
SLOTS = ("key0", "key1", "key2", "key3", "place", "row", "column", "value0", "value1", "color", "other", "extreme")
IMAGE_SIZE = 144  # native side length of the embedded models, in pixels


@dataclass(frozen=True)
class Question:
    """One question about a scene.

    Args:
        answer: what the image says.
        kind: the skill, for training logs.
        where: (x, y) in pixels of the answer's characters, one each, if they are written in the image.
    """

    text: str
    answer: str
    kind: str
    where: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Label:
    """Ground truth for dense supervision: `words` (vocabulary words) stand at pixel (x, y).

    `facts` are (slot, word) pairs that hold for the thing at this place but are written elsewhere in the image: the
    key of a value, the row and column of a character, the other end of a line. Slots are those of `SLOTS`.
    """

    words: tuple[str, ...]
    x: float
    y: float
    facts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Scene:
    """An image with its questions and labels. `difficulty` counts what competes for attention (rows, objects, ...).

    `known` tells what a question that names a thing can know of it: (word, facts) pairs, facts as in `Label`.
    """

    image: Image.Image
    questions: tuple[Question, ...]
    labels: tuple[Label, ...]
    difficulty: int
    known: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = ()


Draw = Callable[[np.random.Generator, str, float], Scene]
"""A world: draw(rng, split, size) with size in [0, 1] scaling the number of things from the fewest to the most."""


def generator(world: str, split: str, index: int, seed: int = 0) -> np.random.Generator:
    """The random stream of one scene; streams of different worlds, splits, seeds and indices are independent."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")
    return np.random.default_rng([zlib.crc32(world.encode()), SPLITS.index(split), seed, index])


def count_between(rng: np.random.Generator, low: int, high: int, size: float) -> int:
    """A number of things: uniform between `low` and the largest that `size` allows, at most `high`."""
    return int(rng.integers(low, round(low + (high - low) * size) + 1))


def count_with_rivals(rng: np.random.Generator, low: int, high: int, size: float) -> int:
    """As `count_between`, but from the upper half in the smallest scenes.

    Between two candidates a guess is right half the time, and looking one up by its key is not learned for the rest.
    """
    return count_between(rng, low, high, size) if size >= 0.5 else int(rng.integers((low + high + 1) // 2, high + 1))


def pick(rng: np.random.Generator, items):
    """One item, uniformly."""
    return items[int(rng.integers(len(items)))]


def pick_some(rng: np.random.Generator, items, num: int) -> list:
    """`num` different items in random order."""
    return [items[int(i)] for i in rng.permutation(len(items))[:num]]
