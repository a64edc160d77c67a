"""VisionZip: keep the patches that the vision tower itself looks at, and merge the rest into a few.

Dominant tokens are those with the most attention in encoder block -2: the CLS row where the tower has a CLS, otherwise
the attention a patch receives from all query rows (SigLIP has no CLS; the surrogate is named in BASELINES). Contextual
tokens are evenly spaced among the leftover; every other leftover joins the one with the most similar key.

An image of several tiles is one set of tokens here. The release has a budget for every tile: `per_tile=True` counts as
it does (`visor.reduction._tiles`), but for the CLS of each tile, which packing drops: a patch has its place.

Shapes: B samples, N visual tokens, R leftover, C contextual, D dominant, H key width, E feature width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from budgets.registry import METHODS
from budgets.schedule import Schedule
from visor.reduction._arithmetic import check_fraction, check_integer
from visor.reduction._tiles import check_per_tile, full_tile, most_kept, reduce_in_tiles, resolved, tower_schedule
from visor.reduction.method import Method

if TYPE_CHECKING:
    import torch

    from budgets.geometry import ModelGeometry
    from visor.vision.features import ReducedFeatures, VisionFeatures


@METHODS.register("visionzip")
@dataclass(frozen=True)
class VisionZip(Method):
    """Options: `keep` tokens in all (a sample that has fewer keeps all), of the image or, with `per_tile`, of each
    tile; `contextual`, the share of them that are merged ones (the authors' 54 + 10; 0 turns merging off); `merge`, how
    a contextual token is made of its target and what joined it: "add" = target + mean(joined), as released, or "mean"
    over target and joined."""

    keep: int = 64
    contextual: float = 10 / 64
    merge: str = "add"
    per_tile: bool = False

    title: ClassVar[str] = "VisionZip"
    paper: ClassVar[str] = "Yang et al., VisionZip: Longer is Better but Not Necessary in VLMs, CVPR 2025"
    taps: ClassVar[frozenset[str]] = frozenset({"salience", "keys"})

    def __post_init__(self) -> None:
        check_integer(self.title, "keep", self.keep, 1)
        check_fraction(self.title, "contextual", self.contextual, low=0, high=1, includes_high=False)
        if self.merge not in ("add", "mean"):
            raise ValueError(f"VisionZip: merge must be 'add' or 'mean', got {self.merge!r}")
        check_per_tile(self)

    def num_contextual(self, keep: int) -> int:
        """How many of `keep` tokens are merged ones; at least one token is always a dominant one."""
        return min(round(keep * self.contextual), keep - 1)

    def schedule(self, geometry: ModelGeometry, num_visual: int) -> Schedule:
        params = {"contextual": self.contextual, "merge": self.merge}
        return tower_schedule(self, geometry, num_visual, "visionzip", params)

    def settings(self, geometry: ModelGeometry, num_visual: int) -> Sequence[VisionZip]:
        return [replace(self, keep=keep) for keep in range(1, most_kept(self, geometry, num_visual) + 1)]

    def scoring_flops(self, geometry: ModelGeometry, schedule: Schedule, num_text: int) -> int:
        """q.k of the scored rows in one tower block (all rows, or the CLS row), and the key similarities; where each
        tile has a number, of full tiles."""
        if schedule.encoder is None or schedule.encoder.method != "visionzip":
            return 0
        num_visual, keep, tiles = (
            schedule.source_visual,
            schedule.encoder.keep,
            geometry.num_tiles(schedule.source_visual),
        )
        tower = geometry.vision
        num_tokens = geometry.tower_tokens(num_visual)
        flops = tiles * 2 * (tower.num_prefix_tokens or num_tokens) * num_tokens * tower.hidden_size
        sets, size = 1, num_visual
        if self.per_tile:
            sets, size, keep = tiles, full_tile(geometry, num_visual), self.keep
        num_contextual = self.num_contextual(keep)
        # The CLS takes one of the dominant places, so one patch more is left over.
        num_leftover = size - (keep - num_contextual) + tower.num_prefix_tokens
        head = tower.hidden_size // tower.num_heads
        return flops + sets * 2 * (num_leftover - num_contextual) * num_contextual * head

    def resolve(self, schedule: Schedule, vision: VisionFeatures) -> Schedule:
        return resolved(self, schedule, vision)

    def reduce_features(self, vision: VisionFeatures, keep: int) -> ReducedFeatures:
        import torch

        from visor.vision.features import ReducedFeatures

        if self.per_tile:
            return reduce_in_tiles(self, vision, self.num_contextual(self.keep))
        features_BNE, salience_BN, keys_BNH = vision.features_BND, vision.tap("salience"), vision.tap("keys")
        batch, num_visual, _ = features_BNE.shape
        if keep >= num_visual:
            return ReducedFeatures(features_BNE, features_BNE.new_ones((batch, num_visual), dtype=torch.bool))
        num_contextual = self.num_contextual(keep)
        cls = vision.cls_B1D
        num_patches = keep - num_contextual - (cls is not None)

        order_BN = salience_BN.argsort(dim=1, descending=True, stable=True)
        dominant_BD = order_BN[:, :num_patches].sort(dim=1).values
        leftover_BR = order_BN[:, num_patches:].sort(dim=1).values
        parts = [] if cls is None else [cls]
        parts.append(take(features_BNE, dominant_BD))
        kept = dominant_BD
        if num_contextual:
            merged_BCE, target_C = merge_leftover(
                take(features_BNE, leftover_BR), take(keys_BNH, leftover_BR), num_contextual, self.merge
            )
            parts.append(merged_BCE)
            kept = torch.cat([dominant_BD, leftover_BR[:, target_C]], dim=1)
        kept_BN = features_BNE.new_zeros((batch, num_visual), dtype=torch.bool).scatter(1, kept, True)
        return ReducedFeatures(torch.cat(parts, dim=1), kept_BN, kept if cls is None else None)


def take(values_BNE: torch.Tensor, index_BK: torch.Tensor) -> torch.Tensor:
    """Rows `index_BK` of each sample: [B, K, E]."""
    return values_BNE.gather(1, index_BK[..., None].expand(-1, -1, values_BNE.shape[-1]))


def merge_leftover(
    features_BRE: torch.Tensor, keys_BRH: torch.Tensor, num_contextual: int, merge: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge R leftover tokens into at most `num_contextual`.

    Returns:
        The merged tokens [B, C, E], C = min(num_contextual, R), and the places [C] of their targets among the leftover.
    """
    import torch

    num_leftover = features_BRE.shape[1]
    num_contextual = min(num_contextual, num_leftover)
    step = max(1, num_leftover // num_contextual)
    places = torch.arange(num_leftover, device=features_BRE.device)
    target_C = places[::step][:num_contextual]
    is_other_R = torch.ones_like(places, dtype=torch.bool)
    is_other_R[target_C] = False
    targets_BCE, others_BOE = features_BRE[:, target_C], features_BRE[:, is_other_R]
    # Half-precision cosines tie where the merge would differ: compare in fp32.
    keys_BRH = torch.nn.functional.normalize(keys_BRH.float(), dim=-1)
    joins_BO = (keys_BRH[:, is_other_R] @ keys_BRH[:, target_C].transpose(1, 2)).argmax(dim=-1)
    sums_BCE = torch.zeros_like(targets_BCE, dtype=torch.float32)
    sums_BCE.scatter_add_(1, joins_BO[..., None].expand_as(others_BOE), others_BOE.float())
    counts_BC1 = torch.zeros_like(sums_BCE[..., :1])
    counts_BC1.scatter_add_(1, joins_BO[..., None], torch.ones_like(joins_BO[..., None], dtype=torch.float32))
    if merge == "add":
        merged_BCE = targets_BCE.float() + sums_BCE / counts_BC1.clamp(min=1)
    else:
        merged_BCE = (targets_BCE.float() + sums_BCE) / (counts_BC1 + 1)
    return merged_BCE.to(features_BRE.dtype), target_C
