"""Figures of compute: what the FLOPs go into, visual tokens over depth, what a policy chose; and all figures in order.

Parts and configurations are drawn in tints and hatches, because the method colours mean methods only.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from reports import plotting
from reports.comparisons import Analysis
from reports.data import FLOPS_PARTS
from reports.figures import WIDTH, layout, legend, pareto_figure, tasks_absolute, tasks_relative
from reports.plotting import INK, LEGEND_INCHES, SURFACE, Drawing, plain, series_id
from reports.policy import choices
from reports.style import PALETTE, method_style

PART_NAMES = {
    "decoder_projections": "decoder projections",
    "decoder_attention": "decoder attention",
    "decoder_mlp": "decoder MLP",
    "cross_projections": "cross-attention projections",
    "cross_attention": "cross-attention",
    "scoring": "token scoring",
    "router": "router",
    "tower": "vision tower",
    "projector": "projector",
    "lm_head": "LM head",
}
PART_FILLS = {  # tints of one hue: method colours mean methods only
    "decoder_projections": ("part1", ""),
    "decoder_attention": ("part2", ""),
    "decoder_mlp": ("part3", ""),
    "cross_projections": ("part1", "xxx"),
    "cross_attention": ("part2", "xxx"),
    "scoring": ("part4", ""),
    "router": ("part4", "xxx"),
    "tower": ("part5", ""),
    "projector": ("part5", "///"),
    "lm_head": ("part5", "xxx"),
}


HATCHES = ("", "///", "xxx")  # dots would cost a hundred kilobytes of circles


def all_figures(analysis: Analysis, watermark: str = "") -> list[Drawing]:
    """Every figure for which the run has data, in the report's order."""
    makers: list[Callable[[Analysis, str], Drawing | None]] = [
        pareto_figure,
        tasks_absolute,
        tasks_relative,
        policy_figure,
        flops_by_part,
        visual_tokens,
    ]
    with plotting.style():
        drawings = [maker(analysis, watermark) for maker in makers]
    return [drawing for drawing in drawings if drawing is not None]


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
        axes.barh(
            places,
            widths,
            left=left,
            height=0.72,
            color=PALETTE[colour][0],
            hatch=hatch,
            edgecolor=SURFACE,
            linewidth=0.5,
            label=PART_NAMES[part],
        )
        left += widths
    axes.set_yticks(places, [plain(s.label) for s in settings])
    axes.set_ylim(-0.6, len(settings) - 0.4)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("GFLOPs a sample (2 x MACs), prefill, mean over tasks")
    figure.legend(loc="upper center", ncols=5, bbox_to_anchor=(0.5, 1.0), handlelength=1.2, columnspacing=1.2)
    layout(figure, left=0.3 + 0.066 * max(len(s.label) for s in settings), top=0.5, bottom=0.45, legend=False)
    caption = (
        "Prefill FLOPs of a mean sample by part, full-square attention. The budget dials the decoder parts only; the "
        "vision tower and the LM head stand beside them."
    )
    return plotting.finish(figure, "flops_by_part", "What the FLOPs go into", caption, watermark, legend=False)


def visual_tokens(analysis: Analysis, watermark: str) -> Drawing | None:
    """Live visual tokens at each decoder layer, one panel a group of settings."""
    run, depth = analysis.run, {}
    for setting_id, rows in run.samples.groupby("setting_id", sort=False):
        lists = [
            np.mean(np.array(list(tokens)), axis=0)
            for _, tokens in rows.visual_tokens.dropna().groupby(rows.task)
            if len({len(t) for t in tokens}) == 1
        ]
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
            (line,) = axes.plot(
                range(1, len(tokens) + 1),
                tokens,
                drawstyle="steps-mid",
                color=look.light,
                marker=look.marker,
                markevery=stagger,
                markersize=4.5,
                markeredgecolor=INK,
                markeredgewidth=0.4,
                linewidth=1.2 * look.weight,
            )
            counter[0] += 1
            line.set_gid(series_id(setting.method, counter[0]))
        axes.set_ylim(0, None)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("decoder layer")
    for axes in grid[len(groups) :]:
        axes.set_visible(False)
    for axes in grid.reshape(rows, columns)[:, 0]:
        axes.set_ylabel("live visual tokens, mean")
    layout(figure, wspace=0.08)
    legend(
        figure,
        [s for g in groups for s in ([run.dense] if run.dense else []) + list(g.settings) if s.id in depth],
        policies=False,
    )
    caption = (
        "Visual tokens that are alive at each decoder layer, mean over samples. "
        "In layers that the image skips they stand still."
    )
    return plotting.finish(figure, "visual_tokens", "Visual tokens over depth", caption, watermark)


# -- what a policy chose -------------------------------------------------------------------------------------------


def policy_figure(analysis: Analysis, watermark: str) -> Drawing | None:
    """Shares of the configurations that each policy chose, per task and per difficulty."""
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
            axes.barh(
                places,
                shares,
                left=left,
                height=0.74,
                color=shades[number],
                edgecolor=SURFACE,
                linewidth=0.5,
                hatch=HATCHES[number // 5 % 3],
                label=plain(configuration),
            )
            left += shares
        axes.set_title(plain(choice.title))
        axes.set_yticks(places, [plain(f"{row.title} (n = {row.num_samples:,})") for row in choice.rows])
        axes.set_xlim(0, 100)
        axes.set_xticks([0, 25, 50, 75, 100])
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("% of samples")
    for axes in grid[len(chosen) :]:
        axes.set_visible(False)
    handles = [
        Patch(facecolor=s, label=plain(c), hatch=HATCHES[i // 5 % 3], edgecolor=SURFACE)
        for i, (c, s) in enumerate(zip(configurations, shades, strict=True))
    ]
    figure.legend(handles=handles, loc="upper center", ncols=min(8, len(handles)), title=None)
    layout(figure, left=2.0, top=0.62, bottom=0.45, wspace=0.14, legend=False)
    caption = "Share of the samples that got each configuration, cheapest first, by task and by difficulty."
    return plotting.finish(figure, "policy", "What the policy chose", caption, watermark, legend=False)
