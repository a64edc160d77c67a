"""Figures of compute: what the FLOPs go into, FLOPs and visual tokens over depth; and all figures in order.

Parts are drawn in tints and hatches, because the method colours mean methods only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.ticker import MaxNLocator

from reports import plotting
from reports.analyses import ModelAnalyses
from reports.comparisons import Analysis, Group
from reports.data import FLOPS_PARTS, Setting
from reports.figures import WIDTH, layout, legend, pareto_figure, tasks_absolute, tasks_relative
from reports.figures_analyses import layer_drop_figure, observation_figure
from reports.figures_policy import policy_choices, policy_curve
from reports.plotting import INK, LEGEND_INCHES, SURFACE, Drawing, plain, series_id
from reports.policy import PolicySection
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


def all_figures(
    analysis: Analysis,
    policy: Sequence[PolicySection] = (),
    analyses: Sequence[ModelAnalyses] = (),
    watermark: str = "",
) -> list[Drawing]:
    """Every figure for which the run has data, in the report's order.

    Args:
        policy: the methods with configurations.
        analyses: the models whose use of visual tokens was analysed.
    """
    makers: list[Callable[[Analysis, str], Drawing | None]] = [
        pareto_figure, tasks_absolute, tasks_relative, flops_by_part, layer_flops, visual_tokens,
    ]  # fmt: skip
    with plotting.style():
        drawings = [maker(analysis, watermark) for maker in makers]
        for section in policy:
            drawings += [policy_curve(analysis, section, watermark), policy_choices(section, watermark)]
        for found in analyses:
            drawings += [observation_figure(found, watermark), layer_drop_figure(found, watermark)]
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
    settings = [s for s in run.settings if s.id in means.index and not s.is_swept and not s.repeats]
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
    return plotting.finish(figure, "flops_by_part", "What the FLOPs go into", caption, watermark, foot=0.0)


def _over_depth(analysis: Analysis, column: str, scale: float = 1.0) -> tuple[dict[str, np.ndarray], list[Group]]:
    """Means of a column of lists by layer, by setting id, macro-averaged over tasks; and the groups that have any."""
    depth = {}
    for setting_id, rows in analysis.run.samples.groupby("setting_id", sort=False):
        lists = [
            np.mean(np.array(list(values)), axis=0) * scale
            for _, values in rows[column].dropna().groupby(rows.task)
            if len({len(each) for each in values}) == 1
        ]
        if lists and len({len(each) for each in lists}) == 1:
            depth[setting_id] = np.mean(lists, axis=0)
    return depth, [g for g in analysis.groups if any(s.id in depth for s in g.settings if _is_drawn(s))]


def _is_drawn(setting: Setting) -> bool:
    return not setting.is_swept and not setting.is_oracle and setting.policy != "random"


def _depth_figure(
    analysis: Analysis, column: str, y_label: str, name: str, title: str, caption: str, watermark: str, scale: float
) -> Drawing | None:
    """One panel a group of settings, one line a setting."""
    run = analysis.run
    depth, groups = _over_depth(analysis, column, scale)
    if not groups:
        return None
    columns = max(3, min(4, len(groups)))
    rows = math.ceil(len(groups) / columns)
    figure, counter = plotting.new_figure(WIDTH, 2.3 * rows + LEGEND_INCHES + 0.3), [0]
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for axes, group in zip(grid, groups, strict=False):
        axes.set_title(group.title.replace(" of dense decoder FLOPs", "").partition(":")[0])
        members = ([run.dense] if run.dense else []) + [s for s in group.settings if _is_drawn(s)]
        drawn = [s for s in members if s.id in depth]
        for place, setting in enumerate(drawn):
            look, values = method_style(setting.method), depth[setting.id]
            stagger = (place % 4, 4)  # markers at different layers, so that equal lines stay apart
            (line,) = axes.plot(
                range(1, len(values) + 1),
                values,
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
            line.set_gid(series_id(setting.method, counter[0], setting.label))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("decoder layer")
    grid[0].set_ylim(0, None)  # shared, so it is set when all lines are there
    for axes in grid[len(groups) :]:
        axes.set_visible(False)
    for axes in grid.reshape(rows, columns)[:, 0]:
        axes.set_ylabel(y_label)
    layout(figure, wspace=0.08)
    foot = legend(
        figure,
        [s for g in groups for s in ([run.dense] if run.dense else []) + list(g.settings) if s.id in depth],
        policies=False,
    )
    return plotting.finish(figure, name, title, caption, watermark, foot)


def visual_tokens(analysis: Analysis, watermark: str) -> Drawing | None:
    """Visual tokens that each decoder layer computes on or reads, one panel a group of settings."""
    caption = (
        "Visual tokens that each decoder layer computes on or reads, mean over samples. "
        "In layers that the image skips they stand still."
    )
    title = "Visual tokens over depth"
    return _depth_figure(
        analysis, "visual_tokens", "visual tokens, mean", "visual_tokens", title, caption, watermark, 1.0
    )


def layer_flops(analysis: Analysis, watermark: str) -> Drawing | None:
    """Prefill FLOPs of each decoder layer, one panel a group of settings."""
    caption = (
        "Prefill FLOPs of each decoder layer (2 x MACs, full-square attention), mean over samples, with the scoring "
        "that decided the layer's tokens. The area under a line is what the budget counts, the router left out."
    )
    return _depth_figure(
        analysis, "layer_flops", "MFLOPs a layer, mean", "layer_flops", "FLOPs over depth", caption, watermark, 1e-6
    )
