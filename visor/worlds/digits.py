"""Handwritten numbers: scans of the UCI digits, set in lines of three or four; questions read a line.

The 1,797 scans (scikit-learn's copy, CC BY 4.0) are split by scan: no test digit was ever trained on.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image

from visor.worlds.canvas import Canvas, Facts
from visor.worlds.world import Question, Scene, count_between, pick, pick_some

READ = ("read line {}.", "what is the number in line {}?", "which number is in line {}?")
POSITION = ("what is digit {} of line {}?",)


@lru_cache(maxsize=1)
def _scans() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images / 16.0).astype(np.float32), data.target


@lru_cache(maxsize=8)
def scans_of_split(split: str) -> np.ndarray:
    """Indices of the scans of a split: 70 % train, 10 % validation, 20 % test, shuffled once with a fixed seed."""
    order = np.random.default_rng(0).permutation(len(_scans()[1]))
    first, second = int(0.7 * len(order)), int(0.8 * len(order))
    return {"train": order[:first], "validation": order[first:second], "test": order[second:]}[split]


def paste_scan(canvas: Canvas, scan: int, x: float, y: float, side: int, facts: Facts = ()) -> str:
    """Draw a scan centred on (x, y), `side` pixels wide, in the canvas's ink; returns its digit."""
    images, targets = _scans()
    mask = Image.fromarray((images[scan] * 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    canvas.image.paste(Image.new("RGB", mask.size, canvas.ink), (round(x - side / 2), round(y - side / 2)), mask)
    digit = str(targets[scan])
    canvas.label((digit,), x, y, facts)
    return digit


def draw(rng: np.random.Generator, split: str, size: float) -> Scene:
    """1 to 4 lines of 3 or 4 handwritten digits."""
    num_lines = count_between(rng, 1, 4, size)
    num_digits = int(rng.integers(3, 5)) if size > 0.3 else int(rng.integers(1, 4))
    canvas = Canvas(rng, dark_probability=0.3)
    side = int(rng.integers(17, 23))
    pitch_x, pitch_y = side + rng.uniform(0, 3), side + rng.uniform(2, min(14.0, 138 / num_lines - side))
    left = rng.uniform(side / 2 + 2, 142 - side / 2 - pitch_x * (num_digits - 1))
    top = rng.uniform(side / 2 + 2, 142 - side / 2 - pitch_y * (num_lines - 1))
    numbers, where = [], []
    for line in range(num_lines):
        number = ""
        for k in range(num_digits):
            scan = int(pick(rng, scans_of_split(split)))
            x, y = left + k * pitch_x, top + line * pitch_y
            number += paste_scan(canvas, scan, x, y, side, (("row", str(line + 1)), ("column", str(k + 1))))
        numbers.append(number)
        where.append([(left + k * pitch_x, top + line * pitch_y) for k in range(num_digits)])

    asked = pick_some(rng, range(num_lines), 4)
    questions = [Question(pick(rng, READ).format(i + 1), numbers[i], "digits/line", tuple(where[i])) for i in asked]
    for _ in range(2):
        i, k = int(rng.integers(num_lines)), int(rng.integers(num_digits))
        question = pick(rng, POSITION).format(k + 1, i + 1)
        questions.append(Question(question, numbers[i][k], "digits/one", (where[i][k],)))
    return Scene(canvas.image, tuple(questions), tuple(canvas.labels), num_lines * num_digits)
