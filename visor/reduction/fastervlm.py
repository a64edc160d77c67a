"""FasterVLM: keep the patches that the tower's CLS token attends to most, in the order of the image.

The score is encoder block -2's attention of the CLS row, mean over heads; the best T tokens stay. Deviations: a tower
without CLS scores by the attention that a patch receives (`visor.vision.taps.TAPS`); tokens are chosen before the
projector, which treats each token alone, so the features are the authors' and fewer are projected; an image of several
tiles is one set of tokens, where the release has a budget for every tile: `per_tile=True` counts as it does
(`visor.reduction._tiles`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from budgets.registry import METHODS
from budgets.schedule import Schedule
from visor.reduction._arithmetic import check_integer, is_reduced_by, salience_flops
from visor.reduction._tiles import check_per_tile, most_kept, reduce_in_tiles, resolved, tower_schedule
from visor.reduction.method import Method

if TYPE_CHECKING:
    from budgets.geometry import ModelGeometry
    from visor.vision.features import ReducedFeatures, VisionFeatures


@METHODS.register("fastervlm")
@dataclass(frozen=True)
class FasterVLM(Method):
    """Options: `keep` tokens (a sample that has fewer keeps all), of the image or, with `per_tile`, of each tile."""

    keep: int = 64
    per_tile: bool = False

    title: ClassVar[str] = "FasterVLM"
    paper: ClassVar[str] = "Zhang et al., [CLS] Attention is All You Need for Training-Free Visual Token Pruning, 2024"
    taps: ClassVar[frozenset[str]] = frozenset({"salience"})

    def __post_init__(self) -> None:
        check_integer(self.title, "keep", self.keep, 1)
        check_per_tile(self)

    def schedule(self, geometry: ModelGeometry, num_visual: int) -> Schedule:
        return tower_schedule(self, geometry, num_visual, "fastervlm", {})

    def settings(self, geometry: ModelGeometry, num_visual: int) -> Sequence[FasterVLM]:
        return [replace(self, keep=keep) for keep in range(1, most_kept(self, geometry, num_visual) + 1)]

    def scoring_flops(self, geometry: ModelGeometry, schedule: Schedule, num_text: int) -> int:
        return salience_flops(geometry, schedule.source_visual) if is_reduced_by(schedule, "fastervlm") else 0

    def resolve(self, schedule: Schedule, vision: VisionFeatures) -> Schedule:
        return resolved(self, schedule, vision)

    def reduce_features(self, vision: VisionFeatures, keep: int) -> ReducedFeatures:
        from visor.reduction._tokens import chosen, ranked

        if self.per_tile:
            return reduce_in_tiles(self, vision)
        return chosen(vision, ranked(vision.tap("salience"))[:, :keep])
