"""Scenes of a few large coloured shapes: attributes, presence and counts.

Coarse: what they ask survives a small image.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
from PIL import ImageDraw

from visor.worlds.canvas import COLORS, Canvas, jitter_color
from visor.worlds.coverage import mask_of
from visor.worlds.world import Question, Scene, count_between, pick, pick_some

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOR = ("what color is the {}?", "what is the color of the {}?")
SHAPE = ("what is the {} shape?", "which shape is {}?")
PRESENT = ("is there a {}?", "does the image contain a {}?", "is a {} present?")
COUNT = ("how many shapes are there?", "how many shapes are in the image?")


def _outline(shape: str, x: float, y: float, radius: float, turn: float) -> list[tuple[float, float]]:
    if shape == "star":
        spokes = [(radius if k % 2 == 0 else radius * 0.42, turn + math.pi * k / 5 - math.pi / 2) for k in range(10)]
    elif shape == "triangle":
        spokes = [(radius, turn + 2 * math.pi * k / 3 - math.pi / 2) for k in range(3)]
    elif shape == "square":
        spokes = [(radius, turn + math.pi * k / 2 + math.pi / 4) for k in range(4)]
    else:  # cross
        arm = math.atan2(0.33, 1.0)
        spokes = []
        for k in range(4):
            middle = turn + math.pi * k / 2
            spokes += [(radius, middle - arm), (radius, middle + arm), (radius * 0.45, middle + math.pi / 4)]
    return [(x + r * math.cos(a), y + r * math.sin(a)) for r, a in spokes]


def draw(rng: np.random.Generator, split: str, size: float) -> Scene:
    """A scene of 1 to 4 shapes, one in each of as many quarters of the image."""
    num_shapes = count_between(rng, 1, 4, size)
    canvas = Canvas(rng)
    shapes = [pick(rng, SHAPES) for _ in range(num_shapes)]
    colors = pick_some(rng, list(COLORS), num_shapes)
    placed = []
    for shape, color, quarter in zip(shapes, colors, pick_some(rng, range(4), num_shapes), strict=True):
        radius = rng.uniform(17, 30)
        x = 72 * (quarter % 2) + rng.uniform(radius + 2, max(radius + 2.1, 70 - radius))
        y = 72 * (quarter // 2) + rng.uniform(radius + 2, max(radius + 2.1, 70 - radius))
        fill = jitter_color(rng, color)
        if shape == "circle":
            paint = partial(ImageDraw.ImageDraw.ellipse, xy=(x - radius, y - radius, x + radius, y + radius))
        else:
            paint = partial(ImageDraw.ImageDraw.polygon, xy=_outline(shape, x, y, radius, rng.uniform(-0.3, 0.3)))
        paint(canvas.draw, fill=fill)
        placed.append((y, x, (color, shape), mask_of(partial(paint, fill=1))))
    for number, (y, x, words, mask) in enumerate(sorted(placed, key=lambda one: one[:2]), 1):
        place = [("place", str(number))]
        canvas.label(words, x, y, place)
        canvas.label_cover(words, mask, place)

    questions = [Question(pick(rng, COUNT), str(num_shapes), "scenes/count")]
    unique = [i for i in range(num_shapes) if shapes.count(shapes[i]) == 1]
    known = [(colors[i], (("other", shapes[i]),)) for i in range(num_shapes)]
    known += [(shapes[i], (("color", colors[i]),)) for i in unique]
    if unique:
        i = pick(rng, unique)
        questions.append(Question(pick(rng, COLOR).format(shapes[i]), colors[i], "scenes/color"))
    i = int(rng.integers(num_shapes))
    questions.append(Question(pick(rng, SHAPE).format(colors[i]), shapes[i], "scenes/shape"))
    there = {f"{c} {s}" for c, s in zip(colors, shapes, strict=True)}
    questions.append(Question(pick(rng, PRESENT).format(pick(rng, sorted(there))), "yes", "scenes/present"))
    # The absent one shares its colour or its shape with something that is there: neither word alone gives it away.
    i = int(rng.integers(num_shapes))
    near = [f"{colors[i]} {s}" for s in SHAPES] + [f"{c} {shapes[i]}" for c in COLORS]
    questions.append(
        Question(pick(rng, PRESENT).format(pick(rng, [n for n in near if n not in there])), "no", "scenes/present")
    )
    return Scene(canvas.image, tuple(questions), tuple(canvas.labels), num_shapes, tuple(known))
