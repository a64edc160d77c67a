"""Every judgement the report makes, computed once: intervals, differences to dense, best marks, matrices, frontiers.

The average is the macro-average over the suite's tasks and exists only for a setting that has all of them. Paired
comparisons use the samples both settings have. P-values are Holm-corrected over the family that one display shows.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from budgets import pareto
from budgets.match import budget_label, counts_tokens
from evaluations import statistics
from evaluations.noise import spread
from evaluations.statistics import Comparison, Interval
from reports.data import Run, Setting

AVERAGE = "average"
MARGIN = 0.01  # non-inferior: shown to lose no more than one point
ALPHA = 0.05


@dataclass(frozen=True)
class Tested:
    """A comparison and its p-value after Holm's correction over its family."""

    comparison: Comparison
    adjusted: float

    @property
    def verdict(self) -> str:
        """What may be said: "within" the margin, "better", "worse", or "undecided".

        A difference can be significant and yet shown to be within the margin; the margin is what a user cares about.
        """
        if self.adjusted < ALPHA and self.comparison.difference > 0:
            return "better"
        if statistics.non_inferior(self.comparison, MARGIN):
            return "within"
        return "worse" if self.adjusted < ALPHA else "undecided"


@dataclass(frozen=True)
class Group:
    """Settings that are compared with each other: one budget, or one kind of setting without a shared budget."""

    key: str
    title: str
    settings: tuple[Setting, ...]
    budget: float | None = None


@dataclass(frozen=True)
class Costs:
    """What a setting costs: macro means over tasks, medians over timing runs at batch 1. None: not measured."""

    decoder_flops: float | None = None
    flops_relative: float | None = None
    kv_bytes: float | None = None
    visual_tokens: float | None = None
    num_visual: float | None = None
    num_text: float | None = None
    prefill_ms: Interval | None = None
    decode_ms: Interval | None = None
    end_to_end_ms: Interval | None = None
    tower_ms: Interval | None = None
    scoring_ms: Interval | None = None
    noise: dict[str, float] = field(default_factory=dict)  # of each timing, relative to its median
    peak_memory_bytes: int | None = None
    not_measured: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Analysis:
    """All judgements over a run.

    Args:
        intervals: by (setting id, task or "average").
        against_dense: the same keys; adjusted over the settings of that task.
        marks: "best" or "tied" (not significantly different from the best) by (setting id, task or "average").
        matrices: by group key: (row id, column id) -> row minus column, on the average.
        frontier: by setting id: on the exact accuracy-FLOPs frontier, and bootstrap probability of being on it.
    """

    run: Run
    intervals: dict[tuple[str, str], Interval]
    against_dense: dict[tuple[str, str], Tested]
    groups: list[Group]
    marks: dict[tuple[str, str], str]
    matrices: dict[str, dict[tuple[str, str], Tested]]
    costs: dict[str, Costs]
    task_costs: dict[tuple[str, str], Costs]
    frontier: dict[str, tuple[bool, float]]

    def average(self, setting: Setting) -> Interval | None:
        """The macro-average over the tasks with its interval; None where a task is missing."""
        return self.intervals.get((setting.id, AVERAGE))


def analyse(run: Run) -> Analysis:
    """Compute everything. Seeded: equal runs give equal results."""
    tables = {task.name: (run.scores(task.name), run.images_of(task.name)) for task in run.tasks}
    intervals: dict[tuple[str, str], Interval] = {}
    for setting in run.settings:
        parts: list[Interval] = []
        for task, (scores, images) in tables.items():
            column = scores[setting.id].dropna()
            if len(column):
                parts.append(statistics.mean_interval(column.to_numpy(), images[column.index].to_numpy()))
                intervals[setting.id, task] = parts[-1]
        if len(parts) == len(tables):
            intervals[setting.id, AVERAGE] = statistics.average_interval(parts)
    compare = _Comparer(tables)
    groups = _groups(run)
    task_costs, costs = _costs(run)
    return Analysis(
        run,
        intervals,
        _against_dense(run, compare),
        groups,
        _marks(groups, intervals, compare, run),
        _matrices(run, groups, compare),
        costs,
        task_costs,
        _frontier(run, tables, intervals, costs),
    )


class _Comparer:
    """Paired comparisons of two settings on one task or on the average, each computed once."""

    def __init__(self, tables) -> None:
        self.tables, self.known = tables, {}

    def __call__(self, a: str, b: str, task: str) -> Comparison | None:
        key = (a, b, task)
        if key not in self.known:
            pairs = []
            for name in self.tables if task == AVERAGE else [task]:
                scores, images = self.tables[name]
                both = scores[[a, b]].dropna()
                if both.empty:
                    self.known[key] = None
                    break
                pairs.append((both[a].to_numpy(), both[b].to_numpy(), images[both.index].to_numpy()))
            else:
                self.known[key] = statistics.paired_comparison(pairs)
        return self.known[key]


def _tested(comparisons: dict) -> dict:
    present = {key: comparison for key, comparison in comparisons.items() if comparison is not None}
    adjusted = statistics.holm([comparison.p_value for comparison in present.values()])
    return {key: Tested(comparison, p) for (key, comparison), p in zip(present.items(), adjusted, strict=True)}


def _against_dense(run: Run, compare: _Comparer) -> dict[tuple[str, str], Tested]:
    if run.dense is None:
        return {}
    result = {}
    for task in (*compare.tables, AVERAGE):
        family = {(s.id, task): compare(s.id, run.dense.id, task) for s in run.settings if not s.is_dense}
        result |= _tested(family)
    return result


def budget_title(budget: float) -> str:
    """What the group of a shared budget is called."""
    of_what = "visual tokens, mean over the layers" if counts_tokens(budget) else "of dense decoder FLOPs"
    return f"Budget {budget_label(budget).removesuffix(' tokens')} {of_what}"


def _groups(run: Run) -> list[Group]:
    """Budgets that at least two methods share, highest first; then what has a cost of its own; then policies."""
    by_budget, own, policies = defaultdict(list), [], []
    for setting in run.settings:
        if setting.is_policy:
            policies.append(setting)
        elif not setting.is_dense:
            (by_budget[setting.budget] if setting.budget is not None else own).append(setting)
    groups = []
    for budget in sorted(by_budget, reverse=True):
        members = by_budget[budget]
        if len(members) == 1 and len(by_budget) > 1:
            own += members
        else:
            groups.append(Group(f"budget-{budget:g}", budget_title(budget), tuple(members), budget))
    if own:
        groups.append(Group("own", "Settings at a cost of their own", tuple(own)))
    if policies:
        groups.append(Group("policies", "Policies: a configuration chosen per sample", tuple(policies)))
    return groups


def _marks(groups, intervals, compare: _Comparer, run: Run) -> dict[tuple[str, str], str]:
    """Best and not significantly different from it, within each shared budget: only equal cost makes a fair winner."""
    marks = {}
    for group in groups:
        for task in (*compare.tables, AVERAGE):
            members = [s.id for s in group.settings if (s.id, task) in intervals]
            if group.budget is None or len(members) < 2:
                continue
            best = max(members, key=lambda m: intervals[m, task].estimate)
            marks[best, task] = "best"
            tests = _tested({m: compare(best, m, task) for m in members if m != best})
            marks |= {(m, task): "tied" for m, tested in tests.items() if tested.adjusted >= ALPHA}
    return marks


def _matrices(run: Run, groups: list[Group], compare: _Comparer) -> dict[str, dict[tuple[str, str], Tested]]:
    matrices = {}
    for group in groups:
        members = [s.id for s in ((run.dense,) if run.dense else ()) + group.settings if not s.is_swept]
        upper = _tested({(a, b): compare(a, b, AVERAGE) for a, b in combinations(members, 2)})
        if upper:
            matrices[group.key] = upper
    return matrices


def _mean(values) -> float | None:
    values = np.asarray(list(values), dtype=float)
    return float(values.mean()) if values.size and np.isfinite(values).all() else None


def _costs(run: Run) -> tuple[dict[tuple[str, str], Costs], dict[str, Costs]]:
    """Costs per cell, and their macro-averages; timings belong to the setting, measured on one fixed sample list."""
    per_cell, per_setting = {}, {}
    names = ["decoder_flops", "dense_decoder_flops", "kv_bytes", "visual_tokens_mean", "num_visual", "num_text"]
    means = run.samples.groupby(["setting_id", "task"], sort=False)[names].mean()
    for setting in run.settings:
        timed = _timed(run, setting)
        cells = []
        for task in run.tasks:
            if (setting.id, task.name) in means.index:
                row = {k: None if np.isnan(v) else float(v) for k, v in means.loc[(setting.id, task.name)].items()}
                flops, dense = row["decoder_flops"], row["dense_decoder_flops"]
                cells.append(
                    Costs(
                        flops,
                        flops / dense if flops is not None and dense else None,
                        row["kv_bytes"],
                        row["visual_tokens_mean"],
                        row["num_visual"],
                        row["num_text"],
                        **timed,
                    )
                )
                per_cell[setting.id, task.name] = cells[-1]
        whole = ("decoder_flops", "flops_relative", "kv_bytes", "visual_tokens", "num_visual", "num_text")
        complete = len(cells) == len(run.tasks)
        averages = {
            name: _mean(np.nan if getattr(c, name) is None else getattr(c, name) for c in cells) if complete else None
            for name in whole
        }
        per_setting[setting.id] = Costs(**averages, **timed)
    return per_cell, per_setting


def _timed(run: Run, setting: Setting) -> dict:
    """Medians over the runs at batch 1, and the reason for each figure that is missing."""
    rows = [t for t in run.timings if t.setting_id == setting.id and t.batch_size == 1]
    fields = {
        "prefill_ms": "prefill_ms",
        "decode_ms": "decode_ms_per_token",
        "end_to_end_ms": "end_to_end_ms",
        "tower_ms": "tower_ms",
        "scoring_ms": "scoring_ms",
    }
    reasons = {name: reason for row in rows for name, reason in row.not_measured.items()}
    untimed = run.run.get("not_timed", {}).get(setting.id)
    untimed = untimed and f"timing failed: {untimed}"
    if setting.is_composed:
        untimed = "composed of the configurations' answers, without a run of its own to time"
    timed: dict = {"not_measured": reasons, "noise": {}}
    for name, column in fields.items():
        values = [getattr(row, column) for row in rows if getattr(row, column) is not None]
        timed[name] = statistics.median_interval(values) if values else None
        if values:
            timed["noise"][name] = spread(values).noise
        else:
            reasons.setdefault(column, untimed or "no timing run at batch size 1 in this run folder")
    peaks = [row.peak_memory_bytes for row in rows if row.peak_memory_bytes is not None]
    timed["peak_memory_bytes"] = max(peaks) if peaks else None
    if not peaks:
        reasons.setdefault("peak_memory_bytes", untimed or "no timing run recorded a peak")
    return timed


def _frontier(run: Run, tables, intervals, costs: dict[str, Costs]) -> dict[str, tuple[bool, float]]:
    """Exact accuracy-FLOPs frontier of the averages; images are resampled jointly over settings.

    Left out are oracles, and the blind control, which nothing can undercut.
    """
    is_rival = lambda s: not (s.is_oracle or s.is_blind or s.repeats)
    ids = [
        s.id
        for s in run.settings
        if (s.id, AVERAGE) in intervals and costs[s.id].flops_relative is not None and is_rival(s)
    ]
    if not ids:
        return {}
    accuracy = np.array([intervals[i, AVERAGE].estimate for i in ids])
    cost = np.array([costs[i].flops_relative for i in ids])
    draws = np.zeros((statistics.NUM_RESAMPLES, len(ids)))
    for number, (scores, images) in enumerate(tables.values()):
        shared = scores[ids].dropna()
        if shared.empty:
            return {}
        clusters = images[shared.index].to_numpy()
        draws += statistics.bootstrap_means(shared.to_numpy(), clusters, seed=number) / len(tables)
    on_frontier = pareto.frontier(cost, accuracy)
    probability = np.mean([pareto.frontier(cost, draw) for draw in draws], axis=0)
    return {i: (bool(on), float(p)) for i, on, p in zip(ids, on_frontier, probability, strict=True)}
