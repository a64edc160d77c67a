"""What policies did: their choices per task and difficulty, confusion with the pseudo-labels, curve and standings.

Everything follows from the records of the fixed configurations on the same samples, which every policy chooses among.
The pseudo-label of a sample is what a router is trained on: the cheapest configuration that reaches 99 % of the largest
one's score on it (`budgets.policies`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from budgets import policies
from evaluations import statistics
from evaluations.statistics import Comparison, Interval
from reports.comparisons import Analysis
from reports.data import Run, Setting, configuration_name


@dataclass(frozen=True)
class Row:
    """Shares of the configurations over some samples."""

    title: str
    num_samples: int
    shares: dict[int, float]


@dataclass(frozen=True)
class Choice:
    """What one setting chose.

    Args:
        rows: all samples, then by task, then by difficulty.
        confusion: (label, choice) -> share of the samples that have both; empty where there are no labels.
        num_confusion: how many samples those are.
        agreement: share of them that got their label.
    """

    setting: Setting
    rows: list[Row]
    confusion: dict[tuple[int, int], float]
    num_confusion: int

    @property
    def title(self) -> str:
        """Its name in the report."""
        return self.setting.label

    @property
    def agreement(self) -> float:
        """Share of samples that got their label."""
        return sum(share for (label, chosen), share in self.confusion.items() if label == chosen)

    @property
    def cheaper(self) -> float:
        """Share of samples that got less than their label."""
        return sum(share for (label, chosen), share in self.confusion.items() if chosen < label)


@dataclass(frozen=True)
class Family:
    """The configurations of a method, and what each did on the samples that all of them answered.

    Args:
        names: of the configurations, cheapest first.
        fixed: their settings.
        samples: one row a (task, sample_id), with `image_id`, `difficulty` and the pseudo-label `label`.
        scores, relative_costs: [num_samples, num_configurations].
    """

    method: str
    names: list[str]
    fixed: list[Setting]
    samples: pd.DataFrame
    scores: np.ndarray
    relative_costs: np.ndarray

    def task_mean(self, values: np.ndarray) -> float:
        """Macro-average over tasks of one value a sample."""
        return float(pd.Series(values).groupby(self.samples.task.to_numpy()).mean().mean())


def families(run: Run) -> list[Family]:
    """One entry a method whose fixed configurations have all been run."""
    found = []
    for method in dict.fromkeys(s.method for s in run.settings if s.policy == "fixed"):
        fixed = sorted((s for s in run.settings if s.method == method and s.policy == "fixed"), key=lambda s: s.value)
        if len(fixed) != len(fixed[0].configurations):
            continue
        rows = run.samples[run.samples.setting_id.isin([s.id for s in fixed]) & run.samples.error.isna()]
        wide = lambda column, rows=rows, fixed=fixed: rows.pivot(
            index=["task", "sample_id"], columns="setting_id", values=column
        ).reindex(columns=[s.id for s in fixed])
        scores, costs, full = wide("score").dropna(), wide("decoder_flops"), wide("dense_decoder_flops")
        if scores.empty:
            continue
        order = scores.index
        costs, full = costs.loc[order].to_numpy(), full.loc[order].to_numpy()
        about = rows.drop_duplicates(["task", "sample_id"]).set_index(["task", "sample_id"])
        samples = about.loc[order, ["image_id", "difficulty"]].reset_index()
        samples["label"] = policies.pseudo_labels(scores.to_numpy(), costs)
        names = [configuration_name(layers) for layers in fixed[0].configurations]
        found.append(Family(method, names, fixed, samples, scores.to_numpy(), costs / full))
    return found


def choices(run: Run, kinds: list[Family]) -> list[Choice]:
    """One entry a policy that stands for itself; points of a sweep are left to the curve."""
    titles = {task.name: task.title for task in run.tasks}
    labels = {family.method: family.samples.set_index(["task", "sample_id"]).label for family in kinds}
    result = []
    for setting in run.settings:
        part = run.samples[(run.samples.setting_id == setting.id) & run.samples.configuration.notna()]
        if not setting.is_policy or setting.is_swept or part.empty or setting.method not in labels:
            continue
        groups = [_row("all samples", part)]
        groups += [_row(titles[name], part[part.task == name]) for name in titles if (part.task == name).any()]
        if part.difficulty.nunique() > 1:
            groups += [_row(f"difficulty {level}", each) for level, each in part.groupby("difficulty")]
        both = part.set_index(["task", "sample_id"])[["configuration"]].join(labels[setting.method], how="inner")
        pairs = both.value_counts(["label", "configuration"], sort=False)
        confusion = {(int(a), int(b)): number / len(both) for (a, b), number in pairs.items()}
        result.append(Choice(setting, groups, confusion, len(both)))
    return result


def label_row(family: Family) -> Row:
    """Shares of the pseudo-labels over all samples."""
    shares = family.samples.label.value_counts(normalize=True)
    return Row("pseudo-labels", len(family.samples), {int(c): float(share) for c, share in shares.items()})


def _row(title: str, part: pd.DataFrame) -> Row:
    shares = part.configuration.astype(int).value_counts(normalize=True, sort=False)
    return Row(title, len(part), {int(name): float(share) for name, share in shares.items()})


# -- the curve: accuracy against mean cost -------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A setting in the accuracy-cost plane, and what its choices would do if they were dealt out at random.

    Args:
        cost: mean decoder FLOPs relative to dense.
        dealt: (mean cost, expected average score) of the same choices without knowledge of the sample; None for what
            makes no choice.
    """

    setting: Setting
    cost: float
    score: Interval
    dealt: tuple[float, float] | None


def curve(analysis: Analysis, family: Family) -> list[Point]:
    """Every setting of a family that was measured on all tasks."""
    points = []
    for setting in analysis.run.settings:
        cost, score = analysis.costs[setting.id].flops_relative, analysis.average(setting)
        if setting.method == family.method and not setting.repeats and cost is not None and score is not None:
            choice = chosen(analysis.run, family, setting)
            points.append(Point(setting, cost, score, choice is not None and dealt(family, choice) or None))
    return points


def chosen(run: Run, family: Family, setting: Setting) -> np.ndarray | None:
    """The configuration of each sample of the family, or None if the setting has not chosen for all of them."""
    if setting.policy not in ("router", "cascade"):
        return None
    part = run.samples[run.samples.setting_id == setting.id].set_index(["task", "sample_id"]).configuration
    ordered = part.reindex(pd.MultiIndex.from_frame(family.samples[["task", "sample_id"]]))
    return None if ordered.isna().any() else ordered.to_numpy(dtype=int)


def dealt(family: Family, choice: np.ndarray) -> tuple[float, float]:
    """Mean cost and average score to be expected if these choices went to the samples at random."""
    shares = np.bincount(choice, minlength=len(family.names)) / len(choice)
    return family.task_mean(family.relative_costs @ shares), family.task_mean(family.scores @ shares)


# -- standings: is a policy worth it -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Standing:
    """A policy against what it has to beat.

    Args:
        rival: the best fixed configuration that costs no more on average; None if all cost more.
        against_rival, against_random: paired differences of the averages; random is the expectation over all ways to
            deal out the same choices.
    """

    setting: Setting
    cost: float
    score: Interval
    rival: Setting | None
    against_rival: Comparison | None
    against_random: Comparison | None


def standings(analysis: Analysis, family: Family) -> list[Standing]:
    """One entry a policy or point of its sweep, by rising cost; the oracle left out: it knows the answers."""
    result = []
    points = curve(analysis, family)
    fixed = [point for point in points if point.setting.policy == "fixed"]
    for point in sorted(points, key=lambda p: p.cost):
        setting = point.setting
        if not setting.is_policy or setting.is_oracle:
            continue
        # The router's own FLOPs are in its cost; without this slack it could never be compared with its equal.
        affordable = [p for p in fixed if p.cost <= point.cost * (1 + 1e-6)]
        rival = max(affordable, key=lambda p: (p.score.estimate, -p.cost), default=None)
        mine = _scores(analysis.run, family, setting)
        against_rival = against_random = None
        if mine is not None and rival is not None:
            against_rival = _compare(family, mine, family.scores[:, family.fixed.index(rival.setting)])
        choice = chosen(analysis.run, family, setting)
        if mine is not None and choice is not None:
            shares = np.bincount(choice, minlength=len(family.names)) / len(choice)
            against_random = _compare(family, mine, family.scores @ shares)
        result.append(
            Standing(setting, point.cost, point.score, rival and rival.setting, against_rival, against_random)
        )
    return result


def _scores(run: Run, family: Family, setting: Setting) -> np.ndarray | None:
    part = run.samples[run.samples.setting_id == setting.id].set_index(["task", "sample_id"]).score
    ordered = part.reindex(pd.MultiIndex.from_frame(family.samples[["task", "sample_id"]]))
    return None if ordered.isna().any() else ordered.to_numpy()


def _compare(family: Family, a: np.ndarray, b: np.ndarray) -> Comparison:
    tasks, images = family.samples.task.to_numpy(), family.samples.image_id.to_numpy()
    pairs = [(a[tasks == task], b[tasks == task], images[tasks == task]) for task in dict.fromkeys(tasks)]
    return statistics.paired_comparison(pairs)


@dataclass(frozen=True)
class PolicySection:
    """All that the report shows of one family."""

    family: Family
    labels: Row
    choices: list[Choice]
    points: list[Point]
    standings: list[Standing]


def sections(analysis: Analysis) -> list[PolicySection]:
    """One entry a method with configurations; empty where a run has none."""
    kinds = families(analysis.run)
    chosen_by = choices(analysis.run, kinds)
    return [
        PolicySection(
            family,
            label_row(family),
            [choice for choice in chosen_by if choice.setting.method == family.method],
            curve(analysis, family),
            standings(analysis, family),
        )
        for family in kinds
    ]
