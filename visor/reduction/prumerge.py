"""PruMerge: keep the tokens whose attention stands out, and merge every other token into them. PruMerge+ adds more.

Scores come from the tower's last block with its heads taken for one over the full width: softmax(q k^T / sqrt(width)),
row of the CLS. Kept are the scores above Q3 + 1.5 IQR. To each kept token its 32 nearest tokens by cosine of keys are
added, weighted by their scores; one more token is the sum of score x feature over all that is not kept. Output in the
order of falling score. PruMerge+ adds tokens evenly spaced among the others.

How many tokens stand out depends on the image. `keep=None` is the authors' rule: the number is settled once the image
is encoded (`resolve`). A budget needs a number, and then `keep - 1` tokens stay: PruMerge takes those with the highest
scores (which are the outliers where the numbers agree), PruMerge+ the outliers and evenly spaced others up to it.
Deviations: that, the surrogate for a missing CLS (`visor.vision.taps.TAPS`), and that an image of several tiles is one
set.

Shapes: B samples, N visual tokens, K kept ones, E feature width, w tower width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from budgets.registry import METHODS
from budgets.schedule import Reduction, Schedule
from visor.reduction._arithmetic import after_tower, check_integer, feature_width, is_reduced_by, salience_flops
from visor.reduction.method import Method

if TYPE_CHECKING:
    import torch

    from budgets.geometry import ModelGeometry
    from visor.vision.features import ReducedFeatures, VisionFeatures


@METHODS.register("prumerge")
@dataclass(frozen=True)
class PruMerge(Method):
    """Options: `keep` tokens in all, merged ones included (a sample that has fewer keeps all), or None: as many as
    stand out, and one; `neighbours` that are merged into a kept token."""

    keep: int | None = None
    neighbours: int = 32

    name: ClassVar[str] = "prumerge"
    title: ClassVar[str] = "PruMerge"
    paper: ClassVar[str] = "Shang et al., LLaVA-PruMerge: Adaptive Token Reduction for Efficient LMMs, ICCV 2025"
    taps: ClassVar[frozenset[str]] = frozenset({"last_salience", "last_keys"})
    merges: ClassVar[bool] = True
    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.keep is not None or not self.adaptive:
            check_integer(self.title, "keep", self.keep, 1)
        check_integer(self.title, "neighbours", self.neighbours, 0)

    def schedule(self, geometry: ModelGeometry, num_visual: int) -> Schedule:
        params = {"neighbours": self.neighbours}
        if self.keep is not None:
            return after_tower(geometry.num_layers, num_visual, self.name, self.keep, params)
        # At most everything; `resolve` counts. (Equal params: the counted schedules of a batch have one structure.)
        everything = after_tower(geometry.num_layers, num_visual + 1, self.name, num_visual, params)
        return replace(everything, source_visual=num_visual)

    def settings(self, geometry: ModelGeometry, num_visual: int) -> Sequence[PruMerge]:
        return [replace(self, keep=keep) for keep in range(1, num_visual + 1)]

    def resolve(self, schedule: Schedule, vision: VisionFeatures) -> Schedule:
        """As many tokens as stand out, and the one into which the others go. A schedule with a number stays."""
        if schedule.encoder.keep < schedule.source_visual:
            return schedule
        keep = min(int(outliers(vision.tap("last_salience")).sum()) + 1, schedule.source_visual)
        return replace(schedule, encoder=Reduction(self.name, keep, schedule.encoder.params))

    def scoring_flops(self, geometry: ModelGeometry, schedule: Schedule, num_text: int) -> int:
        """The rows of one tower block; key similarities of the kept tokens to all; and the weighted sums over all."""
        if not is_reduced_by(schedule, self.name):
            return 0
        num_visual, kept = schedule.source_visual, schedule.encoder.keep - 1
        flops = salience_flops(geometry, num_visual) + 2 * kept * num_visual * geometry.vision.hidden_size
        return flops + 2 * (kept + 1) * num_visual * feature_width(geometry)

    def choose(self, scores_BN: torch.Tensor, num_kept: int) -> torch.Tensor:
        """A mask of `num_kept` tokens of each sample."""
        from visor.reduction._tokens import kept_mask, ranked

        return kept_mask(ranked(scores_BN)[:, :num_kept], scores_BN.shape[1])

    def reduce_features(self, vision: VisionFeatures, keep: int) -> ReducedFeatures:
        import torch

        from visor.reduction._tokens import ranked, take
        from visor.vision.features import ReducedFeatures

        scores_BN, features_BNE = vision.tap("last_salience"), vision.features_BND.float()
        kept_BN = self.choose(scores_BN, keep - 1)
        kept_BK = ranked(scores_BN.masked_fill(~kept_BN, -torch.inf))[:, : keep - 1]
        weight_BN = scores_BN.clamp(min=0)  # a line's end between tiles has no score
        keys_BNw = torch.nn.functional.normalize(vision.tap("last_keys").float(), dim=-1)
        alike_BKN = take(keys_BNw, kept_BK) @ keys_BNw.transpose(1, 2)
        alike_BKN = alike_BKN.scatter(2, kept_BK[..., None], -torch.inf)  # a token is no neighbour of itself
        num_neighbours = min(self.neighbours, vision.num_tokens - 1)
        near_BKM = alike_BKN.argsort(dim=-1, descending=True, stable=True)[..., :num_neighbours]
        is_near_BKN = torch.zeros_like(alike_BKN).scatter(2, near_BKM, 1.0)
        rest_B1N = (weight_BN * ~kept_BN)[:, None]
        sums_BTE = torch.cat([is_near_BKN * weight_BN[:, None], rest_B1N], dim=1) @ features_BNE
        own_BTE = torch.nn.functional.pad(take(features_BNE, kept_BK), (0, 0, 0, 1))
        # The token of all the others stands at the best-scored of them.
        other_B1 = scores_BN.masked_fill(kept_BN, -torch.inf).argmax(1, keepdim=True)
        places_BT = torch.cat([kept_BK, other_B1], dim=1)
        return ReducedFeatures((own_BTE + sums_BTE).to(vision.features_BND.dtype), kept_BN, places_BT)


@METHODS.register("prumerge+")
@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """Options: `keep` tokens in all, merged ones included (a sample that has fewer keeps all); `neighbours` that are
    merged into a kept token."""

    keep: int = 144

    name: ClassVar[str] = "prumerge+"
    title: ClassVar[str] = "PruMerge+"
    adaptive: ClassVar[bool] = False

    def choose(self, scores_BN: torch.Tensor, num_kept: int) -> torch.Tensor:
        import torch

        from visor.reduction._tokens import kept_mask, ranked

        best_BN = kept_mask(ranked(scores_BN)[:, :num_kept], scores_BN.shape[1])
        kept_BN = outliers(scores_BN) & best_BN  # no more outliers than there is room for
        # A line's end between tiles has no score; it is taken only where nothing else is left.
        for others_BN in (~kept_BN & (scores_BN >= 0), scores_BN < 0):
            room_B1 = num_kept - kept_BN.sum(1, keepdim=True)
            there_B1 = others_BN.sum(1, keepdim=True)
            wanted_B1 = torch.minimum(room_B1, there_B1)
            place_BN = others_BN.cumsum(1)  # 1, 2, ... among the others
            steps = lambda place, wanted=wanted_B1, there=there_B1: (place * wanted) // there.clamp(min=1)
            kept_BN = kept_BN | (others_BN & (steps(place_BN) > steps(place_BN - 1)))
        return kept_BN


def outliers(scores_BN: torch.Tensor) -> torch.Tensor:
    """Scores above the third quartile plus 1.5 times the interquartile range, of each sample: [B, N]."""
    import torch

    scores_BN = scores_BN.float()
    real_BN = scores_BN.masked_fill(scores_BN < 0, torch.nan)
    low_B1, high_B1 = torch.nanquantile(real_BN, scores_BN.new_tensor([0.25, 0.75]), dim=1, keepdim=True)
    return scores_BN > high_B1 + 1.5 * (high_B1 - low_B1)
