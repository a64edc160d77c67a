"""Drawing: fonts that matplotlib carries, named colours, and text set one character at a time so that each is labelled.

Characters stand at least one patch (12 px) apart, so a patch never holds the centres of two of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from visor.worlds.coverage import covered_cells
from visor.worlds.world import IMAGE_SIZE, Label, pick

# DejaVu and STIX: free licences, shipped inside matplotlib.
FONT_FILES = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
    "STIXGeneralBol.ttf",
)
COLORS = {
    "red": (214, 39, 40),
    "green": (44, 150, 60),
    "blue": (40, 80, 210),
    "yellow": (240, 205, 30),
    "black": (25, 25, 25),
    "gray": (128, 128, 128),
    "brown": (130, 75, 30),
    "teal": (20, 150, 160),
    "purple": (140, 70, 190),
    "orange": (250, 140, 20),
}
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"  # without I and O, which read as 1 and 0
DIGITS = "0123456789"

Facts = Sequence[tuple[str, str]]


@lru_cache(maxsize=64)
def font(file: str, pixels: int) -> ImageFont.FreeTypeFont:
    """A shipped font at a size in pixels."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", file), pixels)


def jitter_color(rng: np.random.Generator, name: str) -> tuple[int, int, int]:
    """A shade of a named colour."""
    return tuple(int(np.clip(channel + rng.integers(-14, 15), 0, 255)) for channel in COLORS[name])


class Canvas:
    """An image under construction together with its labels."""

    def __init__(self, rng: np.random.Generator, dark_probability: float = 0.0) -> None:
        self.rng = rng
        self.dark = bool(rng.random() < dark_probability)
        low, high = (0, 45) if self.dark else (222, 256)
        self.background = tuple(int(v) for v in rng.integers(low, high, 3))
        self.image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), self.background)
        self.draw = ImageDraw.Draw(self.image)
        self.labels: list[Label] = []
        self.font_file = pick(rng, FONT_FILES)
        ink = rng.integers(205, 256, 3) if self.dark else rng.integers(0, 70, 3)
        self.ink = tuple(int(v) for v in ink)

    def label(self, words: tuple[str, ...], x: float, y: float, facts: Facts = ()) -> None:
        """Record that `words` stand at (x, y), and what is true of them (`Label.facts`)."""
        self.labels.append(Label(words, x, y, tuple(facts)))

    def label_cover(self, words: tuple[str, ...], mask: np.ndarray, facts: Facts = ()) -> None:
        """Record `words` in every cell that a [H, W] mask covers, and `facts` in some of them (`covered_cells`)."""
        for x, y, tell in covered_cells(mask):
            self.label(words, x, y, facts if tell else ())

    def glyph(self, character: str, x: float, y: float, pixels: int, facts: Facts = ()) -> None:
        """Draw one character centred on (x, y) and label it."""
        self.draw.text((x, y), character, font=font(self.font_file, pixels), fill=self.ink, anchor="mm")
        self.label((character,), x, y, facts)

    def text(self, string: str, x: float, y: float, pixels: int, pitch: float, facts: Sequence[Facts] = ()) -> float:
        """Draw a string whose first character is centred on (x, y); returns the x where a next one would stand.

        `facts` are those of each character, if any.
        """
        for k, character in enumerate(string):
            self.glyph(character, x, y, pixels, facts[k] if facts else ())
            x += pitch
        return x

    def rule(self, x0: float, y0: float, x1: float, y1: float) -> None:
        """A faint line, as printed forms and charts have."""
        shade = tuple(int(0.75 * b + 0.25 * i) for b, i in zip(self.background, self.ink, strict=True))
        self.draw.line((x0, y0, x1, y1), fill=shade, width=1)
