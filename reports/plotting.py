"""matplotlib, tamed: no global state, the same bytes every time, and an SVG that a page can recolour.

A figure is drawn once, in the light palette. For papers it is saved as SVG, PDF and PNG as it is. For the page the SVG
loses its metadata and fixed size, its ids get a prefix, and every palette colour becomes its CSS variable, so that
dark mode reaches into the figures. The group of a method's artist gets class and data attribute, so that a
legend can hide it, and its tooltip.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import quote, unquote

import matplotlib
from matplotlib.figure import Figure

from reports.style import PALETTE

INK, MUTED, GRID, SURFACE, BAND = (PALETTE[name][0] for name in ("ink", "muted", "grid", "surface", "band"))
RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "visor",
    "pdf.fonttype": 42,
    "path.simplify": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.facecolor": "none",
    "figure.facecolor": SURFACE,
    "savefig.facecolor": SURFACE,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.solid_capstyle": "round",
    "hatch.linewidth": 0.6,
}
LEGEND_INCHES = 0.38  # strip with a one-row legend at the foot of a figure; the page, which has its own, cuts it off


@dataclass(frozen=True)
class Drawing:
    """A finished figure.

    Args:
        name: file name without suffix.
        title, caption: for the page; the caption says what is drawn and what the intervals are.
        files: suffix -> bytes, for papers.
        page_svg: for the page; trusted markup made here, its texts escaped by matplotlib.
    """

    name: str
    title: str
    caption: str
    files: dict[str, bytes]
    page_svg: str


@contextmanager
def style() -> Iterator[None]:
    """The report's look, for the time of drawing."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(RC)
        yield


def new_figure(width: float, height: float) -> Figure:
    """A figure outside pyplot's registry, so that none is left open."""
    return Figure(figsize=(width, height), dpi=150)


def plain(text: str) -> str:
    """Text that matplotlib must not read as mathematics."""
    return text.replace("$", r"\$")


def series_id(method: str, number: int, tooltip: str = "") -> str:
    """Group id of an artist that belongs to a method. `number` makes it unique in its figure."""
    return f"series--{quote(method, safe='')}--{quote(tooltip, safe='')}--{number}"


def finish(
    figure: Figure, name: str, title: str, caption: str, watermark: str = "", foot: float = LEGEND_INCHES
) -> Drawing:
    """Save in all formats. Must run inside `style()`.

    Args:
        watermark: drawn across the figure, so that it cannot lose its caveat on the way into a paper.
        foot: inches at the foot that hold a legend, which the page cuts off.
    """
    if watermark:
        mark = figure.text(
            0.5,
            0.5,
            plain(watermark),
            rotation=18,
            ha="center",
            va="center",
            fontsize=30,
            weight="bold",
            color=MUTED,
            alpha=0.22,
            zorder=10,
        )
        mark.set_gid("paper-only")
    files = {}
    metadata = {
        "svg": {"Date": None, "Creator": None},
        "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    }
    metadata["png"] = {"Software": None}
    for suffix in ("svg", "pdf", "png"):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix, metadata=metadata[suffix])
        files[suffix] = buffer.getvalue()
    svg = _for_page(files["svg"].decode(), name, f"{title}. {caption}", foot)
    return Drawing(name, title, caption, files, svg)


def _for_page(svg: str, name: str, description: str, cut_inches: float) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.S)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", svg, flags=re.S)  # a "*" rule would style the page
    width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups())
    opening = (
        f'<svg viewBox="0 0 {width:g} {height - 72 * cut_inches:g}" role="img" class="plot-svg" '
        f'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'aria-label="{html.escape(description)}">'
    )
    svg = opening + svg[svg.index(">") + 1 :]
    for variable, (light, _) in PALETTE.items():
        svg = re.sub(rf"{light}\b", f"var(--{variable})", svg, flags=re.I)
    svg = svg.replace('<g id="paper-only">', '<g class="paper-only">')  # the page has a watermark of its own
    svg = re.sub(r'<g id="series--(.*?)--(.*?)---?\d+">', _group, svg)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # matplotlib's own group names repeat from figure to figure
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'xlink:href="#', f'xlink:href="#{name}-', svg)
    svg = re.sub(r"font-family: [^;\"]*; ?", "", svg)  # the page's own font
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
    svg = re.sub(r"(?<=[ LMCQ(\"-])(\d+\.\d\d)\d+", r"\1", svg)  # a hundredth of a point is not seen
    return re.sub(r"\n\s*", "\n", svg)


def _group(match: re.Match) -> str:
    """A series' group: hidden with its method, with a tooltip if it has a text."""
    method, text = (html.escape(unquote(part)) for part in match.groups())
    return f'<g class="series" data-method="{method}">' + (f"<title>{text}</title>" if text else "")
