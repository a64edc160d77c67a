"""Dense: the unmodified model, the reference of every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from budgets.registry import METHODS
from budgets.schedule import Schedule, dense
from visor.reduction.method import Method

if TYPE_CHECKING:
    from budgets.geometry import ModelGeometry


@METHODS.register("dense")
@dataclass(frozen=True)
class Dense(Method):
    """Every layer over every token. It has no dial: its budget is 1.0."""

    title: ClassVar[str] = "Dense"

    def schedule(self, geometry: ModelGeometry, num_visual: int) -> Schedule:
        return dense(geometry.num_layers, num_visual)
