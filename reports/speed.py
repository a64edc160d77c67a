"""The report of a speed run: one table a number of visual tokens and a batch size, and the same for programs.

Reads the run folder that `python -m evaluations.speed` wrote; imports neither torch nor the model. A time is a median
with its 5th and 95th percentile; a speed-up is the median of the ratios within a round, of processor time on a CPU
(other work on the machine does not count) and of device time on a GPU.
"""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from evaluations.noise import NOISY, Ratio, Spread, ratio_by_round, spread
from evaluations.records import RunFolder, TimingRecord, write_bytes_atomically
from reports.style import PALETTE, flops, significant, size

# Column, what is measured, and the processor time of the same.
STAGES = (
    ("Tower", "tower_ms", "cpu_tower_ms"),
    ("Choosing tokens", "scoring_ms", None),
    ("Prefill", "prefill_ms", "cpu_prefill_ms"),
    ("Decode, a token", "decode_ms_per_token", "cpu_decode_ms_per_token"),
    ("End to end", "end_to_end_ms", "cpu_end_to_end_ms"),
)


@dataclass(frozen=True)
class Row:
    """One setting at one length and batch size.

    Args:
        price: its entry of run.json `prices`.
        times, cpu_times: spreads by the name of the wall time; a stage that was not measured is absent.
        prefill_speed_up: over dense, round by round; None without dense.
        tokens_per_s: new tokens of the whole batch by end-to-end time.
    """

    price: dict[str, Any]
    batch_size: int
    modelled: bool
    times: dict[str, Spread]
    cpu_times: dict[str, Spread]
    prefill_speed_up: Ratio | None
    tokens_per_s: float
    kv_bytes: int | None
    peak_bytes: int | None
    peak_without_weights_bytes: int | None

    @property
    def share_of_saving(self) -> float | None:
        """Speed-up by what the causal FLOPs promise: 1 where time follows FLOPs."""
        return self.prefill_speed_up and self.prefill_speed_up.median / self.price["saving_causal"]

    @property
    def noisy_stages(self) -> list[str]:
        """Stages whose time (on a CPU: processor time) spreads by more than 10 %."""
        judged = {**self.times, **self.cpu_times}
        return [title for title, name, _ in STAGES if name in judged and judged[name].is_noisy]


@dataclass(frozen=True)
class Table:
    """All settings at one length and batch size; the order is that of the run."""

    num_visual: int
    num_text: int
    batch_size: int
    rows: list[Row]


def _spreads(rows: list[TimingRecord], names: list[tuple[str, str]]) -> dict[str, Spread]:
    found = {}
    for key, column in names:
        values = [getattr(row, column) for row in rows]
        if values and all(value is not None for value in values):
            found[key] = spread(values)
    return found


def _speed_up(rows: list[TimingRecord], reference: list[TimingRecord]) -> Ratio | None:
    """Prefill of the reference by that of the setting, over the rounds that both have."""
    column = "cpu_prefill_ms" if all(r.cpu_prefill_ms and r.device == "cpu" for r in rows + reference) else "prefill_ms"
    ours, theirs = ({row.round: getattr(row, column) for row in side} for side in (rows, reference))
    rounds = sorted(set(ours) & set(theirs))
    return ratio_by_round([theirs[r] for r in rounds], [ours[r] for r in rounds]) if rounds else None


def tables(run: dict[str, Any], timings: list[TimingRecord]) -> list[Table]:
    """The raw runs, summarised."""
    groups: dict[tuple[int, int, str], list[TimingRecord]] = defaultdict(list)
    for row in timings:
        groups[row.num_visual, row.batch_size, row.setting_id].append(row)
    found: dict[tuple[int, int], list[Row]] = defaultdict(list)
    for price in run["prices"]:
        length, setting = price["num_visual"], price["setting_id"]
        for batch_size in sorted({b for n, b, s in groups if (n, s) == (length, setting)}):
            rows = groups[length, batch_size, setting]
            times = _spreads(rows, [(name, name) for _, name, _ in STAGES])
            cpu = _spreads(rows, [(name, cpu_name) for _, name, cpu_name in STAGES if cpu_name])
            peaks = [r.peak_memory_bytes for r in rows if r.peak_memory_bytes is not None]
            beyond = [r.peak_memory_without_weights_bytes for r in rows]
            found[length, batch_size].append(
                Row(
                    price, batch_size, rows[0].modelled, times, cpu if rows[0].device == "cpu" else {},
                    _speed_up(rows, groups[length, batch_size, "dense"]),
                    1e3 * batch_size * rows[0].num_new_tokens / times["end_to_end_ms"].median,
                    rows[0].kv_bytes, max(peaks, default=None), max((b for b in beyond if b is not None), default=None),
                )
            )  # fmt: skip
    text = {price["num_visual"]: price["num_text"] for price in run["prices"]}
    return [Table(n, text[n], b, rows) for (n, b), rows in sorted(found.items())]


# --- for people -----------------------------------------------------------------------------------------------------


def _time(found: Spread | None, cpu: Spread | None) -> tuple[str, str]:
    """A time and what stands under it."""
    if found is None:
        return "–", "not measured"
    judged = cpu or found
    parts = [f"{significant(found.p5)} – {significant(found.p95)}"] if found.num_runs > 1 else []
    parts += [f"CPU {significant(cpu.median)}"] if cpu else []
    parts += [f"noisy: ±{100 * judged.noise:.0f} %"] if judged.is_noisy else []
    return significant(found.median), ", ".join(parts)


def cells(row: Row) -> list[tuple[str, str]]:
    """What the page shows of a row: (figure, small print) a column."""
    speed_up, share = row.prefill_speed_up, row.share_of_saving
    saving = f"saving ×{row.price['saving']:.2f}, causal ×{row.price['saving_causal']:.2f}"
    interval = "" if speed_up is None or row.modelled else f"{speed_up.low:.2f} – {speed_up.high:.2f}"
    return [
        (flops(row.price["decoder_flops"]), saving),
        *(_time(row.times.get(name), row.cpu_times.get(name)) for _, name, _ in STAGES),
        ("–", "no dense run") if speed_up is None else (f"×{speed_up.median:.2f}", interval),
        ("–", "") if share is None else (f"{share:.2f}", "of the causal saving"),
        (f"{row.tokens_per_s:.3g}", "tokens/s"),
        ("–", "not measured") if row.kv_bytes is None else (size(row.kv_bytes), ""),
        ("–", "not measured") if row.peak_without_weights_bytes is None
        else (size(row.peak_without_weights_bytes), f"{size(row.peak_bytes)} with weights"),
    ]  # fmt: skip


COLUMNS = ("Decoder FLOPs", *(f"{title}, ms" for title, _, _ in STAGES), "Prefill speed-up", "Follows FLOPs",
           "Throughput", "KV cache", "Peak memory")  # fmt: skip


def text_table(folder: str | Path) -> str:
    """The tables for a terminal."""
    opened = RunFolder.open(folder)
    run, lines = opened.read_run(), []
    for table in tables(run, opened.timings()):
        modelled = ", MODELLED by the roofline" if any(row.modelled for row in table.rows) else ""
        lines.append(f"{table.num_visual} visual + {table.num_text} text tokens, batch {table.batch_size}{modelled}")
        lines.append(
            f"  {'':<28}{'saving':>8}{'tower':>9}{'choose':>9}{'prefill':>9}{'decode':>9}{'total':>9}   speed-up"
        )
        for row in table.rows:
            figures = "".join(f"{_short(row.times.get(name)):>9}" for _, name, _ in STAGES)
            speed_up = row.prefill_speed_up
            mark = f"   x{speed_up.median:.2f}" if speed_up else ""
            mark += f"  ({row.share_of_saving:.2f} of causal)" if speed_up else ""
            mark += f"  noisy: {', '.join(row.noisy_stages)}" if row.noisy_stages else ""
            lines.append(f"  {row.price['setting_id']:<28}{row.price['saving_causal']:>7.2f}x{figures}{mark}")
        lines.append("  ms, medians; saving: decoder prefill FLOPs, attention causal")
    return "\n".join(lines)


def _short(found: Spread | None) -> str:
    return "-" if found is None else f"{found.median:.4g}"


# --- files ----------------------------------------------------------------------------------------------------------


def document(run: dict[str, Any], found: list[Table]) -> dict[str, Any]:
    """results.json of a speed run."""
    summary = lambda spreads: {name: vars(each) for name, each in spreads.items()}
    return {
        "schema_version": 1, "kind": "speed", "provenance": run["provenance"], "machine": run.get("machine"),
        "config": run["config"], "modelled": run.get("modelled"),
        "cells": [
            {
                **row.price, "batch_size": row.batch_size, "modelled": row.modelled, "wall_ms": summary(row.times),
                "cpu_ms": summary(row.cpu_times),
                "prefill_speed_up": row.prefill_speed_up and vars(row.prefill_speed_up),
                "share_of_causal_saving": row.share_of_saving, "tokens_per_s": row.tokens_per_s,
                "kv_bytes_of_batch": row.kv_bytes, "peak_memory_bytes": row.peak_bytes,
                "peak_memory_without_weights_bytes": row.peak_without_weights_bytes, "noisy": row.noisy_stages,
            }
            for table in found
            for row in table.rows
        ],
    }  # fmt: skip


def timings_csv(timings: list[TimingRecord]) -> str:
    """Every raw run."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [f for f in TimingRecord.__dataclass_fields__], lineterminator="\n")
    writer.writeheader()
    for row in timings:
        writer.writerow({**row.to_dict(), "not_measured": "; ".join(f"{k}: {v}" for k, v in row.not_measured.items())})
    return buffer.getvalue()


def build(folder: str | Path) -> Path:
    """Write report.html, results.json and timings.csv into the run folder of a speed run.

    Raises:
        evaluations.records.RecordsError: the path is no run folder or a file of it is broken.
        ValueError: nothing has been timed in it.
    """
    opened = RunFolder.open(folder)
    run, timings = opened.read_run(), opened.timings()
    if not timings:
        raise ValueError(f"{opened.path} holds no timing yet; run `python -m evaluations.speed` first")
    found = tables(run, timings)
    environment = Environment(
        loader=PackageLoader("reports"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["css_name"] = str
    html = environment.get_template("speed.html.j2").render(
        run=run, tables=found, columns=COLUMNS, cells=cells, palette=PALETTE, noisy=round(100 * NOISY),
        methods=[], analysis={"groups": []},  # of which the style sheet makes switches
        provenance_text=json.dumps(run, indent=1, ensure_ascii=False),
    )  # fmt: skip
    text = json.dumps(document(run, found), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes_atomically(opened.path / "results.json", text.encode())
    write_bytes_atomically(opened.path / "timings.csv", timings_csv(timings).encode())
    path = opened.path / "report.html"
    write_bytes_atomically(path, html.encode())
    return path
