"""HiRED: a fixed share of tokens for the overview of an image, the rest to its tiles by where the overview looks.

Of T tokens the tile that shows the whole image gets int(T / 2), at most all it has. The rest is shared among the other
tiles in proportion to the attention of the CLS row in encoder *block 0* of the overview that lies in the part of the
image which the tile shows; in each tile the tokens with the most CLS attention in *block -2* stay, in the order of the
image. An image of one tile: the T best. The authors' rate (0.2, 0.4) of all tokens is `keep` here.

The release does not follow this sharing rule of its paper; ours does, so that on images of several tiles the two keep
other tokens. On one tile they keep the same.

Deviations: the surrogate for a missing CLS (`visor.vision.taps.TAPS`); N counts the tokens that the family's packing
leaves (padding cropped), and a line's end is no candidate; the part of the overview that a tile shows is found from
the image itself without its padding; what rounding leaves of the shares goes to the highest scores, so that exactly T
stay.

Shapes: B samples, N visual tokens, Q tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from budgets.registry import METHODS
from budgets.schedule import Schedule
from visor.reduction._arithmetic import after_tower, check_fraction, check_integer, is_reduced_by, salience_flops
from visor.reduction.method import Method

if TYPE_CHECKING:
    import torch

    from budgets.geometry import ModelGeometry
    from visor.vision.features import ReducedFeatures, VisionFeatures


@METHODS.register("hired")
@dataclass(frozen=True)
class HiRED(Method):
    """Options: `keep` tokens (a sample that has fewer keeps all); `overview`, the share of them for the tile that shows
    the whole image."""

    keep: int = 115
    overview: float = 0.5

    title: ClassVar[str] = "HiRED"
    paper: ClassVar[str] = "Arif et al., HiRED: Attention-Guided Token Dropping for High-Resolution VLMs, AAAI 2025"
    taps: ClassVar[frozenset[str]] = frozenset({"salience", "first_salience", "places"})

    def __post_init__(self) -> None:
        check_integer(self.title, "keep", self.keep, 1)
        check_fraction(self.title, "overview", self.overview, low=0, high=1, includes_high=True)

    def schedule(self, geometry: ModelGeometry, num_visual: int) -> Schedule:
        return after_tower(geometry.num_layers, num_visual, "hired", self.keep, {"overview": self.overview})

    def settings(self, geometry: ModelGeometry, num_visual: int) -> Sequence[HiRED]:
        return [replace(self, keep=keep) for keep in range(1, num_visual + 1)]

    def scoring_flops(self, geometry: ModelGeometry, schedule: Schedule, num_text: int) -> int:
        """The rows of two tower blocks."""
        return 2 * salience_flops(geometry, schedule.source_visual) if is_reduced_by(schedule, "hired") else 0

    def reduce_features(self, vision: VisionFeatures, keep: int) -> ReducedFeatures:
        import torch

        from visor.reduction._tokens import chosen, ranked

        scores_BN, places_BN3 = vision.tap("salience").float(), vision.tap("places")
        tile_BN, tile_in_overview_BN = tiles_of(places_BN3)
        num_tiles = int(tile_BN.max()) + 1
        is_tile_BQN = tile_BN[:, None] == torch.arange(num_tiles, device=tile_BN.device)[:, None]
        look_BN = vision.tap("first_salience").float() * (tile_BN == 0)
        is_seen_BQN = tile_in_overview_BN[:, None] == torch.arange(num_tiles, device=tile_BN.device)[:, None]
        mass_BQ = (is_seen_BQN * look_BN[:, None]).sum(-1)
        shares_BQ = tile_shares(mass_BQ, is_tile_BQN.sum(-1), keep, self.overview)
        # Rank of each token within its tile: how many tokens of the tile come before it in the order of scores.
        order_BN = ranked(scores_BN)
        before_BQN = is_tile_BQN.gather(2, order_BN[:, None].expand_as(is_tile_BQN)).cumsum(-1) - 1
        rank_BN = before_BQN.gather(1, tile_BN.gather(1, order_BN).clamp(min=0)[:, None])[:, 0]
        rank_BN = torch.empty_like(rank_BN).scatter(1, order_BN, rank_BN)
        chosen_BN = (tile_BN >= 0) & (rank_BN < shares_BQ.gather(1, tile_BN.clamp(min=0)))
        # First those within their tile's share, then the best of the others, then ends of lines (which score below 0).
        top_B1 = scores_BN.amax(1, keepdim=True) + 1
        return chosen(vision, ranked(scores_BN + chosen_BN * top_B1)[:, :keep])


def tiles_of(places_BN3: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """By token: its tile (0: the overview, 1, 2, ...: the others in reading order, -1: none), and, for a token of the
    overview, the tile that shows the same part of the image (0 elsewhere, and if there is no other tile)."""
    import torch

    kind_BN, yx_BN2 = places_BN3[..., 0], places_BN3[..., 1:]
    is_part_BN1 = (kind_BN > 0.5)[..., None]
    # Fewer columns than 1000: a tile's number grows with its row, then with its column.
    cell_BN2 = yx_BN2.floor().long().clamp(min=0)
    columns_B1 = torch.where(is_part_BN1[..., 0], cell_BN2[..., 1], -1).amax(1, keepdim=True) + 1
    tile_BN = 1 + cell_BN2[..., 0] * columns_B1 + cell_BN2[..., 1]
    tile_BN = torch.where(is_part_BN1[..., 0], tile_BN, torch.where(kind_BN < -0.5, -1, 0))
    # The image reaches from its first to its last token: half a token further than their centres, which no tile's edge
    # notices.
    first_B12 = torch.where(is_part_BN1, yx_BN2, torch.inf).amin(1, keepdim=True)
    last_B12 = torch.where(is_part_BN1, yx_BN2, -torch.inf).amax(1, keepdim=True)
    has_parts_B1 = is_part_BN1[..., 0].any(1, keepdim=True)
    first_B12, last_B12 = (edge.masked_fill(edge.isinf(), 0.0) for edge in (first_B12, last_B12))
    seen_BN2 = (first_B12 + yx_BN2 * (last_B12 - first_B12)).floor().long().clamp(min=0)
    seen_BN = 1 + seen_BN2[..., 0] * columns_B1 + seen_BN2[..., 1]
    return tile_BN, torch.where((tile_BN == 0) & has_parts_B1, seen_BN, 0)


def tile_shares(mass_BQ: torch.Tensor, size_BQ: torch.Tensor, keep: int, overview: float) -> torch.Tensor:
    """Tokens of each tile: at most `keep` in all, at most what the tile has, the overview's share first: [B, Q]."""
    import torch

    others_BQ = mass_BQ.clone()
    others_BQ[:, 0] = 0
    has_others_B = size_BQ[:, 1:].sum(1) > 0
    overview_B = torch.where(has_others_B, int(keep * overview), keep).minimum(size_BQ[:, 0])
    left_B1 = keep - overview_B[:, None]
    shares_BQ = (left_B1 * others_BQ / others_BQ.sum(1, keepdim=True).clamp(min=1e-12)).floor().long()
    shares_BQ[:, 0] = overview_B
    return shares_BQ.minimum(size_BQ)
