"""results.json, cells.csv and samples.parquet: the report's numbers for programs.

One cell a setting and task, and one more with task "average". A value that was not measured is null, and the cell's
`not_measured` says why, by field. The field names are an interface: others read them.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pandas as pd

from evaluations.records import write_bytes_atomically
from evaluations.statistics import Interval
from reports import training
from reports.comparisons import AVERAGE, Analysis, Costs
from reports.data import FLOPS_PARTS, Setting

SCHEMA_VERSION = 1
NO_MEASUREMENTS = ("budget", "policy", "suite", "error", "model")
NOTES = {
    "score": "between 0 and 1; a failed sample counts as 0",
    "score_low": "95 % confidence interval, clustered by image",
    "decoder_flops": "mean over samples; prefill of the decoder layers, 2 x MACs, without tower and LM head",
    "flops_relative_to_dense": "the same relative to the unmodified model on the same samples",
    "prefill_ms_median": "batch size 1, one fixed sample list for the whole setting, so equal in all its tasks",
    "average": "macro-average: the mean over the suite's tasks",
    "policy": "fixed: params.configuration; router: params.cost_weight (null: the paper's); cascade: params.threshold",
    "num_visual_mean": "visual tokens of a sample at full size (N_v); num_text_mean: text tokens (N_t)",
}


def results(analysis: Analysis) -> dict[str, Any]:
    """The document of results.json."""
    return {
        "schema_version": SCHEMA_VERSION,
        "suite": analysis.run.run.get("suite", {}).get("name"),
        "limit": analysis.run.limit,
        "untrained_weights": analysis.run.untrained,
        "training": [training.sentence(model) for model in training.models(analysis.run)],
        "training_caveat": " ".join(training.caveat(analysis.run) or ()) or None,
        "notes": NOTES,
        "provenance": analysis.run.run.get("provenance", {}),
        "cells": [_cell(analysis, s, task) for s in analysis.run.settings for task in (*_tasks(analysis), AVERAGE)],
    }


def results_json(document: dict[str, Any]) -> str:
    """Canonical text: the same results give the same bytes."""
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _tasks(analysis: Analysis) -> list[str]:
    return [task.name for task in analysis.run.tasks]


def why_missing(analysis: Analysis, setting: Setting, task: str) -> tuple[str, str | None]:
    """Status and reason of a cell, or of the average over the tasks."""
    manifests = analysis.run.manifests
    if task != AVERAGE:
        manifest = manifests.get((setting.id, task))
        if manifest is None:
            return "missing", "this cell has not been run"
        if manifest.status != "ok":
            return "failed", manifest.error or "the cell failed without a message"
        return ("ok", None) if manifest.num_samples else ("failed", "the cell has no sample")
    bad = [(name, *why_missing(analysis, setting, name)) for name in _tasks(analysis)]
    bad = [(name, status, error) for name, status, error in bad if status != "ok"]
    if not bad:
        return "ok", None
    status = "failed" if any(status == "failed" for _, status, _ in bad) else "missing"
    return status, "; ".join(f"{name}: {error}" for name, _, error in bad)


def _cell(analysis: Analysis, setting: Setting, task: str) -> dict[str, Any]:
    run = analysis.run
    interval: Interval | None = analysis.intervals.get((setting.id, task))
    costs = (
        analysis.costs.get(setting.id) if task == AVERAGE else analysis.task_costs.get((setting.id, task))
    ) or Costs()
    status, error = why_missing(analysis, setting, task)
    metric = next((t.metric for t in run.tasks if t.name == task), None)
    manifests = [run.manifests.get((setting.id, name)) for name in (_tasks(analysis) if task == AVERAGE else [task])]
    tested = analysis.against_dense.get((setting.id, task))
    medians = {
        "prefill_ms_median": costs.prefill_ms,
        "decode_ms_per_token_median": costs.decode_ms,
        "end_to_end_ms_median": costs.end_to_end_ms,
    }
    cell: dict[str, Any] = {
        "setting_id": setting.id,
        "method": setting.method,
        "budget": setting.budget,
        "policy": setting.policy,
        "params": setting.params,
        "model": setting.model or (run.run.get("provenance", {}).get("checkpoint") or {}).get("name"),
        "suite": run.run.get("suite", {}).get("name"),
        "task": task,
        "num_samples": interval.num_samples if interval else 0,
        "num_failed": sum(m.num_failed for m in manifests if m),
        "score": interval and interval.estimate,
        "score_low": interval and interval.low,
        "score_high": interval and interval.high,
        "metric": "macro_average" if task == AVERAGE else metric,
        "decoder_flops": costs.decoder_flops,
        "flops_relative_to_dense": costs.flops_relative,
        "visual_tokens_mean": costs.visual_tokens,
        "num_visual_mean": costs.num_visual,
        "num_text_mean": costs.num_text,
        "kv_bytes": costs.kv_bytes,
        **{name: median and median.estimate for name, median in medians.items()},
        "peak_memory_bytes": costs.peak_memory_bytes,
        "difference_to_dense": tested and tested.comparison.difference,
        "difference_low": tested and tested.comparison.low,
        "difference_high": tested and tested.comparison.high,
        "p_value_holm": tested and tested.adjusted,
        "trained": setting.trained,
        "status": status,
        "error": error,
    }
    if aggregate := getattr(run.manifests.get((setting.id, task)), "aggregate", None):
        cell["aggregate"] = aggregate  # of a benchmark that has its own
    cell["not_measured"] = _reasons(cell, costs, setting)
    return cell


def _reasons(cell: dict[str, Any], costs: Costs, setting: Setting) -> dict[str, str]:
    """Why each null is null."""
    reasons = {}
    for name in [n for n, value in cell.items() if value is None and n not in NO_MEASUREMENTS]:
        timing = name.removesuffix("_median")
        if timing in costs.not_measured:
            reasons[name] = costs.not_measured[timing]
        elif cell["error"]:
            reasons[name] = cell["error"]
        elif name.startswith(("difference", "p_value")):
            reasons[name] = "dense is the reference itself" if setting.is_dense else "no dense cell to compare with"
        else:
            reasons[name] = "no sample record has this figure"
    return reasons


def cells_csv(document: dict[str, Any]) -> str:
    """The cells as a table; an empty field was not measured, and the last column says why."""
    cells = document["cells"]
    buffer = io.StringIO()
    names = [name for name in cells[0] if name not in ("aggregate", "not_measured")]
    aggregated = ["aggregate"] * any("aggregate" in cell for cell in cells)  # a benchmark's own figures, as JSON
    writer = csv.DictWriter(buffer, [*names, *aggregated, "not_measured"], restval="", lineterminator="\n")
    writer.writeheader()
    for cell in cells:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in cell["not_measured"].items())
        params = json.dumps(cell["params"], sort_keys=True)
        aggregate = {"aggregate": json.dumps(cell["aggregate"], sort_keys=True)} if "aggregate" in cell else {}
        writer.writerow({**cell, "params": params, **aggregate, "not_measured": reasons})
    return buffer.getvalue()


def samples_table(analysis: Analysis) -> pd.DataFrame:
    """All sample records, flat, in a fixed order."""
    names = {s.id: s for s in analysis.run.settings}
    rows = analysis.run.samples.drop(columns=["flops"])
    rows = rows.assign(
        method=rows.setting_id.map(lambda s: names[s].method),
        budget=rows.setting_id.map(lambda s: names[s].budget).astype(float),
        policy=rows.setting_id.map(lambda s: names[s].policy).astype(object),
    )
    first = ["setting_id", "method", "budget", "policy", "task", "sample_id"]
    rows = rows[first + [c for c in rows.columns if c not in first]]
    order = {s: place for place, s in enumerate(names)}
    return rows.sort_values(
        ["task", "sample_id", "setting_id"], key=lambda c: c.map(order) if c.name == "setting_id" else c
    )


def samples_csv_gz(analysis: Analysis) -> bytes:
    """The samples without masks and layer lists, as gzip without a date, small enough to be carried in the report."""
    table = samples_table(analysis)
    parts = [f"flops_{part}" for part in FLOPS_PARTS]
    drop = ["kept", "visual_tokens", "layer_flops", "routing", "attempts", "grid", "question", *parts]
    text = (
        table.drop(columns=drop)
        .assign(references=table.references.map(json.dumps))
        .to_csv(index=False, lineterminator="\n")
    )
    return gzip.compress(text.encode(), compresslevel=9, mtime=0)


def write_samples(analysis: Analysis, path: Path) -> None:
    """samples.parquet, whole and atomically."""
    buffer = io.BytesIO()
    samples_table(analysis).to_parquet(buffer, index=False)
    write_bytes_atomically(path, buffer.getvalue())
