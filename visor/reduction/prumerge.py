"""PruMerge: keep the tokens whose attention stands out, and merge every other token into them. PruMerge+ adds more.

Scores come from the tower's last block with its heads taken for one over the full width: softmax(q k^T / sqrt(width)),
row of the CLS. Kept are the scores above Q3 + 1.5 IQR. To each kept token its 32 nearest tokens by cosine of keys are
added, weighted by their scores; one more token is the sum of score x feature over all that is not kept. Output in the
order of falling score, that token last. PruMerge+ keeps evenly spaced tokens besides, behind the outliers and in the
order of the image: with n outliers of N tokens those of 0, s, 2s, ... below N - 1 that are no outliers,
s = int(int(N / n) / 3).

How many tokens stay depends on the image. `keep=None` is the authors' rule: the number is settled once the image is
encoded (`resolve`). A budget needs a number, and then `keep - 1` tokens stay: PruMerge takes those with the highest
scores (which are the outliers where the numbers agree), PruMerge+ the outliers, by score as long as there is room, and
as many evenly spaced others (the authors' where the numbers agree).
Deviations: that; where nothing stands out, or more than a third does, the release of PruMerge+ divides by zero, and we
take s of one outlier, and s = 1; the surrogate for a missing CLS (`visor.vision.taps.TAPS`); and an image of several
tiles is one set.

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
    usually_one_in: ClassVar[int] = 18  # tokens that stay on the authors' benchmarks

    def __post_init__(self) -> None:
        if self.keep is not None:
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
        """As many tokens as the image asks for, and the one of the others. A schedule with a number stays."""
        if schedule.encoder.keep < schedule.source_visual:
            return schedule
        keep = min(int(self.asked_for(vision.tap("last_salience")).sum()) + 1, schedule.source_visual)
        return replace(schedule, encoder=Reduction(self.name, keep, schedule.encoder.params))

    def scoring_flops(self, geometry: ModelGeometry, schedule: Schedule, num_text: int) -> int:
        """The rows of one tower block; key similarities of the kept tokens to all; and the weighted sums over all."""
        if not is_reduced_by(schedule, self.name):
            return 0
        num_visual, kept = schedule.source_visual, schedule.encoder.keep - 1
        flops = salience_flops(geometry, num_visual) + 2 * kept * num_visual * geometry.vision.hidden_size
        return flops + 2 * (kept + 1) * num_visual * feature_width(geometry)

    def asked_for(self, scores_BN: torch.Tensor) -> torch.Tensor:
        """A mask of the tokens that the authors' rule keeps of each image."""
        return outliers(scores_BN)

    def choose(self, scores_BN: torch.Tensor, num_kept: int) -> torch.Tensor:
        """The places [B, num_kept] of the tokens that stay, in the order in which they leave."""
        from visor.reduction._tokens import ranked

        return ranked(scores_BN)[:, :num_kept]

    def reduce_features(self, vision: VisionFeatures, keep: int) -> ReducedFeatures:
        import torch

        from visor.reduction._tokens import kept_mask, take
        from visor.vision.features import ReducedFeatures

        scores_BN, features_BNE = vision.tap("last_salience"), vision.features_BND.float()
        kept_BK = self.choose(scores_BN, keep - 1)
        kept_BN = kept_mask(kept_BK, vision.num_tokens)
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
    """Options: `keep` tokens in all, merged ones included (a sample that has fewer keeps all), or None: as the authors
    have it; `neighbours` that are merged into a kept token."""

    name: ClassVar[str] = "prumerge+"
    title: ClassVar[str] = "PruMerge+"
    version: ClassVar[int] = 2
    usually_one_in: ClassVar[int] = 4

    def asked_for(self, scores_BN: torch.Tensor) -> torch.Tensor:
        import torch

        stands_out_BN, is_patch_BN = outliers(scores_BN), scores_BN >= 0
        num_B1 = is_patch_BN.sum(1, keepdim=True)
        step_B1 = (num_B1 // stands_out_BN.sum(1, keepdim=True).clamp(min=1) // 3).clamp(min=1)
        place_BN = is_patch_BN.cumsum(1) - 1  # a line's end between tiles has no score and is no token of the image
        is_spaced_BN = is_patch_BN & (place_BN % step_B1 == 0) & (place_BN < num_B1 - 1)
        return torch.where(is_patch_BN, stands_out_BN | is_spaced_BN, False)

    def choose(self, scores_BN: torch.Tensor, num_kept: int) -> torch.Tensor:
        import torch

        from visor.reduction._tokens import ranked

        order_BN = ranked(scores_BN)
        rank_BN = order_BN.argsort(dim=1)
        first_BN = outliers(scores_BN) & (rank_BN < num_kept)  # no more outliers than there is room for
        own_BN = self.asked_for(scores_BN)
        kept_BN = torch.where(own_BN.sum(1, keepdim=True) == num_kept, own_BN, first_BN)
        # A line's end between tiles has no score; it is taken only where nothing else is left.
        for others_BN in (~kept_BN & (scores_BN >= 0), scores_BN < 0):
            room_B1 = num_kept - kept_BN.sum(1, keepdim=True)
            there_B1 = others_BN.sum(1, keepdim=True)
            wanted_B1 = torch.minimum(room_B1, there_B1)
            place_BN = others_BN.cumsum(1)  # 1, 2, ... among the others
            steps = lambda place, wanted=wanted_B1, there=there_B1: (place * wanted) // there.clamp(min=1)
            kept_BN = kept_BN | (others_BN & (steps(place_BN) > steps(place_BN - 1)))
        # Outliers by score, then the others by place.
        behind_BN = rank_BN.shape[1] + torch.arange(rank_BN.shape[1], device=rank_BN.device)
        key_BN = torch.where(first_BN, rank_BN, behind_BN).masked_fill(~kept_BN, 3 * rank_BN.shape[1])
        return key_BN.argsort(dim=1, stable=True)[:, :num_kept]


def outliers(scores_BN: torch.Tensor) -> torch.Tensor:
    """Scores above the third quartile plus 1.5 times the interquartile range, of each sample: [B, N]."""
    import torch

    scores_BN = scores_BN.float()
    real_BN = scores_BN.masked_fill(scores_BN < 0, torch.nan)
    low_B1, high_B1 = torch.nanquantile(real_BN, scores_BN.new_tensor([0.25, 0.75]), dim=1, keepdim=True)
    return scores_BN > high_B1 + 1.5 * (high_B1 - low_B1)
