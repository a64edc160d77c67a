"""What an in-decoder method may look at when it scores tokens: the layer before, and rows of its attention.

Attention is computed for the asked query rows only, from q and k. The N x N matrix never exists.

Shapes: B batch, N live tokens, P prompt length, Q query rows, D hidden width, H heads, G key/value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from budgets.schedule import LayerMode
from visor.engine.compat import rotated_heads, rotated_ones
from visor.engine.streams import PromptStreams, take


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
    def embedded_BPD(self) -> Tensor:
        """The prompt as it entered layer 0, for methods that say `reads_embeddings`."""
        assert self.streams.embedded_BPD is not None
        return self.streams.embedded_BPD

    @property
    def origin_BN(self) -> Tensor:
        """Index in the prompt of each live token."""
        if self.streams.origin_BN is not None:
            return self.streams.origin_BN
        batch, num = self.visual_BN.shape
        return torch.arange(num, device=self.visual_BN.device).expand(batch, num)

    @property
    def memo(self) -> dict[str, Any]:
        """What the methods of this prompt have computed at earlier layers; gone with the prompt."""
        return self.streams.memo

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

    def _keys(self, index: int, hidden_BND: Tensor) -> Tensor:
        block = self.decoder.layers[index]
        return rotated_heads(block.self_attn, "k", block.input_layernorm(hidden_BND), self.streams.full.rotary)

    @torch.no_grad()
    def previous_keys(self) -> Tensor:
        """Keys of the layer before, after RoPE: [B, G, N, d].

        Raises:
            ValueError: that layer did not run on visual tokens.
        """
        if self.h_in is None:
            raise ValueError(f"layer {self.layer - 1} has no keys of visual tokens; reduce after a SELF layer")
        return self._keys(self.layer - 1, self.h_in) if self.keys is None else self.keys

    def slots(self, mask_BN: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Indices [B, M] of the live tokens in a mask, in order, left-padded to the longest row, and which of them are
        no padding. Padding points at distinct tokens outside the mask.

        Args:
            lengths: how many tokens of each row are in the mask, known on the host.
        """
        index_BM, valid_BM = self.streams.slots(mask_BN, lengths)
        return index_BM, torch.ones_like(index_BM, dtype=torch.bool) if valid_BM is None else valid_BM

    def attention_row(
        self, queries: Tensor | None = None, layer: int | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """Softmax attention of some query rows to all live tokens, mean over heads and rows, in fp32: [B, N].

        Args:
            queries, layer: see `attention_heads`.
            weights: of each query row [B, Q] in the mean; by default all count the same.
        """
        rows_BQN = self.attention_heads(queries, layer).mean(1)
        if weights is None:
            return rows_BQN.mean(1)
        # A padded row saw nothing and is NaN; where, because 0 * NaN would stay NaN.
        rows_BQN = torch.where(weights[..., None] > 0, rows_BQN, 0) * weights[..., None]
        return rows_BQN.sum(1) / weights.sum(1, keepdim=True).clamp(min=1e-12)

    def attention_heads(self, queries: Tensor | None = None, layer: int | None = None) -> Tensor:
        """Softmax attention of some query rows to all live tokens, in fp32: [B, H, Q, N].

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
        if keys is None:  # the layer about to run has cached nothing yet
            keys = self._keys(index, hidden_BND)
        (batch, heads, rows, width), num_kv_heads = q_BHQd.shape, keys.shape[1]
        q_BGXd = q_BHQd.reshape(batch, num_kv_heads, -1, width)  # the query heads of a group share its keys
        logits_BHQN = (q_BGXd @ keys.transpose(-1, -2)).view(batch, heads, rows, -1).float() * attention.scaling
        order_N = torch.arange(logits_BHQN.shape[-1], device=logits_BHQN.device)
        # Causal: a query sees live tokens up to itself. Their order is that of the prompt, whatever was dropped.
        seen_B1QN = (self.valid_BN[:, None] & (order_N <= queries[..., None]))[:, None]
        return logits_BHQN.masked_fill(~seen_B1QN, -torch.inf).softmax(-1)

    def rotary_kernel(self, queries: Tensor) -> Tensor:
        """What RoPE alone makes of attention: the product of an all-ones query at some tokens and an all-ones key at
        all live tokens, over sqrt(head width), in fp32: [B, Q, N]. It depends on their distance only.

        Args:
            queries: indices [B, Q] of live tokens.
        """
        attention, (cos, sin) = self.decoder.layers[self.layer - 1].self_attn, self.streams.full.rotary
        keys_BNd = rotated_ones(attention, (cos.float(), sin.float()))
        return take(keys_BNd, queries) @ keys_BNd.transpose(1, 2) * attention.head_dim**-0.5


@dataclass(frozen=True)
class Selection:
    """What a reduction leaves.

    Attributes:
        kept_BN: the live visual tokens that stay, `LayerContext.keep[b]` of each row.
        hidden_BND, source_BN: for a rule that moves or merges tokens: new hidden states of all live tokens, and the
            index of the live token for which each now stands. None if every token is as it was.
    """

    kept_BN: Tensor
    hidden_BND: Tensor | None = None
    source_BN: Tensor | None = None


def best_scored(title: str, scores_BN: Tensor, context: LayerContext) -> Selection:
    """The best-scored visual tokens of each row. Of equals the earlier one stays.

    Raises:
        ValueError: not one score a live token.
    """
    visual_BN = context.visual_BN
    if scores_BN.shape != visual_BN.shape:
        raise ValueError(
            f"{title}: score_tokens must score every live token, shape {tuple(visual_BN.shape)}, got "
            f"{tuple(scores_BN.shape)}"
        )
    lowest = torch.finfo(torch.float32).min
    scores_BN = scores_BN.float().nan_to_num(nan=lowest).clamp(min=lowest)  # any visual token before any other token
    order_BN = scores_BN.masked_fill(~visual_BN, -torch.inf).argsort(dim=1, descending=True, stable=True)
    keep_B1 = torch.tensor(context.keep).to(scores_BN.device, non_blocking=True)[:, None]
    return Selection((order_BN.argsort(dim=1) < keep_B1) & visual_BN)
