"""The sample explorer's data: pictures, questions, every method's answer, and which tokens it kept.

Which samples are shown is a rule, not a choice: the first ones of each task by sample id, as the harness stored their
images. A picture is carried once, reduced by nearest neighbour and to a few colours until it fits its share of the
file; the tokens that a method dropped lie over it as a veil: a PNG of one pixel a token, a hundred bytes each.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from evaluations.records import NUM_EXPLORER_SAMPLES, unpack_bits
from reports.comparisons import Analysis
from reports.data import Run, Setting, configuration_name
from reports.style import signed_minus
from visor.vision.image import open_image

MAX_SIDE = 336  # pixels of a carried picture
ANSWER_LENGTH = 240  # longer answers are cut in the report; samples.parquet has them whole


@dataclass(frozen=True)
class Answer:
    """One setting's answer to one sample. `veil` is a data URI, or None where no mask was recorded."""

    setting: Setting
    text: str
    score: float
    veil: str | None
    tokens: str

    @property
    def sign(self) -> str:
        """A tick, a cross, or a half-filled circle for what is partly right."""
        return "\u2713" if self.score >= 1 else "\u2717" if self.score <= 0 else "\u25d0"

    @property
    def verdict(self) -> str:
        """What the sign says, and the class that the page gives it."""
        return "right" if self.score >= 1 else "wrong" if self.score <= 0 else "partly"

    @property
    def words(self) -> str:
        """The verdict for people, with the score of what is partly right."""
        return self.verdict if self.verdict != "partly" else signed_minus(f"partly, {self.score:.2f}")


@dataclass(frozen=True)
class Card:
    """One sample with the dense answer and, by comparison group, the others'."""

    task: str
    task_title: str
    sample_id: str
    question: str
    references: list[str]
    difficulty: int
    picture: str | None
    width: int
    height: int
    dense: Answer | None
    answers: dict[str, list[Answer]]


def cards(analysis: Analysis, per_task: int = NUM_EXPLORER_SAMPLES, picture_bytes: int = 20_000) -> list[Card]:
    """The explorer's samples, task by task.

    Args:
        per_task: how many a task, at most.
        picture_bytes: size limit of one carried picture.
    """
    run, result = analysis.run, []
    settings = {s.id: s for s in run.settings}
    group_of = {s.id: g.key for g in analysis.groups for s in g.settings}
    pictures: dict[str, tuple[str, int, int] | None] = {}
    for task in run.tasks:
        rows = run.samples[run.samples.task == task.name]
        chosen = sorted(rows.sample_id.unique())[:per_task]
        by_sample = dict(iter(rows[rows.sample_id.isin(chosen)].groupby("sample_id")))
        for sample_id in chosen:
            records = by_sample[sample_id].to_dict("records")
            first = records[0]
            if first["image_id"] not in pictures:
                pictures[first["image_id"]] = picture(run, first["image_id"], picture_bytes)
            answers: dict[str, list[Answer]] = {g.key: [] for g in analysis.groups}
            dense = None
            for record in sorted(records, key=lambda r: list(settings).index(r["setting_id"])):
                setting = settings[record["setting_id"]]
                answer = _answer(setting, record)
                if setting.is_dense:
                    dense = answer
                elif not setting.is_swept:
                    answers[group_of[setting.id]].append(answer)
            shown = pictures[first["image_id"]]
            result.append(
                Card(
                    task.name,
                    task.title,
                    sample_id,
                    first["question"],
                    list(first["references"]),
                    int(first["difficulty"]),
                    shown and shown[0],
                    shown[1] if shown else 0,
                    shown[2] if shown else 0,
                    dense,
                    answers,
                )
            )
    return result


def _answer(setting: Setting, record: dict) -> Answer:
    text = record["answer"] if record["answer"] is not None else f"failed: {record['error']}"
    text = text if len(text) <= ANSWER_LENGTH else text[:ANSWER_LENGTH] + "\u2026"
    full, live = record["num_visual"], record["visual_tokens"]
    mask = veil(record["kept"], record["grid"], int(full)) if record["kept"] and record["grid"] else None
    tokens = ""
    if live and full == full:  # NaN where a failed sample has no count
        alive = next((count for count in reversed(live) if count), 0)
        last = sum(unpack_bits(record["kept"], int(full))) if record["kept"] else alive
        looking = sum(count > 0 for count in live)
        fewer = f"{last} of {full:.0f} tokens kept" if mask else f"{last} instead of {full:.0f} tokens"
        tokens = f"all {full:.0f} tokens" if last >= full else fewer
        if looking < len(live):  # VISOR drops none; most layers do not look
            tokens += f", in {looking} of {len(live)} layers"
    if setting.is_policy and record["configuration"] is not None and setting.configurations:
        tokens += f", {configuration_name(setting.configurations[int(record['configuration'])])}"
    return Answer(setting, text, float(record["score"]), mask, tokens)


def _data_uri(image: Image.Image, **options) -> tuple[str, int]:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True, **options)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(), len(buffer.getvalue())


def picture(run: Run, image_id: str, max_bytes: int) -> tuple[str, int, int] | None:
    """Data URI, width and height of a stored image, small enough; None if it is not stored or cannot be read."""
    path = run.folder.image_path(image_id)
    try:
        image = open_image(path)
    except ValueError:
        return None
    scale = min(1.0, MAX_SIDE / max(image.size))
    while True:
        size = tuple(max(1, round(side * scale)) for side in image.size)
        small = image if size == image.size else image.resize(size, Image.Resampling.NEAREST)
        uri, num_bytes = _data_uri(small.quantize(48, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE))
        if num_bytes <= max_bytes or max(size) <= 48:
            return uri, *size
        scale *= 0.8


def veil(kept: str, grid: list[int], num_visual: int) -> str | None:
    """Data URI of a mask: one pixel a visual token, dark where it was dropped. None if the grid does not fit."""
    rows, columns = grid
    if rows * columns != num_visual:
        return None
    mask = np.array(unpack_bits(kept, num_visual), dtype=np.uint8).reshape(rows, columns)
    image = Image.fromarray(1 - mask, mode=None).convert("P")
    image.putpalette([255, 255, 255, 12, 16, 22])
    return _data_uri(image, transparency=bytes([0, 200]), bits=1)[0]
