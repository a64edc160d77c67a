"""`build(folder)`: everything the report consists of, from a run folder's records, at any time, in the same bytes.

Nothing of the machine or the moment goes in: no paths, no dates but those of the run. The page is one file without
network (a Content-Security-Policy in it says so to the browser), under 3 MB: if pictures are too many, fewer are shown.
"""

from __future__ import annotations

import base64
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.markers import MarkerStyle

from evaluations.records import NUM_EXPLORER_SAMPLES, RunFolder, setting_id, write_bytes_atomically
from reports import explorer, latex, results, speed, tables, training
from reports.analyses import ModelAnalyses, load_analyses
from reports.comparisons import ALPHA, MARGIN, Analysis, analyse
from reports.data import Run, load
from reports.figures_compute import all_figures
from reports.plotting import Drawing
from reports.policy import PolicySection, sections
from reports.published import PUBLISHED
from reports.style import PALETTE, css_name, method_style, size
from reports.verdict import tiles, verdict

MAX_BYTES = 3_000_000
SAMPLES_BYTES = 700_000  # a larger compressed samples table stays outside the page


@dataclass(frozen=True)
class Download:
    """A file carried in the page."""

    name: str
    title: str
    uri: str
    num_bytes: int


def build(folder: str | Path) -> Path:
    """Write report.html, results.json, cells.csv, samples.parquet and figures/ into a run folder.

    Returns:
        The path of report.html.

    Raises:
        evaluations.records.RecordsError: the path is no run folder or a file of it is broken.
        ValueError: it holds no finished cell.
    """
    folder = Path(folder)
    if RunFolder.open(folder).read_run().get("kind") == "speed":
        return speed.build(folder)
    analysis = analyse(load(folder))
    policy, analyses = sections(analysis), load_analyses(folder)
    drawings = all_figures(analysis, policy, analyses, watermark(analysis.run))
    document = results.results(analysis)
    write_bytes_atomically(folder / "results.json", results.results_json(document).encode())
    write_bytes_atomically(folder / "cells.csv", results.cells_csv(document).encode())
    results.write_samples(analysis, folder / "samples.parquet")
    for drawing in drawings:
        for suffix, content in drawing.files.items():
            write_bytes_atomically(folder / "figures" / f"{drawing.name}.{suffix}", content)
    _remove_old_figures(folder, drawings)
    path = folder / "report.html"
    write_bytes_atomically(path, page(analysis, drawings, document, policy, analyses).encode())
    return path


def watermark(run: Run) -> str:
    """What a reader must not miss, or an empty text."""
    marks = [f"SUBSET (--limit {run.limit})"] if run.limit is not None else []
    return ", ".join(marks + ["UNTRAINED WEIGHTS"] * run.untrained)


def page(
    analysis: Analysis,
    drawings: list[Drawing],
    document: dict,
    policy: Sequence[PolicySection] = (),
    analyses: Sequence[ModelAnalyses] = (),
) -> str:
    """The HTML, with as many samples a task as fit."""
    context = {**_context(analysis, drawings, document), **_more(policy, analyses)}
    template = _environment().get_template("report.html.j2")
    for per_task in (NUM_EXPLORER_SAMPLES, 9, 6, 4, 2, 0):
        share = 1_300_000 // max(1, per_task * len(analysis.run.tasks))  # bytes of a picture; base64 adds a third
        shown = explorer.cards(analysis, per_task, min(24_000, share * 3 // 4))
        html = template.render(**context, cards=shown, per_task=per_task)
        if len(html.encode()) <= MAX_BYTES or per_task == 0:
            return html
    raise AssertionError("unreachable")


def swatch(method: str) -> Markup:
    """The method's marker in its colour, as in the figures."""
    style = method_style(method)
    marker = MarkerStyle(style.marker)
    path = marker.get_path().transformed(marker.get_transform())
    scale = 4.6 / np.abs(path.vertices).max()
    commands = []
    for points, code in path.iter_segments(curves=True, simplify=False):
        letter = {1: "M", 2: "L", 3: "Q", 4: "C", 79: "z"}[int(code)]
        pairs = "" if letter == "z" else " ".join(f"{v:.2f}" for v in (points.reshape(-1, 2) * (scale, -scale)).ravel())
        commands.append(letter + pairs)
    return Markup(
        f'<svg class="swatch" viewBox="-6 -6 12 12" aria-hidden="true"><path d="{"".join(commands)}" '
        f'style="fill:var(--{style.colour})"/></svg>'
    )


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    colour = lambda method: method_style(method).colour
    environment.filters |= {"css_name": css_name, "swatch": swatch, "size": size, "colour": colour}
    return environment


def _download(name: str, title: str, mime: str, content: bytes) -> Download:
    return Download(name, title, f"data:{mime};base64,{base64.b64encode(content).decode()}", len(content))


def _downloads(analysis: Analysis, document: dict) -> tuple[list[Download], str]:
    """The carried files, and a remark on what was too large."""
    samples = results.samples_csv_gz(analysis)
    files = [
        _download(
            "results.json",
            "All cells with intervals and reasons",
            "application/json",
            results.results_json(document).encode(),
        ),
        _download("cells.csv", "The same as a table", "text/csv", results.cells_csv(document).encode()),
        _download("table.tex", "Main table, booktabs", "text/x-tex", latex.latex_table(analysis).encode()),
        _download("references.bib", "BibTeX", "text/x-bibtex", latex.bibtex(analysis).encode()),
    ]
    if len(samples) <= SAMPLES_BYTES:
        files.insert(2, _download("samples.csv.gz", "Every answer and score", "application/gzip", samples))
        return files, "Beside this file: samples.parquet (every record) and figures/ (SVG, PDF, PNG)."
    remark = f"The table of all answers ({size(len(samples))} compressed) is not carried here: see samples.parquet."
    return files, remark + " Figures are in figures/ (SVG, PDF, PNG)."


def _context(analysis: Analysis, drawings: list[Drawing], document: dict) -> dict:
    run = analysis.run
    downloads, remark = _downloads(analysis, document)
    figures = {d.name: d for d in drawings}
    methods = {s.method: s for s in run.settings}
    timings = run.timings
    return {
        "run": run,
        "analysis": analysis,
        "record": _optional(run.run),
        "suite": _optional(run.run.get("suite")),
        "provenance": _optional(run.run.get("provenance")),
        "checkpoint": _optional(run.run.get("provenance", {}).get("checkpoint")),
        "verdict": verdict(analysis),
        "training": [training.sentence(model) for model in training.models(run)],
        "training_caveat": training.caveat(run),
        "tiles": tiles(analysis),
        "watermark": watermark(run),
        "figures": {name: (d.title, d.caption, Markup(d.page_svg)) for name, d in figures.items()},
        "methods": list(methods.values()),
        "accuracy_table": tables.accuracy_table(analysis),
        "benchmark_table": tables.benchmark_table(analysis),
        "cost_table": tables.cost_table(analysis),
        "matrices": tables.matrices(analysis),
        "failures": _failures(analysis),
        "default_group": max((i for i, g in enumerate(analysis.groups, 1) if g.budget is not None), default=1),
        "palette": PALETTE,
        "alpha": ALPHA,
        "margin": f"{100 * MARGIN:g}",
        "batch_sizes": sorted({t.batch_size for t in timings}),
        "num_new_tokens": sorted({t.num_new_tokens for t in timings}),
        "num_timing_runs": len(timings),
        "rules": sorted({i.rule for i in analysis.intervals.values()}),
        "tests": sorted({t.comparison.test for t in analysis.against_dense.values()}),
        "lengths": _lengths(run),
        "downloads": downloads,
        "download_remark": remark,
        "bibtex": latex.bibtex(analysis),
        "latex_table": latex.latex_table(analysis),
        "provenance_text": json.dumps({k: v for k, v in run.run.items() if k != "cells"}, indent=1, ensure_ascii=False),
    }


def _more(policy: Sequence[PolicySection], analyses: Sequence[ModelAnalyses]) -> dict:
    """The sections that not every run has, and what others have published."""
    return {
        "policy": [(section, css_name(section.family.method), tables.standings_table(section)) for section in policy],
        "analyses": [(found, css_name(found.model)) for found in analyses],
        "published": PUBLISHED,
    }


def _optional(entries: dict | None) -> dict:
    """A part of run.json whose absent entries read as None: an older or foreign run may lack some."""
    return defaultdict(lambda: None, entries or {})


def _failures(analysis: Analysis) -> list[tuple[str, str, str]]:
    """Settings that could not be run on this model, failed cells with their errors, and cells with failed samples."""
    titles = {task.name: task.title for task in analysis.run.tasks}
    found = [
        (
            setting_id(entry["method"], entry["budget"], entry.get("policy")),
            "all tasks",
            f"not run: {entry['reason']}",
        )
        for entry in analysis.run.run.get("unreachable", [])
        if entry.get("least") is None  # else its rule does not go so low: a row of the tables says so
    ]
    for setting in analysis.run.settings:
        for task in titles:
            manifest = analysis.run.manifests.get((setting.id, task))
            if manifest and manifest.status != "ok":
                found.append((setting.label, titles[task], manifest.error or "failed without a message"))
            elif manifest and manifest.num_failed:
                text = f"{manifest.num_failed} of {manifest.num_samples} samples failed and count as wrong"
                found.append((setting.label, titles[task], text))
    return found


def _lengths(run: Run) -> str:
    """Visual and text tokens of the samples, which every saving depends on."""
    rows = run.samples
    if not len(rows) or rows.num_visual.isna().all():
        return "not recorded"
    return (
        f"N_v = {rows.num_visual.mean():.0f} visual tokens at full size, "
        f"N_t = {rows.num_text.mean():.1f} text tokens a sample (means)"
    )


def _remove_old_figures(folder: Path, drawings: list[Drawing]) -> None:
    """Figures of an earlier build that this one does not draw would lie beside the report as if they were its own."""
    names = {drawing.name for drawing in drawings}
    known = r"pareto|tasks_absolute|tasks_relative|flops_by_part|visual_tokens|layer_flops|policy.*|layer_drop_.*"
    known += r"|observations_.*|looks_.*"  # the second as earlier versions called them
    for path in (folder / "figures").glob("*"):
        if path.stem not in names and re.fullmatch(known, path.stem):
            path.unlink()
