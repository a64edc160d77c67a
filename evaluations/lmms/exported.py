"""Our tasks for lmms-eval: a folder for `--include_path`, a parquet file and a YAML for each task.

They ask the same questions in the same words about the same pixels, and an answer gets the same score: the metric is
this package's own, named in the YAML as `evaluations.lmms.exported.process_results`. Any model of lmms-eval can answer
them where this package is installed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaluations.metrics import score
from evaluations.task import Sample, open_task
from visor.vision.image import as_rgb

PREFIX = "visor_"

YAML = """\
# Written by `python -m evaluations.lmms export`; version {version} of the task.
task: {name}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_visual: !function evaluations.lmms.exported.doc_to_visual
doc_to_text: !function evaluations.lmms.exported.doc_to_text
doc_to_target: !function evaluations.lmms.exported.doc_to_target
process_results: !function evaluations.lmms.exported.process_results
generation_kwargs:
  max_new_tokens: {max_new_tokens}
  until: []
  do_sample: false
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
metadata:
  version: {version}
"""


def export(name: str, folder: Path, limit: int | None = None, data_root: Path | None = None) -> Path:
    """Write a task; returns its YAML.

    Raises:
        ValueError: no such task, or it brings conversations of its own, which lmms-eval has better ways for.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    task = open_task(name, data_root)
    samples = task.samples(limit)
    if any(sample.messages is not None for sample in samples):
        raise ValueError(f"{name} is not of one image and one question each; only such tasks can be exported")
    stem = PREFIX + name.replace(":", "_").replace("/", "_")
    folder.mkdir(parents=True, exist_ok=True)
    rows = [_row(sample, task.metric) for sample in samples]
    text, value = pa.string(), {"dtype": "string", "_type": "Value"}
    columns = {
        "image": (pa.struct({"bytes": pa.binary(), "path": text}), {"_type": "Image"}),
        "question": (text, value),
        "answers": (pa.list_(text), {"feature": value, "_type": "List"}),
        "metric": (text, value),
        "sample_id": (text, value),
    }
    # `datasets` is told by the "huggingface" entry that the column of bytes is one of images.
    told = json.dumps({"info": {"features": {name: feature for name, (_, feature) in columns.items()}}})
    schema = pa.schema({name: kind for name, (kind, _) in columns.items()}, metadata={"huggingface": told})
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / f"{stem}.parquet")
    path = folder / f"{stem}.yaml"
    path.write_text(
        YAML.format(
            name=stem,
            file=f"{stem}.parquet",
            version=json.dumps(task.version),
            max_new_tokens=task.max_new_tokens,
            metric=task.metric,
        ),
        encoding="utf-8",
    )
    return path


def _row(sample: Sample, metric: str) -> dict[str, Any]:
    buffer = io.BytesIO()
    sample.image.save(buffer, format="PNG")
    return {
        "image": {"bytes": buffer.getvalue(), "path": None},
        "question": sample.question,
        "answers": list(sample.references),
        "metric": metric,
        "sample_id": sample.sample_id,
    }


# What the YAML names.


def doc_to_visual(doc: Mapping[str, Any]) -> list[Any]:
    """Its image."""
    return [as_rgb(doc["image"])]


def doc_to_text(doc: Mapping[str, Any]) -> str:
    """Its question, word for word."""
    return doc["question"]


def doc_to_target(doc: Mapping[str, Any]) -> str:
    """The first of its answers; the metric looks at all."""
    return doc["answers"][0]


def process_results(doc: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    """The score of the answer, under the name of its metric."""
    return {doc["metric"]: score(doc["metric"], results[0], doc["answers"])}
