"""How a method looks, everywhere: one colour and one marker each; and how numbers are written.

Colours are Okabe-Ito's, so that they stay apart for colour-blind readers; the marker says the same again. Dense is
neutral ink, VISOR the one strong accent. A colour is named by its variable, because it differs between light and dark:
figures are drawn in the light values and the page replaces those by the variables.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

# variable -> (light, dark). Light values are distinct, because the page finds them in the figures by value.
PALETTE = {
    "ink": ("#1a1f26", "#e6e9ee"),
    "muted": ("#58626f", "#a2adba"),
    "grid": ("#e1e5ea", "#2e363f"),
    "surface": ("#fefefe", "#171b20"),
    "band": ("#ecf3ee", "#1e2b25"),
    "vermillion": ("#d55e00", "#f0782a"),
    "blue": ("#0072b2", "#4aa3dc"),
    "sky": ("#56b4e9", "#7cc8f2"),
    "green": ("#009e73", "#2bbd93"),
    "orange": ("#e69f00", "#eab03a"),
    "purple": ("#cc79a7", "#dd97bf"),
    "yellow": ("#d9cb1b", "#f0e442"),  # Okabe-Ito's yellow, darkened to be seen on white
    "grey": ("#8b929b", "#8f98a3"),
    # tints for parts and configurations, which are no methods
    "part1": ("#27405e", "#a9c4e4"),
    "part2": ("#4f7096", "#7c9cc2"),
    "part3": ("#86a3c3", "#56779f"),
    "part4": ("#b4664a", "#d18c70"),
    "part5": ("#c3ccd6", "#434e5b"),
}


@dataclass(frozen=True)
class MethodStyle:
    """Colour variable and matplotlib marker of a method."""

    colour: str
    marker: str

    @property
    def light(self) -> str:
        """Its colour on white, as hex."""
        return PALETTE[self.colour][0]

    @property
    def weight(self) -> float:
        """Relative line weight: the accent and the reference stand out."""
        return 1.5 if self.colour in ("vermillion", "ink") else 1.0


KNOWN = {
    "dense": MethodStyle("ink", "D"),
    "visor": MethodStyle("vermillion", "o"),
    "visor_tr2": MethodStyle("vermillion", "p"),
    "visor_tr4": MethodStyle("vermillion", "h"),
    "fastv": MethodStyle("blue", "s"),
    "visionzip": MethodStyle("green", "^"),
    "pooling": MethodStyle("orange", "v"),
    "m3": MethodStyle("sky", "h"),
    "downsample": MethodStyle("purple", "P"),
    "pyramiddrop": MethodStyle("sky", "<"),
    "sparsevlm": MethodStyle("yellow", ">"),
    "dart": MethodStyle("green", "p"),
    "divprune": MethodStyle("blue", "d"),
    "cdpruner": MethodStyle("purple", "H"),
    "hired": MethodStyle("orange", "8"),
    "prumerge": MethodStyle("yellow", "p"),
    "fastervlm": MethodStyle("sky", "^"),
    "vispruner": MethodStyle("blue", "v"),
    "flowcut": MethodStyle("green", "s"),
    "tome": MethodStyle("purple", "<"),
    "random": MethodStyle("grey", "X"),
    "blind": MethodStyle("grey", "d"),
}
CONTROLS = ("random", "blind")  # what a method must beat, and what the text alone gives: last in tables and legends
_ORDER = list(KNOWN)
_SPARE_COLOURS = ("sky", "yellow", "purple", "green", "orange", "blue")
_SPARE_MARKERS = (">", "<", "d", "8", "H", "*")


def css_name(method: str) -> str:
    """A name as it may stand in a selector, an id or a file name."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", method)


def method_style(method: str) -> MethodStyle:
    """The look of a method; an unknown one gets a look that depends on its name alone, in VISOR's colour if it is."""
    if method in KNOWN:
        return KNOWN[method]
    number = sum((place + 1) * ord(letter) for place, letter in enumerate(method))
    if "visor" in method.split("+"):
        return MethodStyle("vermillion", _SPARE_MARKERS[number % 6])
    return MethodStyle(_SPARE_COLOURS[number % 6], _SPARE_MARKERS[number // 6 % 6])


def method_rank(method: str) -> int:
    """Place in tables and legends: dense, VISOR, known methods, others, controls last."""
    if method in CONTROLS:
        return 10**6 + CONTROLS.index(method)
    return _ORDER.index(method) if method in KNOWN else 10**5


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage without the sign: 0.8123 -> "81.2"."""
    return "" if value is None else signed_minus(f"{100 * value:.{digits}f}")


def points(value: float, digits: int = 1) -> str:
    """A difference of shares in percentage points, with its sign: "+0.4", "−3.2"."""
    text = f"{100 * value:+.{digits}f}"
    return "0." + "0" * digits if float(text) == 0 else signed_minus(text)


def signed_minus(text: str) -> str:
    """A real minus sign, as wide as the plus."""
    return text.replace("-", "\u2212")


def significant(value: float, digits: int = 3) -> str:
    """`digits` significant figures, never in scientific notation for everyday sizes."""
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return signed_minus(f"{value:,.{decimals}f}")


def _scaled(value: float, largest: float | None, base: float, units: tuple[str, ...]) -> str:
    """In the unit that suits `largest`, so that a column has one unit."""
    power, largest = 0, value if largest is None else largest
    while abs(largest) >= base and power < len(units) - 1:
        value, largest, power = value / base, largest / base, power + 1
    return f"{significant(value)}\u00a0{units[power]}"


def flops(value: float, largest: float | None = None) -> str:
    """FLOPs (2 x MACs) with their prefix: "1.30 GFLOPs"."""
    return _scaled(value, largest, 1000, ("FLOPs", "kFLOPs", "MFLOPs", "GFLOPs", "TFLOPs", "PFLOPs"))


def size(value: float, largest: float | None = None) -> str:
    """Bytes with their binary prefix: "1.72 MiB"."""
    return _scaled(value, largest, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def p_value(value: float) -> str:
    """ "p < 0.001" or "p = 0.043"."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}" if value < 0.1 else f"p = {value:.2f}"
