"""One answer through lmms-eval's filters and metrics, and all of them through its aggregation.

The figures are lmms-eval's own. What is done around it, and why:

* Answers that it cannot parse it may replace by a random choice (MMMU). The choice here depends on the sample alone,
  not on how many were drawn before it, and it is counted.
* OCRBench's score is divided by its 1,000 questions however few were asked, and is summed in a variable of the module
  that is never reset: it starts from zero here and is divided by what was asked.
* MME's aggregate asserts that both questions of a pair are there, so only whole pairs are asked (`whole_pairs`).
* Aggregations that write files (TextVQA, MMBench, OCRBench) write them where they are thrown away.
* A filter is handed the answers with the documents from the first on; here one answer with its own document.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import random
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from evaluations.lmms.benchmarks import Benchmark
from evaluations.lmms.library import cause, working_directory

REASONING_TAGS = [["<think>", "</think>"]]
"""What lmms-eval's command line takes out of answers unless a task says otherwise."""

OCRBENCH_QUESTIONS = 1000
CIRCULAR = 1_000_000  # MMBench: the same question with its choices turned has this much more for an index, or twice it


def without_control_characters(text: str) -> str:
    """An answer as it can be written to any file: one C0 or C1 character makes MMBench's export fail after the run."""
    return "".join(c for c in text if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160))


@dataclass
class Draws:
    """Whether anything was drawn at random."""

    any: bool = False


@contextmanager
def random_by(seed: str) -> Iterator[Draws]:
    """Python's and numpy's random numbers follow from `seed` for a while, and it is noticed if any are drawn."""
    number = int(hashlib.sha256(seed.encode()).hexdigest()[:8], 16)
    before, draws = (random.getstate(), np.random.get_state()), Draws()
    random.seed(number)
    np.random.seed(number)
    state = lambda: (random.getstate(), str(np.random.get_state()))
    seeded = state()
    try:
        yield draws
        draws.any = state() != seeded
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def evaluate(task: Any, document: Mapping[str, Any], index: int, answer: str, seed: str) -> dict[str, Any]:
    """lmms-eval's metrics of one answer, by "<metric>,<filter>" as in its own results, and as JSON.

    Args:
        task: of lmms-eval.
        document: without its images, unless the task scores with them.

    Raises:
        ValueError: the task cannot score the answer; the message has the first cause.
    """
    from lmms_eval.api.instance import Instance
    from lmms_eval.api.reasoning import parse_reasoning_tags_config, strip_reasoning_tags

    metadata = {"task": task.config.task, "doc_id": index, "repeats": 1}
    request = Instance("generate_until", (), 0, metadata, resps=[without_control_characters(answer)])
    tags = parse_reasoning_tags_config(json.dumps(REASONING_TAGS), getattr(task.config, "reasoning_tags", None))
    clean = lambda each: strip_reasoning_tags(each, tags) if tags and isinstance(each, str) else each
    values: dict[str, Any] = {}
    try:
        with random_by(seed) as draws, redirect_stdout(io.StringIO()):
            for ensemble in task._filters:
                ensemble.apply([request], [document])
            for name, filtered in request.filtered_resps.items():
                filtered = [clean(each) for each in filtered] if isinstance(filtered, list) else clean(filtered)
                for metric, value in task.process_results(document, [filtered]).items():
                    if metric in task.aggregation() and metric != "submission":
                        values[f"{metric},{name}"] = value
    except Exception as error:
        raise ValueError(f"lmms-eval cannot score the answer {answer[:80]!r}: {cause(error)}") from error
    # As it will be read back: a resumed cell must aggregate the very same values.
    return json.loads(json.dumps({**values, **({"guessed": True} if draws.any else {})}, default=_plain))


def _plain(value: Any) -> Any:
    """numpy's numbers and arrays as Python's; anything else as text."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else str(value)


def metric_of(values: Mapping[str, Any], benchmark: Benchmark | None) -> str:
    """Which of a document's metrics is its score: the quoted one, or else the first."""
    keys = [key for key in values if "," in key]
    quoted = [key for key in keys if benchmark is not None and key.rpartition(",")[0] == benchmark.metric]
    if not keys:
        raise ValueError("lmms-eval gives this answer no metric that could be its score")
    return (quoted or keys)[0]


def score_of(task: Any, values: Mapping[str, Any], benchmark: Benchmark | None, metric: str | None = None) -> float:
    """What a document adds to the mean, from 0 to 1: its metric as a number, or as the aggregate of it alone.

    Raises:
        ValueError: it is no such number.
    """
    key = metric or metric_of(values, benchmark)
    value = values[key]
    if isinstance(value, Mapping) and isinstance(value.get("score"), int | float):
        value = value["score"]
    if not isinstance(value, int | float):
        if isinstance(value, Mapping) and isinstance(value.get("index"), int):
            value = {**value, "index": value["index"] % CIRCULAR}
        scale = benchmark.per_cent / 100 if benchmark is not None else 1.0
        value = _aggregated(task, key, [value]) * scale
    if not 0 <= value <= 1:
        raise ValueError(f"the metric {key} of one answer is {value:g}; a score here is from 0 to 1")
    return float(value)


def _aggregated(task: Any, key: str, values: Sequence[Any]) -> Any:
    aggregate = task.aggregation()[key.rpartition(",")[0]]
    inner = getattr(aggregate, "__globals__", {})
    for total in inner.get("OCRBench_score", {}):
        inner["OCRBench_score"][total] = 0
    with tempfile.TemporaryDirectory() as scratch, redirect_stdout(io.StringIO()):  # tables, one a document
        wants_arguments = "args" in inspect.signature(aggregate).parameters
        options = {"args": SimpleNamespace(output_path=scratch)} if wants_arguments else {}
        with working_directory(Path(scratch)):
            return aggregate(list(values), **options)


def aggregates(task: Any, records: Sequence[Mapping[str, Any]], benchmark: Benchmark | None) -> dict[str, Any]:
    """lmms-eval's figures over documents in their order, as `evaluations.task.Task.aggregate` gives them.

    Args:
        records: what `evaluate` gave, a document each.
    """
    figures: dict[str, float] = {}
    try:
        for key in dict.fromkeys(key for values in records for key in values if "," in key):
            own = [values[key] for values in records if key in values]
            figure = _aggregated(task, key, own)
            if isinstance(figure, int | float | np.generic):
                scale = OCRBENCH_QUESTIONS / len(own) if key.startswith("ocrbench_accuracy,") else 1.0
                figures[key] = float(figure) * scale
    except Exception as error:
        return {"error": f"lmms-eval cannot aggregate the answers: {cause(error)}"}
    result: dict[str, Any] = {"values": figures}
    quoted = [key for key in figures if benchmark is not None and key.rpartition(",")[0] == benchmark.metric]
    if quoted:
        result["quoted"] = {"name": benchmark.quoted, "value": figures[quoted[0]] * benchmark.per_cent}
    guesses = sum(bool(values.get("guessed")) for values in records)
    return {**result, "guesses": guesses} if guesses else result


def whole_pairs(documents: Sequence[tuple[int, Mapping[str, Any]]]) -> list[int]:
    """Of MME's documents those whose pair is complete, by index."""
    pair = lambda document: (document["category"], document["question_id"])
    counts = Counter(pair(document) for _, document in documents)
    return [index for index, document in documents if counts[pair(document)] == 2]
