"""Connections: letters on the left joined to letters on the right by coloured lines. Multi-hop."""

from __future__ import annotations

import numpy as np

from visor.worlds.canvas import COLORS, LETTERS, Canvas, jitter_color
from visor.worlds.world import Question, Scene, count_with_rivals, pick, pick_some

OTHER_END = ("what is {} connected to?", "which letter is joined to {}?")
LINE_COLOR = ("what color is the line of {}?",)
ENDS = ("which letter on the {} has the {} line?",)


def draw(rng: np.random.Generator, split: str, size: float) -> Scene:
    """2 to 5 lines between two columns of letters."""
    num_lines = count_with_rivals(rng, 2, 5, size)
    canvas = Canvas(rng)
    letters, colors = pick_some(rng, LETTERS, 2 * num_lines), pick_some(rng, list(COLORS), num_lines)
    left, right = letters[:num_lines], letters[num_lines:]
    goal = [int(i) for i in rng.permutation(num_lines)]
    pitch = rng.uniform(20, 128 / num_lines)
    top = rng.uniform(10, 134 - pitch * (num_lines - 1))
    x0, x1, pixels = rng.uniform(8, 14), rng.uniform(130, 136), int(rng.integers(12, 16))
    where = {}
    for i, j in enumerate(goal):
        y0, y1 = top + i * pitch, top + j * pitch
        bend = rng.uniform(15, 35)
        points = []
        for t in np.linspace(0, 1, 24):
            x = (
                (1 - t) ** 3 * (x0 + 11)
                + 3 * (1 - t) ** 2 * t * (x0 + 11 + bend)
                + 3 * (1 - t) * t**2 * (x1 - 11 - bend)
            )
            points.append((x + t**3 * (x1 - 11), y0 + (y1 - y0) * (3 * t**2 - 2 * t**3)))
        canvas.draw.line(points, fill=jitter_color(rng, colors[i]), width=4, joint="curve")
        # An end knows the other one only if it comes later, row by row: the decoder is causal.
        near, far = [("value0", left[i])], [("color", colors[i])]
        if y1 >= y0:
            far.append(("other", left[i]))
        if y0 >= y1:
            near.append(("other", right[j]))
        canvas.label((colors[i], "line"), x0 + 14, y0, near)
        canvas.label((colors[i], "line"), x1 - 14, y1)
        where |= {left[i]: ((x0, y0),), right[j]: ((x1, y1),)}
        canvas.glyph(left[i], x0, y0, pixels)
        canvas.glyph(right[j], x1, y1, pixels, far)

    known = tuple(
        entry
        for color, here, there in zip(colors, left, (right[j] for j in goal), strict=True)
        for entry in (
            (here, (("color", color), ("other", there))),
            (there, (("color", color), ("other", here))),
            (color, (("value0", here), ("value1", there))),
        )
    )
    questions = []
    for i in pick_some(rng, range(num_lines), 3):
        here, there = left[i], right[goal[i]]
        if rng.random() < 0.5:
            here, there = there, here
        questions.append(Question(pick(rng, OTHER_END).format(here), there, "connections/other_end", where[there]))
    for i in pick_some(rng, range(num_lines), 3):
        end = pick(rng, (left[i], right[goal[i]]))
        questions.append(Question(pick(rng, LINE_COLOR).format(end), colors[i], "connections/color"))
    for i in pick_some(rng, range(num_lines), 2):
        side = pick(rng, ("left", "right"))
        answer = left[i] if side == "left" else right[goal[i]]
        questions.append(Question(pick(rng, ENDS).format(side, colors[i]), answer, "connections/end", where[answer]))
    return Scene(canvas.image, tuple(questions), tuple(canvas.labels), num_lines, known)
