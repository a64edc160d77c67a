"""Bar charts with named, coloured bars and printed values (ChartQA-like)."""

from __future__ import annotations

from functools import partial

import numpy as np
from PIL import ImageDraw

from visor.worlds.canvas import COLORS, LETTERS, Canvas, jitter_color
from visor.worlds.coverage import mask_of
from visor.worlds.world import Question, Scene, count_with_rivals, pick, pick_some

VALUE = ("what is the value of {}?", "how much is {}?")
NAME = ("what is the value of the {} bar?", "how much is the {} bar?")
COLOR = ("what color is the bar of {}?", "what color is {}?")
HIGHEST, LOWEST = (
    ("which bar is the highest?", "which is the largest?"),
    ("which bar is the lowest?", "which is the smallest?"),
)


def draw(rng: np.random.Generator, split: str, size: float) -> Scene:
    """A chart of 2 to 5 bars, each with a letter below, a two-digit value above, and a colour."""
    num_bars = count_with_rivals(rng, 2, 5, size)
    canvas = Canvas(rng)
    names, colors = pick_some(rng, LETTERS, num_bars), pick_some(rng, list(COLORS), num_bars)
    values = pick_some(rng, range(10, 100), num_bars)
    pitch = rng.uniform(26, min(36, 134 / num_bars))
    left = rng.uniform(pitch / 2 + 1, 143 - pitch * (num_bars - 0.5))
    base, full = rng.uniform(116, 124), rng.uniform(75, 92)
    width, pixels = pitch * rng.uniform(0.5, 0.8), int(rng.integers(12, 15))
    if rng.random() < 0.5:
        for tick in range(1, 5):
            canvas.rule(2, base - full * tick / 4, 142, base - full * tick / 4)
    canvas.draw.line((2, base, 142, base), fill=canvas.ink)
    known_of, named_at, value_at = [], [], []
    extremes = {int(np.argmax(values)): "largest", int(np.argmin(values)): "smallest"}
    for i, (name, color, value) in enumerate(zip(names, colors, values, strict=True)):
        read = [("value0", str(value)[0]), ("value1", str(value)[1])]
        known = [*read, ("color", color)] + ([("extreme", extremes[i])] if i in extremes else [])
        x, top = left + i * pitch, base - full * value / 100
        box = (x - width / 2, top, x + width / 2, base)
        canvas.draw.rectangle(box, fill=jitter_color(rng, color))
        canvas.label((color, "bar"), x, (top + base) / 2, read)
        canvas.label_cover((color, "bar"), mask_of(partial(ImageDraw.ImageDraw.rectangle, xy=box, fill=1)), read)
        canvas.glyph(name, x, base + 10, pixels, known)
        known_of += [(name, tuple(known)), (color, tuple(read))]
        canvas.text(str(value), x - 6.2, top - 9, pixels, 12.4)
        named_at.append((x, base + 10))
        value_at.append(((x - 6.2, top - 9), (x + 6.2, top - 9)))

    questions = []
    for i in rng.permutation(num_bars)[:3]:
        questions.append(Question(pick(rng, VALUE).format(names[i]), str(values[i]), "charts/value", value_at[i]))
    for i in rng.permutation(num_bars)[:2]:
        question = pick(rng, NAME).format(colors[i])
        questions.append(Question(question, str(values[i]), "charts/value_of_color", value_at[i]))
    for i in rng.permutation(num_bars)[:3]:
        questions.append(Question(pick(rng, COLOR).format(names[i]), colors[i], "charts/color"))
    extreme, phrasings = (np.argmax, HIGHEST) if rng.random() < 0.5 else (np.argmin, LOWEST)
    i = int(extreme(values))
    questions.append(Question(pick(rng, phrasings), names[i], "charts/extreme", (named_at[i],)))
    return Scene(canvas.image, tuple(questions), tuple(canvas.labels), num_bars, tuple(known_of))
