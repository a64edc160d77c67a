"""Image down-sampling: a smaller image gives the tower, and so the decoder, fewer tokens. The simplest control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from budgets.registry import METHODS
from budgets.schedule import Schedule
from visor.reduction._arithmetic import after_tower, check_integer, square_side
from visor.reduction.method import Method

if TYPE_CHECKING:
    from budgets.geometry import ModelGeometry
    from visor.vision.features import ReducedFeatures, VisionFeatures


@METHODS.register("downsample")
@dataclass(frozen=True)
class Downsample(Method):
    """Option: `side`; the image is resized so that the tower yields side x side tokens (never more than it does)."""

    side: int = 6

    title: ClassVar[str] = "Image down-sampling"

    def __post_init__(self) -> None:
        check_integer(self.title, "side", self.side, 1)

    def full_side(self, geometry: ModelGeometry, num_visual: int) -> int:
        """Side of the one tile's grid."""
        if geometry.vision is not None and geometry.vision.image_size is None:
            raise ValueError(
                f"{self.title}: {geometry.name} takes images of any size, and its processor decides how many patches "
                "that is; give the model smaller images (or a smaller max_pixels)"
            )
        if geometry.vision is not None and geometry.vision.packs_tiles:
            raise ValueError(
                f"{self.title}: {geometry.name} cuts an image into tiles by its size, so a smaller image is cut in "
                "another way, and its tokens do not follow from the full one's; give the model smaller images"
            )
        return square_side(self.title, num_visual)

    def schedule(self, geometry: ModelGeometry, num_visual: int) -> Schedule:
        full_side = self.full_side(geometry, num_visual)
        side = min(self.side, full_side)
        return after_tower(geometry.num_layers, num_visual, "downsample", side * side, image_scale=side / full_side)

    def settings(self, geometry: ModelGeometry, num_visual: int) -> Sequence[Downsample]:
        return [replace(self, side=side) for side in range(1, self.full_side(geometry, num_visual) + 1)]

    def reduce_features(self, vision: VisionFeatures, keep: int) -> ReducedFeatures:
        """Nothing is left to do: the smaller image already gave `keep` tokens."""
        from visor.vision.features import ReducedFeatures

        num_tokens = vision.features_BND.shape[1]
        if num_tokens != keep:
            raise ValueError(
                f"{self.title}: the tower gave {num_tokens} tokens where the schedule says {keep}; "
                "encode the image at the schedule's image_scale first"
            )
        return ReducedFeatures(vision.features_BND, None)
