"""ToMe: in every block of the tower merge the most similar pairs of tokens, a few at a time.

Between attention and MLP of a block the tokens are split into even and odd places; each even token looks for the odd
one with the most similar key (cosine, keys averaged over heads), and the r best pairs are merged into their mean,
weighted by how many patches each stands for. Attention logits get + log(size). The CLS is protected. r is the smallest
number with which the blocks together leave `keep` tokens (the authors give r).

Deviations: merged tokens stay in the order of the image (the release puts what was not merged first), because the
decoder numbers visual tokens by it. CLIP and SigLIP towers; images of several packed tiles are refused, because their
packing needs the grid that merging dissolves.

Shapes: T tiles, P live tower tokens (CLS included), X even and Y odd ones, N patches, D tower width.
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
        """In each block the similarity of the even to the odd tokens, one head wide."""
        if not is_reduced_by(schedule, "tome"):
            return 0
        per_block = lengths(schedule.source_visual, schedule.encoder.keep, feature_blocks(self.title, geometry))
        head = geometry.vision.hidden_size // geometry.vision.num_heads
        return sum(2 * -(-live // 2) * (live // 2) * head for live, left in per_block if left < live)

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
        from visor.vision.taps import reading_block, split_heads

        hidden_TPD = walk.embed(tiles)
        prefix = int(walk.has_cls)
        num_visual = hidden_TPD.shape[1] - prefix
        size_TP = torch.ones(hidden_TPD.shape[:2], device=hidden_TPD.device)
        origin_TP = torch.arange(num_visual, device=hidden_TPD.device).expand(len(hidden_TPD), -1)
        for block, (live, left) in zip(walk.blocks, lengths(num_visual, keep, len(walk.blocks)), strict=True):
            bias_T1PP = None
            if self.size_bias and live < num_visual:  # before the first merge all sizes are 1, and the bias is 0
                bias_T11P = size_TP.log().to(hidden_TPD.dtype)[:, None, None]
                bias_T1PP = bias_T11P.expand(-1, -1, hidden_TPD.shape[1], -1)
            with reading_block(block, "k") as seen:
                hidden_TPD = walk.attend(block, hidden_TPD, bias_T1PP)
            if left < live:
                with scoring("tower"):
                    keys_TNd = split_heads(seen["k"], walk.num_heads).mean(1)[:, prefix:]
                    hidden_TND, size_TN, stays_TM = merge_pairs(
                        hidden_TPD[:, prefix:], size_TP[:, prefix:], keys_TNd, live - left
                    )
                hidden_TPD = torch.cat([hidden_TPD[:, :prefix], hidden_TND], dim=1)
                size_TP = torch.cat([size_TP[:, :prefix], size_TN], dim=1)
                origin_TP = origin_TP.gather(1, stays_TM)
            hidden_TPD = walk.feed_forward(block, hidden_TPD)
        kept_TN = torch.zeros((len(hidden_TPD), num_visual), dtype=torch.bool, device=hidden_TPD.device)
        return hidden_TPD, kept_TN.scatter(1, origin_TP, True)


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
    hidden_TPD: torch.Tensor, size_TP: torch.Tensor, keys_TPd: torch.Tensor, num_merged: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merge the `num_merged` most similar (even, odd) pairs of tokens, weighted by size.

    Returns:
        Tokens [T, P - num_merged, D] in order, their sizes, and the places [T, P - num_merged] they had.
    """
    import torch

    tiles, num_tokens, width = hidden_TPD.shape
    unit_TPd = torch.nn.functional.normalize(keys_TPd.float(), dim=-1)
    alike_TX, partner_TX = (unit_TPd[:, ::2] @ unit_TPd[:, 1::2].transpose(1, 2)).max(-1)
    merged_TR = 2 * alike_TX.argsort(dim=1, descending=True, stable=True)[:, :num_merged]
    into_TR = 2 * partner_TX.gather(1, merged_TR // 2) + 1
    weight_TP1 = size_TP.float()[..., None]
    sums_TPD = hidden_TPD.float() * weight_TP1
    wide = lambda index_TR: index_TR[..., None].expand(-1, -1, width)
    sums_TPD = sums_TPD.scatter_add(1, wide(into_TR), sums_TPD.gather(1, wide(merged_TR)))
    sizes_TP = size_TP.float().scatter_add(1, into_TR, size_TP.float().gather(1, merged_TR))
    gone_TP = torch.zeros((tiles, num_tokens), dtype=torch.uint8, device=hidden_TPD.device).scatter(1, merged_TR, 1)
    stays_TM = gone_TP.argsort(dim=1, stable=True)[:, : num_tokens - num_merged]
    means_TPD = sums_TPD / sizes_TP[..., None]
    return means_TPD.gather(1, wide(stays_TM)).to(hidden_TPD.dtype), sizes_TP.gather(1, stays_TM), stays_TM
