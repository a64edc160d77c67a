"""Figures of accuracy: against three costs, and per task; and the pieces that all figures share.

Each draws with `reports.plotting` inside one style and returns a `Drawing`. Intervals are 95 % and drawn as bars;
hollow markers are policies; the dashed step is the exact frontier.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from budgets import pareto
from evaluations.statistics import Interval
from reports import plotting
from reports.comparisons import MARGIN, Analysis, Costs
from reports.data import Setting
from reports.plotting import BAND, INK, LEGEND_INCHES, MUTED, SURFACE, Drawing, plain, series_id
from reports.style import CONTROLS, method_style

WIDTH = 10.6  # inches; the page shows it at its full width
ROW_INCHES = 0.2  # of a legend


# -- shared pieces -------------------------------------------------------------------------------------------------


def methods(settings: list[Setting]) -> dict[str, str]:
    """Method -> title, in order."""
    return {setting.method: setting.title for setting in settings}


def legend(figure, settings: list[Setting], policies: bool = True) -> float:
    """At the foot, in the strip that the page cuts off; to be called when the figure is laid out.

    Returns:
        Height of the strip in inches. Where one row is not enough, the figure grows by the others.
    """
    handles = []
    for method, title in methods(settings).items():
        look = method_style(method)
        line = "none" if method == "dense" else "-"
        handles.append(
            Line2D(
                [],
                [],
                color=look.light,
                marker=look.marker,
                linestyle=line,
                markeredgecolor=INK,
                markeredgewidth=0.4,
                markersize=5.5,
                label=plain(title),
            )
        )
    if policies and any(setting.is_policy for setting in settings):
        handles.append(
            Line2D([], [], color=MUTED, marker="o", linestyle="none", markerfacecolor=SURFACE, label="policy")
        )
    entry = 0.55 + 0.066 * max(len(handle.get_label()) for handle in handles)  # inches, of the widest
    columns = max(1, min(len(handles), int(WIDTH / entry)))
    further = ROW_INCHES * (math.ceil(len(handles) / columns) - 1)
    _grow(figure, further)
    height = figure.get_size_inches()[1]
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=columns,
        bbox_to_anchor=(0.5, 0.04 / height),
        columnspacing=1.4,
        handletextpad=0.5,
    )
    return LEGEND_INCHES + further


def _grow(figure, inches: float) -> None:
    """Add height at the foot; the margins and the plots keep their size."""
    width, height = figure.get_size_inches()
    bottom, top = figure.subplotpars.bottom * height + inches, (1 - figure.subplotpars.top) * height
    figure.set_size_inches(width, height + inches)
    figure.subplots_adjust(bottom=bottom / (height + inches), top=1 - top / (height + inches))


def layout(figure, left=0.55, right=0.15, top=0.32, bottom=0.5, wspace=0.24, hspace=0.55, legend=True) -> None:
    """Margins in inches, so that figures of any size have the same."""
    width, height = figure.get_size_inches()
    foot = bottom + (LEGEND_INCHES if legend else 0)
    figure.subplots_adjust(left / width, foot / height, 1 - right / width, 1 - top / height, wspace, hspace)


def _curves(axes, points: list[tuple[Setting, float, Interval, str]], counter: list[int], label_policies=True) -> None:
    """Points (setting, x, y interval in %, tooltip) with bars; budgets of one method joined by a line."""
    by_method: dict[str, list] = {}
    for point in points:
        by_method.setdefault(point[0].method, []).append(point)
    # The policies of one method, as those of several would cover one another.
    named = next((p[0].method for p in points if p[0].is_policy), None) if label_policies else None
    # Controls first, accents last, so that what matters lies on top.
    for method in sorted(by_method, key=lambda m: (method_style(m).weight, m not in CONTROLS)):
        look = method_style(method)
        fixed = sorted((p for p in by_method[method] if not p[0].is_policy), key=lambda p: p[1])
        if len(fixed) > 1:
            (line,) = axes.plot(
                [p[1] for p in fixed],
                [p[2].estimate for p in fixed],
                color=look.light,
                linewidth=1.4 * look.weight,
                zorder=2 + look.weight,
            )
            counter[0] += 1
            line.set_gid(series_id(method, counter[0]))
        members = by_method[method]
        counter[0] += 1
        bars = axes.vlines(
            [p[1] for p in members],
            [p[2].low for p in members],
            [p[2].high for p in members],
            color=look.light,
            linewidth=1.1,
            zorder=2 + look.weight,
        )
        bars.set_gid(series_id(method, counter[0]))
        for setting, x, y, tooltip in members:
            counter[0] += 1
            hollow, small = setting.is_policy, setting.is_swept
            (marker,) = axes.plot(
                [x],
                [y.estimate],
                marker=look.marker,
                linestyle="none",
                zorder=4 + look.weight,
                markersize=3.4 if small else 6.2 if look.weight > 1 else 5.4,
                color=SURFACE if hollow else look.light,
                markeredgecolor=look.light if hollow else INK,
                markeredgewidth=0.9 if small else 1.6 if hollow else 0.4,
            )
            marker.set_gid(series_id(method, counter[0], tooltip))
            if hollow and not small and method == named:
                text = axes.annotate(  # on the left: the settings of a sweep lie on the right
                    plain(setting.policy),
                    (x, y.estimate),
                    xytext=(-6, 0),
                    fontsize=7,
                    textcoords="offset points",
                    ha="right",
                    va="center",
                    color=MUTED,
                )
                text.set_gid(series_id(method, -counter[0]))


def _log_axis(axes, values: list[float], unit: str = "") -> None:
    """A logarithmic x axis with round labels."""
    low, high = min(values), max(values)
    axes.set_xscale("log")
    axes.set_xlim(low / 1.25, high * 1.25)
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        ticks = [m * 10.0**e for e in decades for m in steps if low / 1.25 <= m * 10.0**e <= high * 1.25]
        if len(ticks) >= 3:
            break
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{unit}"))


def _in_percent(interval: Interval) -> Interval:
    return Interval(
        100 * interval.estimate,
        100 * interval.low,
        100 * interval.high,
        interval.num_samples,
        interval.num_clusters,
        interval.rule,
    )


def _tooltip(setting: Setting, y: Interval, x_text: str) -> str:
    return f"{setting.label}: {y.estimate:.1f} % (95 % CI {y.low:.1f} to {y.high:.1f}, n = {y.num_samples:,}); {x_text}"


def _empty(axes, text: str) -> None:
    axes.text(0.5, 0.5, plain(text), transform=axes.transAxes, ha="center", va="center", color=MUTED, wrap=True)
    axes.set_xticks([])
    axes.grid(visible=False)  # the ticks stay: y axes are shared


def dense_band(axes, dense: Interval) -> None:
    """A line at the accuracy of dense, and the band of what is within `MARGIN` below it. The axis is in percent."""
    axes.axhspan(100 * (dense.estimate - MARGIN), 100 * dense.estimate, color=BAND, zorder=0)
    axes.axhline(100 * dense.estimate, color=MUTED, linewidth=0.7, linestyle=(0, (1, 2)), zorder=1)


def _frontier_step(axes, x: np.ndarray, y: np.ndarray) -> None:
    """The exact frontier of costs and scores as a dashed step, a little beyond the dearest point."""
    on_frontier = pareto.frontier(x, y)
    best = sorted(zip(x[on_frontier], y[on_frontier], strict=True))
    costs, scores = [p[0] for p in best] + [x.max() * 1.02], [p[1] for p in best] + [best[-1][1]]
    axes.step(costs, scores, where="post", color=MUTED, linewidth=0.9, linestyle=(0, (4, 2)), zorder=1.5)


# -- accuracy against cost -----------------------------------------------------------------------------------------


def pareto_figure(analysis: Analysis, watermark: str) -> Drawing | None:
    """Average accuracy against decoder FLOPs, prefill latency and KV bytes."""
    run = analysis.run
    shown = [(s, _in_percent(analysis.average(s))) for s in run.settings if analysis.average(s) and not s.repeats]
    if not shown:
        return None
    figure, counter = plotting.new_figure(WIDTH, 3.95), [0]
    panels = figure.subplots(1, 3, sharey=True)
    dense = analysis.average(run.dense) if run.dense else None
    milliseconds = lambda c: c.prefill_ms and c.prefill_ms.estimate
    axes_of_cost: list[tuple[str, str, Callable[[Costs], float | None], str]] = [
        (
            "Decoder FLOPs",
            "prefill, % of dense, log scale",
            lambda c: c.flops_relative and 100 * c.flops_relative,
            "{:.3g} % of dense decoder FLOPs",
        ),
        (
            "Prefill latency",
            f"decoder, median ms at batch size 1, {run.run.get('provenance', {}).get('device', '')}",
            milliseconds,
            "{:.3g} ms prefill",
        ),
        (
            "KV cache",
            "KiB a sample after prefill, log scale",
            lambda c: c.kv_bytes and c.kv_bytes / 1024,
            "{:,.0f} KiB of KV cache",
        ),
    ]
    for axes, (title, label, cost, text) in zip(panels, axes_of_cost, strict=True):
        points = [(s, cost(analysis.costs[s.id]), y) for s, y in shown]
        points = [(s, x, y, _tooltip(s, y, text.format(x))) for s, x, y in points if x is not None]
        axes.set_title(title)
        axes.set_xlabel(plain(label.rstrip(", ")))
        if not points:
            _empty(axes, "not measured in this run")
            continue
        if dense:
            dense_band(axes, dense)
        rivals = [p for p in points if not (p[0].is_oracle or p[0].is_blind)] or points
        x, y = np.array([p[1] for p in rivals]), np.array([p[2].estimate for p in rivals])
        _frontier_step(axes, x, y)
        _curves(axes, points, counter, label_policies=title == "Decoder FLOPs")
        if title == "Prefill latency":
            axes.set_xlim(0, x.max() * 1.08)
        else:
            _log_axis(axes, list(x))
    panels[0].set_ylabel(f"average accuracy over {len(run.tasks)} task{'s' * (len(run.tasks) > 1)}, %")
    layout(figure, wspace=0.08)
    foot = legend(figure, [s for s, _ in shown])
    caption = (
        "Average over the suite's tasks against three costs. Up and left is better. Vertical bars: 95 % confidence "
        "intervals, clustered by image. Dashed: the exact frontier. Band: within 1 point below dense."
    )
    if any(s.is_policy for s, _ in shown):
        caption += " Hollow: a policy that chooses a configuration per sample; small: points of its sweep."
    return plotting.finish(figure, "pareto", "Accuracy against cost", caption, watermark, foot)


def _task_grid(
    analysis: Analysis,
    name: str,
    title: str,
    caption: str,
    watermark: str,
    y_label: str,
    value: Callable[[Setting, str], Interval | None],
) -> Drawing | None:
    """Small multiples over tasks; `value(setting, task)` gives the y interval in %, or None."""
    run = analysis.run
    columns = min(4, max(3, len(run.tasks)))
    rows = math.ceil(len(run.tasks) / columns)
    figure, counter = plotting.new_figure(WIDTH, 2.75 * rows + LEGEND_INCHES + 0.3), [0]
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    drawn = False
    for axes, task in zip(grid, run.tasks, strict=False):
        axes.set_title(plain(task.title), pad=14)
        subtitle = ", ".join(filter(None, (task.kind, task.metric.replace("_", " "))))
        axes.text(0, 1.025, plain(subtitle), transform=axes.transAxes, fontsize=7.5, color=MUTED)
        points = []
        for setting in run.settings:
            if setting.repeats or setting.is_swept:
                continue
            y, costs = value(setting, task.name), analysis.task_costs.get((setting.id, task.name))
            if y is not None and costs is not None and costs.flops_relative is not None:
                x = 100 * costs.flops_relative
                points.append((setting, x, y, _tooltip(setting, y, f"{x:.3g} % of dense decoder FLOPs")))
        if not points:
            _empty(axes, "not measured")
            continue
        drawn = True
        _curves(axes, points, counter, label_policies=False)
        reference = next((y.estimate for s, _, y, _ in points if s.is_dense), None)
        if reference is not None:
            axes.axhline(reference, color=MUTED, linewidth=0.7, linestyle=(0, (1, 2)), zorder=1)
        _log_axis(axes, [p[1] for p in points])
    for axes in grid[len(run.tasks) :]:
        axes.set_visible(False)
    for axes in grid.reshape(rows, columns)[:, 0]:
        axes.set_ylabel(y_label)
    for axes in grid[max(0, len(run.tasks) - columns) : len(run.tasks)]:
        axes.set_xlabel("decoder FLOPs, % of dense, log scale")
    layout(figure, top=0.48, wspace=0.1, hspace=0.5)
    foot = legend(figure, run.settings)
    return plotting.finish(figure, name, title, caption, watermark, foot) if drawn else None


def tasks_absolute(analysis: Analysis, watermark: str) -> Drawing | None:
    """Score of each task against decoder FLOPs."""
    value = lambda s, t: (lambda i: i and _in_percent(i))(analysis.intervals.get((s.id, t)))
    caption = "Each task's own metric. Bars: 95 % confidence intervals, clustered by image. Dotted: dense."
    return _task_grid(analysis, "tasks_absolute", "Accuracy per task", caption, watermark, "score, %", value)


def tasks_relative(analysis: Analysis, watermark: str) -> Drawing | None:
    """Score of each task relative to dense, which is 100 %."""
    dense = analysis.run.dense
    if dense is None:
        return None

    def value(setting: Setting, task: str) -> Interval | None:
        reference = analysis.intervals.get((dense.id, task))
        if reference is None or reference.estimate == 0:
            return None
        if setting.is_dense:
            return Interval(100.0, 100.0, 100.0, reference.num_samples, reference.num_clusters, "reference")
        tested = analysis.against_dense.get((setting.id, task))
        if tested is None:
            return None
        c, scale = tested.comparison, 100 / reference.estimate
        return Interval(
            100 + scale * c.difference,
            100 + scale * c.low,
            100 + scale * c.high,
            c.num_samples,
            c.num_clusters,
            "paired difference over dense",
        )

    caption = (
        "Share of dense accuracy that is kept; dense is 100 %. Bars: 95 % confidence intervals of the paired "
        "difference, divided by dense accuracy, which is taken as exact."
    )
    return _task_grid(
        analysis, "tasks_relative", "Accuracy per task, relative to dense", caption, watermark, "% of dense", value
    )
