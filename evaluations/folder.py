"""`folder:DIR`: your own questions as a task, without lmms-eval.

    DIR/questions.jsonl or DIR/questions.parquet

One row a question: "image" (a path in DIR; in a parquet file also the bytes of one, as `datasets` writes them),
"question", "answers" (a text or a list of them), and if wanted "metric" (one of `evaluations.metrics.METRICS`),
"choices" (a list; the answer is then a letter or the text of a choice) and "id". Questions about one image are one
cluster for the intervals.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from budgets.registry import check_name
from evaluations.extraction import LETTERS, chosen_letter, short_answer, with_choices
from evaluations.metrics import METRICS, score
from evaluations.task import Kind, Sample, Scored, Task
from visor.vision.image import open_image

FILES = ("questions.jsonl", "questions.parquet")
COLUMNS = ("image", "question", "answers", "metric", "choices", "id")
DEFAULT_METRIC = "exact_match"
MULTIPLE_CHOICE = "multiple_choice"
"""Metric of a question with choices: 1 if the answer names the right one (`evaluations.extraction.chosen_letter`)."""


@dataclass(frozen=True)
class Question:
    """A row as a sample (`evaluations.task.Sample`); its image is read when it is asked for.

    Args:
        source: path of the image, or its bytes.
        choices: texts under letters; empty for a free answer. `references` are then letters.
    """

    task: str
    question: str
    references: tuple[str, ...]
    image_id: str
    sample_id: str
    source: Path | bytes
    metric: str
    choices: tuple[str, ...] = ()
    difficulty: int = 1
    messages: None = None

    @property
    def image(self) -> Image.Image:
        """Decoded anew each time, so that a large folder does not fill the memory."""
        return open_image(self.source)


def task_of(folder: str) -> type[FolderTask]:
    """The task of `folder:FOLDER`.

    Raises:
        ValueError: there is no such folder, or no questions in it.
    """
    path = Path(folder).expanduser()
    if not any((path / name).is_file() for name in FILES):
        raise ValueError(f"{path} holds neither {FILES[0]} nor {FILES[1]}; docs/own-data.md says what is in them")
    return type("FolderTask", (FolderTask,), {"name": f"folder:{folder}", "title": path.resolve().name, "path": path})


class FolderTask(Task):
    """Questions of a folder; `task_of` makes a class for each."""

    name: ClassVar[str] = "folder:"
    title: ClassVar[str] = "Own data"
    kind: ClassVar[Kind] = "coarse"
    max_new_tokens: ClassVar[int] = 32
    path: ClassVar[Path]

    def __init__(self) -> None:
        metrics = list(dict.fromkeys(sample.metric for sample in self._questions))
        self.metric, self.num_samples = " or ".join(metrics), len(self._questions)

    def stream(self, split: str = "test") -> Iterator[Sample]:
        return iter(self._questions)

    def score(self, sample: Question, answer: str) -> Scored:
        if sample.choices:
            return Scored(float(chosen_letter(answer, sample.choices) in sample.references))
        return Scored(score(sample.metric, short_answer(answer), sample.references))

    @cached_property
    def _questions(self) -> list[Question]:
        file = next(self.path / name for name in FILES if (self.path / name).is_file())
        questions = [self._question(row, f"{file}, row {number}") for number, row in enumerate(_rows(file), start=1)]
        if not questions:
            raise ValueError(f"{file} holds no question")
        return questions

    def _question(self, row: Any, where: str) -> Question:
        if not isinstance(row, Mapping):
            raise ValueError(f"{where}: a row is an object with {', '.join(COLUMNS[:3])}, got {row!r}")
        row = {name: value for name, value in row.items() if value is not None}
        missing, unknown = [n for n in COLUMNS[:3] if n not in row], sorted(set(row) - set(COLUMNS))
        if missing or unknown:
            raise ValueError(f"{where}: lacks {missing}, has unknown {unknown}; a row has {', '.join(COLUMNS)}")
        if not isinstance(row["question"], str) or not row["question"].strip():
            raise ValueError(f"{where}: the question is empty")
        answers = [row["answers"]] if isinstance(row["answers"], str | int | float) else list(row["answers"])
        answers, choices = [str(each) for each in answers], [str(each) for each in row.get("choices", ())]
        if not answers:
            raise ValueError(f"{where}: a question needs at least one answer that counts as right")
        metric, question = str(row.get("metric", MULTIPLE_CHOICE if choices else DEFAULT_METRIC)), row["question"]
        try:
            if choices:
                check_name("metric of a question with choices", metric, [MULTIPLE_CHOICE])
                question, answers = with_choices(question, choices), [_letter(each, choices) for each in answers]
            else:
                check_name("metric", metric, list(METRICS))
            source, image_id = self._image(row["image"])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        content = json.dumps([self.title, row.get("id"), image_id, question, answers, metric])
        sample_id = hashlib.sha256(content.encode()).hexdigest()[:16]
        return Question(self.name, question, tuple(answers), image_id, sample_id, source, metric, tuple(choices))

    def _image(self, value: Any) -> tuple[Path | bytes, str]:
        """Where the image is, and sixteen hex digits for its file."""
        if isinstance(value, Mapping):  # as `datasets` writes an image
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return value, hashlib.sha256(value).hexdigest()[:16]
        path = self.path / str(value)
        if not path.is_file():
            raise ValueError(f"the image {path} does not exist")
        return path, hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _rows(file: Path) -> Iterator[Any]:
    """The rows of a file of either form.

    Raises:
        ValueError: it cannot be read; the message names the line.
    """
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        try:
            yield from pq.read_table(file).to_pylist()
        except (OSError, ValueError) as error:  # pyarrow's own errors are either
            raise ValueError(f"{file} cannot be read as parquet: {error}") from error
        return
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number}: not valid JSON ({error})") from None


def _letter(answer: str, choices: list[str]) -> str:
    """The letter of a right answer, which may be given as its letter or its text."""
    same = [letter for letter, choice in zip(LETTERS, choices, strict=False) if choice.strip() == answer.strip()]
    if same:
        return same[0]
    letter = answer.strip().upper()
    if len(letter) == 1 and letter in LETTERS[: len(choices)]:
        return letter
    raise ValueError(f"the answer {answer!r} is neither a choice nor the letter of one; the choices: {choices}")
