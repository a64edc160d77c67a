"""What an in-decoder method may look at when it scores tokens: the layer before, and rows of its attention.

Attention is computed for the asked query rows only, from q and k. The N x N matrix never exists.

Shapes: B batch, N live tokens, Q query rows, D hidden width, H heads, G key/value heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from budgets.schedule import LayerMode
from visor.compat import rotated_heads
from visor.streams import PromptStreams, take


@dataclass(frozen=True)
class LayerContext:
    """The live tokens of a batch between two decoder layers.

    Attributes:
        layer: index of the layer about to run.
        decoder: the Hugging Face decoder.
        h_in: input [B, N, D] of the layer before; None before layer 0, or if that layer ran on text only.
        keys: that layer's cached keys after RoPE, [B, G, N, d]; None if nothing is cached.
        keep: visual tokens that will stay, by row.
        previous_mode: what the layer before did; None before layer 0.
        streams: the tokens themselves.
    """

    layer: int
    decoder: nn.Module
    streams: PromptStreams
    keep: tuple[int, ...]
    previous_mode: LayerMode | None = None
    h_in: Tensor | None = None
    keys: Tensor | None = None

    @property
    def hidden_BND(self) -> Tensor:
        """Input of the layer about to run."""
        return self.streams.full_stream().hidden_BND

    @property
    def visual_BN(self) -> Tensor:
        """Visual tokens among the live ones."""
        return self.streams.visual_BN

    @property
    def valid_BN(self) -> Tensor:
        """Real tokens (not padding) among the live ones."""
        return self.streams.valid_BN

    @property
    def num_visual(self) -> tuple[int, ...]:
        """Live visual tokens by row, on the host."""
        return self.streams.num_visual

    @property
    def num_text(self) -> tuple[int, ...]:
        """Text tokens by row, on the host."""
        return self.streams.num_text

    @property
    def last_B1(self) -> Tensor:
        """Index of each row's last prompt token among the live ones."""
        return self.streams.last_B1

    @torch.no_grad()
    def attention_row(self, queries: Tensor | None = None, layer: int | None = None) -> Tensor:
        """Softmax attention of some query rows to all live tokens, mean over heads and rows, in fp32: [B, N].

        Args:
            queries: indices [B, Q] of live tokens; by default the last prompt token.
            layer: the layer before (default), as it ran; or the layer about to run, on the tokens before reduction.

        Raises:
            ValueError: that layer did not attend to visual tokens, or is another one.
        """
        index = self.layer - 1 if layer is None else layer
        hidden_BND, keys = (self.h_in, self.keys) if index == self.layer - 1 else (self.hidden_BND, None)
        if index not in (self.layer - 1, self.layer):
            raise ValueError(f"before layer {self.layer}, attention is known of it and the one before, not of {index}")
        if hidden_BND is None:
            mode = self.previous_mode
            reason = "there is no such layer" if mode is None else f"it is a {mode.value.upper()} layer"
            raise ValueError(
                f"layer {index} has no attention to visual tokens: {reason}. Reduce after a SELF layer, or score with "
                f"layer={self.layer}"
            )
        block, (cos, sin) = self.decoder.layers[index], self.streams.full.rotary
        attention = block.self_attn
        queries = self.last_B1 if queries is None else queries
        rows_BQD = block.input_layernorm(take(hidden_BND, queries))
        q_BHQd = rotated_heads(attention, "q", rows_BQD, (take(cos, queries), take(sin, queries)))
        if keys is None:
            keys = rotated_heads(attention, "k", block.input_layernorm(hidden_BND), (cos, sin))
        (batch, heads, rows, width), num_kv_heads = q_BHQd.shape, keys.shape[1]
        q_BGXd = q_BHQd.reshape(batch, num_kv_heads, -1, width)  # the query heads of a group share its keys
        logits_BHQN = (q_BGXd @ keys.transpose(-1, -2)).view(batch, heads, rows, -1).float() * attention.scaling
        order_N = torch.arange(logits_BHQN.shape[-1], device=logits_BHQN.device)
        seen_B1QN = (self.valid_BN[:, None] & (order_N <= queries[..., None]))[:, None]
        return logits_BHQN.masked_fill(~seen_B1QN, -torch.inf).softmax(-1).mean((1, 2))
