"""Tables as data: what stands in each cell, how it sorts, how it is marked. The template only lays them out.

Every number has its unit in the column head, its interval under it, and n in the head where all rows share it or in
the cell where they do not. Best is marked by weight and a star, "not significantly different" by a rule and a sign.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from budgets.match import counts_tokens
from budgets.registry import METHODS
from evaluations.noise import NOISY
from evaluations.records import setting_id
from evaluations.statistics import Comparison, Interval
from reports.comparisons import ALPHA, AVERAGE, Analysis, Tested, budget_title
from reports.data import Setting, TaskInfo
from reports.policy import PolicySection
from reports.results import why_missing
from reports.style import flops, p_value, percent, points, significant, size

MARK_SIGNS = {"best": "\u2605", "tied": "\u2248"}
VERDICTS = {
    "within": ("\u2713", "within 1 point"),
    "better": ("\u25b2", "better"),
    "worse": ("\u25bc", "worse"),
    "undecided": ("?", "undecided"),
}


@dataclass(frozen=True)
class TableCell:
    """One cell. `sort` is None where there is no number; `loss` (0..1) shades it."""

    text: str
    sub: str = ""
    sort: float | None = None
    mark: str = ""
    tone: str = ""
    loss: float = 0.0
    note: str = ""

    @property
    def sign(self) -> str:
        """What marks the best, and those that cannot be told from it."""
        return MARK_SIGNS.get(self.mark, "")


@dataclass(frozen=True)
class Column:
    """A column's head: title, and a second line for unit and n."""

    title: str
    sub: str = ""


@dataclass(frozen=True)
class Row:
    """A setting's cells, one a column."""

    setting: Setting
    cells: list[TableCell]


@dataclass(frozen=True)
class RowGroup:
    """Settings that are compared with each other, under a title."""

    title: str
    rows: list[Row]


@dataclass(frozen=True)
class Table:
    """Columns, and groups of rows."""

    columns: list[Column]
    groups: list[RowGroup] = field(default_factory=list)

    @property
    def not_measured(self) -> list[str]:
        """Every reason for a missing figure, with its column, once."""
        found: dict[str, dict[str, None]] = {}
        for group in self.groups:
            for row in group.rows:
                for column, cell in zip(self.columns, row.cells, strict=True):
                    if cell.tone == "missing" and cell.note:
                        found.setdefault(cell.note, {})[column.title] = None
        return [f"{', '.join(columns)} \u2013 {reason}" for reason, columns in found.items()]


def _grouped(analysis: Analysis, columns: list[Column], make) -> Table:
    """Dense first, then the comparison groups; `make(setting)` gives a row's cells. The first column is of FLOPs."""
    groups = []
    if analysis.run.dense:
        groups.append(RowGroup("Reference", [Row(analysis.run.dense, make(analysis.run.dense))]))
    groups += [RowGroup(g.title, [Row(s, make(s)) for s in g.settings]) for g in analysis.groups]
    by_title = {group.title: group for group in groups}
    for entry in analysis.run.run.get("unreachable", []):
        if entry.get("least") is None or entry["budget"] is None:
            continue
        title = budget_title(entry["budget"])
        if title not in by_title:
            by_title[title] = RowGroup(title, [])
            groups.append(by_title[title])
        by_title[title].rows.append(_out_of_reach(analysis, entry, len(columns)))
    return Table(columns, groups)


def _out_of_reach(analysis: Analysis, entry: dict[str, Any], num_columns: int) -> Row:
    """The row of a budget that a method's rule does not go down to: no failure, and nothing measured."""
    method, budget = entry["method"], entry["budget"]
    setting = next((s for s in analysis.run.settings if s.method == method and s.budget is not None), None)
    title = setting.title if setting else METHODS.get(method).title if method in METHODS else method
    # "at least" must not be rounded down, in either unit of a budget.
    in_tokens = counts_tokens(budget)
    scale, unit = (1, "tokens") if in_tokens else (100, "%")
    least = f"{math.ceil(10 * scale * entry['least']) / 10:g} {unit}"
    reach = TableCell(f"reaches {least}", "at least", tone="quiet", note=entry["reason"])
    trained = setting is not None and setting.trained
    absent = Setting(setting_id(method, budget, None), method, title, budget, None, trained)
    return Row(absent, [reach] + [TableCell("\u2013", tone="quiet", note=entry["reason"])] * (num_columns - 1))


def missing(analysis: Analysis, setting: Setting, task: str) -> TableCell:
    """The cell of a score that does not exist, with the reason."""
    status, reason = why_missing(analysis, setting, task)
    text = "failed" if status == "failed" else "not measured"
    return TableCell(text, tone="missing", note=reason or "no sample has a score")


def _shared_n(analysis: Analysis, task: str) -> int | None:
    numbers = {i.num_samples for (_, name), i in analysis.intervals.items() if name == task}
    return numbers.pop() if len(numbers) == 1 else None


def _score(analysis: Analysis, setting: Setting, task: str) -> TableCell:
    interval = analysis.intervals.get((setting.id, task))
    if interval is None:
        return missing(analysis, setting, task)
    sub = f"{percent(interval.low)} \u2013 {percent(interval.high)}"
    if _shared_n(analysis, task) is None:
        sub += f", n = {interval.num_samples:,}"
    tested = analysis.against_dense.get((setting.id, task))
    loss = min(1.0, max(0.0, -tested.comparison.difference * 1.6)) if tested else 0.0
    mark = analysis.marks.get((setting.id, task), "")
    return TableCell(percent(interval.estimate), sub, interval.estimate, mark, loss=round(loss, 3), note=interval.rule)


def _against_dense(tested: Tested | None, is_dense: bool) -> TableCell:
    if tested is None:
        return TableCell("reference" if is_dense else "not measured", tone="missing" if not is_dense else "quiet")
    c = tested.comparison
    sign, words = VERDICTS[tested.verdict]
    note = f"{c.test}, {p_value(tested.adjusted)} after Holm; n = {c.num_samples:,}"
    sub = f"{points(c.low)} \u2013 {points(c.high)}".replace(" \u2013 ", " to ")
    return TableCell(points(c.difference), f"{sub} \u00b7 {sign} {words}", c.difference, tone=tested.verdict, note=note)


def accuracy_table(analysis: Analysis) -> Table:
    """The main table: average, difference to dense, each task, frontier."""
    run = analysis.run
    n = lambda task: (lambda number: f", n\u00a0=\u00a0{number:,}" if number else "")(_shared_n(analysis, task))
    columns = [
        Column("Decoder FLOPs", "% of dense"),
        Column("Average", f"%{n(AVERAGE)}"),
        Column("To dense", "points, 95 % CI"),
        *(Column(t.title, f"{t.metric.replace('_', ' ')}, %{n(t.name)}") for t in run.tasks),
        Column("On frontier", "bootstrap probability"),
    ]

    largest = max((c.decoder_flops or 0 for c in analysis.costs.values()), default=0)

    def cells(setting: Setting) -> list[TableCell]:
        share = analysis.costs[setting.id].flops_relative
        row = [
            TableCell(f"{100 * share:.3g}", flops(analysis.costs[setting.id].decoder_flops, largest), share)
            if share is not None
            else missing(analysis, setting, AVERAGE),
            _score(analysis, setting, AVERAGE),
            _against_dense(analysis.against_dense.get((setting.id, AVERAGE)), setting.is_dense),
            *(_score(analysis, setting, task.name) for task in run.tasks),
        ]
        if setting.id in analysis.frontier:
            on, probability = analysis.frontier[setting.id]
            words = "\u25cf on it" if on else "\u25cb dominated"
            row.append(TableCell(f"{probability:.2f}", words, probability, tone="on" if on else "off"))
        elif setting.is_oracle or (setting.is_blind or setting.repeats) and analysis.average(setting):
            words = "bound" if setting.is_oracle else "floor" if setting.is_blind else "as its configuration"
            row.append(TableCell(words, tone="quiet"))
        else:
            row.append(missing(analysis, setting, AVERAGE))
        return row

    return _grouped(analysis, columns, cells)


def benchmark_table(analysis: Analysis) -> Table | None:
    """What the benchmarks' own aggregation makes of the answers: the figures that papers quote. None without any."""
    run = analysis.run
    figure = lambda setting, task: getattr(run.manifests.get((setting.id, task.name)), "aggregate", None) or {}
    tasks = [task for task in run.tasks if any(figure(setting, task) for setting in run.settings)]
    if not tasks:
        return None
    quoted = lambda task: next((f["quoted"]["name"] for s in run.settings if "quoted" in (f := figure(s, task))), "")

    def cell(setting: Setting, task: TaskInfo) -> TableCell:
        own = figure(setting, task)
        if "quoted" not in own:
            if not own:
                return missing(analysis, setting, task.name)
            return TableCell("none", tone="missing", note=own.get("error", "papers quote no one figure of it"))
        guesses = own.get("guesses", 0)
        sub = f"{guesses:,} guessed" if guesses else ""
        return TableCell(f"{own['quoted']['value']:.1f}", sub, own["quoted"]["value"])

    columns = [Column(task.title, quoted(task)) for task in tasks]
    return _grouped(analysis, columns, lambda setting: [cell(setting, task) for task in tasks])


def _median(interval: Interval | None, reason: str, noise: float = 0.0) -> TableCell:
    if interval is None:
        return TableCell("not measured", tone="missing", note=reason)
    sub = f"{significant(interval.low)} \u2013 {significant(interval.high)}"
    note = f"n = {interval.num_samples} timing runs, noise {100 * noise:.2g} %"
    if noise > NOISY:
        sub += f", noisy: \u00b1{100 * noise:.0f}\u00a0%"
        note += ": other work disturbed this machine; measure again when it is quiet"
    return TableCell(significant(interval.estimate), sub, interval.estimate, note=note)


def cost_table(analysis: Analysis) -> Table:
    """What each setting costs: counted and measured figures."""
    runs = {c.prefill_ms.num_samples for c in analysis.costs.values() if c.prefill_ms}
    n = f", n\u00a0=\u00a0{runs.pop()}\u00a0runs" if len(runs) == 1 else ""
    largest = lambda name: max((getattr(c, name) or 0 for c in analysis.costs.values()), default=0)
    columns = [
        Column("Decoder FLOPs", "prefill, a sample"),
        Column("Visual tokens", "mean over layers"),
        Column("KV cache", "a sample"),
        Column("Vision tower", f"median ms{n}"),
        Column("Choosing tokens", f"median ms{n}"),
        Column("Prefill", f"median ms{n}"),
        Column("Decode", f"median ms a token{n}"),
        Column("End to end", f"median ms{n}"),
        Column("Peak memory", "largest run"),
    ]

    def cells(setting: Setting) -> list[TableCell]:
        costs = analysis.costs[setting.id]
        absent = missing(analysis, setting, AVERAGE)
        reason = lambda name: costs.not_measured.get(name, "no timing run")
        share = f"{100 * costs.flops_relative:.3g} % of dense" if costs.flops_relative is not None else ""
        return [
            TableCell(flops(costs.decoder_flops, largest("decoder_flops")), share, costs.decoder_flops)
            if costs.decoder_flops is not None
            else absent,
            TableCell(significant(costs.visual_tokens), f"of {significant(costs.num_visual)}", costs.visual_tokens)
            if costs.visual_tokens is not None and costs.num_visual is not None
            else absent,
            TableCell(size(costs.kv_bytes, largest("kv_bytes")), "", costs.kv_bytes)
            if costs.kv_bytes is not None
            else absent,
            _median(costs.tower_ms, reason("tower_ms"), costs.noise.get("tower_ms", 0.0)),
            _median(costs.scoring_ms, reason("scoring_ms")),
            _median(costs.prefill_ms, reason("prefill_ms"), costs.noise.get("prefill_ms", 0.0)),
            _median(costs.decode_ms, reason("decode_ms_per_token"), costs.noise.get("decode_ms", 0.0)),
            _median(costs.end_to_end_ms, reason("end_to_end_ms"), costs.noise.get("end_to_end_ms", 0.0)),
            TableCell(size(costs.peak_memory_bytes, largest("peak_memory_bytes")), "", float(costs.peak_memory_bytes))
            if costs.peak_memory_bytes is not None
            else TableCell("not measured", tone="missing", note=reason("peak_memory_bytes")),
        ]

    return _grouped(analysis, columns, cells)


@dataclass(frozen=True)
class Matrix:
    """Pairwise differences of averages within a group, row minus column."""

    title: str
    settings: list[Setting]
    cells: list[list[TableCell]]


def matrices(analysis: Analysis) -> list[Matrix]:
    """One matrix a comparison group, dense included."""
    result = []
    for group in analysis.groups:
        tests = analysis.matrices.get(group.key)
        if not tests:
            continue
        known = {s.id for pair in tests for s in analysis.run.settings if s.id in pair}
        settings = [
            s for s in ([analysis.run.dense] if analysis.run.dense else []) + list(group.settings) if s.id in known
        ]
        cells = [[_pair(tests, row, column) for column in settings] for row in settings]
        result.append(Matrix(group.title, settings, cells))
    return result


def _pair(tests, row: Setting, column: Setting) -> TableCell:
    if row == column:
        return TableCell("\u2013", tone="quiet")
    flip = (row.id, column.id) not in tests
    tested = tests.get((column.id, row.id) if flip else (row.id, column.id))
    if tested is None:
        return TableCell("", tone="quiet", note="no sample in common")
    c, sign = tested.comparison, -1 if flip else 1
    low, high = sorted((sign * c.low, sign * c.high))
    clear = tested.adjusted < ALPHA
    tone = ("plus" if sign * c.difference > 0 else "minus") if clear else "unclear"
    note = (
        f"{row.label} minus {column.label}: {points(sign * c.difference)} points, "
        f"95 % CI {points(low)} to {points(high)}, "
        f"{p_value(tested.adjusted)} after Holm, {c.test}, n = {c.num_samples:,}"
    )
    sub = p_value(tested.adjusted).replace("p = ", "").replace("p < ", "< ")
    return TableCell(
        points(sign * c.difference) + ("*" if clear else ""), sub, sign * c.difference, tone=tone, note=note
    )


def _versus(comparison: Comparison | None, why: str) -> TableCell:
    if comparison is None:
        return TableCell("not measured", tone="missing", note=why)
    c = comparison
    sub = f"{points(c.low)} to {points(c.high)}, {p_value(c.p_value)}"
    clear = c.low > 0 or c.high < 0
    tone = ("better" if c.difference > 0 else "worse") if clear else ""
    return TableCell(points(c.difference), sub, c.difference, tone=tone, note=f"{c.test}, n = {c.num_samples:,}")


def standings_table(section: PolicySection) -> Table:
    """Each policy against the best fixed configuration of no higher cost, and against its own choices dealt out."""
    agreement = {choice.setting.id: choice for choice in section.choices}
    columns = [
        Column("Decoder FLOPs", "% of dense, mean"),
        Column("Average", "%"),
        Column("To the best fixed", "of no higher mean cost; points, 95 % CI"),
        Column("To random", "the same choices dealt out; points, 95 % CI"),
        Column("Gets its label", "% of samples"),
    ]
    rows = []
    for standing in section.standings:
        i, rival = standing.score, standing.rival
        versus = _versus(standing.against_rival, "every fixed configuration costs more")
        if rival is not None and standing.against_rival is not None:
            versus = replace(versus, sub=f"{versus.sub} \u00b7 {rival.dial}")
        random = _versus(standing.against_random, "makes no choice by sample")
        if standing.against_random is None:
            random = TableCell("\u2013", tone="quiet")
        choice = agreement.get(standing.setting.id)
        label = TableCell("\u2013", tone="quiet")
        if choice is not None and choice.confusion:
            cheaper = f"{100 * choice.cheaper:.0f} % got less"
            label = TableCell(f"{100 * choice.agreement:.0f}", cheaper, choice.agreement)
        rows.append(
            Row(
                standing.setting,
                [
                    TableCell(f"{100 * standing.cost:.3g}", "", standing.cost),
                    TableCell(percent(i.estimate), f"{percent(i.low)} \u2013 {percent(i.high)}", i.estimate),
                    versus,
                    random,
                    label,
                ],
            )
        )
    return Table(columns, [RowGroup("Policies by rising mean cost", rows)] if rows else [])
