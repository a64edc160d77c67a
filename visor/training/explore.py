"""Evaluate SELF subsets on examples: for the search of viable ones, here, and for the router (`visor.training.labels`).

Answers are scored by teacher forcing: is each token what greedy decoding would say. The vision features of the examples
are computed once for all subsets. What has been evaluated is on disk, so both stages go on where they were stopped.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from budgets import geometry as geometries
from budgets import search
from budgets.costs import price
from budgets.schedule import dense
from visor.training.batch import Batch
from visor.training.data import BadRow, Skipped, Stream
from visor.training.encoding import Encoder
from visor.training.forward import Answers, Features, PackedModel, answers_of
from visor.training.processes import Processes
from visor.training.rows import Row
from visor.training.run_folder import write_json

SCORES = ("exact", "likelihood")
Subset = tuple[int, ...]


def check_score(name: str) -> str:
    """The name of a score.

    Raises:
        ValueError: no such score.
    """
    if name not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}, got {name!r}")
    return name


def score_of(answers: Answers, score: str) -> list[list[float]]:
    """Of each row, of each of its segments: 1 if the whole answer is right ("exact"), or its likelihood."""
    return answers.likelihood if score == "likelihood" else [[float(ok) for ok in row] for row in answers.right]


@dataclass
class Encoded:
    """Rows of a batch with the projected features of their images."""

    batch: Batch
    features: list[Features]


def read_rows(stream: Stream, encoder: Encoder, positions: Sequence[int], skipped: Skipped) -> list[Row]:
    """The usable rows at some positions of a stream; the others are listed."""
    rows = []
    for position in positions:
        example = stream.read(position)
        if isinstance(example, tuple):
            skipped.add([example])
            continue
        try:
            rows.append(encoder.encode(example))
        except BadRow as error:
            skipped.add([(example.key, str(error))])
    return rows


@torch.no_grad()
def encode(
    packed: PackedModel, rows: Sequence[Row], pad_id: int, processes: Processes, skipped: Skipped
) -> Encoded | None:
    """A batch with its features; rows whose image tokens do not match them are listed. None if nothing is left."""
    if not rows:
        return None
    batch = Batch.of(rows, pad_id).to(processes.device)
    with processes.autocast():
        features = packed.image_features(batch)
    wrong = packed.mismatched(batch, features)
    if not wrong:
        return Encoded(batch, features)
    skipped.add([(batch.rows[index].key, reason) for index, reason in wrong])
    bad = {index for index, _ in wrong}
    return encode(packed, [row for i, row in enumerate(rows) if i not in bad], pad_id, processes, skipped)


@torch.no_grad()
def evaluate(packed: PackedModel, one: Encoded, subset: Subset, score: str, processes: Processes) -> list[list[float]]:
    """Scores of a batch under a SELF subset, by row and segment."""
    with processes.autocast():
        logits = packed.logits(one.batch, one.features, subset)
    return score_of(answers_of(logits, one.batch), score)


def relative_cost(packed: PackedModel, num_visual: int, num_text: int) -> Callable[[Subset], float]:
    """Decoder prefill FLOPs of a subset relative to dense, for a prompt of these lengths."""
    geometry = geometries.from_config(packed.base.config)
    full = price(geometry, dense(geometry.num_layers, num_visual), num_text).decoder_prefill

    def cost(subset: Subset) -> float:
        schedule = replace(packed.schedule(subset), source_visual=num_visual)
        return price(geometry, schedule, num_text).decoder_prefill / full

    return cost


def lengths_of(rows: Sequence[Row]) -> tuple[int, int]:
    """(visual, text) tokens of the mean prompt, as if each question stood alone."""
    num_visual = [row.num_visual for row in rows for _ in row.segments]
    num_text = [len(row.prefix) - row.num_visual + s.prompt_end + 1 for row in rows for s in row.segments]
    return round(float(np.mean(num_visual))), round(float(np.mean(num_text)))


def macro_mean(by_kind: Mapping[str, Sequence[float]]) -> float:
    """The mean over tasks of their mean scores, so that no task counts more for having more questions.

    Kinds are of the form task/skill.
    """
    by_task: dict[str, list[float]] = defaultdict(list)
    for kind, values in by_kind.items():
        by_task[kind.partition("/")[0]] += values
    return float(np.mean([np.mean(values) for values in by_task.values()]))


# --- search -----------------------------------------------------------------------------------------------------------


@dataclass
class SearchResult:
    """The table of a search, and the viable configurations, cheapest first."""

    candidates: list[search.Candidate]
    document: dict[str, Any]

    @property
    def configurations(self) -> list[list[int]]:
        """The SELF layers of each viable configuration."""
        return [list(one.layers) for one in self.candidates if one.viable]


class ScoreTable:
    """Scores of SELF subsets on some examples, by kind of question; what has been evaluated is on disk.

    Args:
        encoded: this process's share of the examples.
        path: a JSON file, read if it is there.
    """

    def __init__(
        self, packed: PackedModel, encoded: Sequence[Encoded], score: str, processes: Processes, path: Path
    ) -> None:
        self.packed, self.encoded, self.score, self.processes, self.path = packed, encoded, score, processes, path
        self.scored: dict[str, dict[str, list[float]]] = json.loads(path.read_text()) if path.exists() else {}

    def means(self, subsets: Sequence[Subset]) -> list[float]:
        """The macro-averaged score of each subset; evaluates those that are new."""
        return [macro_mean(self._of(subset)) for subset in subsets]

    def means_by_kind(self, subset: Subset) -> dict[str, float]:
        """The mean score of each kind of question."""
        return {kind: round(float(np.mean(values)), 4) for kind, values in sorted(self._of(subset).items())}

    @property
    def num_questions(self) -> int:
        """Questions that each subset has been scored on; one must have been."""
        return sum(map(len, next(iter(self.scored.values())).values()))

    def _of(self, subset: Subset) -> dict[str, list[float]]:
        name = ",".join(map(str, subset))
        if name not in self.scored:
            self.scored[name] = self._evaluated(subset)
            if self.processes.is_main:
                write_json(self.path, self.scored)
                print(f"search: SELF {name or 'none'}: {macro_mean(self.scored[name]):.3f}", flush=True)
        return self.scored[name]

    def _evaluated(self, subset: Subset) -> dict[str, list[float]]:
        """Scores by kind of question, of all processes."""
        own: dict[str, list[float]] = defaultdict(list)
        for one in self.encoded:
            scores = evaluate(self.packed, one, subset, self.score, self.processes)
            for row, values in zip(one.batch.rows, scores, strict=True):
                for kind, value in zip(row.kinds, values, strict=True):
                    own[kind].append(value)
        by_kind: dict[str, list[float]] = defaultdict(list)
        for part in self.processes.gather([dict(own)]):
            for kind, values in part.items():
                by_kind[kind] += values
        return dict(by_kind)


def run_search(
    packed: PackedModel,
    stream: Stream,
    encoder: Encoder,
    folder: Path,
    processes: Processes,
    num_examples: int = 512,
    batch_size: int = 32,
    score: str = "exact",
    longest: int | None = None,
    margin: float = 0.0,
) -> SearchResult:
    """Score SELF subsets on a validation split and keep the viable ones; writes `search.json`.

    Args:
        num_examples: examples (images) from the stream.
        longest, margin: see `budgets.search.shortlist`.

    Raises:
        ValueError: no usable example.
    """
    check_score(score)
    folder.mkdir(parents=True, exist_ok=True)
    packed.model.to(processes.device).eval()
    pad_id, skipped = encoder.tokenizer.pad_token_id or 0, Skipped(folder / "skipped.jsonl")
    rows = read_rows(stream, encoder, processes.share(range(num_examples)), skipped)
    encoded = [
        one
        for first in range(0, len(rows), batch_size)
        if (one := encode(packed, rows[first : first + batch_size], pad_id, processes, skipped)) is not None
    ]
    lengths = processes.gather([lengths_of(rows)] if rows else [])
    if not lengths:
        raise ValueError(f"no usable validation example: {skipped.summary()}; see {skipped.path}")
    num_visual, num_text = (round(float(np.mean([one[k] for one in lengths]))) for k in (0, 1))
    table = ScoreTable(packed, encoded, score, processes, folder / "scored.json")
    slots = packed.visor.config.self_layers
    cost = relative_cost(packed, num_visual, num_text)
    candidates = search.search(slots, table.means, cost, longest, margin)
    document = {
        "slots": list(slots),
        "score": score,
        "num_examples": num_examples,
        "num_questions": table.num_questions,
        "num_visual": num_visual,
        "num_text": num_text,
        "skipped": len(skipped.reasons),
        "candidates": [{**one.to_dict(), "by_kind": table.means_by_kind(one.layers)} for one in candidates],
    }
    result = SearchResult(candidates, document)
    document["configurations"] = result.configurations
    if processes.is_main:
        write_json(folder / "search.json", document)
    return result
