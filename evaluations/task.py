"""What a task is: a fixed list of samples of a held-out split, and how their answers are scored.

Most tasks ask a question about an image and name a metric. A benchmark that comes with rules of its own brings a
conversation of its own (`Sample.messages`), stop strings, a score (`Task.score`) and what it makes of all of them
(`Task.aggregate`).
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from PIL import Image

from budgets.registry import TASKS
from evaluations import metrics
from visor.vision.image import as_rgb
from visor.worlds.worlds import scene

if TYPE_CHECKING:
    from evaluations.records import SampleRecord

Kind = Literal["coarse", "fine-grained", "reasoning"]


def image_id_of(image: Image.Image) -> str:
    """Sixteen hex digits that stand for an image's size and pixels, as a model sees them.

    An image that cannot be read has an id too, of its file or its numbers: its samples are to fail one by one, not to
    end the list of samples that they stand in.
    """
    try:
        pixels = as_rgb(image)
        content = f"{pixels.size}".encode() + pixels.tobytes()
    except ValueError as error:
        content = f"{error} {image.mode} {image.size}".encode() + _undecoded(image)
    return hashlib.sha256(content).hexdigest()[:16]


def _undecoded(image: Image.Image) -> bytes:
    """The bytes of an image's open file, or of its numbers where they are in memory; empty if there are neither."""
    file = getattr(image, "fp", None)
    if file is None or file.closed:
        try:
            return image.tobytes() if min(image.size) else b""
        except Exception:  # its file was closed before it was read
            return b""
    place = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(place)  # Pillow goes on where it was
    return content


@dataclass(frozen=True)
class Sample:
    """One question about one image.

    Args:
        task: name of the task it belongs to.
        image: as Pillow opened it; models and the report see it as `visor.vision.image.as_rgb` does.
        question: what the model is asked, word for word.
        references: answers that count as right, at least one.
        image_id: hash of the pixels; questions about one image share it (and its `Image`).
        sample_id: hash of image, question and references.
        difficulty: how many things compete for attention (rows, objects, characters), for breakdowns.
        messages: the conversation, where it is not one turn with the image and the question
            (`visor.inference.chat`). It may hold several images or none; `image` is then the first, or None.
    """

    task: str
    image: Image.Image
    question: str
    references: tuple[str, ...]
    image_id: str
    sample_id: str
    difficulty: int = 1
    messages: tuple[Mapping[str, Any], ...] | None = None

    @classmethod
    def make(
        cls, task: str, image: Image.Image, image_id: str, question: str, references, difficulty: int = 1
    ) -> Sample:
        """A sample with its content hash."""
        content = json.dumps([task, image_id, question, list(references)])
        sample_id = hashlib.sha256(content.encode()).hexdigest()[:16]
        return cls(task, image, question, tuple(references), image_id, sample_id, difficulty)


def prepare_sample(loaded: Any, sample: Sample) -> Any:
    """A sample, ready for a model (`visor.inference.loaded_model.LoadedModel`)."""
    if sample.messages is not None:
        return loaded.prepare_chat(sample.messages)
    return loaded.prepare(sample.image, sample.question)


@dataclass(frozen=True)
class Scored:
    """What a task says of an answer.

    Args:
        score: from 0 to 1.
        values: what the task's aggregate is made of, as JSON; None where that is the mean score.
    """

    score: float
    values: dict[str, Any] | None = None


def open_task(name: str, data_root: Path | None = None) -> Task:
    """The task of this name.

    Args:
        data_root: where data sets lie, for tasks that read any.

    Raises:
        ValueError: no such task, or its data cannot be read.
    """
    return TASKS.get(name).open(data_root)


class Task(ABC):
    """Base of all tasks; a subclass is registered with `@TASKS.register(name)`.

    Class attributes:
        name, title: as registered, and as a reader sees it.
        version: counts up whenever samples or scoring change, so that old records are not mixed with new ones.
        metric: name in `evaluations.metrics.METRICS`; of a task that scores by itself, what it calls its metric.
        kind: what it asks for; suites group by it.
        max_new_tokens: longest answer, in tokens.
        stop_strings: an answer ends before the first of them.
        num_samples: how many questions the test split has here, at most.
        splits: what `stream` can yield; a policy that is chosen on data needs "validation".
    """

    name: ClassVar[str]
    title: ClassVar[str]
    version: ClassVar[int] = 1
    metric: ClassVar[str] = "exact_match"
    kind: ClassVar[Kind]
    max_new_tokens: ClassVar[int] = 8
    stop_strings: ClassVar[tuple[str, ...]] = ()
    num_samples: ClassVar[int] = 600
    splits: ClassVar[tuple[str, ...]] = ("test",)

    @classmethod
    def open(cls, data_root: Path | None = None) -> Task:
        """The task, its data found under `data_root` where it reads any."""
        return cls()

    def score(self, sample: Sample, answer: str) -> Scored:
        """What an answer is worth."""
        return Scored(metrics.score(self.metric, answer, sample.references))

    def aggregate(self, records: Sequence[SampleRecord]) -> dict[str, Any] | None:
        """What the task makes of the records of a cell beside the mean score, as JSON; None if nothing.

        Returns:
            "values": numbers by name; "quoted": the one that its paper quotes, as {"name", "value"}; or "error": why
            there are none.
        """
        return None

    @abstractmethod
    def stream(self, split: str = "test") -> Iterator[Sample]:
        """The samples of a held-out split, always in the same order."""

    def samples(self, limit: int | None = None, split: str = "test") -> list[Sample]:
        """The first `limit` samples (default: all of them).

        Raises:
            ValueError: `limit` is not positive, or the task has no such split.
        """
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1 sample, got {limit}")
        if split not in self.splits:
            raise ValueError(f"task {self.name!r} has no {split} split, only: {', '.join(self.splits)}")
        wanted = min(limit or self.num_samples, self.num_samples)
        chosen, seen = [], set()
        for sample in self.stream(split):
            if sample.sample_id not in seen:  # the same question may be drawn twice for an image
                seen.add(sample.sample_id)
                chosen.append(sample)
            if len(chosen) == wanted:
                break
        return chosen


class SyntheticTask(Task):
    """A task over the test split of one of the worlds in `visor.worlds`.

    Class attributes:
        world: name of the world.
        size: scale of its scenes in [0, 1]; 1 is the largest the world draws.
        questions_per_image: how many of a scene's questions are asked.
        skills: kinds of question that are asked (`Question.kind`); None is every kind of the world.
    """

    world: ClassVar[str]
    skills: ClassVar[frozenset[str] | None] = None
    size: ClassVar[float] = 1.0
    questions_per_image: ClassVar[int] = 3
    splits: ClassVar[tuple[str, ...]] = ("validation", "test")

    def stream(self, split: str = "test") -> Iterator[Sample]:
        """Samples without end; sample i of a split is the same in every run."""
        index = 0
        while True:
            one = scene(self.world, split, index, self.size)
            image_id = image_id_of(one.image)
            # A scene lists its questions by kind: take them evenly spaced, starting anywhere, so that all kinds come.
            asked = [q for q in one.questions if self.skills is None or q.kind in self.skills]
            num = min(self.questions_per_image, len(asked))
            for k in range(num):
                question = asked[(index + k * len(asked) // num) % len(asked)]
                yield Sample.make(self.name, one.image, image_id, question.text, (question.answer,), one.difficulty)
            index += 1
