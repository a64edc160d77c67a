"""ToMe: in every block of the tower merge the most similar pairs of tokens, a few at a time.

Between attention and MLP of a block the tower's tokens, CLS included, are dealt in turn to two sets: A gets the first,
third, ... and B the others, so that behind a CLS the patches 1, 3, 5, ... are in A. Each token of A looks for the one
of B with the most similar key (cosine, keys averaged over heads), and the r best pairs are merged into their mean,
weighted by how many patches each stands for. What is left of A, in order, and then B is what the next block deals out;
the order of the image returns once, behind the last block, by the places of those that were never merged into another.
Attention logits get + log(size). The CLS stays as it is. r is the smallest number with which the blocks together leave
`keep` tokens (the authors give r).

In a tower without CLS the release leaves the rest of A in the order of falling similarity; so do we.

Deviations: the order of the image at the end, because the decoder numbers visual tokens by it (the release only
classifies); of equally similar tokens the earlier. CLIP and SigLIP towers; images of several packed tiles are refused,
because their packing needs the grid that merging dissolves.

Shapes: T tiles, P live tower tokens (CLS included), X of them in A and Y in B, N patches, D tower width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

from budgets.registry import METHODS
from budgets.schedule import Schedule
from visor.reduction._arithmetic import after_tower, check_choice, check_integer, feature_blocks, is_reduced_by
from visor.reduction.method import Method

if TYPE_CHECKING:
    import torch

    from budgets.geometry import ModelGeometry
    from visor.vision.tower import TowerWalk


@METHODS.register("tome")
@dataclass(frozen=True)
class ToMe(Method):
    """Options: `keep` tokens (a sample that has fewer keeps all); `size_bias`: add log(size) to attention logits."""

    keep: int = 64
    size_bias: bool = True

    title: ClassVar[str] = "ToMe"
    paper: ClassVar[str] = "Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023"
    stage: ClassVar[str] = "inside"
    merges: ClassVar[bool] = True
    version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_integer(self.title, "keep", self.keep, 1)
        check_choice(self.title, "size_bias", self.size_bias, (True, False))

    def schedule(self, geometry: ModelGeometry, num_visual: int) -> Schedule:
        num_blocks = feature_blocks(self.title, geometry)
        lengths(num_visual, min(self.keep, num_visual), num_blocks)
        return after_tower(geometry.num_layers, num_visual, "tome", self.keep, {"size_bias": self.size_bias})

    def settings(self, geometry: ModelGeometry, num_visual: int) -> Sequence[ToMe]:
        least = num_visual
        for _ in range(feature_blocks(self.title, geometry)):
            least -= least // 2
        return [replace(self, keep=keep) for keep in range(least, num_visual + 1)]

    def scoring_flops(self, geometry: ModelGeometry, schedule: Schedule, num_text: int) -> int:
        """In each block the similarity of the tokens of A to those of B, one head wide."""
        if not is_reduced_by(schedule, "tome"):
            return 0
        per_block = lengths(schedule.source_visual, schedule.encoder.keep, feature_blocks(self.title, geometry))
        head = geometry.vision.hidden_size // geometry.vision.num_heads
        merging = [live + geometry.vision.num_prefix_tokens for live, left in per_block if left < live]
        return sum(2 * -(-tokens // 2) * (tokens // 2) * head for tokens in merging)

    def tower_flops(self, geometry: ModelGeometry, schedule: Schedule) -> int:
        """Embedding and blocks, each at the tokens it has: attention before, MLP after merging."""
        tower = geometry.vision
        width, prefix = tower.hidden_size, tower.num_prefix_tokens
        flops = 2 * schedule.source_visual * width * tower.num_channels * tower.patch_size**2
        num_blocks = feature_blocks(self.title, geometry)
        for live, left in lengths(schedule.source_visual, schedule.encoder.keep, num_blocks):
            tokens = live + prefix
            flops += 2 * tokens * 4 * width**2 + 4 * width * tokens**2
            flops += 2 * (left + prefix) * tower.num_mlp_matrices * width * tower.intermediate_size
        return flops

    def reduce_in_tower(self, walk: TowerWalk, tiles: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        from visor.engine.stopwatch import scoring
        from visor.engine.streams import take
        from visor.vision.taps import recorded_projections, split_heads

        hidden_TPD = walk.embed(tiles)
        prefix = int(walk.has_cls)
        num_visual = hidden_TPD.shape[1] - prefix
        size_TP = torch.ones(hidden_TPD.shape[:2], device=hidden_TPD.device)
        place_TP = torch.arange(hidden_TPD.shape[1], device=hidden_TPD.device).expand(len(hidden_TPD), -1)
        for block, (live, left) in zip(walk.blocks, lengths(num_visual, keep, len(walk.blocks)), strict=True):
            bias_T1PP = None
            if self.size_bias and live < num_visual:  # before the first merge all sizes are 1, and the bias is 0
                bias_T11P = size_TP.log().to(hidden_TPD.dtype)[:, None, None]
                bias_T1PP = bias_T11P.expand(-1, -1, hidden_TPD.shape[1], -1)
            with recorded_projections(block, "k") as seen:
                hidden_TPD = walk.attend(block, hidden_TPD, bias_T1PP)
            if left < live:
                with scoring("tower"):
                    keys_TPd = split_heads(seen["k"], walk.num_heads).mean(1)
                    hidden_TPD, size_TP, stays_TM = merge_pairs(
                        hidden_TPD, size_TP, keys_TPd, live - left, walk.has_cls
                    )
                    place_TP = place_TP.gather(1, stays_TM)
            hidden_TPD = walk.feed_forward(block, hidden_TPD)
        place_TP, order_TP = place_TP.sort(dim=1)
        origin_TK = place_TP[:, prefix:] - prefix
        kept_TN = torch.zeros((len(hidden_TPD), num_visual), dtype=torch.bool, device=hidden_TPD.device)
        return take(hidden_TPD, order_TP), kept_TN.scatter(1, origin_TK, True)


@lru_cache(maxsize=65536)
def lengths(num_visual: int, keep: int, num_blocks: int) -> list[tuple[int, int]]:
    """Of each block the patches before and after merging: r fewer in each, at most half of them, with the smallest r
    that leaves `keep` in the end.

    Raises:
        ValueError: halving in every block still leaves more than `keep`.
    """
    least = -(-(num_visual - keep) // num_blocks)
    for rate in range(least, max(least, num_visual // 2) + 1):
        live, per_block = num_visual, []
        for _ in range(num_blocks):
            merged = min(rate, live // 2, live - keep)
            per_block.append((live, live - merged))
            live -= merged
        if live == keep:
            return per_block
    raise ValueError(
        f"ToMe: {num_blocks} blocks that each merge at most half of their tokens leave {live} of {num_visual}, "
        f"keep={keep} cannot be reached"
    )


def merge_pairs(
    hidden_TPD: torch.Tensor, size_TP: torch.Tensor, keys_TPd: torch.Tensor, num_merged: int, has_cls: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merge the `num_merged` tokens of A most similar to one of B into it, weighted by size.

    Args:
        has_cls: True if the first token is a CLS, which is merged into none.

    Returns:
        Tokens [T, P - num_merged, D], what is left of A and then B; their sizes; and the places they had.
    """
    import torch

    width = hidden_TPD.shape[-1]
    unit_TPd = torch.nn.functional.normalize(keys_TPd.float(), dim=-1)
    alike_TX, partner_TX = (unit_TPd[:, ::2] @ unit_TPd[:, 1::2].transpose(1, 2)).max(-1)
    if has_cls:
        alike_TX[:, 0] = -torch.inf
    ranked_TX = alike_TX.argsort(dim=1, descending=True, stable=True)
    merged_TR, rest_TX = ranked_TX[:, :num_merged], ranked_TX[:, num_merged:]
    if has_cls:  # sorted, so that the CLS comes first again
        rest_TX = rest_TX.sort(dim=1).values
    into_TR = 2 * partner_TX.gather(1, merged_TR) + 1
    merged_TR = 2 * merged_TR
    sums_TPD = hidden_TPD.float() * size_TP.float()[..., None]
    wide = lambda index_TR: index_TR[..., None].expand(-1, -1, width)
    sums_TPD = sums_TPD.scatter_add(1, wide(into_TR), sums_TPD.gather(1, wide(merged_TR)))
    sizes_TP = size_TP.float().scatter_add(1, into_TR, size_TP.float().gather(1, merged_TR))
    of_b_Y = torch.arange(1, hidden_TPD.shape[1], 2, device=hidden_TPD.device)
    stays_TM = torch.cat([2 * rest_TX, of_b_Y.expand(len(hidden_TPD), -1)], dim=1)
    means_TPD = sums_TPD / sizes_TP[..., None]
    return means_TPD.gather(1, wide(stays_TM)).to(hidden_TPD.dtype), sizes_TP.gather(1, stays_TM), stays_TM
