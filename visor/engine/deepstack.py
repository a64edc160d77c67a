"""DeepStack: visual features that enter the hidden states behind each of the first decoder layers (Qwen3-VL).

The tower gives, beside the features that stand in the prompt, one more feature a visual token for each of a few
levels. Level i is added to the hidden states of the visual tokens behind layer i (arXiv 2406.04334). Under a schedule:

* A dropped token takes its levels with it.
* Where visual tokens stand still (TEXT and CROSS layers) the levels are added to them all the same: they are inputs,
  not something that the layer computes. So a later CROSS layer reads, and a later SELF layer starts from, the visual
  tokens with the levels that the base model would have given them by that depth.
* Encoder-side reduction makes one token of several: its levels are those of the token in whose place it stands
  (`ReducedFeatures.places`).

Shapes: B batch, N live tokens, V visual tokens of the whole batch, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class DeepStack:
    """Levels of a batch, and where they go.

    Args:
        levels: [V, D] for each level; all visual tokens of the batch, row after row.
        row_BN: for each live token its row in `levels`, or -1.
    """

    levels: tuple[Tensor, ...]
    row_BN: Tensor

    @classmethod
    def of(cls, levels: Sequence[Tensor] | None, visual_BN: Tensor | None) -> DeepStack | None:
        """From what the family's own forward hands to its decoder; None if there is nothing to add."""
        if not levels or visual_BN is None:
            return None
        # The family gives the levels of all visual tokens in one row, in reading order over the batch.
        order_BN = visual_BN.flatten().long().cumsum(0).view_as(visual_BN) - 1
        return cls(tuple(levels), order_BN.masked_fill(~visual_BN, -1))

    def take(self, index_BM: Tensor) -> DeepStack:
        """Of the tokens at `index_BM` only."""
        return replace(self, row_BN=self.row_BN.gather(1, index_BM))

    def rows(self, index: Tensor) -> DeepStack:
        """Of some rows only."""
        return replace(self, row_BN=self.row_BN.index_select(0, index.to(self.row_BN.device)))

    def add(self, hidden_BND: Tensor, layer: int) -> Tensor:
        """Hidden states behind `layer`, with its level if it has one."""
        if layer >= len(self.levels):
            return hidden_BND
        row_BN = self.row_BN.to(hidden_BND.device)
        # Text points at row 0 and its share is then zeroed: no size here depends on data.
        level_BND = self.levels[layer].to(hidden_BND.device, hidden_BND.dtype)[row_BN.clamp(min=0)]
        return hidden_BND + torch.where(row_BN[..., None] >= 0, level_BND, 0.0)
