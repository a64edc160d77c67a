"""`lmms:NAME`: a benchmark of lmms-eval as a task of our suites, with its documents, prompts, stop strings and metrics.

The prompts are its conversations; `lmms:NAME:simple` asks with its one text behind all images instead. Images stay on
disk until a sample is asked: a suite of ten thousand pages must not lie in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from evaluations.lmms import library, scoring
from evaluations.lmms.benchmarks import BENCHMARKS, Benchmark
from evaluations.task import Kind, Sample, Scored, Task

if TYPE_CHECKING:
    from PIL.Image import Image

    from evaluations.records import SampleRecord

DEFAULT_MAX_NEW_TOKENS = 1024
"""Where a task does not say: what lmms-eval's own adapters take."""

NUM_KEPT = 32  # conversations that stay in memory: a sample is looked at several times while its batch is run


@dataclass(frozen=True)
class Document:
    """A document as a sample (`evaluations.task.Sample`), read when it is asked for.

    Args:
        index: its place in the split.
        read: the conversation of a place.
    """

    task: str
    question: str
    references: tuple[str, ...]
    image_id: str
    sample_id: str
    index: int
    read: Callable[[int], tuple[Mapping[str, Any], ...]] = field(repr=False, compare=False)
    difficulty: int = 1

    @property
    def messages(self) -> tuple[Mapping[str, Any], ...]:
        """The conversation with its images."""
        return self.read(self.index)

    @property
    def image(self) -> Image | None:
        """The first image."""
        parts = (part for message in self.messages for part in message["content"])
        return next((part["image"] for part in parts if part["type"] == "image"), None)


def task_named(text: str) -> type[LmmsTask]:
    """The task of `lmms:TEXT`.

    Raises:
        ValueError: lmms-eval is not installed, or the name is not of the form NAME or NAME:simple.
    """
    library.require()
    name, _, prompts = text.partition(":")
    if not name or prompts not in ("", "chat", "simple"):
        raise ValueError(f"a task of lmms-eval is named lmms:NAME, or lmms:NAME:simple, got 'lmms:{text}'")
    benchmark = BENCHMARKS.get(name)
    attributes = {
        "name": f"lmms:{text}",
        "title": benchmark.title if benchmark else name,
        "kind": benchmark.kind if benchmark else "coarse",
        "benchmark": benchmark,
        "task_of_lmms": name,
        "chat": prompts != "simple",
    }
    return type("LmmsTask", (LmmsTask,), attributes)


class LmmsTask(Task):
    """A task of lmms-eval; `task_named` makes a class for each, `open` reads its documents."""

    name: ClassVar[str] = "lmms:"
    title: ClassVar[str] = "lmms-eval"
    metric: ClassVar[str] = "score per document"  # whose mean is not always the benchmark's figure: see `aggregate`
    kind: ClassVar[Kind] = "coarse"
    benchmark: ClassVar[Benchmark | None] = None
    task_of_lmms: ClassVar[str] = ""
    chat: ClassVar[bool] = True

    @classmethod
    def open(cls, data_root: Path | None = None) -> Task:
        return cls(library.open_documents(cls.task_of_lmms, cls.chat, data_root), data_root)

    def __init__(self, task: Any, data_root: Path | None = None) -> None:
        self.task, self.data_root = task, data_root
        self.documents = task.test_docs() if task.has_test_docs() else task.validation_docs()
        self.texts = task.eval_docs_no_media
        self.num_samples = len(self.documents)
        self.max_new_tokens, self.stop_strings = generation_limits(task.config.generation_kwargs or {}, self.name)
        asked = [self.chat, self.max_new_tokens, self.stop_strings, str(task.config.filter_list)]
        kind = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]
        self.version = f"{library.installed_version()}, {task.VERSION}, {kind}"
        self._raw = _Raw(self.documents)
        self._read = lru_cache(maxsize=NUM_KEPT)(self._messages)
        self._places: dict[str, int] = {}

    def stream(self, split: str = "test") -> Iterator[Sample]:
        return (self._sample(index) for index in range(self.num_samples))

    def samples(self, limit: int | None = None, split: str = "test") -> list[Sample]:
        """The first documents; of MME those whose pairs are complete."""
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1 sample, got {limit}")
        if split not in self.splits:
            raise ValueError(f"task {self.name!r} has no {split} split, only: {', '.join(self.splits)}")
        indices = list(range(min(limit or self.num_samples, self.num_samples)))
        if self.task_of_lmms == "mme":
            indices = scoring.whole_pairs([(index, self.texts[index]) for index in indices])
            if not indices:
                raise ValueError(f"{self.name} scores pairs of questions about an image: --limit must be at least 2")
        return [self._sample(index) for index in indices]

    def score(self, sample: Document, answer: str) -> Scored:
        values = scoring.evaluate(self.task, self.texts[sample.index], sample.index, answer, sample.sample_id)
        key = scoring.metric_of(values, self.benchmark)
        return Scored(scoring.score_of(self.task, values, self.benchmark, key), values)

    def aggregate(self, records: Sequence[SampleRecord]) -> dict[str, Any] | None:
        failed = sum(record.error is not None for record in records)
        if failed or not records:
            return {"error": f"{failed} of {len(records)} samples failed; the benchmark's figure needs all of them"}
        ordered = sorted(records, key=lambda record: self._places[record.sample_id])
        return scoring.aggregates(self.task, [record.values for record in ordered], self.benchmark)

    def _sample(self, index: int) -> Document:
        image_id, num_images = _images_digest(self._raw[index], self.name, index)
        question = _text(self._conversation(self._light(index), index))
        references = self._references(self.texts[index])
        content = json.dumps([self.name, index, image_id, question, list(references)])
        sample_id = hashlib.sha256(content.encode()).hexdigest()[:16]
        self._places[sample_id] = index
        return Document(self.name, question, references, image_id, sample_id, index, self._read, max(1, num_images))

    def _references(self, document: Mapping[str, Any]) -> tuple[str, ...]:
        """What counts as right, for the reader: the metric looks at the document itself."""
        target = self.task.config.doc_to_target
        if target == "answer" and "answer" not in document and "answers" in document:
            return tuple(dict.fromkeys(map(str, document["answers"])))  # TextVQA names a column that it has not
        return tuple(map(str, _as_list(self.task.doc_to_target(document))))

    def _light(self, index: int) -> Mapping[str, Any]:
        """A document whose images are not decoded: enough for its prompt's text, in nearly all tasks."""
        light = lambda value: [light(v) for v in value] if isinstance(value, list) else _Undecoded.of(value)
        raw = self._raw[index]
        return {name: light(value) if name in self._raw.images else value for name, value in raw.items()}

    def _conversation(self, document: Mapping[str, Any], index: int) -> list[Any]:
        with library.working_directory(self.data_root):
            try:
                return self._asked(document)
            except Exception:
                if not any(isinstance(value, list | _Undecoded) for value in document.values()):
                    raise
                return self._asked(self.documents[index])  # it looked at the pixels

    def _asked(self, document: Mapping[str, Any]) -> list[Any]:
        """What lmms-eval would ask of it, as its adapters get it."""
        if self.chat:
            return self.task.doc_to_messages(document)
        images = [{"type": "image", "url": visual} for visual in self.task.doc_to_visual(document) or []]
        text = self.task.fewshot_context(document, self.task.config.num_fewshot or 0)
        return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]

    def _messages(self, index: int) -> tuple[Mapping[str, Any], ...]:
        with library.working_directory(self.data_root):
            return conversation(self._asked(self.documents[index]))


def generation_limits(options: Mapping[str, Any], name: str) -> tuple[int, tuple[str, ...]]:
    """(max_new_tokens, stop strings) of a task's generation arguments.

    Raises:
        ValueError: it wants answers to be sampled or searched for; answers here are greedy.
    """
    if options.get("do_sample") or (options.get("num_beams") or 1) > 1:
        raise ValueError(f"{name} asks for {dict(options)}: answers here are greedy, so its figures would be others")
    until = options.get("until") or []
    stop = tuple(dict.fromkeys(each for each in _as_list(until) if each))
    return int(options.get("max_new_tokens") or DEFAULT_MAX_NEW_TOKENS), stop


def conversation(messages: Any) -> tuple[Mapping[str, Any], ...]:
    """lmms-eval's messages in transformers' form, as `visor.inference.chat` takes them.

    Raises:
        ValueError: a part that is neither text nor an image.
    """
    result = []
    for message in getattr(messages, "messages", messages):
        message = message if isinstance(message, Mapping) else message.model_dump()
        content = message["content"]
        parts = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                parts.append({"type": "text", "text": part["text"]})
            elif part["type"] == "image":
                parts.append({"type": "image", "image": _opened(part.get("url", part.get("image")))})
            else:
                raise ValueError(f"this document asks about {part['type']}; here questions are about images")
        result.append({"role": message["role"], "content": parts})
    return tuple(result)


def _opened(image: Any) -> Any:
    if isinstance(image, str | Path):
        from visor.vision.image import open_image

        return open_image(image)
    return image


def _text(messages: Any) -> str:
    """The text of a conversation, as the report shows it."""
    parts = [part for message in conversation(messages) for part in message["content"]]
    return "\n".join(part["text"].strip() for part in parts if part["type"] == "text" and part["text"].strip())


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


class _Undecoded:
    """Stands in a document for an image that is not needed yet."""

    def __init__(self, raw: Any) -> None:
        self.raw = raw

    @classmethod
    def of(cls, raw: Any) -> _Undecoded | None:
        return None if raw is None else cls(raw)

    def convert(self, mode: str) -> _Undecoded:
        return self


class _Raw:
    """The documents with their images as the bytes of their files."""

    def __init__(self, documents: Any) -> None:
        from datasets import Image, List, Sequence

        self.images = []
        for name, feature in documents.features.items():
            inner = getattr(feature, "feature", None)
            if isinstance(feature, Image):
                documents = documents.cast_column(name, Image(decode=False))
            elif isinstance(inner, Image):
                several = List if isinstance(feature, List) else Sequence
                documents = documents.cast_column(name, several(Image(decode=False)))
            else:
                continue
            self.images.append(name)
        self.documents = documents

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.documents[index]


def _images_digest(raw: Mapping[str, Any], task: str, index: int) -> tuple[str, int]:
    """Sixteen hex digits for the files of a document's images, and their number; one of its own for one without any."""
    total, count = hashlib.sha256(), 0
    for value in raw.values():
        for each in _as_list(value):
            if isinstance(each, Mapping) and set(each) == {"bytes", "path"}:
                content = each["bytes"] if each["bytes"] is not None else Path(each["path"]).read_bytes()
                total.update(hashlib.sha256(content).digest())
                count += 1
    if not count:
        total.update(f"{task} {index}".encode())
    return total.hexdigest()[:16], count
