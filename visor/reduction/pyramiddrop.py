"""PyramidDrop: drop visual tokens in stages, the deeper the fewer.

Before the layers at L/4, L/2 and 3L/4 (evenly spaced, one a stage) the visual tokens are ranked by the attention that
the last instruction token would pay them in the layer about to run: that layer's own input norm, q and k projections
and RoPE on the hidden states entering it. Each stage keeps a share of the *original* N. Positions are renumbered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from budgets.registry import METHODS
from budgets.schedule import Schedule
from visor.reduction._arithmetic import inside_decoder
from visor.reduction.method import Method

if TYPE_CHECKING:
    import torch

    from budgets.geometry import ModelGeometry
    from visor.engine.decoder import LayerContext


@METHODS.register("pyramiddrop")
@dataclass(frozen=True)
class PyramidDrop(Method):
    """Options: `stages`, the shares of the original tokens that stay after each stage, falling, comma-separated;
    `positions`, what happens to position ids: "contiguous" (as the authors) or "kept"."""

    stages: str = "0.5,0.25,0.125"
    positions: str = "contiguous"

    title: ClassVar[str] = "PyramidDrop"
    paper: ClassVar[str] = "Xing et al., PyramidDrop, CVPR 2025"

    def __post_init__(self) -> None:
        shares = self.shares
        falls = all(early >= late for early, late in zip(shares, shares[1:], strict=False))
        if not shares or not all(0 < share <= 1 for share in shares) or not falls:
            rule = "shares in (0, 1] that do not rise, like '0.5,0.25'"
            raise ValueError(f"PyramidDrop: stages must be {rule}, got {self.stages!r}")
        if self.positions not in ("kept", "contiguous"):
            raise ValueError(f"PyramidDrop: positions must be 'contiguous' or 'kept', got {self.positions!r}")

    @property
    def shares(self) -> tuple[float, ...]:
        """`stages` as numbers."""
        try:
            return tuple(float(share) for share in str(self.stages).split(","))
        except ValueError as error:
            raise ValueError(f"PyramidDrop: stages must be numbers like '0.5,0.25', got {self.stages!r}") from error

    def schedule(self, geometry: ModelGeometry, num_visual: int) -> Schedule:
        num_stages = len(self.shares)
        if geometry.num_layers <= num_stages:
            raise ValueError(f"PyramidDrop: {num_stages} stages do not fit into {geometry.num_layers} decoder layers")
        keep_at_layer = {
            (stage + 1) * geometry.num_layers // (num_stages + 1): max(1, int(num_visual * share + 1e-6))
            for stage, share in enumerate(self.shares)
        }
        return inside_decoder(geometry.num_layers, num_visual, "pyramiddrop", keep_at_layer, self.positions)

    def settings(self, geometry: ModelGeometry, num_visual: int) -> Sequence[PyramidDrop]:
        """The dial is the ratio r between stages, r, r^2, r^3, as in the authors' own tables (default r = 1/2)."""
        ratios = [keep / num_visual for keep in range(1, num_visual + 1)]
        powers = range(1, len(self.shares) + 1)
        return [replace(self, stages=",".join(f"{ratio**power:.12g}" for power in powers)) for ratio in ratios]

    def scoring_flops(self, geometry: ModelGeometry, schedule: Schedule, num_text: int) -> int:
        """A stage projects one query row, and the keys of all n tokens a second time (the layer makes its own for the
        tokens that stay), then q.k over the n keys."""
        heads_width, keys_width = geometry.num_heads * geometry.head_dim, geometry.num_kv_heads * geometry.head_dim
        flops = 0
        for layer, op in enumerate(schedule.layers):
            if op.reduce and op.reduce.method == "pyramiddrop":
                num_tokens = schedule.visual_tokens[layer - 1] + num_text
                flops += 2 * geometry.hidden_size * (heads_width + keys_width * num_tokens)
                flops += 2 * heads_width * num_tokens
        return flops

    def score_tokens(self, context: LayerContext) -> torch.Tensor:
        return context.attention_row(layer=context.layer)
