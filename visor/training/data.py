"""Where training examples come from: LLaVA JSON with an image folder, Hugging Face datasets, the built-in worlds.

A stream numbers the examples of a mixture: what stands at a position depends on the seed and the position alone. So a
run's data position is its step, a resumed run sees what the unbroken one would have seen, and several processes share
a step by taking turns. A row that cannot be used leaves a hole: it is counted and listed (`Skipped`), never replaced
silently.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from budgets.registry import nearest_first

if TYPE_CHECKING:
    from PIL.Image import Image

    from visor.worlds.world import Scene

IMAGE_MARK = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
BLOCK = 1000  # positions over which the weights of a mixture are met exactly


class BadRow(ValueError):
    """A row that cannot be trained on; the message is what the list of skipped rows says."""


@dataclass(frozen=True)
class Example:
    """An image and the conversations about it, which do not see one another.

    Args:
        key: names the row for people, e.g. "train.json[17]".
        image: decoded, RGB.
        conversations: each a sequence of (question, answer) exchanges.
        kinds: what each conversation is about, for accuracy by task.
        scene: of a built-in world, if it is one; its first questions are the conversations.
    """

    key: str
    image: Image
    conversations: tuple[tuple[tuple[str, str], ...], ...]
    kinds: tuple[str, ...]
    scene: Scene | None = None


class Source(Protocol):
    """Numbered examples. `read` raises BadRow for a row that cannot be used."""

    name: str
    length: int | None  # None: endless

    def read(self, index: int) -> Example: ...


# --- rows -------------------------------------------------------------------------------------------------------------


def read_image(value: Any, folder: Path | None, key: str) -> Image:
    """An RGB image from a file name, bytes, or a decoded image.

    Raises:
        BadRow: there is none, or it cannot be read.
    """
    from visor.vision.image import as_rgb, open_image

    if isinstance(value, Mapping):  # an undecoded Hugging Face image
        value = value.get("bytes") or value.get("path")
    if value is None or value == "":
        raise BadRow("no image")
    try:
        if isinstance(value, bytes):
            return open_image(value)
        return open_image((folder or Path()) / value) if isinstance(value, (str, Path)) else as_rgb(value)
    except ValueError as error:
        raise BadRow(str(error)) from error


def one_image(value: Any) -> Any:
    """The only image of a row.

    Raises:
        BadRow: there is none, or more than one.
    """
    images = [x for x in (value if isinstance(value, (list, tuple)) else [value]) if x is not None and x != ""]
    if len(images) != 1:
        raise BadRow("no image" if not images else f"{len(images)} images where one is meant")
    return images[0]


def exchanges(turns: Any) -> tuple[tuple[str, str], ...]:
    """(question, answer) pairs of a LLaVA `conversations` or a chat `messages` list; image marks are taken out.

    Raises:
        BadRow: turns that do not alternate, unknown roles, empty texts, or not exactly one image mark where marks are
            used.
    """
    if not isinstance(turns, (list, tuple)) or not turns:
        raise BadRow("no conversation")
    said, marks, uses_marks = [], 0, False
    for turn in turns:
        name = turn.get("from", turn.get("role"))
        text = turn.get("value", turn.get("content"))
        if name not in ROLES:
            raise BadRow(f"unknown speaker {name!r}; expected human and gpt, or user and assistant")
        if "value" in turn:
            uses_marks = True
        if isinstance(text, (list, tuple)):  # chat content parts
            marks += sum(part.get("type") == "image" for part in text)
            uses_marks = True
            text = "".join(part.get("text") or "" for part in text if part.get("type") == "text")
        if not isinstance(text, str):
            raise BadRow(f"a turn holds {type(text).__name__} instead of text")
        marks += text.count(IMAGE_MARK)
        said.append((ROLES[name], text.replace(IMAGE_MARK, "").strip()))
    expected = ["user", "assistant"] * (len(said) // 2)
    if [role for role, _ in said] != expected:
        raise BadRow(f"turns must alternate from user to assistant, got {[role for role, _ in said]}")
    if any(not text for _, text in said):
        raise BadRow("an empty turn")
    if marks > 1 or (uses_marks and marks != 1):
        raise BadRow(f"{marks} image marks for one image")
    return tuple((said[i][1], said[i + 1][1]) for i in range(0, len(said), 2))


def _first_of(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def example_of(row: Mapping[str, Any], key: str, folder: Path | None, columns: Mapping[str, str]) -> Example:
    """An example from a row with an image and `conversations`, `messages`, or `question` and `answer`.

    Args:
        columns: other names for the columns `image`, `conversations`, `question`, `answer`, `kind`.

    Raises:
        BadRow: see `read_image`, `one_image` and `exchanges`.
    """
    named = lambda default, *more: [columns[default]] if default in columns else [default, *more]
    image = one_image(_first_of(row, named("image", "images", "img")))
    turns = _first_of(row, named("conversations", "messages"))
    if turns is None:
        question = _first_of(row, named("question", "query"))
        answer = _first_of(row, named("answer", "answers", "label"))
        if isinstance(answer, (list, tuple)):  # of several annotators: what most of them say
            said = [a.get("answer") if isinstance(a, Mapping) else a for a in answer]
            answer = Counter(map(str, said)).most_common(1)[0][0] if said else None
        if question is None or answer is None:
            raise BadRow(f"neither conversations, messages, nor question and answer; the row has {sorted(row)}")
        turns = [{"role": "user", "content": str(question)}, {"role": "assistant", "content": str(answer)}]
    spoken = exchanges(turns)
    kind = _first_of(row, named("kind", "task"))
    return Example(key, read_image(image, folder, key), (spoken,), (str(kind or "all"),))


# --- sources ----------------------------------------------------------------------------------------------------------


@dataclass
class LlavaSource:
    """LLaVA's format: a JSON list (or JSON lines) of {"image", "conversations"}, and the folder of the images.

    Raises:
        ValueError: the file is missing, or no such list.
    """

    path: Path
    images: Path
    columns: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.path, self.images = Path(self.path), Path(self.images)
        if not self.path.is_file():
            raise ValueError(f"no training file at {self.path}")
        if not self.images.is_dir():
            raise ValueError(f"no image folder at {self.images} (for {self.path})")
        text = self.path.read_text(encoding="utf-8")
        try:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()] if (
                self.path.suffix == ".jsonl") else json.loads(text)  # fmt: skip
        except ValueError as error:
            raise ValueError(f"{self.path} is no valid JSON ({error})") from error
        if not isinstance(rows, list) or not rows:
            raise ValueError(f"{self.path} must hold a list of rows, at least one; it holds {type(rows).__name__}")
        self.rows, self.name, self.length = rows, self.path.name, len(rows)

    def read(self, index: int) -> Example:
        row = self.rows[index]
        if not isinstance(row, Mapping):
            raise BadRow(f"the row is {type(row).__name__}, not an object")
        return example_of(row, f"{self.name}[{index}]", self.images, self.columns)


@dataclass
class HubSource:
    """A Hugging Face dataset: a folder of `save_to_disk`, or whatever `load_dataset` takes (a path or a Hub name)."""

    path: str
    split: str = "train"
    subset: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ValueError(f"reading the dataset {self.path!r} needs a package: pip install datasets") from error
        folder = Path(self.path)
        try:
            if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
                loaded = datasets.load_from_disk(str(folder))
                if isinstance(loaded, datasets.DatasetDict):
                    if self.split not in loaded:
                        raise ValueError(f"{folder} has the splits {sorted(loaded)}, not {self.split!r}")
                    loaded = loaded[self.split]
            else:
                loaded = datasets.load_dataset(self.path, self.subset, split=self.split)
        except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
            raise ValueError(f"the dataset {self.path!r} cannot be loaded: {error}") from error
        self.data, self.name, self.length = loaded, f"{folder.name}:{self.split}", len(loaded)
        if not self.length:
            raise ValueError(f"the dataset {self.path!r}, split {self.split!r}, has no rows")

    def read(self, index: int) -> Example:
        try:
            row = self.data[index]
        except Exception as error:  # decoding happens here: broken images raise what their reader raises
            raise BadRow(f"the row cannot be read: {type(error).__name__}: {error}") from error
        return example_of(row, f"{self.name}[{index}]", None, self.columns)


@dataclass
class WorldSource:
    """Scenes of one built-in world, without end; all questions of a scene stand behind its image.

    Args:
        size: scale of the scenes in [0, 1].
        smaller: share of scenes that are drawn smaller.
        questions: at most so many a scene.
    """

    world: str
    split: str = "train"
    size: float = 1.0
    smaller: float = 0.0
    seed: int = 0
    questions: int | None = None

    length: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        from visor.worlds.world import SPLITS
        from visor.worlds.worlds import WORLDS

        if self.world not in WORLDS:
            raise ValueError(
                f"unknown world {self.world!r}; expected one of {', '.join(nearest_first(self.world, WORLDS))}"
            )
        if self.split not in SPLITS:
            raise ValueError(f"unknown split {self.split!r}; expected one of {', '.join(SPLITS)}")
        self.name = f"{self.world}/{self.split}"

    def read(self, index: int) -> Example:
        from visor.worlds.worlds import scene

        rng = np.random.default_rng([self.seed, index, 7])
        size = self.size if rng.random() >= self.smaller else float(rng.uniform(0, self.size))
        one = scene(self.world, self.split, index, size, self.seed)
        asked = one.questions[: self.questions]
        if not asked:
            raise BadRow("the scene has no questions")
        return Example(
            f"{self.name}[{index}]",
            one.image,
            tuple(((question.text, question.answer),) for question in asked),
            tuple(question.kind for question in asked),
            one,
        )


def sources_of(specification: Sequence[Mapping[str, Any]], seed: int) -> tuple[list[Source], list[float]]:
    """Sources and their weights from a recipe's `data` list.

    Entries: `{worlds: {forms: 2, charts: 1}, split, size, smaller, questions}`, `{llava: FILE, images: FOLDER}`,
    `{dataset: NAME_OR_PATH, split, subset}`; each with `weight` (default 1) and `columns` where rows name theirs
    otherwise.

    Raises:
        ValueError: an entry of no known form, or an option that it does not have.
    """
    if not specification:
        raise ValueError("the recipe names no data; give a list of {worlds: ...}, {llava: ...} or {dataset: ...}")
    sources: list[Source] = []
    weights: list[float] = []
    for entry in specification:
        options = dict(entry)
        weight = float(options.pop("weight", 1.0))
        forms = [name for name in ("worlds", "llava", "dataset") if name in options]
        if len(forms) != 1:
            raise ValueError(f"a data entry names one of worlds, llava, dataset; got {dict(entry)}")
        try:
            if forms == ["worlds"]:
                worlds = options.pop("worlds")
                worlds = dict.fromkeys(worlds, 1.0) if isinstance(worlds, (list, tuple)) else worlds
                total = sum(worlds.values())
                for world, share in worlds.items():
                    sources.append(WorldSource(world, seed=seed, **options))
                    weights.append(weight * share / total)
                continue
            if forms == ["llava"]:
                sources.append(LlavaSource(options.pop("llava"), **options))
            else:
                sources.append(HubSource(options.pop("dataset"), **options))
            weights.append(weight)
        except TypeError as error:
            raise ValueError(f"data entry {dict(entry)}: {error}") from error
    if min(weights) <= 0:
        raise ValueError(f"weights of data must be positive, got {weights}")
    return sources, weights


class Stream:
    """A mixture of sources, numbered: `stream[position]` depends on (seed, position) only.

    Each thousand positions hold the sources in the exact proportion of their weights, shuffled; each pass over a
    finite source is a new permutation of its rows.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], seed: int) -> None:
        self.sources, self.seed = list(sources), seed
        shares = np.asarray(weights, float) / sum(weights) * BLOCK
        self.counts = np.floor(shares).astype(int)
        for source in np.argsort(self.counts - shares, kind="stable")[: BLOCK - self.counts.sum()]:
            self.counts[source] += 1
        self._blocks: dict[int, np.ndarray] = {}
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    @classmethod
    def of(cls, specification: Sequence[Mapping[str, Any]], seed: int) -> Stream:
        """From a recipe's `data` list."""
        return cls(*sources_of(specification, seed), seed)

    def locate(self, position: int) -> tuple[Source, int]:
        """The source at a position and the number of its row."""
        block, place = divmod(position, BLOCK)
        if block not in self._blocks:
            order = np.repeat(np.arange(len(self.sources)), self.counts)
            self._blocks = {block: np.random.default_rng([self.seed, block]).permutation(order)}
        order = self._blocks[block]
        chosen = int(order[place])
        visit = block * int(self.counts[chosen]) + int((order[:place] == chosen).sum())
        source = self.sources[chosen]
        if source.length is None:
            return source, visit
        epoch, index = divmod(visit, source.length)
        if (chosen, epoch) not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k[0] != chosen}
            rng = np.random.default_rng([self.seed, chosen, epoch, 1])
            self._orders[chosen, epoch] = rng.permutation(source.length)
        return source, int(self._orders[chosen, epoch][index])

    def read(self, position: int) -> Example | tuple[str, str]:
        """The example at a position, or (row, reason) if it cannot be used."""
        source, index = self.locate(position)
        try:
            return source.read(index)
        except BadRow as error:
            return f"{source.name}[{index}]", str(error)


class Skipped:
    """The rows that were not trained on, each once, in a JSON-lines file; it survives a resume.

    Args:
        path: the file.
        most: share of skipped rows above which training on the rest would be a mistake.
    """

    def __init__(self, path: Path, most: float = 0.5) -> None:
        self.path, self.most = path, most
        self.reasons: dict[str, str] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self.reasons[row["row"]] = row["reason"]

    def add(self, rows: Sequence[tuple[str, str]]) -> None:
        """List rows that are not listed yet."""
        new = {row: reason for row, reason in rows if row not in self.reasons}
        self.reasons.update(new)
        if new:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"row": row, "reason": reason}) + "\n" for row, reason in new.items())

    def check(self, num_seen: int) -> None:
        """Stop a run whose data are mostly unusable.

        Raises:
            ValueError: of at least twenty rows, more than the allowed share was skipped.
        """
        if num_seen >= 20 and len(self.reasons) > self.most * num_seen:
            raise ValueError(
                f"{len(self.reasons)} of {num_seen} rows cannot be used: {self.summary()}; see {self.path}"
            )

    def summary(self, num: int = 3) -> str:
        """The commonest reasons with an example row each."""
        counts = Counter(self.reasons.values())
        example = {reason: row for row, reason in reversed(self.reasons.items())}
        return "; ".join(f"{count} x {reason} (e.g. {example[reason]})" for reason, count in counts.most_common(num))
