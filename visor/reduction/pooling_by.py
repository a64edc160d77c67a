"""Pooling by a factor: a half or a quarter of the visual tokens, each the mean of two or four neighbours.

What VISOR-TR puts before the decoder (arXiv 2603.23495: pooled 2x / 4x). A grid is halved along its columns, or
along both sides; packed tiles are pooled as `pooling` does it, to as many tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from budgets.registry import METHODS
from budgets.schedule import Schedule
from visor.reduction._arithmetic import after_tower, check_choice, square_side
from visor.reduction.method import Method

if TYPE_CHECKING:
    from budgets.geometry import ModelGeometry
    from visor.vision.features import ReducedFeatures, VisionFeatures

FACTORS = (4, 2)


@METHODS.register("pooling_by")
@dataclass(frozen=True)
class PoolingBy(Method):
    """Option: `factor`, how many times fewer visual tokens are left, 2 or 4."""

    factor: int = 2

    title: ClassVar[str] = "Pooling by a factor"
    stage: ClassVar[str] = "projected"
    taps: ClassVar[frozenset[str]] = frozenset({"places"})
    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice(self.title, "factor", self.factor, FACTORS)

    def shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of what is left of a grid."""
        return (rows if self.factor == 2 else -(-rows // 2)), -(-columns // 2)

    def num_kept(self, geometry: ModelGeometry, num_visual: int) -> int:
        """Visual tokens that are left."""
        if geometry.vision is not None and geometry.vision.packs_tiles:
            return max(1, round(num_visual / self.factor))
        side = square_side(self.title, num_visual)
        rows, columns = self.shape(side, side)
        return rows * columns

    def schedule(self, geometry: ModelGeometry, num_visual: int) -> Schedule:
        keep = self.num_kept(geometry, num_visual)
        return after_tower(geometry.num_layers, num_visual, "pooling_by", keep, {"factor": self.factor})

    def settings(self, geometry: ModelGeometry, num_visual: int) -> Sequence[PoolingBy]:
        return [replace(self, factor=factor) for factor in FACTORS]

    def reduce_features(self, vision: VisionFeatures, keep: int) -> ReducedFeatures:
        import torch

        from visor.reduction.pooling import pool_packed
        from visor.vision.features import ReducedFeatures

        if vision.grid is None and "places" in vision.taps:
            rows = zip(vision.features_BND.unbind(), vision.tap("places").unbind(), strict=True)
            return ReducedFeatures(torch.stack([pool_packed(*row, keep) for row in rows]), None)
        if vision.grid is None or keep != self.shape(*vision.grid)[0] * self.shape(*vision.grid)[1]:
            raise ValueError(f"{self.title}: cannot average a token grid of {vision.grid} to {keep} tokens")
        batch, _, width = vision.features_BND.shape
        grid_BERC = vision.features_BND.transpose(1, 2).reshape(batch, width, *vision.grid)
        pooled_BERC = torch.nn.functional.adaptive_avg_pool2d(grid_BERC, self.shape(*vision.grid))
        # Every token lives on in a mean: there is no kept set to show.
        return ReducedFeatures(pooled_BERC.flatten(2).transpose(1, 2), None)
