"""Glyph grids: characters in rows and columns; questions read one by its position, or a whole row (OCR by position)."""

from __future__ import annotations

import numpy as np

from visor.worlds.canvas import DIGITS, LETTERS, Canvas
from visor.worlds.world import Question, Scene, count_between, pick, pick_some

ALPHABET = LETTERS + DIGITS
CELL = ("what is in row {} column {}?", "which character is in row {} column {}?")
ROW = ("read row {}.", "what does row {} say?")


def draw(rng: np.random.Generator, split: str, size: float) -> Scene:
    """A grid of 1 to 4 rows of 2 to 4 characters."""
    num_rows, num_columns = count_between(rng, 1, 4, size), count_between(rng, 2, 4, size)
    canvas = Canvas(rng, dark_probability=0.15)
    pixels = int(rng.integers(12, 16))
    pitch_x, pitch_y = rng.uniform(14, min(24, 128 / num_columns)), rng.uniform(14, min(24, 128 / num_rows))
    left = rng.uniform(9, 135 - pitch_x * (num_columns - 1))
    top = rng.uniform(9, 135 - pitch_y * (num_rows - 1))
    rows = ["".join(pick(rng, ALPHABET) for _ in range(num_columns)) for _ in range(num_rows)]
    boxed = rng.random() < 0.3
    for r, row in enumerate(rows):
        facts = [(("row", str(r + 1)), ("column", str(c + 1))) for c in range(num_columns)]
        canvas.text(row, left, top + r * pitch_y, pixels, pitch_x, facts)
        if boxed:
            y = top + (r + 0.5) * pitch_y
            canvas.rule(left - pitch_x / 2, y, left + (num_columns - 0.5) * pitch_x, y)

    cells = pick_some(rng, [(r, c) for r in range(num_rows) for c in range(num_columns)], 4)
    where = [[(left + c * pitch_x, top + r * pitch_y) for c in range(num_columns)] for r in range(num_rows)]
    questions = [
        Question(pick(rng, CELL).format(r + 1, c + 1), rows[r][c], "glyphs/cell", (where[r][c],)) for r, c in cells
    ]
    questions += [
        Question(pick(rng, ROW).format(r + 1), rows[r], "glyphs/row", tuple(where[r]))
        for r in pick_some(rng, range(num_rows), 3)
    ]
    return Scene(canvas.image, tuple(questions), tuple(canvas.labels), num_rows * num_columns)
