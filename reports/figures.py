"""The figures: accuracy against cost, per task, what the FLOPs go into, visual tokens over depth, what a policy chose.

Each draws with `reports.plotting` inside one style and returns a `Drawing`. Intervals are 95 % and drawn as bars;
hollow markers are policies; the dashed step is the exact frontier.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from budgets import pareto
from evaluations.statistics import Interval
from reports import plotting
from reports.comparisons import AVERAGE, MARGIN, Analysis, Costs
from reports.data import FLOPS_PARTS, Setting
from reports.plotting import BAND, INK, LEGEND_INCHES, MUTED, SURFACE, Drawing, plain, series_id
from reports.style import PALETTE, method_style

WIDTH = 10.6  # inches; the page shows it at its full width
PART_NAMES = {
    "decoder_projections": "decoder projections", "decoder_attention": "decoder attention", "decoder_mlp": "decoder MLP",
    "cross_projections": "cross-attention projections", "cross_attention": "cross-attention", "scoring": "token scoring",
    "router": "router", "tower": "vision tower", "projector": "projector", "lm_head": "LM head",
}  # fmt: skip
PART_FILLS = {  # tints of one hue: method colours mean methods only
    "decoder_projections": ("part1", ""), "decoder_attention": ("part2", ""), "decoder_mlp": ("part3", ""),
    "cross_projections": ("part1", "xxx"), "cross_attention": ("part2", "xxx"), "scoring": ("part4", ""),
    "router": ("part4", "xxx"), "tower": ("part5", ""), "projector": ("part5", "///"), "lm_head": ("part5", "xxx"),
}  # fmt: skip


HATCHES = ("", "///", "xxx")  # dots would cost a hundred kilobytes of circles


def all_figures(analysis: Analysis, watermark: str = "") -> list[Drawing]:
    """Every figure for which the run has data, in the report's order."""
    makers: list[Callable[[Analysis, str], Drawing | None]] = [
        pareto_figure, tasks_absolute, tasks_relative, policy_figure, flops_by_part, visual_tokens,
    ]  # fmt: skip
    with plotting.style():
        drawings = [maker(analysis, watermark) for maker in makers]
    return [drawing for drawing in drawings if drawing is not None]


# -- shared pieces -------------------------------------------------------------------------------------------------


def _methods(settings: list[Setting]) -> dict[str, str]:
    """Method -> title, in order."""
    return {setting.method: setting.title for setting in settings}


def _legend(figure, settings: list[Setting], policies: bool = True) -> None:
    """One row at the foot, in the strip that the page cuts off."""
    handles = []
    for method, title in _methods(settings).items():
        look = method_style(method)
        line = "none" if method == "dense" else "-"
        handles.append(Line2D([], [], color=look.light, marker=look.marker, linestyle=line, markeredgecolor=INK,
                              markeredgewidth=0.4, markersize=5.5, label=plain(title)))  # fmt: skip
    if policies and any(setting.policy for setting in settings):
        handles.append(Line2D([], [], color=MUTED, marker="o", linestyle="none", markerfacecolor=SURFACE, label="policy"))
    height = figure.get_size_inches()[1]
    figure.legend(handles=handles, loc="lower center", ncols=min(len(handles), 9), bbox_to_anchor=(0.5, 0.04 / height),
                  columnspacing=1.4, handletextpad=0.5)  # fmt: skip


def _layout(figure, left=0.55, right=0.15, top=0.32, bottom=0.5, wspace=0.24, hspace=0.55, legend=True) -> None:
    """Margins in inches, so that figures of any size have the same."""
    width, height = figure.get_size_inches()
    foot = bottom + (LEGEND_INCHES if legend else 0)
    figure.subplots_adjust(left / width, foot / height, 1 - right / width, 1 - top / height, wspace, hspace)


def _curves(axes, points: list[tuple[Setting, float, Interval, str]], counter: list[int], label_policies=True) -> None:
    """Points (setting, x, y interval in %, tooltip) with bars; budgets of one method joined by a line."""
    by_method: dict[str, list] = {}
    labelled = 0
    for point in points:
        by_method.setdefault(point[0].method, []).append(point)
    # Random first, accents last, so that what matters lies on top.
    for method in sorted(by_method, key=lambda m: (method_style(m).weight, m != "random")):
        look = method_style(method)
        fixed = sorted((p for p in by_method[method] if p[0].policy is None), key=lambda p: p[1])
        if len(fixed) > 1:
            (line,) = axes.plot([p[1] for p in fixed], [p[2].estimate for p in fixed], color=look.light,
                                linewidth=1.4 * look.weight, zorder=2 + look.weight)  # fmt: skip
            counter[0] += 1
            line.set_gid(series_id(method, counter[0]))
        members = by_method[method]
        counter[0] += 1
        bars = axes.vlines([p[1] for p in members], [p[2].low for p in members], [p[2].high for p in members],
                           color=look.light, linewidth=1.1, zorder=2 + look.weight)  # fmt: skip
        bars.set_gid(series_id(method, counter[0]))
        for setting, x, y, tooltip in members:
            counter[0] += 1
            hollow = setting.policy is not None
            (marker,) = axes.plot([x], [y.estimate], marker=look.marker, linestyle="none", zorder=4 + look.weight,
                                  markersize=6.2 if look.weight > 1 else 5.4, color=SURFACE if hollow else look.light,
                                  markeredgecolor=look.light if hollow else INK,
                                  markeredgewidth=1.6 if hollow else 0.4)  # fmt: skip
            marker.set_gid(series_id(method, counter[0], tooltip))
            if hollow and label_policies:
                labelled += 1  # one below the other, because policies tend to sit at the same cost
                text = axes.annotate(plain(setting.policy), (x, y.estimate), xytext=(4, -7 - 8 * labelled), fontsize=7,
                                     textcoords="offset points", color=MUTED)  # fmt: skip
                text.set_gid(series_id(method, -counter[0]))


def _log_axis(axes, values: list[float], unit: str = "") -> None:
    """A logarithmic x axis with round labels."""
    low, high = min(values), max(values)
    axes.set_xscale("log")
    axes.set_xlim(low / 1.25, high * 1.25)
    ticks = [m * 10.0**e for e in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1) for m in (1, 2, 5)]
    axes.xaxis.set_major_locator(FixedLocator([t for t in ticks if low / 1.25 <= t <= high * 1.25]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{unit}"))


def _in_percent(interval: Interval) -> Interval:
    return Interval(100 * interval.estimate, 100 * interval.low, 100 * interval.high, interval.num_samples,
                    interval.num_clusters, interval.rule)  # fmt: skip


def _tooltip(setting: Setting, y: Interval, x_text: str) -> str:
    return f"{setting.label}: {y.estimate:.1f} % (95 % CI {y.low:.1f} to {y.high:.1f}, n = {y.num_samples:,}); {x_text}"


def _empty(axes, text: str) -> None:
    axes.text(0.5, 0.5, plain(text), transform=axes.transAxes, ha="center", va="center", color=MUTED, wrap=True)
    axes.set_xticks([])
    axes.set_yticks([])


# -- accuracy against cost -----------------------------------------------------------------------------------------


def pareto_figure(analysis: Analysis, watermark: str) -> Drawing | None:
    """Average accuracy against decoder FLOPs, prefill latency and KV bytes."""
    run = analysis.run
    shown = [(s, _in_percent(analysis.average(s))) for s in run.settings if analysis.average(s)]
    if not shown:
        return None
    figure, counter = plotting.new_figure(WIDTH, 3.95), [0]
    panels = figure.subplots(1, 3, sharey=True)
    dense = analysis.average(run.dense) if run.dense else None
    milliseconds = lambda c: c.prefill_ms and c.prefill_ms.estimate
    axes_of_cost: list[tuple[str, str, Callable[[Costs], float | None], str]] = [
        ("Decoder FLOPs", "prefill, % of dense, log scale", lambda c: c.flops_relative and 100 * c.flops_relative, "{:.3g} % of dense decoder FLOPs"),
        ("Prefill latency", f"decoder, median ms at batch size 1, {run.run.get('provenance', {}).get('device', '')}", milliseconds, "{:.3g} ms prefill"),
        ("KV cache", "KiB a sample after prefill, log scale", lambda c: c.kv_bytes and c.kv_bytes / 1024, "{:,.0f} KiB of KV cache"),
    ]  # fmt: skip  # noqa: E501
    for axes, (title, label, cost, text) in zip(panels, axes_of_cost, strict=True):
        points = [(s, cost(analysis.costs[s.id]), y) for s, y in shown]
        points = [(s, x, y, _tooltip(s, y, text.format(x))) for s, x, y in points if x is not None]
        axes.set_title(title)
        axes.set_xlabel(plain(label.rstrip(", ")))
        if not points:
            _empty(axes, "not measured in this run")
            continue
        if dense:
            axes.axhspan(100 * (dense.estimate - MARGIN), 100 * dense.estimate, color=BAND, zorder=0)
            axes.axhline(100 * dense.estimate, color=MUTED, linewidth=0.7, linestyle=(0, (1, 2)), zorder=1)
        x, y = np.array([p[1] for p in points]), np.array([p[2].estimate for p in points])
        best = sorted(zip(x[pareto.frontier(x, y)], y[pareto.frontier(x, y)], strict=True))
        axes.step([p[0] for p in best] + [x.max() * 1.02], [p[1] for p in best] + [best[-1][1]], where="post",
                  color=MUTED, linewidth=0.9, linestyle=(0, (4, 2)), zorder=1.5)  # fmt: skip
        _curves(axes, points, counter, label_policies=title == "Decoder FLOPs")
        if title == "Prefill latency":
            axes.set_xlim(0, x.max() * 1.08)
        else:
            _log_axis(axes, list(x))
    panels[0].set_ylabel(f"average accuracy over {len(run.tasks)} task{'s' * (len(run.tasks) > 1)}, %")
    _layout(figure, wspace=0.08)
    _legend(figure, [s for s, _ in shown])
    caption = (
        "Average over the suite's tasks against three costs. Up and left is better. Vertical bars: 95 % confidence intervals, "
        "clustered by image. Dashed: the exact frontier of the points shown. Band: within 1 point below dense."
    )
    if any(s.policy for s, _ in shown):
        caption += " Hollow: a policy that chooses per sample."
    return plotting.finish(figure, "pareto", "Accuracy against cost", caption, watermark)


def _task_grid(
    analysis: Analysis, name: str, title: str, caption: str, watermark: str, y_label: str,
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
    _layout(figure, top=0.48, wspace=0.1, hspace=0.5)
    _legend(figure, run.settings)
    return plotting.finish(figure, name, title, caption, watermark) if drawn else None


def tasks_absolute(analysis: Analysis, watermark: str) -> Drawing | None:
    """Score of each task against decoder FLOPs."""
    value = lambda s, t: (lambda i: i and _in_percent(i))(analysis.intervals.get((s.id, t)))
    caption = "Each task's own metric against decoder FLOPs. Bars: 95 % confidence intervals, clustered by image. Dotted: dense."
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
        return Interval(100 + scale * c.difference, 100 + scale * c.low, 100 + scale * c.high, c.num_samples,
                        c.num_clusters, "paired difference over dense")  # fmt: skip

    caption = (
        "Share of dense accuracy that is kept; dense is 100 %. Bars: 95 % confidence intervals of the paired difference, "
        "divided by dense accuracy, which is taken as exact."
    )
    return _task_grid(analysis, "tasks_relative", "Accuracy per task, relative to dense", caption, watermark, "% of dense", value)


# -- where the compute goes ----------------------------------------------------------------------------------------


def flops_by_part(analysis: Analysis, watermark: str) -> Drawing | None:
    """Prefill FLOPs of a mean sample, by part."""
    run = analysis.run
    columns = [f"flops_{part}" for part in FLOPS_PARTS]
    means = run.samples.groupby(["setting_id", "task"])[columns].mean().groupby("setting_id").mean().fillna(0.0)
    means = means.reindex([s.id for s in run.settings]).dropna(how="all")
    parts = [part for part in FLOPS_PARTS if len(means) and means[f"flops_{part}"].max() > 0]
    if not parts:
        return None
    settings = [s for s in run.settings if s.id in means.index]
    height = 0.19 * len(settings) + 1.15
    figure = plotting.new_figure(WIDTH, height)
    axes = figure.subplots()
    left, places = np.zeros(len(settings)), np.arange(len(settings))[::-1]
    for part in parts:
        colour, hatch = PART_FILLS[part]
        widths = means.loc[[s.id for s in settings], f"flops_{part}"].to_numpy() / 1e9
        axes.barh(places, widths, left=left, height=0.72, color=PALETTE[colour][0], hatch=hatch, edgecolor=SURFACE,
                  linewidth=0.5, label=PART_NAMES[part])  # fmt: skip
        left += widths
    axes.set_yticks(places, [plain(s.label) for s in settings])
    axes.set_ylim(-0.6, len(settings) - 0.4)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("GFLOPs a sample (2 x MACs), prefill, mean over tasks")
    figure.legend(loc="upper center", ncols=5, bbox_to_anchor=(0.5, 1.0), handlelength=1.2, columnspacing=1.2)
    _layout(figure, left=0.3 + 0.066 * max(len(s.label) for s in settings), top=0.5, bottom=0.45, legend=False)
    caption = "Prefill FLOPs of a mean sample by part, full-square attention. The budget dials the decoder parts only; the vision tower and the LM head stand beside them."  # noqa: E501
    return plotting.finish(figure, "flops_by_part", "What the FLOPs go into", caption, watermark, legend=False)


def visual_tokens(analysis: Analysis, watermark: str) -> Drawing | None:
    """Live visual tokens at each decoder layer, one panel a group of settings."""
    run, depth = analysis.run, {}
    for setting_id, rows in run.samples.groupby("setting_id", sort=False):
        lists = [np.mean(np.array(list(tokens)), axis=0) for _, tokens in rows.visual_tokens.dropna().groupby(rows.task)
                 if len({len(t) for t in tokens}) == 1]  # fmt: skip
        if lists and len({len(each) for each in lists}) == 1:
            depth[setting_id] = np.mean(lists, axis=0)
    groups = [g for g in analysis.groups if any(s.id in depth for s in g.settings)]
    if not groups:
        return None
    columns = max(3, min(4, len(groups)))
    rows = math.ceil(len(groups) / columns)
    figure, counter = plotting.new_figure(WIDTH, 2.3 * rows + LEGEND_INCHES + 0.3), [0]
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for axes, group in zip(grid, groups, strict=False):
        axes.set_title(group.title.replace(" of dense decoder FLOPs", "").partition(":")[0])
        members = ([run.dense] if run.dense else []) + list(group.settings)
        drawn = [s for s in members if s.id in depth]
        for place, setting in enumerate(drawn):
            look, tokens = method_style(setting.method), depth[setting.id]
            stagger = (place % 4, 4)  # markers at different layers, so that equal lines stay apart
            (line,) = axes.plot(range(1, len(tokens) + 1), tokens, drawstyle="steps-mid", color=look.light, marker=look.marker,
                                markevery=stagger, markersize=4.5, markeredgecolor=INK, markeredgewidth=0.4,
                                linewidth=1.2 * look.weight)  # fmt: skip
            counter[0] += 1
            line.set_gid(series_id(setting.method, counter[0]))
        axes.set_ylim(0, None)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("decoder layer")
    for axes in grid[len(groups) :]:
        axes.set_visible(False)
    for axes in grid.reshape(rows, columns)[:, 0]:
        axes.set_ylabel("live visual tokens, mean")
    _layout(figure, wspace=0.08)
    _legend(figure, [s for g in groups for s in ([run.dense] if run.dense else []) + list(g.settings) if s.id in depth],
            policies=False)
    caption = "Visual tokens that are alive at each decoder layer, mean over samples. In layers that the image skips they stand still."
    return plotting.finish(figure, "visual_tokens", "Visual tokens over depth", caption, watermark)


# -- what a policy chose -------------------------------------------------------------------------------------------


def policy_figure(analysis: Analysis, watermark: str) -> Drawing | None:
    """Shares of the configurations that each policy chose, per task and per difficulty."""
    from reports.policy import choices  # here, because it is absent from most runs

    chosen = choices(analysis.run)
    if not chosen:
        return None
    configurations = chosen[0].configurations
    shades = [PALETTE[f"part{1 + i % 5}"][0] for i in range(len(configurations))]
    bars = max(len(c.rows) for c in chosen)
    columns = min(3, max(2, len(chosen)))
    lines = math.ceil(len(chosen) / columns)
    figure = plotting.new_figure(WIDTH, (0.24 * bars + 0.75) * lines + 0.45)
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
    for axes, choice in zip(grid, chosen, strict=False):
        left, places = np.zeros(len(choice.rows)), np.arange(len(choice.rows))[::-1]
        for number, configuration in enumerate(configurations):
            shares = np.array([100 * row.shares.get(configuration, 0.0) for row in choice.rows])
            axes.barh(places, shares, left=left, height=0.74, color=shades[number], edgecolor=SURFACE, linewidth=0.5,
                      hatch=HATCHES[number // 5 % 3], label=plain(configuration))  # fmt: skip
            left += shares
        axes.set_title(plain(choice.title))
        axes.set_yticks(places, [plain(f"{row.title} (n = {row.num_samples:,})") for row in choice.rows])
        axes.set_xlim(0, 100)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("% of samples")
    for axes in grid[len(chosen) :]:
        axes.set_visible(False)
    handles = [Patch(facecolor=s, label=plain(c), hatch=HATCHES[i // 5 % 3], edgecolor=SURFACE)
               for i, (c, s) in enumerate(zip(configurations, shades, strict=True))]  # fmt: skip
    figure.legend(handles=handles, loc="upper center", ncols=min(8, len(handles)), title=None)
    _layout(figure, left=2.0, top=0.62, bottom=0.45, wspace=0.06, legend=False)
    caption = "Share of the samples that got each configuration, cheapest first, by task and by difficulty."
    return plotting.finish(figure, "policy", "What the policy chose", caption, watermark, legend=False)
