"""VisPruner: half the tokens by importance, the other half by thinning out what is alike.

T r tokens (r = 0.5) with the most attention of the CLS row in encoder block -2 stay. The rest, in the order of falling
attention, is thinned out until T - T r are left: the even and the odd places are compared, the (at most) eight even
tokens most similar (cosine) to an odd one go, and what is left of the even ones, most similar first, stands before the
odd ones in the next round. Output in the order of the image. Deviations: the surrogate for a missing CLS
(`visor.vision.taps.TAPS`); tokens are chosen before the projector; an image of several tiles is one set of tokens,
compared after the projector, where the release has a budget for every tile: `per_tile=True` counts as it does
(`visor.reduction._tiles`). One similarity matrix serves all rounds.

Shapes: B samples, N visual tokens, R tokens not yet thinned out, E feature width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from budgets.registry import METHODS
from budgets.schedule import Schedule
from visor.reduction._arithmetic import (
    check_fraction,
    check_integer,
    feature_width,
    is_reduced_by,
    salience_flops,
)
from visor.reduction._tiles import check_per_tile, full_tile, most_kept, reduce_in_tiles, resolved, tower_schedule
from visor.reduction.method import Method

if TYPE_CHECKING:
    import torch

    from budgets.geometry import ModelGeometry
    from visor.vision.features import ReducedFeatures, VisionFeatures


@METHODS.register("vispruner")
@dataclass(frozen=True)
class VisPruner(Method):
    """Options: `keep` tokens (a sample that has fewer keeps all), of the image or, with `per_tile`, of each tile;
    `important`, the share of them that is chosen by attention; `step`, how many tokens at most go in a round."""

    keep: int = 64
    important: float = 0.5
    step: int = 8
    per_tile: bool = False

    title: ClassVar[str] = "VisPruner"
    paper: ClassVar[str] = "Zhang et al., Beyond Text-Visual Attention (VisPruner), ICCV 2025"
    taps: ClassVar[frozenset[str]] = frozenset({"salience"})

    def __post_init__(self) -> None:
        check_integer(self.title, "keep", self.keep, 1)
        check_integer(self.title, "step", self.step, 1)
        check_per_tile(self)
        check_fraction(self.title, "important", self.important, low=0, high=1, includes_high=True)

    def schedule(self, geometry: ModelGeometry, num_visual: int) -> Schedule:
        params = {"important": self.important, "step": self.step}
        return tower_schedule(self, geometry, num_visual, "vispruner", params)

    def settings(self, geometry: ModelGeometry, num_visual: int) -> Sequence[VisPruner]:
        return [replace(self, keep=keep) for keep in range(1, most_kept(self, geometry, num_visual) + 1)]

    def scoring_flops(self, geometry: ModelGeometry, schedule: Schedule, num_text: int) -> int:
        """The rows of one tower block, and the similarities of the tokens that are not important: of full tiles, where
        each has a number."""
        if not is_reduced_by(schedule, "vispruner"):
            return 0
        sets, size, keep = 1, schedule.source_visual, schedule.encoder.keep
        if self.per_tile:
            sets, size, keep = geometry.num_tiles(size), full_tile(geometry, size), self.keep
        num_rest = size - int(keep * self.important)
        return salience_flops(geometry, schedule.source_visual) + sets * 2 * num_rest**2 * feature_width(geometry)

    def resolve(self, schedule: Schedule, vision: VisionFeatures) -> Schedule:
        return resolved(self, schedule, vision)

    def reduce_features(self, vision: VisionFeatures, keep: int) -> ReducedFeatures:
        import torch

        from visor.reduction._tokens import chosen, cosines, ranked, take

        if self.per_tile:
            return reduce_in_tiles(self, vision)
        order_BN = ranked(vision.tap("salience"))
        num_important = int(keep * self.important)
        important_BK, rest_BR = order_BN[:, :num_important], order_BN[:, num_important:]
        diverse = thinned_out(cosines(take(vision.features_BND, rest_BR)), keep - num_important, self.step)
        return chosen(vision, torch.cat([important_BK, rest_BR.gather(1, diverse)], dim=1))


def thinned_out(similarity_BRR: torch.Tensor, num_left: int, step: int) -> torch.Tensor:
    """Indices of `num_left` of the R tokens, after rounds that each drop up to `step` of the even places."""
    import torch

    batch, num_rest, _ = similarity_BRR.shape
    rows_B11 = torch.arange(batch, device=similarity_BRR.device)[:, None, None]
    places_BR = torch.arange(num_rest, device=similarity_BRR.device).expand(batch, -1)
    while places_BR.shape[1] > num_left:
        even_BX, odd_BY = places_BR[:, ::2], places_BR[:, 1::2]
        if not odd_BY.shape[1]:  # one token is left where none should be
            return places_BR[:, :num_left]
        num_gone = min(step, places_BR.shape[1] - num_left)
        alike_BX = similarity_BRR[rows_B11, even_BX[:, :, None], odd_BY[:, None]].amax(-1)
        order_BX = alike_BX.argsort(dim=1, descending=True, stable=True)
        places_BR = torch.cat([even_BX.gather(1, order_BX[:, num_gone:]), odd_BY], dim=1)
    return places_BR
