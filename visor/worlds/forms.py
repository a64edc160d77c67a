"""Forms: printed fields with a value beside each name; questions ask for a value by its field (DocVQA-like)."""

from __future__ import annotations

import numpy as np

from visor.worlds.canvas import DIGITS, LETTERS, Canvas
from visor.worlds.world import Question, Scene, count_with_rivals, pick, pick_some

FIELDS = (
    "TAX AGE NET FEE DAY BOX BED LOT JOB BUS KEY MAP PIN REF SUM VAT ZIP ART BAR CAR DUE END FAX GAS HUB ICE LAW "
    "MAX MIN NAME DATE CITY CODE SIZE RATE ROOM SEAT GATE UNIT COST PAID TEAM ZONE LANE DOCK BANK CASE DESK EXIT "
    "FILE HALL ITEM LINE MAIL NOTE PAGE RANK SHIP TYPE USER WARD YEAR"
).split()
PHRASINGS = ("what is the value of {}?", "what is written after {}?", "what is the {}?", "read the field {}.")
SHORTEST = ("{}?",)  # of the smallest forms: more questions for the same tokens


def _field(rng: np.random.Generator, word: str, size: float) -> str:
    """A field name: a word or a code of three letters; codes of one or two letters in the smallest forms.

    A lookup by a name of one letter is the easiest to learn, so it comes first.
    """
    if size >= 0.5 and rng.random() < 0.6:
        return word
    return "".join(pick_some(rng, LETTERS, 1 if size < 0.2 else 2 if size < 0.5 else 3))


def _value(rng: np.random.Generator, size: float) -> str:
    longest = 1 if size < 0.2 else 2 if size < 0.5 else 3
    digits = "".join(pick(rng, DIGITS) for _ in range(int(rng.integers(max(1, longest - 1), longest + 1))))
    return digits if size < 0.5 or rng.random() < 0.7 else pick(rng, LETTERS) + digits[:2]


def _fields(rng: np.random.Generator, num: int, size: float) -> list[str]:
    """Different field names."""
    chosen: list[str] = []
    for word in pick_some(rng, FIELDS, len(FIELDS)):
        field = _field(rng, word, size)
        if field not in chosen:
            chosen.append(field)
        if len(chosen) == num:
            break
    return chosen


def draw(rng: np.random.Generator, split: str, size: float) -> Scene:
    """A form of 1 to 7 rows."""
    num_rows = count_with_rivals(rng, 1, 7, size)
    canvas = Canvas(rng, dark_probability=0.1)
    fields = _fields(rng, num_rows, size)
    values = [_value(rng, size) for _ in fields]

    pitch_x, pixels = float(rng.uniform(12.0, 12.8)), int(rng.integers(12, 15))
    pitch_y = float(rng.uniform(14, min(20.0, 128 / num_rows) if num_rows > 1 else 20))
    left = float(rng.uniform(8, 11))
    top = float(rng.uniform(9, max(10.0, 135 - pitch_y * (num_rows - 1))))
    colon, ruled, right_aligned = rng.random(3) < (0.3, 0.4, 0.4)
    column = 11 - max(map(len, values)) if right_aligned else max(map(len, fields)) + 1 + int(colon)
    where = []
    for row, (field, value) in enumerate(zip(fields, values, strict=True)):
        y = top + row * pitch_y
        end = canvas.text(field, left, y, pixels, pitch_x)
        if colon:
            canvas.draw.text((end - pitch_x / 2, y), ":", fill=canvas.ink, anchor="mm")
        start = column + (max(map(len, values)) - len(value) if right_aligned else 0)
        key = [(f"key{k}", character) for k, character in enumerate(field)]
        facts = [[*key, ("place", str(k + 1))] for k in range(len(value))]
        canvas.text(value, left + start * pitch_x, y, pixels, pitch_x, facts)
        where.append(tuple((left + (start + k) * pitch_x, y) for k in range(len(value))))
        if ruled:
            canvas.rule(3, y + pitch_y / 2, 140, y + pitch_y / 2)

    asked = rng.permutation(num_rows)
    questions = [
        Question(pick(rng, SHORTEST if size < 0.2 else PHRASINGS).format(fields[i]), values[i], "forms/value", where[i])
        for i in asked
    ]
    return Scene(canvas.image, tuple(questions), tuple(canvas.labels), num_rows)
