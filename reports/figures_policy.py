"""Figures of policies: accuracy against mean cost beside what they have to beat, and what each of them chose."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from reports import plotting
from reports.comparisons import Analysis
from reports.figures import WIDTH, dense_band, layout
from reports.plotting import GRID, INK, MUTED, SURFACE, Drawing, plain, series_id
from reports.policy import Point, PolicySection
from reports.style import PALETTE, css_name, method_style

HATCHES = ("", "///", "xxx")  # dots would cost a hundred kilobytes of circles
MARKERS = {"per-task": "s", "random": "X", "oracle": "*", "router": "o", "cascade": "^"}


def policy_curve(analysis: Analysis, section: PolicySection, watermark: str) -> Drawing | None:
    """Average accuracy against mean cost: fixed configurations, router and cascade as curves, what random would do."""
    points = section.points
    if len(points) < 2:
        return None
    method = section.family.method
    figure = plotting.new_figure(WIDTH, 3.9)
    axes = figure.subplots()
    dense = analysis.average(analysis.run.dense) if analysis.run.dense else None
    if dense:
        dense_band(axes, dense)
        axes.annotate("dense", (1, 100 * dense.estimate), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                      fontsize=7.5, color=MUTED, xytext=(-2, 2), textcoords="offset points")  # fmt: skip
    handles = _draw_policies(axes, points, method)
    axes.grid(color=GRID)
    axes.set_xlim(left=0)
    axes.set_xlabel("mean decoder FLOPs, % of dense, router and every attempt of a cascade included")
    axes.set_ylabel("average accuracy, %")
    figure.legend(handles=handles, loc="center left", bbox_to_anchor=(0.72, 0.5), handlelength=2.4, labelspacing=0.9)
    layout(figure, right=3.15, legend=False)
    caption = (
        "Policies over the configurations of one network. Up and left is better. A router earns its place above the "
        "line of the fixed configurations and above its own choices dealt out at random, which cost the same. "
        "Bars: 95 % confidence intervals of the fixed configurations, clustered by image; band: within 1 point below "
        "dense."
    )
    name = f"policy_curve_{css_name(method)}"
    return plotting.finish(figure, name, "Policies: accuracy against mean cost", caption, watermark, foot=0.0)


def _draw_policies(axes, points: list[Point], method: str) -> list[Line2D]:
    """Every policy's points, those of a sweep as a curve. Returns the legend's entries."""
    colour, counter = method_style(method).light, [0]
    of = lambda policy: sorted((p for p in points if p.setting.policy == policy), key=lambda p: p.cost)
    handles = []

    def line(members: list[Point], style: dict, label: str, markers: dict) -> None:
        if not members:
            return
        x, y = [100 * p.cost for p in members], [100 * p.score.estimate for p in members]
        axes.plot(x, y, **style)
        for point in members:
            counter[0] += 1
            (mark,) = axes.plot([100 * point.cost], [100 * point.score.estimate], linestyle="none", **markers)
            mark.set_gid(series_id(method, counter[0], _tooltip(point)))
        handles.append(Line2D([], [], **{**markers, **style, "zorder": 1}, label=label))

    fixed, routed, cascades = of("fixed"), of("router"), of("cascade")
    solid = {"color": colour, "linewidth": 2.0, "zorder": 3}
    filled = {"marker": "o", "markersize": 6.5, "markeredgecolor": INK, "markeredgewidth": 0.4, "color": colour}
    low, high = [100 * p.score.low for p in fixed], [100 * p.score.high for p in fixed]
    bars = axes.vlines([100 * p.cost for p in fixed], low, high, color=colour, linewidth=1.0, alpha=0.55, zorder=2)
    counter[0] += 1
    bars.set_gid(series_id(method, counter[0]))
    line(fixed, solid, "fixed configurations", {**filled, "zorder": 4})
    hollow = {"markerfacecolor": SURFACE, "markeredgecolor": colour, "markeredgewidth": 1.5, "zorder": 5}
    swept = [p for p in routed if p.setting.value is not None]
    line(swept, {"color": colour, "linewidth": 1.1, "linestyle": (0, (5, 1.5)), "zorder": 3},
         "router, cost-aware (each \u03bb)", {**hollow, "marker": "o", "markersize": 5.5})  # fmt: skip
    line([p for p in routed if p.setting.value is None], {"linestyle": "none"}, "router, as in the paper",
         {**hollow, "marker": "D", "markersize": 6.5})  # fmt: skip
    line(cascades, {"color": colour, "linewidth": 1.0, "linestyle": (0, (1, 1.5)), "zorder": 3},
         "cascade (each threshold)", {**hollow, "marker": "^", "markersize": 6})  # fmt: skip
    expected = sorted(p.dealt for p in swept if p.dealt)
    if len(expected) > 1:
        style = {"color": MUTED, "linewidth": 1.2, "linestyle": (0, (3, 2)), "zorder": 2}
        axes.plot([100 * c for c, _ in expected], [100 * s for _, s in expected], **style)
        handles.append(Line2D([], [], **style, label="the same \u03bb, dealt at random (expected)"))
    for policy, label in (("per-task", "per task, chosen on validation"), ("random", "random, dealt once"),
                          ("oracle", "oracle (knows the answers)")):  # fmt: skip
        edge = {"oracle": INK, "random": MUTED}.get(policy, colour)
        look = {"markerfacecolor": INK if policy == "oracle" else SURFACE, "markeredgecolor": edge,
                "markeredgewidth": 1.4, "marker": MARKERS[policy], "markersize": 9 if policy == "oracle" else 6.5,
                "zorder": 6}  # fmt: skip
        line(of(policy), {"linestyle": "none"}, label, look)
    for point in fixed:
        axes.annotate(plain(point.setting.dial), (100 * point.cost, 100 * point.score.estimate), xytext=(5, -11),
                      textcoords="offset points", fontsize=7.5, color=MUTED)  # fmt: skip
    return handles


def _tooltip(point: Point) -> str:
    score = point.score
    return (
        f"{point.setting.label}: {100 * score.estimate:.1f} % (95 % CI {100 * score.low:.1f} to "
        f"{100 * score.high:.1f}, n = {score.num_samples:,}) at {100 * point.cost:.3g} % of dense decoder FLOPs"
    )


def policy_choices(section: PolicySection, watermark: str) -> Drawing | None:
    """Shares of the configurations that each policy chose, per task and per difficulty; the pseudo-labels first."""
    if not section.choices:
        return None
    names = section.family.names
    shades = [PALETTE[f"part{1 + i % 5}"][0] for i in range(len(names))]
    panels = [(choice.title, [*choice.rows, section.labels]) for choice in section.choices]
    bars = max(len(rows) for _, rows in panels)
    columns = min(3, max(2, len(panels)))
    lines = math.ceil(len(panels) / columns)
    figure = plotting.new_figure(WIDTH, (0.22 * bars + 0.75) * lines + 0.45)
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
    for axes, (title, rows) in zip(grid, panels, strict=False):
        left, places = np.zeros(len(rows)), np.arange(len(rows))[::-1]
        for number in range(len(names)):
            shares = np.array([100 * row.shares.get(number, 0.0) for row in rows])
            axes.barh(places, shares, left=left, height=0.74, color=shades[number], edgecolor=SURFACE, linewidth=0.5,
                      hatch=HATCHES[number // 5 % 3])  # fmt: skip
            left += shares
        axes.set_title(plain(title))
        axes.set_yticks(places, [plain(f"{row.title} (n = {row.num_samples:,})") for row in rows])
        axes.set_xlim(0, 100)
        axes.set_xticks([0, 25, 50, 75, 100])
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("% of samples")
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    handles = [
        Patch(facecolor=shade, label=plain(f"{number}: {name}"), hatch=HATCHES[number // 5 % 3], edgecolor=SURFACE)
        for number, (name, shade) in enumerate(zip(names, shades, strict=True))
    ]
    figure.legend(handles=handles, loc="upper center", ncols=min(6, len(handles)))
    layout(figure, left=2.0, top=0.62, bottom=0.45, wspace=0.14, hspace=0.5, legend=False)
    caption = (
        "Share of the samples that got each configuration, cheapest first: all, by task, by difficulty (how many "
        "things in the image compete). Last row: the pseudo-labels, the cheapest configuration with 99 % of the "
        "largest one's score."
    )
    name = f"policy_{css_name(section.family.method)}"
    return plotting.finish(figure, name, "What the policies chose", caption, watermark, foot=0.0)
