"""DivPrune: keep the tokens that are farthest from one another (max-min diversity), whatever the question.

Distance is 1 - cosine between projected tokens, as they would enter the decoder. First comes the token whose nearest
neighbour is farthest, then always the token whose distance to the chosen ones is largest; T = round(ratio N) in the
paper, `keep` here. Output in the order of the image. No deviation but the batch; of equals the earlier comes first.

Shapes: B samples, N visual tokens, T kept ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from budgets.registry import METHODS
from budgets.schedule import Schedule
from visor.reduction._arithmetic import after_tower, check_integer, is_reduced_by
from visor.reduction.method import Method

if TYPE_CHECKING:
    import torch

    from budgets.geometry import ModelGeometry
    from visor.vision.features import ReducedFeatures, VisionFeatures


@METHODS.register("divprune")
@dataclass(frozen=True)
class DivPrune(Method):
    """Option: `keep` tokens (a sample that has fewer keeps all)."""

    keep: int = 64

    title: ClassVar[str] = "DivPrune"
    paper: ClassVar[str] = "Alvar et al., DivPrune: Diversity-based Visual Token Pruning, CVPR 2025"
    stage: ClassVar[str] = "projected"

    def __post_init__(self) -> None:
        check_integer(self.title, "keep", self.keep, 1)

    def schedule(self, geometry: ModelGeometry, num_visual: int) -> Schedule:
        return after_tower(geometry.num_layers, num_visual, "divprune", self.keep)

    def settings(self, geometry: ModelGeometry, num_visual: int) -> Sequence[DivPrune]:
        return [replace(self, keep=keep) for keep in range(1, num_visual + 1)]

    def scoring_flops(self, geometry: ModelGeometry, schedule: Schedule, num_text: int) -> int:
        """All cosines, once."""
        return 2 * schedule.source_visual**2 * geometry.hidden_size if is_reduced_by(schedule, "divprune") else 0

    def reduce_features(self, vision: VisionFeatures, keep: int) -> ReducedFeatures:
        from visor.reduction._tokens import chosen, cosines

        return chosen(vision, farthest(cosines(vision.features_BND), keep))


def farthest(cosine_BNN: torch.Tensor, num_kept: int) -> torch.Tensor:
    """Indices [B, T] by greedy max-min of 1 - cosine, in the order in which they are chosen."""
    import torch

    from visor.reduction._tokens import first_equal

    batch, num_tokens, _ = cosine_BNN.shape
    index_N = torch.arange(num_tokens, device=cosine_BNN.device)
    rows_B, itself_NN = torch.arange(batch, device=cosine_BNN.device), index_N[:, None] == index_N
    first_BN = first_equal(cosine_BNN)
    distance_BNN = (1 - cosine_BNN).masked_fill(first_BN[:, :, None] == first_BN[:, None], 0)
    nearest_BN = distance_BNN.masked_fill(itself_NN, torch.inf).amin(-1)
    if num_tokens == 1:
        return torch.zeros((batch, 1), dtype=torch.long, device=distance_BNN.device)
    picks = [nearest_BN.argmax(1)]
    distance_BNN = distance_BNN.masked_fill(itself_NN, -torch.inf)  # a token that is chosen is never the farthest again
    nearest_BN = distance_BNN[rows_B, picks[0]].masked_fill(first_BN != index_N, 0)  # its equal comes before it
    for _ in range(num_kept - 1):
        picks.append(nearest_BN.argmax(1))
        nearest_BN = torch.minimum(nearest_BN, distance_BNN[rows_B, picks[-1]])
    return torch.stack(picks, dim=1)
