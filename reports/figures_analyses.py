"""Figures of the analyses: attention to the image and CKA over depth, and what each layer's look at the image is worth.

Tasks are drawn in tints with a marker each, because the method colours mean methods only.
"""

from __future__ import annotations

import math

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from reports import plotting
from reports.analyses import ModelAnalyses
from reports.figures import WIDTH, layout
from reports.plotting import GRID, INK, MUTED, SURFACE, Drawing, plain
from reports.style import PALETTE, css_name, method_style

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
KINDS = {"coarse": "part3", "fine-grained": "part1", "reasoning": "part4"}


def observation_figure(found: ModelAnalyses, watermark: str) -> Drawing | None:
    """Text-to-image attention mass and CKA to the first layer, one line a task."""
    if not found.having("attention") and not found.having("cka"):
        return None
    figure = plotting.new_figure(WIDTH, 3.3)
    panels = figure.subplots(1, 3)
    views = (
        ("attention", "text", "Attention of the text to the image", "% of the attention mass", 100),
        ("attention", "last", "Attention of the last prompt token", "% of the attention mass", 100),
        ("cka", "visual", "Visual tokens: CKA to the first layer", "debiased linear CKA", 1),
    )
    handles = {}
    for axes, (kind, rows, title, label, scale) in zip(panels, views, strict=True):
        axes.set_title(title)
        axes.set_xlabel("decoder layer")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for number, task in enumerate(found.tasks.values()):
            if kind not in task or rows not in task[kind]:
                continue
            values = task[kind][rows]
            layers = np.arange(1, len(values["mean"]) + 1)
            colour = PALETTE[KINDS.get(task["kind"], "part5")][0]
            marker = MARKERS[number % len(MARKERS)]
            low, high = scale * np.array(values["low"]), scale * np.array(values["high"])
            axes.fill_between(layers, low, high, color=colour, alpha=0.16, linewidth=0)
            axes.plot(layers, scale * np.array(values["mean"]), color=colour, marker=marker, markersize=4,
                      markeredgecolor=INK, markeredgewidth=0.3, linewidth=1.2)  # fmt: skip
            handles[task["title"]] = Line2D([], [], color=colour, marker=marker, markeredgecolor=INK, markersize=5,
                                            markeredgewidth=0.3, label=plain(task["title"]))  # fmt: skip
        axes.set_ylim(0, 103 if scale == 100 else None)
    figure.legend(handles=list(handles.values()), loc="upper center", ncols=min(8, len(handles)))
    layout(figure, top=0.72, bottom=0.5, wspace=0.28, legend=False)
    caption = (
        f"{found.model}, run densely. Left and middle: share of its attention that the text after the image, and the "
        "last prompt token, pay to visual tokens, mean over heads. Right: similarity of the visual tokens after each "
        "layer to those after the first one; 1 is unchanged up to rotation and scale. Bands: 95 % bootstrap intervals "
        "over images. Tints: coarse, fine-grained and reasoning tasks."
    )
    return plotting.finish(
        figure, f"observations_{css_name(found.model)}", "Use of visual tokens, by layer", caption, watermark, 0.0
    )


def layer_drop_figure(found: ModelAnalyses, watermark: str) -> Drawing | None:
    """What a task loses when one layer loses the image: one panel a task."""
    tasks = found.having("layer-drop")
    if not tasks:
        return None
    columns = min(4, max(3, len(tasks)))
    lines = math.ceil(len(tasks) / columns)
    figure = plotting.new_figure(WIDTH, 2.2 * lines + 0.35)
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
    ink, colour = method_style("dense").light, PALETTE["part2"][0]
    for axes, (title, drop) in zip(grid, tasks, strict=False):
        layers = np.arange(1, len(drop["layers"]) + 1)
        get = lambda name, drop=drop: 100 * np.array([each[name] for each in drop["layers"]])
        clear = np.array([each["p_value_holm"] < 0.05 for each in drop["layers"]])
        difference = get("difference")
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.vlines(layers, get("difference_low"), get("difference_high"), color=colour, linewidth=1.1)
        axes.plot(layers, difference, linestyle="none", marker="o", markersize=5, color=SURFACE, markeredgecolor=colour,
                  markeredgewidth=1.2)  # fmt: skip
        axes.plot(layers[clear], difference[clear], linestyle="none", marker="o", markersize=5, color=ink)
        axes.set_title(plain(title), pad=14)
        dense = drop["dense"]
        text = (
            f"dense {100 * dense['score']:.1f} % [{100 * dense['low']:.0f}, {100 * dense['high']:.0f}], "
            f"n = {drop['num_samples']}"
        )
        axes.text(0, 1.03, text, transform=axes.transAxes, fontsize=7.5, color=MUTED)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="x", visible=False)
        axes.grid(axis="y", color=GRID)
    for axes in grid[len(tasks) :]:
        axes.set_visible(False)
    for axes in grid.reshape(lines, columns)[:, 0]:
        axes.set_ylabel("points to dense")
    for axes in grid[max(0, len(tasks) - columns) : len(tasks)]:
        axes.set_xlabel("layer without the image")
    layout(figure, top=0.48, bottom=0.45, wspace=0.1, hspace=0.62, legend=False)
    caption = (
        f"{found.model}: change of the score when text and image are kept apart in one layer, against dense on the "
        "same samples. Bars: 95 % intervals, clustered by image. Filled: significant at 0.05 after Holm's correction "
        "over the layers of the task."
    )
    return plotting.finish(
        figure, f"layer_drop_{css_name(found.model)}", "Layers without the image", caption, watermark, 0.0
    )
