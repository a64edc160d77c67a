"""FastV: after a few layers, drop the visual tokens that the last prompt token attends to least.

Layers 0..K-1 see everything. Before layer K each visual token is scored by the attention that the last prompt row paid
it in layer K-1 (softmax over all tokens, mean over heads); the best `round(N (1 - drop))` stay, in order and with
their original position ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from budgets.registry import METHODS
from budgets.schedule import Schedule
from visor.reduction._arithmetic import check_fraction, check_integer, inside_decoder
from visor.reduction.method import Method

if TYPE_CHECKING:
    import torch

    from budgets.geometry import ModelGeometry
    from visor.engine.decoder import LayerContext


@METHODS.register("fastv")
@dataclass(frozen=True)
class FastV(Method):
    """Options: `layer` (K, the first layer with fewer tokens) and `drop` (R, the share that goes, in [0, 1))."""

    layer: int = 2
    drop: float = 0.5

    title: ClassVar[str] = "FastV"
    paper: ClassVar[str] = "Chen et al., An Image is Worth 1/2 Tokens After Layer 2, ECCV 2024"
    looks_back: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_integer(self.title, "layer", self.layer, 1, " (it reads the attention of the layer before)")
        check_fraction(self.title, "drop", self.drop, low=0, high=1, includes_high=False)

    def schedule(self, geometry: ModelGeometry, num_visual: int) -> Schedule:
        if self.layer >= geometry.num_layers:
            raise ValueError(f"FastV: layer={self.layer}, but the decoder's layers are 0 to {geometry.num_layers - 1}")
        keep = max(1, round(num_visual * (1 - self.drop)))
        # `layer` is the place in the schedule; params stay empty so that equal places mean equal structure.
        return inside_decoder(geometry.num_layers, num_visual, "fastv", {self.layer: keep}, positions="kept")

    def settings(self, geometry: ModelGeometry, num_visual: int) -> Sequence[FastV]:
        """The dial is `drop`, one setting a token count; `layer` stays as given."""
        return [replace(self, drop=1 - keep / num_visual) for keep in range(1, num_visual + 1)]

    def nominal_visual_tokens(self, geometry: ModelGeometry, num_visual: int) -> Sequence[float]:
        """The paper's formula takes N (1 - drop) tokens, unrounded: 57.6 of 576 at drop = 0.9."""
        return [num_visual] * self.layer + [num_visual * (1 - self.drop)] * (geometry.num_layers - self.layer)

    def scoring_flops(self, geometry: ModelGeometry, schedule: Schedule, num_text: int) -> int:
        """One query row a step: its projection, and q.k over the n keys that layer K-1 had."""
        heads_width, flops = geometry.num_heads * geometry.head_dim, 0
        for layer, op in enumerate(schedule.layers):
            if op.reduce and op.reduce.method == "fastv":
                num_tokens = schedule.visual_tokens[layer - 1] + num_text
                flops += 2 * geometry.hidden_size * heads_width + 2 * heads_width * num_tokens
        return flops

    def score_tokens(self, context: LayerContext) -> torch.Tensor:
        return context.attention_row()
