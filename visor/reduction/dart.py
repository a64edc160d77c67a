"""DART: drop tokens that duplicate a few pivots, not those that look unimportant.

Layers 0..K-1 see everything. Before layer K, pivots are the 4 visual and the 4 text tokens (of those after the image)
whose keys of layer K-1, all heads together and after RoPE, have the largest L1 norm. Each pivot in turn keeps the
int(N (1 - drop) / 8) visual tokens not yet chosen that are least similar to it (cosine of the hidden states after the
decoder's final norm); the visual pivots stay too. Position ids are kept.

Deviations: pivots take turns in a fixed order, visual ones first and by falling norm (the release iterates over a set);
where fewer than 4 text tokens follow the image they take turns again.

Shapes: B batch, N live tokens, G key heads, d head width, P pivots, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from budgets.registry import METHODS
from budgets.schedule import Schedule
from visor.reduction._arithmetic import check_choice, check_fraction, check_integer, inside_decoder
from visor.reduction.method import Method

if TYPE_CHECKING:
    import torch

    from budgets.geometry import ModelGeometry
    from visor.engine.context import LayerContext


@METHODS.register("dart")
@dataclass(frozen=True)
class DART(Method):
    """Options: `layer` (K, the first layer with fewer tokens); `drop`, the share that goes, in [0, 1]; how many
    `visual_pivots` and `text_pivots`; `positions`: "kept" or "contiguous"."""

    layer: int = 2
    drop: float = 0.778
    visual_pivots: int = 4
    text_pivots: int = 4
    positions: str = "kept"

    title: ClassVar[str] = "DART"
    paper: ClassVar[str] = "Wen et al., Stop Looking for Important Tokens: Duplication Matters More, EMNLP 2025"
    looks_back: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_integer(self.title, "layer", self.layer, 1, " (it reads the keys of the layer before)")
        check_fraction(self.title, "drop", self.drop, low=0, high=1, includes_high=True)
        check_integer(self.title, "visual_pivots", self.visual_pivots, 1)
        check_integer(self.title, "text_pivots", self.text_pivots, 0)
        check_choice(self.title, "positions", self.positions, ("kept", "contiguous"))

    @property
    def num_pivots(self) -> int:
        return self.visual_pivots + self.text_pivots

    def schedule(self, geometry: ModelGeometry, num_visual: int) -> Schedule:
        if self.layer >= geometry.num_layers:
            raise ValueError(f"DART: layer={self.layer}, but the decoder's layers are 0 to {geometry.num_layers - 1}")
        each = int(num_visual * (1 - self.drop) / self.num_pivots + 1e-6)
        keep = min(num_visual, self.visual_pivots + self.num_pivots * each)
        params = {"text_pivots": self.text_pivots, "visual_pivots": self.visual_pivots}
        return inside_decoder(geometry.num_layers, num_visual, "dart", {self.layer: keep}, self.positions, params)

    def settings(self, geometry: ModelGeometry, num_visual: int) -> Sequence[DART]:
        """The dial is `drop`, one setting for each number of tokens that a pivot keeps."""
        most = num_visual // self.num_pivots
        return [replace(self, drop=1 - self.num_pivots * each / num_visual) for each in range(most + 1)]

    def scoring_flops(self, geometry: ModelGeometry, schedule: Schedule, num_text: int) -> int:
        """The pivots' similarity to all live tokens."""
        flops = 0
        for layer, op in enumerate(schedule.layers):
            if op.reduce and op.reduce.method == "dart":
                num_tokens = schedule.visual_tokens[layer - 1] + num_text
                flops += 2 * self.num_pivots * num_tokens * geometry.hidden_size
        return flops

    def score_tokens(self, context: LayerContext) -> torch.Tensor:
        """Pivots first, then what each pivot in turn keeps."""
        import torch

        from visor.engine.streams import take

        visual_BN = context.visual_BN
        norm_BN = context.previous_keys().float().abs().sum((1, 3))
        order_N = torch.arange(visual_BN.shape[1], device=visual_BN.device)
        last_visual_B1 = (order_N * visual_BN).amax(1, keepdim=True)
        after_BN = context.valid_BN & ~visual_BN & (order_N > last_visual_B1)
        after_BN = torch.where(after_BN.any(1, keepdim=True), after_BN, order_N == context.last_B1)
        pivots = [strongest(norm_BN, visual_BN, self.visual_pivots), strongest(norm_BN, after_BN, self.text_pivots)]
        pivot_BP = torch.cat(pivots, dim=1)
        unit_BND = torch.nn.functional.normalize(context.decoder.norm(context.hidden_BND).float(), dim=-1)
        alike_BPN = take(unit_BND, pivot_BP) @ unit_BND.transpose(1, 2)
        chosen_BN = torch.zeros_like(visual_BN).scatter(1, pivots[0], True) & visual_BN
        scores_BN = chosen_BN.float() * (1 + self.num_pivots)
        counts = [-(-max(0, keep - self.visual_pivots) // self.num_pivots) for keep in context.keep]
        each_B1 = torch.tensor(counts, device=visual_BN.device)[:, None]
        for turn, alike_BN in enumerate(alike_BPN.unbind(1)):
            free_BN = visual_BN & ~chosen_BN
            rank_BN = alike_BN.masked_fill(~free_BN, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
            mine_BN = free_BN & (rank_BN < each_B1)
            scores_BN = torch.where(mine_BN, float(self.num_pivots - turn), scores_BN)
            chosen_BN = chosen_BN | mine_BN
        return scores_BN


def strongest(norm_BN: torch.Tensor, among_BN: torch.Tensor, num: int) -> torch.Tensor:
    """Indices [B, num] of the tokens with the largest norms among some; with fewer than `num` they come round again."""
    import torch

    order_BN = norm_BN.masked_fill(~among_BN, -torch.inf).argsort(dim=1, descending=True, stable=True)
    turns_BP = torch.arange(num, device=norm_BN.device) % among_BN.sum(1, keepdim=True).clamp(min=1)
    return order_BN.gather(1, turns_BP)
