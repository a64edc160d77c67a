"""Pages full of characters and handwritten digits, to teach the tower to read. Not a task: nothing is asked.

A page holds five times as many characters as a form or a chart, so the tower sees five times as many in the same time.
"""

from __future__ import annotations

import numpy as np

from visor.worlds.canvas import DIGITS, FONT_FILES, LETTERS, Canvas
from visor.worlds.digits import paste_scan, scans_of_split
from visor.worlds.world import IMAGE_SIZE, Scene, pick

CHARACTERS = LETTERS + DIGITS
HANDWRITTEN = 0.3  # share of the lines


def draw(rng: np.random.Generator, split: str, size: float) -> Scene:
    """Lines of characters from top to bottom, each line with its own font, height and pitch; `size` has no effect."""
    canvas = Canvas(rng, dark_probability=0.15)
    y = 2.0
    while True:
        handwritten = rng.random() < HANDWRITTEN
        height = float(rng.uniform(17, 23)) if handwritten else float(rng.uniform(14, 17))
        if y + height > IMAGE_SIZE:
            break
        canvas.font_file = pick(rng, FONT_FILES)
        pixels = int(height) if handwritten else int(rng.integers(12, 16))
        pitch = height + rng.uniform(0, 3) if handwritten else rng.uniform(12, 15)
        x = rng.uniform(7, 14) if not handwritten else height / 2 + rng.uniform(1, 6)
        while x < IMAGE_SIZE - pitch / 2:
            if handwritten:
                paste_scan(canvas, int(pick(rng, scans_of_split(split))), x, y + height / 2, pixels)
            else:
                canvas.glyph(pick(rng, CHARACTERS), x, y + height / 2, pixels)
            x += pitch
        y += height + rng.uniform(0, 3)
    return Scene(canvas.image, (), tuple(canvas.labels), len(canvas.labels))
