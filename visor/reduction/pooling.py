"""Average pooling: the token grid averaged to a smaller one, without training. The control of trained pooling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from budgets.registry import METHODS
from budgets.schedule import Schedule
from visor.method import Method
from visor.reduction._arithmetic import after_tower, check_integer, square_side

if TYPE_CHECKING:
    from budgets.geometry import ModelGeometry
    from visor.vision import ReducedFeatures, VisionFeatures


@METHODS.register("pooling")
@dataclass(frozen=True)
class Pooling(Method):
    """Option: `side`, the side of the grid that is left (never more than there is; pooling does not enlarge)."""

    side: int = 6

    title: ClassVar[str] = "Average pooling"
    stage: ClassVar[str] = "projected"

    def __post_init__(self) -> None:
        check_integer(self.title, "side", self.side, 1)

    def schedule(self, geometry: ModelGeometry, num_visual: int) -> Schedule:
        side = min(self.side, square_side(self.title, num_visual))
        return after_tower(geometry.num_layers, num_visual, "pooling", side * side)

    def settings(self, geometry: ModelGeometry, num_visual: int) -> Sequence[Pooling]:
        return [replace(self, side=side) for side in range(1, square_side(self.title, num_visual) + 1)]

    def reduce_features(self, vision: VisionFeatures, keep: int) -> ReducedFeatures:
        import torch

        from visor.vision import ReducedFeatures

        side = square_side(self.title, keep)
        if vision.grid is None or side > min(vision.grid):
            raise ValueError(f"{self.title}: cannot average a token grid of {vision.grid} to {side} x {side}")
        batch, _, width = vision.features_BND.shape
        grid_BDRC = vision.features_BND.transpose(1, 2).reshape(batch, width, *vision.grid)
        pooled_BDRC = torch.nn.functional.adaptive_avg_pool2d(grid_BDRC, side)
        # Every token lives on in a mean: there is no kept set to show.
        return ReducedFeatures(pooled_BDRC.flatten(2).transpose(1, 2), None)
