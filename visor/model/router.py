"""The router: a light MLP that chooses a sample's configuration, before the first layer in which they differ.

It reads a *routing vector*, made where the layers that all configurations share have run. One head with an output for
each configuration serves two policies. Its softmax is the paper's router: which configuration is the cheapest that
suffices (cross-entropy). Summed up to a configuration it is that configuration's probability of success, as one
suffices if a cheaper one does; a weight chosen at run time trades it against cost, so one router gives a whole curve.

Shapes: B batch, C configurations, R routing vector, D hidden width, N live tokens, T text tokens, V visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from visor.engine.compat import start_weights
from visor.engine.streams import PromptStreams, TokenStream, take


@dataclass(frozen=True)
class RouterOutput:
    """What the router says: `logits` [B, C]."""

    logits: Tensor

    @property
    def probabilities(self) -> Tensor:
        """[B, C]: that each configuration is the cheapest that suffices (the paper's softmax)."""
        return self.logits.float().softmax(-1)

    @property
    def success(self) -> Tensor:
        """[B, C]: that each configuration does as well as the largest, since it or a cheaper one suffices."""
        return self.logits.double().softmax(-1).cumsum(-1)

    def choose(
        self, cost_weight: float | None = None, relative_costs: Sequence[Sequence[float]] | None = None
    ) -> list[int]:
        """A configuration for each sample. Of equals the cheaper one.

        Args:
            cost_weight: None for the paper's router; a number for the cost-aware one: success - cost_weight * cost.
            relative_costs: of each sample, decoder prefill FLOPs of each configuration relative to dense.
        """
        if cost_weight is None:
            return self.logits.argmax(-1).tolist()
        costs_BC = torch.tensor(relative_costs, dtype=torch.float64)
        value_BC = self.success.cpu() - cost_weight * costs_BC
        return value_BC.argmax(-1).tolist()


class Router(nn.Module):
    """`head(gelu(hidden(norm(vector))))`, with one norm for each part of the vector.

    Args:
        width: hidden width D of the decoder.
        inputs: parts of the routing vector, each D wide: "last" (the last text token), "text" (the mean over the text),
            "visual" (the mean over the visual tokens).
        hidden_size: width of the hidden layer.
        num_configurations: outputs.
    """

    def __init__(self, width: int, inputs: Sequence[str], hidden_size: int, num_configurations: int) -> None:
        super().__init__()
        self.inputs = tuple(inputs)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in inputs)
        self.hidden = nn.Linear(width * len(inputs), hidden_size)
        self.head = nn.Linear(hidden_size, num_configurations)
        # The head starts at zero: nothing is known yet.
        self.hidden.initial_std, self.head.initial_std = self.hidden.in_features**-0.5, 0.0
        for module in (self.hidden, self.head):
            start_weights(module)

    def vector(self, streams: PromptStreams) -> Tensor:
        """The routing vector [B, R] of a batch between two layers."""
        text = streams.text_stream()
        parts = []
        for name in self.inputs:
            if name == "last":
                parts.append(last_of(streams, text))
            elif name == "text":
                parts.append(mean_over(text.hidden_BND, text.valid_BN))
            elif not any(streams.num_visual):
                parts.append(torch.zeros_like(text.hidden_BND[:, -1]))
            else:
                visual_BVD, valid_BV, active_B = streams.visual_tokens()
                mean_BD = mean_over(visual_BVD, valid_BV)
                parts.append(mean_BD if active_B is None else mean_BD * active_B[:, None])
        return torch.cat(parts, -1)

    def forward(self, vector_BR: Tensor) -> Tensor:
        """Logits [B, C]."""
        parts = vector_BR.to(self.hidden.weight.dtype).chunk(len(self.norms), -1)
        normed_BR = torch.cat([norm(part) for norm, part in zip(self.norms, parts, strict=True)], -1)
        return self.head(nn.functional.gelu(self.hidden(normed_BR)))


def last_of(streams: PromptStreams, text: TokenStream) -> Tensor:
    """The last text token of each row: [B, D]."""
    if text is streams.full:
        return take(text.hidden_BND, streams.last_B1)[:, 0]
    return text.hidden_BND[:, -1]  # text is gathered to the right


def mean_over(x_BND: Tensor, valid_BN: Tensor | None) -> Tensor:
    """The mean over real tokens: [B, D]."""
    if valid_BN is None:
        return x_BND.mean(1)
    weight_BN1 = valid_BN[..., None].to(x_BND.dtype)
    return (x_BND * weight_BN1).sum(1) / weight_BN1.sum(1).clamp(min=1)
