"""The sentence at the top, and the tiles under it: what a reader must get in ten seconds, with its interval.

The sentence claims only what a test supports: "within 1 point of dense" needs the whole confidence interval of the
paired difference above -1 point. Where nothing reaches that, it says so and names the nearest.
"""

from __future__ import annotations

from dataclasses import dataclass

from budgets.match import budget_label
from evaluations.statistics import Interval
from reports.comparisons import AVERAGE, MARGIN, Analysis
from reports.data import Setting
from reports.style import percent, points, significant


@dataclass(frozen=True)
class Tile:
    """One figure with its unit, interval and n."""

    title: str
    value: str
    unit: str
    detail: str
    method: str = ""


def _within(analysis: Analysis) -> list[Setting]:
    """Settings shown to be within the margin of dense or better, cheapest first."""
    good = []
    for setting in analysis.run.settings:
        tested = analysis.against_dense.get((setting.id, AVERAGE))
        cost = analysis.costs[setting.id].flops_relative
        bound = setting.is_oracle or setting.is_blind  # one knows the answers, the other sees no image: no method
        shown = not bound and not setting.repeats and not setting.is_swept
        if tested and cost is not None and cost < 1 and shown and tested.verdict in ("within", "better"):
            good.append((cost, setting.id, setting))
    return [setting for _, _, setting in sorted(good, key=lambda each: each[:2])]


def name(setting: Setting) -> str:
    """Title, with the policy; the budget is said as a share of FLOPs wherever a setting is named here."""
    return setting.label if setting.policy else setting.title


def _lengths(analysis: Analysis, setting: Setting) -> str:
    """The saving and the lengths that it holds for: an x-figure says nothing without them."""
    costs = analysis.costs[setting.id]
    if costs.num_visual is None or costs.num_text is None:
        return ""
    saving = f"{1 / costs.flops_relative:.3g}\u00d7 less"
    return f", {saving} at N_v\u00a0=\u00a0{costs.num_visual:.0f} and N_t\u00a0=\u00a0{costs.num_text:.0f}"


def _share(analysis: Analysis, setting: Setting) -> str:
    return f"{100 * analysis.costs[setting.id].flops_relative:.3g} %"


def _difference(analysis: Analysis, setting: Setting) -> str:
    c = analysis.against_dense[setting.id, AVERAGE].comparison
    interval = f"95\u00a0% CI {points(c.low)} to {points(c.high)}"
    return f"{points(c.difference)} points, {interval}, n\u00a0=\u00a0{c.num_samples:,}"


def verdict(analysis: Analysis) -> str:
    """One or two sentences, plain text."""
    run = analysis.run
    tasks = f"the average of {len(run.tasks)} tasks" if len(run.tasks) > 1 else run.tasks[0].title
    tested = [s for s in run.settings if (s.id, AVERAGE) in analysis.against_dense]
    if run.untrained:
        return "No verdict: the weights are untrained, so only costs and timings mean something."
    if run.dense is None or analysis.average(run.dense) is None:
        return f"No verdict: this run has no complete dense reference on {tasks}, so no method can be compared with it."
    if not tested:
        return f"Dense alone was measured: {_score(analysis.average(run.dense))} on {tasks}. Add methods to compare."
    good = _within(analysis)
    if good:
        best = good[0]
        first = (
            f"{name(best)} is within {100 * MARGIN:g} point of dense on {tasks} "
            f"at {_share(analysis, best)} of its decoder FLOPs{_lengths(analysis, best)} "
            f"({_difference(analysis, best)})."
        )
    else:
        candidates = [s for s in tested if not (s.is_oracle or s.is_blind or s.is_swept)] or tested
        best = max(candidates, key=lambda s: (analysis.against_dense[s.id, AVERAGE].comparison.difference, s.id))
        first = f"No setting is shown to be within {100 * MARGIN:g} point of dense on {tasks}."
        if analysis.costs[best.id].flops_relative is not None:
            first += (
                f" The nearest is {name(best)}, at {_share(analysis, best)} of dense decoder FLOPs "
                f"({_difference(analysis, best)})."
            )
    return first + _second(analysis, best)


def _second(analysis: Analysis, named: Setting) -> str:
    """Who wins at the lowest budget that methods share."""
    shared = [g for g in analysis.groups if g.budget is not None and len(g.settings) > 1]
    if not shared:
        return ""
    group = shared[-1]
    winner = next((s for s in group.settings if analysis.marks.get((s.id, AVERAGE)) == "best"), None)
    if winner is None or winner == named:
        return ""
    tested = analysis.against_dense.get((winner.id, AVERAGE))
    gap = f", {points(tested.comparison.difference)} points to dense" if tested else ""
    rivals = [s.title for s in group.settings if analysis.marks.get((s.id, AVERAGE)) == "tied"]
    tie = f" (not significantly different: {', '.join(rivals)})" if rivals else ""
    score = _score(analysis.average(winner))
    return f" At a budget of {budget_label(group.budget)} the best is {winner.title} with {score}{gap}{tie}."


def _score(interval: Interval) -> str:
    return f"{percent(interval.estimate)} % [{percent(interval.low)}, {percent(interval.high)}]"


def tiles(analysis: Analysis) -> list[Tile]:
    """Four or five figures; what was not measured says so."""
    run, result = analysis.run, []
    dense = analysis.average(run.dense) if run.dense else None
    if dense:
        result.append(
            Tile(
                "Dense reference",
                percent(dense.estimate),
                "% average score",
                f"95\u00a0% CI {percent(dense.low)} to {percent(dense.high)}, n\u00a0=\u00a0{dense.num_samples:,}",
                "dense",
            )
        )
    good = _within(analysis)
    if good:
        best = good[0]
        result.append(
            Tile(
                "Cheapest within 1 point",
                f"{100 * analysis.costs[best.id].flops_relative:.3g}",
                "% of dense decoder FLOPs",
                f"{name(best)}: {_difference(analysis, best)}",
                best.method,
            )
        )
        result.append(_speed_tile(analysis, best))
    elif dense and analysis.against_dense:
        result.append(Tile("Cheapest within 1 point", "none", "", "no setting is shown to be within 1 point of dense"))
    shared = [g for g in analysis.groups if g.budget is not None and len(g.settings) > 1]
    if shared:
        winner = next((s for s in shared[-1].settings if analysis.marks.get((s.id, AVERAGE)) == "best"), None)
        if winner:
            i = analysis.average(winner)
            result.append(
                Tile(
                    f"Best at {budget_label(shared[-1].budget)}" + " of FLOPs" * (shared[-1].budget <= 1),
                    percent(i.estimate),
                    "% average score",
                    f"{winner.title}: 95\u00a0% CI {percent(i.low)} to {percent(i.high)}, "
                    f"n\u00a0=\u00a0{i.num_samples:,}",
                    winner.method,
                )
            )
    failed = sum(m.status != "ok" for m in run.manifests.values())
    questions = sum(len(run.samples[run.samples.task == t.name].sample_id.unique()) for t in run.tasks)
    bad = sum(m.num_failed for m in run.manifests.values())
    detail = f"{len(run.settings)} settings, {len(run.tasks)} tasks, {len(run.samples):,} answers"
    detail += f"; {failed} failed cells" if failed else ""
    detail += f"; {bad} failed samples" if bad else ""
    result.append(Tile("Evaluated", f"{questions:,}", "questions", detail))
    return result


def _speed_tile(analysis: Analysis, setting: Setting) -> Tile:
    mine = analysis.costs[setting.id].prefill_ms
    dense = analysis.costs[analysis.run.dense.id].prefill_ms
    if mine is None or dense is None:
        reasons = analysis.costs[setting.id].not_measured
        return Tile("Its prefill", "not measured", "", reasons.get("prefill_ms", "no timing run"), setting.method)
    detail = f"{significant(mine.estimate)} ms [{significant(mine.low)}, {significant(mine.high)}] against "
    detail += f"{significant(dense.estimate)} ms, median, batch size 1, n\u00a0=\u00a0{mine.num_samples} runs"
    return Tile(
        "Its prefill", f"{dense.estimate / mine.estimate:.2f}", "times as fast as dense", detail, setting.method
    )
