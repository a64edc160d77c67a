"""Blind: no layer sees a visual token. The floor that the text alone gives, from which any use of the image counts.

Every layer runs on the text only, so nothing of the image is computed in the decoder or cached. The text keeps the
position ids that it has in the full prompt, as it does in VTW's layers behind the image and in VISOR's TEXT layers: the
model differs from the dense one in what it sees, and in nothing else. So the gap in the ids says how many visual tokens
there were, which is the image's size where a family has images of any size; and what a template writes around an image,
such as the marks of rows, is text and stays. The tower runs, as it does for every method, and is priced; the budget
counts the decoder only.

A control, not a method: reports show it as the floor and leave it out of the frontier, which it would always be on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from budgets.registry import METHODS
from budgets.schedule import LayerMode, LayerOp, Schedule
from visor.reduction.method import Method

if TYPE_CHECKING:
    from budgets.geometry import ModelGeometry


@METHODS.register("blind")
@dataclass(frozen=True)
class Blind(Method):
    """Text only. It has no dial: its cost is that of the text."""

    title: ClassVar[str] = "Blind"
    changes_modes: ClassVar[bool] = True

    def schedule(self, geometry: ModelGeometry, num_visual: int) -> Schedule:
        return Schedule((LayerOp(LayerMode.TEXT),) * geometry.num_layers, num_visual)
